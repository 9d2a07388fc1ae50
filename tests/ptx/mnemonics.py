"""What the words of PTX stand for: operations of `machine.cpp`, and the banks of their operands."""

from __future__ import annotations

# By mnemonic (a name and its suffixes, as alternatives): the operation, and the bank of each
# operand: r of 32 bits or less, q of 64, p a predicate.
PLAIN: dict[str, tuple[str, str]] = {}
_I, _Q = "r r r", "q q q"
for _names, _operation, _operands in (
    ("add.s32 add.u32", "ADD32", _I), ("sub.s32 sub.u32", "SUB32", _I),
    ("mul.lo.s32 mul.lo.u32 mul.wide.u16", "MULLO32", _I), ("mul.hi.u32", "MULHIU32", _I),
    ("mul.hi.s32", "MULHIS32", _I), ("mad.lo.s32 mad.lo.u32", "MADLO32", "r r r r"),
    ("and.b32 and.b16", "AND32", _I), ("or.b32 or.b16", "OR32", _I),
    ("xor.b32 xor.b16", "XOR32", _I), ("not.b32", "NOT32", "r r"), ("not.b16", "NOT16", "r r"),
    ("shl.b32", "SHL32", _I), ("shr.u32 shr.b32", "SHRU32", _I), ("shr.s32", "SHRS32", _I),
    ("shl.b16", "SHL16", _I), ("shr.u16 shr.b16", "SHRU16", _I), ("shr.s16", "SHRS16", _I),
    ("add.s16 add.u16", "ADD16", _I), ("sub.s16 sub.u16", "SUB16", _I),
    ("mul.lo.s16 mul.lo.u16", "MULLO16", _I),
    ("min.s32", "MINS32", _I), ("max.s32", "MAXS32", _I), ("min.u32", "MINU32", _I),
    ("max.u32", "MAXU32", _I), ("neg.s32", "NEG32", "r r"), ("abs.s32", "ABS32", "r r"),
    ("div.s32", "DIVS32", _I), ("div.u32", "DIVU32", _I), ("rem.s32", "REMS32", _I),
    ("rem.u32", "REMU32", _I),
    ("selp.b32 selp.f32 selp.b16 selp.s32 selp.u32", "SELP32", "r r r p"),
    ("selp.b64 selp.f64", "SELP64", "q q q p"), ("bfe.u32", "BFEU32", "r r r r"),
    ("bfe.s32", "BFES32", "r r r r"), ("bfe.u64", "BFEU64", "q q r r"),
    ("bfe.s64", "BFES64", "q q r r"), ("popc.b32", "POPC32", "r r"), ("clz.b32", "CLZ32", "r r"),
    ("prmt.b32", "PRMT", "r r r r"),
    ("add.s64 add.u64", "ADD64", _Q), ("sub.s64 sub.u64", "SUB64", _Q),
    ("mul.lo.s64 mul.lo.u64", "MULLO64", _Q), ("mad.lo.s64 mad.lo.u64", "MADLO64", "q q q q"),
    ("mul.hi.s64", "MULHIS64", _Q), ("mul.hi.u64", "MULHIU64", _Q),
    ("and.b64", "AND64", _Q), ("or.b64", "OR64", _Q), ("xor.b64", "XOR64", _Q),
    ("not.b64", "NOT64", "q q"), ("shl.b64", "SHL64", "q q r"),
    ("shr.u64 shr.b64", "SHRU64", "q q r"), ("shr.s64", "SHRS64", "q q r"),
    ("min.s64", "MINS64", _Q), ("max.s64", "MAXS64", _Q), ("min.u64", "MINU64", _Q),
    ("max.u64", "MAXU64", _Q), ("neg.s64", "NEG64", "q q"), ("div.s64", "DIVS64", _Q),
    ("div.u64", "DIVU64", _Q), ("rem.s64", "REMS64", _Q), ("rem.u64", "REMU64", _Q),
    ("mul.wide.s32", "MULWS", "q r r"), ("mul.wide.u32", "MULWU", "q r r"),
    ("mad.wide.s32", "MADWS", "q r r q"), ("mad.wide.u32", "MADWU", "q r r q"),
    ("cvt.s64.s32", "CVT_S64_S32", "q r"),
    ("cvt.s64.s32:", "CVT_S64_LOW", "q q"), ("cvt.u64.u32 cvt.u64.u16", "CVT_U64_U32", "q r"),
    ("cvt.u32.u64 cvt.s32.s64 cvt.s32.u64 cvt.u32.s64", "CVT_32_64", "r q"),
    ("cvt.u16.u32 cvt.u32.u16 cvt.s16.s32", "CVT_16_32", "r r"),
    ("cvt.u32.u8 cvt.u16.u8", "CVT_8_32", "r r"), ("cvt.s32.s16", "CVT_S32_S16", "r r"),
    ("cvt.s32.s8", "CVT_S32_S8", "r r"), ("cvt.s64.s16", "CVT_S64_S16", "q r"),
    ("cvt.f32.bf16", "CVT_F32_BF16", "r r"), ("cvt.rn.bf16.f32", "CVT_BF16_F32", "r r"),
    ("cvt.rn.bf16x2.f32", "CVT_BF16X2_F32", _I), ("cvt.f32.f16", "CVT_F32_F16", "r r"),
    ("cvt.rn.f16.f32", "CVT_F16_F32", "r r"), ("cvt.rn.f16x2.f32", "CVT_F16X2_F32", _I),
    ("cvt.rn.f32.s32", "CVT_F32_S32", "r r"), ("cvt.rn.f32.u32", "CVT_F32_U32", "r r"),
    ("cvt.rn.f32.s64", "CVT_F32_S64", "r q"), ("cvt.rn.f32.u64", "CVT_F32_U64", "r q"),
    ("cvt.rzi.s32.f32", "CVT_S32_F32Z", "r r"), ("cvt.rmi.f32.f32", "CVT_FLOOR", "r r"),
    ("cvt.rmi.ftz.f32.f32", "CVT_FLOORZ", "r r"), ("cvt.rpi.f32.f32", "CVT_CEIL", "r r"),
    ("cvt.rzi.f32.f32", "CVT_TRUNC", "r r"), ("cvt.rni.f32.f32", "CVT_RNI", "r r"),
    ("add.f32 add.rn.f32", "FADD", _I), ("sub.f32 sub.rn.f32", "FSUB", _I),
    ("mul.f32 mul.rn.f32", "FMUL", _I), ("fma.rn.f32", "FFMA", "r r r r"),
    ("add.ftz.f32 add.rn.ftz.f32", "FADDZ", _I), ("sub.ftz.f32 sub.rn.ftz.f32", "FSUBZ", _I),
    ("mul.ftz.f32 mul.rn.ftz.f32", "FMULZ", _I), ("fma.rn.ftz.f32", "FFMAZ", "r r r r"),
    ("max.f32", "FMAX", _I), ("min.f32", "FMIN", _I), ("max.NaN.f32", "FMAXN", _I),
    ("min.NaN.f32", "FMINN", _I), ("neg.f32", "FNEG", "r r"), ("abs.f32", "FABS", "r r"),
    ("abs.ftz.f32", "FABSZ", "r r"),
    ("neg.bf16 neg.f16", "FNEG16", "r r"), ("neg.bf16x2 neg.f16x2", "FNEG16X2", "r r"),
    ("abs.bf16 abs.f16", "FABS16", "r r"), ("abs.bf16x2 abs.f16x2", "FABS16X2", "r r"),
    ("div.full.f32 div.approx.f32", "FDIV", _I),
    ("div.rn.f32", "FDIVRN", _I), ("sqrt.approx.f32", "FSQRT", "r r"),
    ("sqrt.approx.ftz.f32", "FSQRTZ", "r r"), ("sqrt.rn.f32", "FSQRTRN", "r r"),
    ("rcp.approx.f32", "FRCP", "r r"), ("rcp.approx.ftz.f32", "FRCPZ", "r r"),
    ("rcp.rn.f32", "FRCPRN", "r r"), ("rsqrt.approx.f32", "FRSQRT", "r r"),
    ("ex2.approx.f32", "EX2", "r r"), ("ex2.approx.ftz.f32", "EX2Z", "r r"),
    ("lg2.approx.f32", "LG2", "r r"), ("lg2.approx.ftz.f32", "LG2Z", "r r"),
    ("add.f64 add.rn.f64", "DADD", _Q), ("sub.f64 sub.rn.f64", "DSUB", _Q),
    ("mul.f64 mul.rn.f64", "DMUL", _Q), ("fma.rn.f64", "DFMA", "q q q q"),
    ("max.f64", "DMAX", _Q), ("min.f64", "DMIN", _Q), ("neg.f64", "DNEG", "q q"),
    ("abs.f64", "DABS", "q q"), ("div.rn.f64", "DDIV", _Q), ("rcp.approx.ftz.f64", "DRCPZ", "q q"),
    ("cvt.f64.bf16", "CVT_F64_BF16", "q r"), ("cvt.f64.f16", "CVT_F64_F16", "q r"),
    ("cvt.f64.f32", "CVT_F64_F32", "q r"), ("cvt.rn.f32.f64", "CVT_F32_F64", "r q"),
    ("and.pred", "PAND", "p p p"), ("or.pred", "POR", "p p p"), ("xor.pred", "PXOR", "p p p"),
    ("not.pred", "PNOT", "p p"), ("ret exit", "RET", ""), ("bar.warp.sync", "WARPSYNC", "r"),
):  # fmt: skip
    for _name in _names.split():
        PLAIN[_name] = (_operation, _operands)
for _type in ("f16", "bf16", "f16x2", "bf16x2"):
    for _names, _operation in (
        ("add add.rn", "ADD"), ("sub sub.rn", "SUB"), ("mul mul.rn", "MUL"), ("max", "MAX"),
        ("min", "MIN"), ("max.NaN", "MAXN"), ("min.NaN", "MINN"),
    ):  # fmt: skip
        for _name in _names.split():
            PLAIN[f"{_name}.{_type}"] = f"{_operation}_{_type}", _I

COMPARE = {
    name: number
    for number, names in enumerate(
        ("eq", "ne", "lt lo", "le ls", "gt hi", "ge hs", "equ", "neu", "ltu", "leu", "gtu", "geu",
         "num", "nan")
    )
    for name in names.split()
}  # fmt: skip
COMPARED = {  # by type: the operation's suffix and the bank
    "s32": ("S32", "r"), "u32": ("U32", "r"), "b32": ("U32", "r"), "s64": ("S64", "q"),
    "u64": ("U64", "q"), "b64": ("U64", "q"), "f32": ("F32", "r"), "f64": ("F64", "q"),
    "s16": ("S16", "r"), "u16": ("U32", "r"), "b16": ("U32", "r"),
    "bf16": ("BF16", "r"), "f16": ("F16", "r"), "bf16x2": ("BF16X2", "r"), "f16x2": ("F16X2", "r"),
}  # fmt: skip
SPECIAL = {
    name: number
    for number, name in enumerate(
        ("%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x",
         "%nctaid.y", "%nctaid.z", "%ntid.x", "%ntid.y", "%laneid", "%warpid")
    )
}  # fmt: skip
SHUFFLES = ("bfly", "idx", "up", "down")
REDUCTIONS = {
    "max.s32": "REDUXMAXS", "min.s32": "REDUXMINS", "add.s32": "REDUXADD", "add.u32": "REDUXADD",
    "or.b32": "REDUXOR", "and.b32": "REDUXAND",
}  # fmt: skip
BANKS = {"r": "r", "rs": "r", "f": "r", "h": "r", "rd": "q", "fd": "q", "p": "p"}
