// The instructions that compute one number from up to three, by lane.
//
// X(name, bank of the result, its bits). A, B, C are the bits of the operands, LA, LB, LC those of
// 64-bit ones, FA, FB, FC the same as fp32, DA, DB, DC as fp64; l is the lane, w the warp, i the instruction.
#pragma once

// Of one number of 16 bits, and of two in a register.
#define OF_16_BITS(X, type, operation, number) \
  X(operation##_##type, R, by_##type(A, B, [](float a, float b) { return number; })) \
  X(operation##_##type##x2, R, \
    by_##type(A, B, [](float a, float b) { return number; }) | \
    by_##type(A >> 16, B >> 16, [](float a, float b) { return number; }) << 16)
#define HALVES(X, type) \
  OF_16_BITS(X, type, ADD, a + b) \
  OF_16_BITS(X, type, SUB, a - b) \
  OF_16_BITS(X, type, MUL, a * b) \
  OF_16_BITS(X, type, MAX, larger(a, b)) \
  OF_16_BITS(X, type, MIN, smaller(a, b)) \
  OF_16_BITS(X, type, MAXN, (a != a ? a : b != b ? b : larger(a, b))) \
  OF_16_BITS(X, type, MINN, (a != a ? a : b != b ? b : smaller(a, b)))

#define FORMULAS(X) \
  HALVES(X, f16) \
  HALVES(X, bf16) \
  X(MOV32, R, A) \
  X(ADD32, R, A + B) \
  X(SUB32, R, A - B) \
  X(MULLO32, R, A * B) \
  X(MULHIU32, R, (u32)(((u64)A * B) >> 32)) \
  X(MULHIS32, R, (u32)(((s64)(s32)A * (s32)B) >> 32)) \
  X(MADLO32, R, A * B + C) \
  X(AND32, R, A & B) \
  X(OR32, R, A | B) \
  X(XOR32, R, A ^ B) \
  X(NOT32, R, ~A) \
  X(SHL32, R, B > 31 ? 0 : A << B) \
  X(SHRU32, R, B > 31 ? 0 : A >> B) \
  X(SHRS32, R, (u32)((s32)A >> (B > 31 ? 31 : B))) \
  X(MINS32, R, (u32)std::min((s32)A, (s32)B)) \
  X(MAXS32, R, (u32)std::max((s32)A, (s32)B)) \
  X(MINU32, R, std::min(A, B)) \
  X(MAXU32, R, std::max(A, B)) \
  X(NEG32, R, 0u - A) \
  X(ABS32, R, (s32)A < 0 ? 0u - A : A) \
  X(DIVS32, R, B == 0 ? ~0u : (u32)(s32)((s64)(s32)A / (s32)B)) \
  X(DIVU32, R, B == 0 ? ~0u : A / B) \
  X(REMS32, R, B == 0 ? ~0u : (u32)(s32)((s64)(s32)A % (s32)B)) \
  X(REMU32, R, B == 0 ? ~0u : A % B) \
  X(BFEU32, R, bit_field<u32>(A, B, C)) \
  X(BFES32, R, bit_field<s32>(A, B, C)) \
  X(POPC32, R, (u32)__builtin_popcount(A)) \
  X(CLZ32, R, A ? (u32)__builtin_clz(A) : 32) \
  X(PRMT, R, permuted(A, B, C)) \
  X(SHL16, R, B > 15 ? 0 : (A << B) & 0xffff) \
  X(SHRU16, R, B > 15 ? 0 : (A & 0xffff) >> B) \
  X(SHRS16, R, (u32)((s32)(s16)A >> (B > 15 ? 15 : B)) & 0xffff) \
  X(NOT16, R, ~A & 0xffff) \
  X(ADD16, R, (A + B) & 0xffff) \
  X(SUB16, R, (A - B) & 0xffff) \
  X(MULLO16, R, (A * B) & 0xffff) \
  X(FNEG16, R, (A ^ 0x8000) & 0xffff) \
  X(FNEG16X2, R, A ^ 0x80008000) \
  X(FABS16, R, A & 0x7fff) \
  X(FABS16X2, R, A & 0x7fff7fff) \
  X(SELP32, R, chosen(w, i) >> l & 1 ? A : B) \
  X(SELP64, Q, chosen(w, i) >> l & 1 ? LA : LB) \
  X(MOV64, Q, LA) \
  X(ADD64, Q, LA + LB) \
  X(SUB64, Q, LA - LB) \
  X(MULLO64, Q, LA * LB) \
  X(MADLO64, Q, LA * LB + LC) \
  X(AND64, Q, LA & LB) \
  X(OR64, Q, LA | LB) \
  X(XOR64, Q, LA ^ LB) \
  X(NOT64, Q, ~LA) \
  X(SHL64, Q, B > 63 ? 0 : LA << B) \
  X(SHRU64, Q, B > 63 ? 0 : LA >> B) \
  X(SHRS64, Q, (u64)((s64)LA >> (B > 63 ? 63 : B))) \
  X(MINS64, Q, (u64)std::min((s64)LA, (s64)LB)) \
  X(MAXS64, Q, (u64)std::max((s64)LA, (s64)LB)) \
  X(MINU64, Q, std::min(LA, LB)) \
  X(MAXU64, Q, std::max(LA, LB)) \
  X(NEG64, Q, 0ull - LA) \
  X(DIVS64, Q, LB == 0 ? ~0ull : (u64)((s64)LA / (s64)LB)) \
  X(DIVU64, Q, LB == 0 ? ~0ull : LA / LB) \
  X(REMS64, Q, LB == 0 ? ~0ull : (u64)((s64)LA % (s64)LB)) \
  X(REMU64, Q, LB == 0 ? ~0ull : LA % LB) \
  X(BFEU64, Q, bit_field<u64>(LA, B, C)) \
  X(BFES64, Q, (u64)bit_field<s64>(LA, B, C)) \
  X(MULHIS64, Q, (u64)(((__int128)(s64)LA * (s64)LB) >> 64)) \
  X(MULHIU64, Q, (u64)(((unsigned __int128)LA * LB) >> 64)) \
  X(MULWS, Q, (u64)((s64)(s32)A * (s64)(s32)B)) \
  X(MULWU, Q, (u64)A * (u64)B) \
  X(MADWS, Q, (u64)((s64)(s32)A * (s64)(s32)B) + LC) \
  X(MADWU, Q, (u64)A * (u64)B + LC) \
  X(CVT_S64_S32, Q, (u64)(s64)(s32)A) \
  X(CVT_S64_LOW, Q, (u64)(s64)(s32)LA) \
  X(CVT_U64_U32, Q, (u64)A) \
  X(CVT_32_64, R, (u32)LA) \
  X(CVT_16_32, R, A & 0xffff) \
  X(CVT_8_32, R, A & 0xff) \
  X(CVT_S32_S16, R, (u32)(s32)(s16)A) \
  X(CVT_S32_S8, R, (u32)(s32)(int8_t)A) \
  X(CVT_S64_S16, Q, (u64)(s64)(s16)A) \
  X(CVT_F32_BF16, R, U(from_bf16(A))) \
  X(CVT_BF16_F32, R, to_bf16(FA)) \
  X(CVT_BF16X2_F32, R, to_bf16(FA) << 16 | to_bf16(FB)) \
  X(CVT_F32_F16, R, U(from_f16(A))) \
  X(CVT_F16_F32, R, to_f16(FA)) \
  X(CVT_F16X2_F32, R, to_f16(FA) << 16 | to_f16(FB)) \
  X(CVT_F32_S32, R, U((float)(s32)A)) \
  X(CVT_F32_U32, R, U((float)A)) \
  X(CVT_F32_S64, R, U((float)(s64)LA)) \
  X(CVT_F32_U64, R, U((float)LA)) \
  X(CVT_S32_F32Z, R, to_s32(FA)) \
  X(CVT_FLOOR, R, U(std::floor(FA))) \
  X(CVT_FLOORZ, R, U(std::floor(ftz(FA)))) \
  X(CVT_CEIL, R, U(std::ceil(FA))) \
  X(CVT_TRUNC, R, U(std::trunc(FA))) \
  X(CVT_RNI, R, U(std::nearbyint(FA))) \
  X(FADD, R, U(FA + FB)) \
  X(FSUB, R, U(FA - FB)) \
  X(FMUL, R, U(FA * FB)) \
  X(FFMA, R, U(std::fma(FA, FB, FC))) \
  X(FADDZ, R, U(ftz(ftz(FA) + ftz(FB)))) \
  X(FSUBZ, R, U(ftz(ftz(FA) - ftz(FB)))) \
  X(FMULZ, R, U(ftz(ftz(FA) * ftz(FB)))) \
  X(FFMAZ, R, U(ftz(std::fma(ftz(FA), ftz(FB), ftz(FC))))) \
  X(FMAX, R, U(larger(FA, FB))) \
  X(FMIN, R, U(smaller(FA, FB))) \
  X(FMAXN, R, (FA != FA || FB != FB) ? 0x7fffffffu : U(larger(FA, FB))) \
  X(FMINN, R, (FA != FA || FB != FB) ? 0x7fffffffu : U(smaller(FA, FB))) \
  X(FNEG, R, A ^ 0x80000000u) \
  X(FABS, R, A & 0x7fffffffu) \
  X(FABSZ, R, U(ftz(std::fabs(FA)))) \
  X(FDIV, R, U(approximate(FA / FB, A * 31 + B))) \
  X(FDIVRN, R, U(FA / FB)) \
  X(FSQRT, R, U(approximate(std::sqrt(FA), A))) \
  X(FSQRTZ, R, U(approximate(std::sqrt(ftz(FA)), A))) \
  X(FSQRTRN, R, U(std::sqrt(FA))) \
  X(FRCP, R, U(approximate(1.0f / FA, A))) \
  X(FRCPZ, R, U(ftz(approximate(1.0f / ftz(FA), A)))) \
  X(FRCPRN, R, U(1.0f / FA)) \
  X(FRSQRT, R, U(approximate((float)(1.0 / std::sqrt((double)FA)), A))) \
  X(EX2, R, U(approximate((float)std::exp2((double)FA), A))) \
  X(EX2Z, R, U(ftz(approximate((float)std::exp2((double)ftz(FA)), A)))) \
  X(LG2, R, U(approximate((float)std::log2((double)FA), A, true))) \
  X(LG2Z, R, U(ftz(approximate((float)std::log2((double)ftz(FA)), A, true)))) \
  X(DADD, Q, bits_of(DA + DB)) \
  X(DSUB, Q, bits_of(DA - DB)) \
  X(DMUL, Q, bits_of(DA * DB)) \
  X(DFMA, Q, bits_of(std::fma(DA, DB, DC))) \
  X(DMAX, Q, bits_of(std::fmax(DA, DB))) \
  X(DMIN, Q, bits_of(std::fmin(DA, DB))) \
  X(DNEG, Q, LA ^ (1ull << 63)) \
  X(DABS, Q, LA & ~(1ull << 63)) \
  X(DDIV, Q, bits_of(DA / DB)) \
  X(DRCPZ, Q, bits_of(1.0 / DA) & ~0ull << 32) \
  X(CVT_F64_BF16, Q, bits_of((double)from_bf16(A))) \
  X(CVT_F64_F16, Q, bits_of((double)from_f16(A))) \
  X(CVT_F64_F32, Q, bits_of((double)FA)) \
  X(CVT_F32_F64, R, U((float)DA)) \
  X(PACK32, R, (A & 0xffff) | B << 16) \
  X(PACK64, Q, (u64)A | (u64)B << 32)

// X(name, whether it holds)
#define COMPARISONS(X) \
  X(SETP_S32, compare(i.kind, (s32)A, (s32)B)) \
  X(SETP_U32, compare(i.kind, A, B)) \
  X(SETP_S64, compare(i.kind, (s64)LA, (s64)LB)) \
  X(SETP_U64, compare(i.kind, LA, LB)) \
  X(SETP_F32, compare(i.kind, FA, FB)) \
  X(SETP_F64, compare(i.kind, DA, DB)) \
  X(SETP_S16, compare(i.kind, (s16)A, (s16)B)) \
  X(SETP_BF16, compare(i.kind, from_bf16(A), from_bf16(B))) \
  X(SETP_F16, compare(i.kind, from_f16(A), from_f16(B)))
