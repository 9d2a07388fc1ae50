// Executes a kernel's decoded PTX on host memory. `decode.py` decodes, `machine.py` calls.
//
// A warp is 32 lanes in lock-step groups (pc, lanes); the group with the lowest pc runs, groups that
// meet merge. Registers: bank R of 32 bits, bank Q of 64, bank P of predicates, a bit for each lane.
// Constants and parameters are registers too, filled at launch.
#include "formulas.h"
#include "memory.h"

#define NAME(n, ...) n,
#define OTHERS(X) \
  X(NOP) X(BRA) X(RET) X(BAR) X(WARPSYNC) X(SPECIAL) X(SETP_BF16X2) X(SETP_F16X2) X(PAND) X(POR) \
  X(PXOR) X(PNOT) X(PMOV) X(UNPACK32) X(UNPACK64) X(LDG) X(LDV) X(EXCH) X(STG) X(LDS) X(STS) \
  X(LDMATRIX) X(STMATRIX) X(SHFL) X(REDUXMAXS) X(REDUXMINS) X(REDUXADD) X(REDUXOR) X(REDUXAND) \
  X(VOTEBALLOT) X(VOTEANY) X(VOTEALL) X(ATOMOR)
enum Operation { FORMULAS(NAME) COMPARISONS(NAME) OTHERS(NAME) OPERATIONS };
#undef NAME
#define NAME(n, ...) #n,
static const char *names[] = {FORMULAS(NAME) COMPARISONS(NAME) OTHERS(NAME)};
#undef NAME

// flags: 1 the predicate is negated, 2 a 32-bit address, 4 a signed load, 8 a load that widens to 64
// bits, 16 transposed.
struct Instruction { s32 op, kind, vector, guard, a[10]; s64 immediate; s32 line, flags; };
struct Program { std::vector<Instruction> code; int r, q, p; mutable std::vector<u8> hit; };
// mode 1: warps take turns; 2, 3: the first, the last that can runs as far as it can. window:
// programs under way. ulp: how far approximate instructions are off, at most. dropped: the place of
// a barrier that is left out, -2 for all.
struct Config { u64 seed; s32 mode, window, ulp, dropped; u64 most_steps; };

const u32 ALL = ~0u;
struct Group { int pc; u32 lanes; bool at_barrier; };
struct Warp {
  std::vector<u32> r, p;
  std::vector<u64> q;
  std::vector<Group> groups;
  int id;
  s32 sync;
  bool waiting;
};
struct Block {
  int id, x, y, z;
  s32 epoch;
  std::vector<Warp> warps;
  Memory::Shared shared;
};

#define R(k) (&w.r[(size_t)(k) * 32])
#define Q(k) (&w.q[(size_t)(k) * 32])
#define P(k) (w.p[k])
#define EACH for (int l = 0; l < 32; ++l)
#define LANE EACH if (m >> l & 1)
#define A (R(i.a[1])[l])
#define B (R(i.a[2])[l])
#define C (R(i.a[3])[l])
#define LA (Q(i.a[1])[l])
#define LB (Q(i.a[2])[l])
#define LC (Q(i.a[3])[l])
#define FA F(A)
#define FB F(B)
#define FC F(C)
#define DA number_of(LA)
#define DB number_of(LB)
#define DC number_of(LC)

struct Machine {
  const Program &program;
  const u32 *first_r;
  const u64 *first_q;
  int grid[3], warps, shared;
  Config config;
  Memory memory;
  u64 steps, state;
  bool looked;  // at what other programs may change: they have their turn

  u32 random() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)(state >> 33);
  }

  // A result that hardware gives to within config.ulp; absolute: of a logarithm near 0.
  float approximate(float y, u32 key, bool absolute = false) {
    if (!config.ulp || !std::isfinite(y) || y == 0 || key << 1 == 0) return y;  // 2^0 is exact
    u32 drawn = mixed(key ^ (u32)config.seed * 0x9e3779b9u);
    int off = (int)(drawn % (2 * config.ulp + 1)) - config.ulp;
    if (absolute && std::fabs(y) < 1)
      return (float)((double)y + off * 1.1920929e-7 * (config.ulp > 1 ? 1.0 : 0.5));
    float near = F(U(y) + off);
    return std::isfinite(near) ? near : y;  // not beyond the largest and the smallest number
  }

  Access access(const Block &b, const Warp &w, int lane, int pc) {
    return {b.id + 1, b.epoch, w.sync, pc, (s16)w.id, (s16)lane};
  }

  void start(Block &b, int id) {
    b.id = id;
    b.x = id % grid[0];
    b.y = id / grid[0] % grid[1];
    b.z = id / grid[0] / grid[1];
    b.epoch = 1;
    b.shared.bytes.assign(shared, 0xff);
    b.shared.written.assign(shared, 0);
    b.shared.cells.assign(shared, Cell{});
    b.warps.resize(warps);
    for (int n = 0; n < warps; n++) {
      Warp &w = b.warps[n];
      w.r.resize(program.r * 32);
      w.q.resize(program.q * 32);
      w.p.assign(program.p, 0);
      for (int k = 0; k < program.r; k++) std::fill_n(R(k), 32, first_r[k]);
      for (int k = 0; k < program.q; k++) std::fill_n(Q(k), 32, first_q[k]);
      w.groups = {{0, ALL, false}};
      w.id = n;
      w.sync = 1;
      w.waiting = false;
    }
  }

  // At most n instructions of a warp.
  void run(Block &b, Warp &w, u64 n) {
    while (n && !w.groups.empty()) {
      int best = -1;
      for (int k = 0; k < (int)w.groups.size(); k++)
        if (!w.groups[k].at_barrier && (best < 0 || w.groups[k].pc < w.groups[best].pc)) best = k;
      if (best < 0) {
        for (Group &g : w.groups)
          if (g.pc != w.groups[0].pc) {
            memory.report(DIVERGENT_BARRIER, NOTHING, GLOBAL, 0, access(b, w, -1, g.pc));
            break;
          }
        w.waiting = true;
        return;
      }
      Group &g = w.groups[best];
      int meets = 1 << 30;  // another group there
      for (Group &other : w.groups)
        if (&other != &g && !other.at_barrier && other.pc > g.pc) meets = std::min(meets, other.pc);
      looked = false;
      for (bool changed = false; n && !changed && !looked && g.pc != meets; n--, steps++)
        changed = step(b, w, g);
      merge(w.groups);
      if (looked) return;
    }
  }

  static void merge(std::vector<Group> &groups) {
    std::vector<Group> kept;
    for (Group &g : groups) {
      bool merged = !g.lanes;
      for (Group &other : kept)
        if (!merged && other.pc == g.pc && other.at_barrier == g.at_barrier) {
          other.lanes |= g.lanes;
          merged = true;
        }
      if (!merged) kept.push_back(g);
    }
    groups = kept;
  }

  // The predicate that a selection or combination takes.
  static u32 chosen(const Warp &w, const Instruction &i) {
    u32 p = P(i.a[3]);
    return i.flags & 1 ? ~p : p;
  }

  static void put(u32 &p, u32 m, u32 to) { p = (p & ~m) | (to & m); }

  void set_predicate(Warp &w, const Instruction &i, u32 m, u32 t) {
    if (i.vector) {  // combined with another: 1 and, 2 or, 3 xor
      u32 c = chosen(w, i);
      t = i.vector == 1 ? t & c : i.vector == 2 ? t | c : t ^ c;
    }
    put(P(i.a[0]), m, t);
    if (i.a[4] >= 0) put(P(i.a[4]), m, ~t);
  }

  // One instruction of a group; true where the warp's groups, or whether it may go on, changed.
  bool step(Block &b, Warp &w, Group &g) {
    const Instruction &i = program.code[g.pc];
    u32 m = g.lanes;
    if (i.guard > 0) m &= P(i.guard - 1);
    else if (i.guard < 0) m &= ~P(-i.guard - 1);
    if (m) program.hit[g.pc] = 1;
    switch (i.op) {
#define X(name, bank, bits) \
  case name: { \
    auto *d = bank(i.a[0]); \
    if (m == ALL) EACH d[l] = (bits); \
    else LANE d[l] = (bits); \
    break; \
  }
    FORMULAS(X)
#undef X
#define X(name, holds) \
  case name: { \
    u32 t = 0; \
    EACH t |= (u32)(holds) << l; \
    set_predicate(w, i, m, t); \
    break; \
  }
    COMPARISONS(X)
#undef X
    case NOP: break;
    case BRA: {
      if (!m) break;
      if (m == g.lanes) {
        g.pc = (int)i.immediate;
        return w.groups.size() > 1;
      }
      g.lanes &= ~m;
      g.pc++;
      w.groups.push_back({(int)i.immediate, m, false});
      return true;
    }
    case RET:
      if (!m) break;
      g.lanes &= ~m;
      g.pc++;
      return true;
    case BAR:
      if (!m || config.dropped == -2 || config.dropped == g.pc) break;
      w.sync++;
      g.at_barrier = true;
      return true;
    case WARPSYNC: w.sync++; break;
    case SPECIAL: LANE R(i.a[0])[l] = special(b, w, i.kind, l); break;
    case SETP_BF16X2: both(w, i, m, from_bf16); break;
    case SETP_F16X2: both(w, i, m, from_f16); break;
    case PAND: put(P(i.a[0]), m, P(i.a[1]) & P(i.a[2])); break;
    case POR: put(P(i.a[0]), m, P(i.a[1]) | P(i.a[2])); break;
    case PXOR: put(P(i.a[0]), m, P(i.a[1]) ^ P(i.a[2])); break;
    case PNOT: put(P(i.a[0]), m, ~P(i.a[1])); break;
    case PMOV: put(P(i.a[0]), m, i.a[1] >= 0 ? P(i.a[1]) : i.immediate ? ALL : 0); break;
    case UNPACK32:
      LANE {
        u32 v = B;
        if (i.a[0] >= 0) R(i.a[0])[l] = v & 0xffff;
        if (i.a[1] >= 0) R(i.a[1])[l] = v >> 16;
      }
      break;
    case UNPACK64:
      LANE {
        u64 v = LB;
        if (i.a[0] >= 0) R(i.a[0])[l] = (u32)v;
        if (i.a[1] >= 0) R(i.a[1])[l] = (u32)(v >> 32);
      }
      break;
    case LDG: case LDS: LANE load(b, w, i, l, g.pc); break;
    case LDV: case EXCH: LANE word(b, w, i, l, g.pc); looked = true; break;
    case STG: case STS: LANE store(b, w, i, l, g.pc); break;
    case ATOMOR: LANE update(b, w, i, l, g.pc); break;
    case LDMATRIX: case STMATRIX: converged(b, w, g); matrix(b, w, i, g.pc); break;
    case SHFL: converged(b, w, g); shuffle(w, i, m); break;
#define REDUCE(name, type, start, expression) \
  case name: { \
    converged(b, w, g); \
    type all = start; \
    LANE { type x = (type)A; all = expression; } \
    LANE R(i.a[0])[l] = (u32)all; \
    w.sync++; \
    break; \
  }
    REDUCE(REDUXMAXS, s32, INT32_MIN, std::max(all, x))
    REDUCE(REDUXMINS, s32, INT32_MAX, std::min(all, x))
    REDUCE(REDUXADD, u32, 0, all + x)
    REDUCE(REDUXOR, u32, 0, all | x)
    REDUCE(REDUXAND, u32, ALL, all & x)
    case VOTEBALLOT: case VOTEANY: case VOTEALL: {
      converged(b, w, g);
      u32 v = (i.flags & 1 ? ~P(i.a[1]) : P(i.a[1])) & m;
      if (i.op == VOTEBALLOT) { LANE R(i.a[0])[l] = v; }
      else put(P(i.a[0]), m, (i.op == VOTEANY ? v != 0 : v == m) ? ALL : 0);
      w.sync++;
      break;
    }
    default: memory.report(UNKNOWN, NOTHING, GLOBAL, i.op, access(b, w, -1, g.pc));
    }
    g.pc++;
    return false;
  }

  u32 special(const Block &b, const Warp &w, int which, int lane) {
    const u32 found[] = {
        (u32)(w.id * 32 + lane), 0, 0, (u32)b.x, (u32)b.y, (u32)b.z, (u32)grid[0], (u32)grid[1],
        (u32)grid[2], (u32)warps * 32, 1, (u32)lane, (u32)w.id};
    return found[which];
  }

  // Two numbers of 16 bits in a register, each with a predicate.
  template <class T> void both(Warp &w, const Instruction &i, u32 m, T number) {
    u32 low = 0, high = 0;
    EACH {
      low |= (u32)compare(i.kind, number(A), number(B)) << l;
      high |= (u32)compare(i.kind, number(A >> 16), number(B >> 16)) << l;
    }
    put(P(i.a[0]), m, low);
    put(P(i.a[4]), m, high);
  }

  u64 address(const Warp &w, const Instruction &i, int l) {
    return (i.a[9] < 0 ? 0 : i.flags & 2 ? (u64)R(i.a[9])[l] : Q(i.a[9])[l]) + i.immediate;
  }

  void load(Block &b, Warp &w, const Instruction &i, int l, int pc) {
    const int n = i.kind * i.vector;
    const Access now = access(b, w, l, pc);
    u64 at = address(w, i, l);
    u8 *p = i.op == LDG ? memory.touch(now, at, n, nullptr)
                        : memory.touch(b.shared, now, at, n, nullptr);
    for (int k = 0; k < i.vector; k++) {
      if (i.a[k] < 0) continue;
      u64 v = p ? 0 : ~0ull;
      if (p) memcpy(&v, p + k * i.kind, i.kind);
      if (i.kind == 8 || i.flags & 8) Q(i.a[k])[l] = v;
      else if (i.kind == 4) R(i.a[k])[l] = (u32)v;
      else if (i.kind == 2) R(i.a[k])[l] = (u32)v & 0xffff;
      else R(i.a[k])[l] = i.flags & 4 ? (u32)(s32)(int8_t)v & 0xffff : (u32)v & 0xff;
    }
  }

  // A word of 64 bits that programs read and write whole, in any order.
  void word(Block &b, Warp &w, const Instruction &i, int l, int pc) {
    u8 *p = memory.word(access(b, w, l, pc), address(w, i, l), 8, i.op == EXCH);
    u64 old = ~0ull;
    if (p) memcpy(&old, p, 8);
    if (p && i.op == EXCH) memcpy(p, &Q(i.a[1])[l], 8);
    if (i.a[0] >= 0) Q(i.a[0])[l] = old;
  }

  void store(Block &b, Warp &w, const Instruction &i, int l, int pc) {
    const int n = i.kind * i.vector;
    const Access now = access(b, w, l, pc);
    u64 at = address(w, i, l);
    u8 value[32];
    for (int k = 0; k < i.vector; k++) {
      if (i.kind == 8) memcpy(value + k * 8, &Q(i.a[k])[l], 8);
      else memcpy(value + k * i.kind, &R(i.a[k])[l], i.kind);
    }
    u8 *p = i.op == STG ? memory.touch(now, at, n, value) : memory.touch(b.shared, now, at, n, value);
    if (p) memcpy(p, value, n);
  }

  // The bits of an operand are set in a word of global memory.
  void update(Block &b, Warp &w, const Instruction &i, int l, int pc) {
    u8 *p = memory.update(access(b, w, l, pc), address(w, i, l), 4);
    if (!p) return;
    u32 old, set = R(i.a[1])[l];
    memcpy(&old, p, 4);
    set |= old;
    memcpy(p, &set, 4);
    if (i.a[0] >= 0) R(i.a[0])[l] = old;
  }

  // Matrices of 8 x 8 numbers of 16 bits: two of a row to a lane, lane k * 8 + r has row r of the kth.
  void matrix(Block &b, Warp &w, const Instruction &i, int pc) {
    const bool loads = i.op == LDMATRIX;
    u32 out[4][32];
    for (int k = 0; k < i.vector; k++)
      EACH {
        u32 word = 0;
        for (int half = 0; half < 2; half++) {
          int row = l / 4, column = 2 * (l % 4) + half;
          if (i.flags & 16) std::swap(row, column);
          u64 at = (i.a[9] < 0 ? 0 : (u64)R(i.a[9])[k * 8 + row]) + i.immediate;
          const Access now = access(b, w, l, pc);
          if (at % 16) memory.report(MISALIGNED, NOTHING, SHARED, at, now);
          u16 x = loads ? 0xffff : (u16)(R(i.a[k])[l] >> (16 * half));
          u8 *p = memory.touch(b.shared, now, at + column * 2, 2, loads ? nullptr : (u8 *)&x);
          if (p && loads) memcpy(&x, p, 2);
          else if (p) memcpy(p, &x, 2);
          word |= (u32)x << (16 * half);
        }
        out[k][l] = word;
      }
    if (loads)
      for (int k = 0; k < i.vector; k++) EACH R(i.a[k])[l] = out[k][l];
  }

  // kind: 0 by the bits of the lane, 1 from a lane, 2 from below, 3 from above.
  void shuffle(Warp &w, const Instruction &i, u32 m) {
    u32 source[32], found = 0, clamp = (u32)i.immediate & 31, segment = (u32)i.immediate >> 8 & 31;
    memcpy(source, R(i.a[1]), sizeof source);
    LANE {
      int by = (int)(B & 31), most = (l & segment) | (clamp & ~segment), from;
      if (i.kind == 0) from = l ^ by;
      else if (i.kind == 1) from = (l & segment) | (by & ~segment & 31);
      else from = i.kind == 2 ? l - by : l + by;
      bool inside = i.kind == 2 ? from >= most : from <= most;
      R(i.a[0])[l] = source[inside ? from : l];
      found |= (u32)inside << l;
    }
    if (i.a[4] >= 0) put(P(i.a[4]), m, found);
    w.sync++;
  }

  void converged(Block &b, Warp &w, Group &g) {
    if (g.lanes != ALL)
      memory.report(DIVERGENT_SHUFFLE, NOTHING, GLOBAL, g.lanes, access(b, w, -1, g.pc));
  }

  // All programs, in an order that config draws.
  void go() {
    int total = grid[0] * grid[1] * grid[2], next = 0;
    state = config.seed * 0x9E3779B97F4A7C15ull + 12345;
    std::vector<int> order(total), live;
    for (int k = 0; k < total; k++) order[k] = k;
    for (int k = total - 1; k > 0; k--) std::swap(order[k], order[random() % (k + 1)]);
    std::vector<Block> active(std::min(total, std::max(1, config.window)));
    for (; next < (int)active.size(); next++) {
      start(active[next], order[next]);
      live.push_back(next);
    }
    while (!live.empty() && steps <= config.most_steps) {
      int at = random() % live.size();
      Block &b = active[live[at]];
      std::vector<int> able;
      int alive = 0;
      for (Warp &w : b.warps) {
        alive += !w.groups.empty();
        if (!w.groups.empty() && !w.waiting) able.push_back(w.id);
      }
      if (!alive) {
        if (next < total) start(b, order[next++]);
        else live.erase(live.begin() + at);
      } else if (able.empty()) {
        open_barrier(b, alive);
      } else {
        int chosen = config.mode == 2 ? 0 : able.size() - 1;
        if (config.mode == 1 || looked) chosen = random() % able.size();
        run(b, b.warps[able[chosen]], config.mode == 1 ? 1 + random() % 2000 : 1000000);
      }
    }
    if (!live.empty()) {
      Block &b = active[live[0]];
      for (Warp &w : b.warps)
        if (!w.groups.empty())
          memory.report(ENDLESS, NOTHING, GLOBAL, 0, access(b, w, -1, w.groups[0].pc));
    }
  }

  void open_barrier(Block &b, int alive) {
    if (alive < warps) {
      Warp *waiting = nullptr;
      for (Warp &w : b.warps) if (!w.groups.empty()) waiting = &w;
      memory.report(EXITED_BARRIER, NOTHING, GLOBAL, 0, access(b, *waiting, -1, waiting->groups[0].pc));
    }
    b.epoch++;
    for (Warp &w : b.warps) {
      w.waiting = false;
      for (Group &g : w.groups)
        if (g.at_barrier) {
          g.at_barrier = false;
          g.pc++;
        }
    }
  }
};

extern "C" {
int operation(const char *name) {
  for (int k = 0; k < OPERATIONS; k++) if (!strcmp(names[k], name)) return k;
  return -1;
}
void *program(const Instruction *code, int n, int r, int q, int p) {
  return new Program{{code, code + n}, r, q, p, std::vector<u8>(n, 0)};
}
const u8 *hits(void *p) { return ((Program *)p)->hit.data(); }
int launch(void *p, const u32 *r, const u64 *q, const int *grid, int warps, int shared,
           const Allocation *allocations, int n, const Config *config, Report *out, int most,
           u64 *steps) {
  Machine m{*(Program *)p, r, q, {grid[0], grid[1], grid[2]}, warps, shared, *config, {}, 0, 0, false};
  m.memory.most_reports = most;
  m.memory.allocations.assign(allocations, allocations + n);
  m.go();
  std::copy(m.memory.reports.begin(), m.memory.reports.end(), out);
  *steps = m.steps;
  return (int)m.memory.reports.size();
}
}
