// What the instructions compute of single numbers: bits in, bits out.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

static inline float F(u32 x) { float f; memcpy(&f, &x, 4); return f; }
static inline u32 U(float f) { u32 x; memcpy(&x, &f, 4); return x; }
static inline double number_of(u64 x) { double f; memcpy(&f, &x, 8); return f; }
static inline u64 bits_of(double f) { u64 x; memcpy(&x, &f, 8); return x; }
// Denormal numbers count as 0.
static inline float ftz(float x) {
  return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x;
}
static inline float larger(float a, float b) {
  if (a != a) return b != b ? F(0x7fffffff) : b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
static inline float smaller(float a, float b) { return -larger(-a, -b); }
static inline u32 to_bf16(float f) {
  u32 x = U(f);
  if (f != f) return 0x7fff;
  return ((x + 0x7fff + ((x >> 16) & 1)) >> 16) & 0xffff;
}
static inline float from_bf16(u32 x) { return F((x & 0xffff) << 16); }
static inline u32 to_f16(float f) {
  if (f != f) return 0x7fff;
  _Float16 h = (_Float16)f;
  u16 x;
  memcpy(&x, &h, 2);
  return x;
}
static inline float from_f16(u32 x) {
  u16 y = (u16)x;
  _Float16 h;
  memcpy(&h, &y, 2);
  return (float)h;
}
static inline u32 mixed(u32 x) {
  x = (x ^ x >> 16) * 0x7feb352d;
  x = (x ^ x >> 15) * 0x846ca68b;
  return x ^ x >> 16;
}
// Of numbers of 16 bits, by a function of fp32, where a result in fp32 has enough digits.
template <class T> static inline u32 by_bf16(u32 a, u32 b, T function) {
  return to_bf16(function(from_bf16(a), from_bf16(b)));
}
template <class T> static inline u32 by_f16(u32 a, u32 b, T function) {
  return to_f16(function(from_f16(a), from_f16(b)));
}
// The bits of a from number b on, c of them; of a signed number the last one goes on.
template <class T> static inline T bit_field(T a, u32 b, u32 c) {
  const u32 bits = 8 * sizeof(T), first = b & 0xff, count = c & 0xff;
  if (!count) return 0;
  T sign = a < 0 ? -1 : 0;
  if (first >= bits) return sign;
  if (first + count >= bits) return a >> first;
  return (T)((std::make_unsigned_t<T>)a << (bits - first - count)) >> (bits - count);
}
static inline u32 permuted(u32 a, u32 b, u32 selection) {
  u64 all = (u64)b << 32 | a;
  u32 out = 0;
  for (int k = 0; k < 4; k++) {
    u32 s = selection >> (4 * k) & 15, v = (u32)(all >> (8 * (s & 7))) & 255;
    if (s & 8) v = v & 128 ? 255 : 0;
    out |= v << (8 * k);
  }
  return out;
}
// Towards 0, held within the range.
static inline u32 to_s32(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return 0x7fffffff;
  if (x < -2147483648.0f) return 0x80000000u;
  return (u32)(s32)x;
}
// Of numbers: 0 to 5 false where one is NaN, 6 to 11 true; 12: neither is, 13: one is.
template <class T> static inline bool compare(int how, T a, T b) {
  bool ordered = a == a && b == b;
  if (how == 12) return ordered;
  if (how == 13) return !ordered;
  if (!ordered) return how >= 6;
  switch (how % 6) {
  case 0: return a == b;
  case 1: return a != b;
  case 2: return a < b;
  case 3: return a <= b;
  case 4: return a > b;
  default: return a >= b;
  }
}
