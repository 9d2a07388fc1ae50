// Memory with a shadow: who touched each cell last, hence which accesses race.
#pragma once
#include <cstdlib>
#include <vector>

#include "numbers.h"

enum Kind {
  OUT_OF_BOUNDS, OUTSIDE_VIEW, MISALIGNED, UNWRITTEN, WRITE_AFTER_WRITE, READ_AFTER_WRITE,
  WRITE_AFTER_READ, DIVERGENT_BARRIER, DIVERGENT_SHUFFLE, EXITED_BARRIER, ENDLESS, UNKNOWN
};
enum Between { NOTHING, LANES, WARPS, PROGRAMS };

// program: its number + 1, so that 0 is nobody. epoch: barriers of the program, sync: of the warp.
struct Access { s32 program, epoch, sync, pc; s16 warp, lane; };
const s32 GLOBAL = -1, SHARED = -2;
const s16 ATOMIC = -2;  // in place of a lane
struct Report {
  s32 kind, between, allocation;  // its number, or where there is none, GLOBAL or SHARED
  Access now, before;
  u64 address, count;
};
// Cells of `cell` bytes; writable: those that belong to a tensor; written: those that have a value.
struct Allocation { u64 base, size; u8 *writable, *written; s64 cell; };

struct Cell {
  Access written, read;  // the last ones
  Access readers[2];     // the first ones of two programs
  Access first;          // of the program that read last, since its last barrier
  u32 warps;             // of it, that have read since then
};

class Memory {
 public:
  std::vector<Allocation> allocations;
  std::vector<Report> reports;
  size_t most_reports = 0;

  ~Memory() { for (Cell *cells : shadow) free(cells); }

  void report(int kind, int between, int allocation, u64 address, const Access &now,
              const Access &before = {0, 0, 0, -1, -1, -1}) {
    for (Report &r : reports)
      if (r.kind == kind && r.between == between && r.allocation == allocation &&
          r.now.pc == now.pc && r.before.pc == before.pc) {
        r.count++;
        return;
      }
    if (reports.size() < most_reports)
      reports.push_back({kind, between, allocation, now, before, address, 1});
  }

  // The allocation of an access of n bytes; below 0 where there is none.
  int reached(const Access &now, u64 address, int n) {
    if (address % n) report(MISALIGNED, NOTHING, GLOBAL, address, now);
    int k = find(address, n);
    if (k < 0) report(OUT_OF_BOUNDS, NOTHING, GLOBAL, address, now);
    return k;
  }

  // The host's memory of an access of n bytes, which stores where value is given; null where
  // there is none.
  u8 *touch(const Access &now, u64 address, int n, const u8 *value) {
    int k = reached(now, address, n);
    if (k < 0) return nullptr;
    Allocation &a = allocations[k];
    if (shadow.empty()) shadow.resize(allocations.size());
    if (!shadow[k]) shadow[k] = (Cell *)calloc(a.size / a.cell + 1, sizeof(Cell));
    for (u64 i = (address - a.base) / a.cell; i <= (address - a.base + n - 1) / a.cell; i++) {
      u64 at = a.base + i * a.cell;
      if (!value) {
        if (!a.written[i]) report(UNWRITTEN, NOTHING, k, at, now);
        read(shadow[k][i], now, k, at);
        continue;
      }
      if (!a.writable[i]) report(OUTSIDE_VIEW, NOTHING, k, at, now);
      bool same = a.written[i] && !memcmp((u8 *)at, value + (at - address), a.cell);
      write(shadow[k][i], now, k, at, same);
      a.written[i] = 1;
    }
    return (u8 *)address;
  }

  // The same of an atomic operation of a program, which races with all that is none.
  u8 *update(const Access &now, u64 address, int n) {
    int k = find(address, n);
    if (address % n || k < 0) {
      report(k < 0 ? OUT_OF_BOUNDS : MISALIGNED, NOTHING, GLOBAL, address, now);
      return nullptr;
    }
    Allocation &a = allocations[k];
    if (shadow.empty()) shadow.resize(allocations.size());
    if (!shadow[k]) shadow[k] = (Cell *)calloc(a.size / a.cell + 1, sizeof(Cell));
    u64 i = (address - a.base) / a.cell;
    if (!a.written[i]) report(UNWRITTEN, NOTHING, k, address, now);
    if (!a.writable[i]) report(OUTSIDE_VIEW, NOTHING, k, address, now);
    Cell &c = shadow[k][i];
    bool both = c.written.lane == ATOMIC && c.written.program == now.program;
    bool last = both && c.written.epoch == now.epoch;
    if (last) c.written = {0, 0, 0, -1, -1, -1};
    write(c, now, k, address, false);
    c.written.lane = ATOMIC;
    return (u8 *)address;
  }

  // The same of a word that any program may read and write at any time, which is no race.
  u8 *word(const Access &now, u64 address, int n, bool writes) {
    int k = reached(now, address, n);
    if (k < 0) return nullptr;
    Allocation &a = allocations[k];
    u64 i = (address - a.base) / a.cell;
    if (!writes && !a.written[i]) report(UNWRITTEN, NOTHING, k, address, now);
    if (writes && !a.writable[i]) report(OUTSIDE_VIEW, NOTHING, k, address, now);
    if (writes) a.written[i] = 1;
    return (u8 *)address;
  }

  struct Shared { std::vector<u8> bytes, written; std::vector<Cell> cells; };

  u8 *touch(Shared &s, const Access &now, u64 address, int n, const u8 *value) {
    if (address % n) report(MISALIGNED, NOTHING, SHARED, address, now);
    if (address + n > s.bytes.size()) {
      report(OUT_OF_BOUNDS, NOTHING, SHARED, address, now);
      return nullptr;
    }
    for (u64 i = address; i < address + n; i++) {
      if (!value) {
        if (!s.written[i]) report(UNWRITTEN, NOTHING, SHARED, i, now);
        read(s.cells[i], now, SHARED, i);
        continue;
      }
      bool same = s.written[i] && s.bytes[i] == value[i - address];
      // Lanes that hold the same sum may have rounded it apart.
      bool near = s.cells[i].written.pc == now.pc && s.written[i] && close(s, i, address, n, value);
      write(s.cells[i], now, SHARED, i, same || near);
      s.written[i] = 1;
    }
    return &s.bytes[address];
  }

 private:
  std::vector<Cell *> shadow;
  int last = 0;

  int find(u64 address, u64 n) {
    auto holds = [&](const Allocation &a) {
      return address >= a.base && address + n <= a.base + a.size;
    };
    if (allocations.empty()) return -1;
    if (holds(allocations[last])) return last;
    for (int k = 0; k < (int)allocations.size(); k++)
      if (holds(allocations[k])) return last = k;
    return -1;
  }

  static bool close(const Shared &s, u64 at, u64 address, int n, const u8 *value) {
    u64 word = at & ~3ull;
    if (word < address || word + 4 > address + n) return false;
    float x, y;
    memcpy(&x, &s.bytes[word], 4);
    memcpy(&y, value + (word - address), 4);
    if (x != x && y != y) return true;
    return std::fabs(x - y) <= 1e-5f * (std::fabs(x) + std::fabs(y)) + 1e-6f;  // of terms about 1
  }

  // Whether two accesses may come in either order, and between whom.
  static int race(const Access &before, const Access &now) {
    if (!before.program) return NOTHING;
    if (before.program != now.program) return PROGRAMS;
    if (before.warp != now.warp) return before.epoch == now.epoch ? WARPS : NOTHING;
    return before.lane != now.lane && before.sync == now.sync ? LANES : NOTHING;
  }

  void read(Cell &c, const Access &now, int allocation, u64 address) {
    if (int between = race(c.written, now))
      report(READ_AFTER_WRITE, between, allocation, address, now, c.written);
    if (!c.readers[0].program) c.readers[0] = now;
    else if (c.readers[0].program != now.program && !c.readers[1].program) c.readers[1] = now;
    bool again = c.read.program == now.program && c.read.epoch == now.epoch;
    if (!again) {
      c.warps = 0;
      c.first = now;
    }
    bool others = again && c.read.warp == now.warp && c.read.sync == now.sync &&
                  c.read.lane != now.lane;
    c.warps |= 1u << now.warp;
    c.read = now;
    if (others) c.read.lane = -1;  // several lanes
  }

  // same: what is there already. Lanes of a warp that hold the same number may all store it.
  void write(Cell &c, const Access &now, int allocation, u64 address, bool same) {
    int between = race(c.written, now);
    if (between && !(between == LANES && same))
      report(WRITE_AFTER_WRITE, between, allocation, address, now, c.written);
    for (const Access &reader : c.readers)
      if (reader.program && reader.program != now.program) {
        report(WRITE_AFTER_READ, PROGRAMS, allocation, address, now, reader);
        break;
      }
    if (c.read.program == now.program && c.read.epoch == now.epoch) {
      if (c.warps & ~(1u << now.warp)) {
        const Access &other = c.first.warp != now.warp ? c.first : c.read;
        report(WRITE_AFTER_READ, WARPS, allocation, address, now, other);
      } else if (race(c.read, now) == LANES) {
        report(WRITE_AFTER_READ, LANES, allocation, address, now, c.read);
      }
    }
    c.written = now;
  }
};
