"""PTX text into the instructions of `machine.cpp`. What is not known raises: add it here."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

INSTRUCTION = np.dtype(
    [("op", "i4"), ("kind", "i4"), ("vector", "i4"), ("guard", "i4"), ("a", "i4", 10),
     ("immediate", "i8"), ("line", "i4"), ("flags", "i4")]
)  # fmt: skip
NEGATED, ADDRESS_32, SIGNED, WIDENS, TRANSPOSED = 1, 2, 4, 8, 16
BASE = 9  # the operand that an address begins at

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
    ("bfe.s32", "BFES32", "r r r r"), ("popc.b32", "POPC32", "r r"), ("clz.b32", "CLZ32", "r r"),
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
    ("neg.bf16 neg.f16", "FNEG16", "r r"), ("div.full.f32 div.approx.f32", "FDIV", _I),
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
MASK = {"r": 0xFFFFFFFF, "q": 0xFFFFFFFFFFFFFFFF}


class Decoder:
    """The instructions of a kernel, and what its registers begin as."""

    def __init__(self, text: str, operation: Callable[[str], int]) -> None:
        self.operation = operation
        self.lines = text.splitlines()
        self.banks: dict[str, dict[str, int]] = {"r": {}, "q": {}, "p": {}}
        self.constants: dict[str, dict[int, int]] = {"r": {}, "q": {}}  # by register
        self.from_parameters: list[tuple[str, int, int, str]] = []  # bank, register, which, type
        start = text.index(".entry")
        end = text.index("{", start)
        head = text[start:end]
        (self.name,) = re.findall(r"\.entry\s+(\S+?)\(", head)
        self.parameters = re.findall(
            r"\.param\s+(?:\.align \d+ )?\.\w+(?:\s+\.ptr.*?)?\s+(\w+)\s*[,\n)]", head
        )
        self.threads = int(re.findall(r"\.reqntid (\d+)", head)[0])
        self.code = self._code(text[:end].count("\n"))
        self.counts = [max(len(self.banks[bank]), 1) for bank in "rqp"]

    def _code(self, first: int) -> np.ndarray:
        code: list[Any] = []
        labels: dict[str, int] = {}
        self.jumps: list[tuple[Any, str]] = []
        for number, statement in self._statements(first):
            if statement.endswith(":"):
                labels[statement[:-1]] = len(code)
                continue
            one = np.zeros((), INSTRUCTION)
            one["a"], one["line"] = -1, number
            self._decode(one, statement)
            code.append(one)
        for one, label in self.jumps:
            one["immediate"] = labels[label]
        return np.array(code, INSTRUCTION)

    def _statements(self, first: int) -> list[tuple[int, str]]:
        """(line, statement) of the entry whose head ends on line `first`; labels end in a colon."""
        statements: list[tuple[int, str]] = []
        for number, whole in enumerate(self.lines[first:], first + 1):
            line = whole.split("//")[0].strip()
            if number == first + 1:
                line = line[line.index("{") + 1 :].strip()
            if line == "}":
                break
            if half := re.match(r"\{ \.reg \.b32 tmp; (.*) \}$", line):  # of a number of 64 bits
                line = half[1].replace("tmp", "_")
            if line.startswith((".loc", ".file", ".pragma", ".reg")):
                continue
            if label := re.match(r"([\w$]+:)\s*(.*)$", line):
                statements.append((number, label[1]))
                line = label[2]
            statements += [(number, part.strip()) for part in line.split(";") if part.strip()]
        return statements

    # --- operands ----------------------------------------------------------------------------

    def register(self, bank: str, name: str) -> int:
        return self.banks[bank].setdefault(name, len(self.banks[bank]))

    def constant(self, bank: str, value: int) -> int:
        value &= MASK[bank]
        register = self.register(bank, f"#{value}")
        self.constants[bank][register] = value
        return register

    def operand(self, bank: str, token: str) -> int:
        if token == "_":
            return -1
        if not token.startswith("%"):
            if bank == "p":
                raise ValueError(f"immediate predicate {token}")
            return self.constant(bank, _number(token))
        if BANKS[re.findall("[a-z]+", token)[0]] != bank:
            raise ValueError(f"{token} in bank {bank}")
        return self.register(bank, token)

    def predicate(self, one: Any, token: str) -> int:
        if token.startswith("!"):
            one["flags"] |= NEGATED
        return self.operand("p", token.lstrip("!"))

    def address(self, one: Any, token: str, shared: bool) -> None:
        found = re.fullmatch(r"\[\s*(%\w+|[\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", token)
        if not found:
            raise ValueError(f"address {token}")
        base = found[1]
        one["immediate"] = int(found[2] or "0", 0)
        if base.startswith("%rd"):
            one["a"][BASE] = self.register("q", base)
        elif base.startswith("%r"):
            one["a"][BASE] = self.register("r", base)
            one["flags"] |= ADDRESS_32
        elif base != "global_smem" or not shared:
            raise ValueError(f"address {token}")

    # --- instructions ------------------------------------------------------------------------

    def _decode(self, one: Any, statement: str) -> None:
        if guard := re.match(r"@(!?)(%p\d+)\s+(.*)$", statement):
            register = self.register("p", guard[2]) + 1
            one["guard"] = -register if guard[1] else register
            statement = guard[3]
        name, *rest = statement.split(None, 1)
        operands = _split(rest[0]) if rest else []
        if name == "cvt.s64.s32" and operands[1].startswith("%rd"):  # the lower half of it
            name += ":"
        if name in PLAIN:
            self._plain(one, name, operands)
            return
        first = name.split(".")[0]
        decode = {
            "bra": self._branch, "bar": self._barrier, "barrier": self._barrier,
            "createpolicy": self._nothing, "mov": self._mov, "ld": self._load_or_store,
            "st": self._load_or_store, "setp": self._compare, "shfl": self._shuffle,
            "redux": self._reduce, "vote": self._vote, "ldmatrix": self._matrix,
            "stmatrix": self._matrix, "atom": self._atomic,
        }.get(first)  # fmt: skip
        if decode is None:
            raise ValueError(f"unknown instruction: {statement}")
        try:
            decode(one, name, operands)
        except (KeyError, ValueError) as error:
            raise ValueError(f"unknown instruction: {statement}") from error

    def _set(self, one: Any, operation: str) -> None:
        one["op"] = self.operation(operation)
        if one["op"] < 0:
            raise ValueError(operation)

    def _plain(self, one: Any, name: str, operands: list[str]) -> None:
        operation, banks = PLAIN[name]
        self._set(one, operation)
        for k, (bank, token) in enumerate(zip(banks.split(), operands, strict=True)):
            one["a"][k] = self.predicate(one, token) if bank == "p" else self.operand(bank, token)

    def _nothing(self, one: Any, name: str, operands: list[str]) -> None:
        self._set(one, "NOP")

    def _branch(self, one: Any, name: str, operands: list[str]) -> None:
        self._set(one, "BRA")
        self.jumps.append((one, operands[0]))

    def _barrier(self, one: Any, name: str, operands: list[str]) -> None:
        if operands != ["0"]:
            raise ValueError("a barrier of some warps")
        self._set(one, "BAR")

    def _mov(self, one: Any, name: str, operands: list[str]) -> None:
        type_, (to, source) = name[4:], operands
        a = one["a"]
        wide = type_ in ("b64", "u64", "s64", "f64")
        bank = "q" if wide else "r"
        if to.startswith("{"):
            self._set(one, "UNPACK64" if wide else "UNPACK32")
            a[0], a[1] = (self.operand("r", part) for part in _vector(to))
            a[2] = self.operand(bank, source)
        elif source.startswith("{"):
            self._set(one, "PACK64" if wide else "PACK32")
            a[0] = self.operand(bank, to)
            a[1], a[2] = (self.operand("r", part) for part in _vector(source))
        elif type_ == "pred":
            self._set(one, "PMOV")
            a[0] = self.operand("p", to)
            if source.startswith("%"):
                a[1] = self.operand("p", source)
            else:
                one["immediate"] = int(source) != 0
        elif source in SPECIAL:
            self._set(one, "SPECIAL")
            one["kind"] = SPECIAL[source]
            a[0] = self.operand("r", to)
        else:
            self._set(one, "MOV64" if wide else "MOV32")
            a[0], a[1] = self.operand(bank, to), self._value(type_, bank, source)

    def _value(self, type_: str, bank: str, token: str) -> int:
        """A register, or a number, which of 16 bits has no more."""
        if type_.endswith("16") and not token.startswith("%"):
            return self.constant("r", _number(token) & 0xFFFF)
        return self.operand(bank, token)

    def _parameter(self, one: Any, type_: str, operands: list[str]) -> None:
        """A parameter is a register that is filled at launch: the load moves it."""
        which = self.parameters.index(operands[1].strip("[] "))
        bank = "q" if operands[0].startswith("%rd") else "r"
        source = self.register(bank, f"${which}.{type_}")
        self.from_parameters.append((bank, source, which, type_))
        self._set(one, "MOV64" if bank == "q" else "MOV32")
        one["a"][0], one["a"][1] = self.operand(bank, operands[0]), source

    def _load_or_store(self, one: Any, name: str, operands: list[str]) -> None:
        first, *middle, type_ = (f for f in name.split(".") if not f.startswith(("L1::", "L2::")))
        if middle == ["param"]:
            self._parameter(one, type_, operands)
            return
        if first == "ld" and middle == ["volatile", "global"] and type_ == "b64":
            self._word(one, "LDV", _vector(operands[0])[0], operands[1])
            return
        loads, shared = first == "ld", any(f in middle for f in ("shared", "shared::cta"))
        place, vectors = {"shared", "shared::cta", "global"}, {"v2", "v4", "v8"}
        middle = [word for word in middle if word != "cg"]  # there is no L1
        if len(place & set(middle)) != 1 or set(middle) - place - vectors:
            raise ValueError(name)
        self._set(one, ("LDS" if loads else "STS") if shared else ("LDG" if loads else "STG"))
        one["kind"] = int(type_[1:]) // 8
        # Beyond them a cache's policy may come.
        address, data = operands[1::-1] if loads else operands[:2]
        values = _vector(data)
        one["vector"] = len(values)
        wide = values[0].startswith("%rd")
        signed = type_[0] == "s" and one["kind"] < 4
        if loads and signed:
            one["flags"] |= SIGNED
        if wide and one["kind"] < 8:
            if not loads or type_[0] == "s":
                raise ValueError(name)
            one["flags"] |= WIDENS
        if (one["kind"] == 8 and not wide) or (len(values) > 1 and f"v{len(values)}" not in middle):
            raise ValueError(name)
        for k, token in enumerate(values):
            one["a"][k] = self.operand("q" if wide else "r", token)
        self.address(one, address, shared)

    def _atomic(self, one: Any, name: str, operands: list[str]) -> None:
        if name == "atom.global.gpu.relaxed.exch.b64":
            self._word(one, "EXCH", operands[0], operands[1])
            one["a"][1] = self.operand("q", operands[2])
            return
        if name != "atom.global.cta.relaxed.or.b32":
            raise ValueError(name)
        self._set(one, "ATOMOR")
        one["a"][0], one["a"][1] = (self.operand("r", operands[k]) for k in (0, 2))
        self.address(one, operands[1], False)

    def _word(self, one: Any, operation: str, to: str, address: str) -> None:
        self._set(one, operation)
        one["a"][0] = self.operand("q", to)
        self.address(one, address, False)

    def _compare(self, one: Any, name: str, operands: list[str]) -> None:
        how, *combined, type_ = (f for f in name.split(".")[1:] if f != "ftz")
        if combined:
            one["vector"] = {"and": 1, "or": 2, "xor": 3}[combined[0]]
            one["a"][3] = self.predicate(one, operands[3])
        one["kind"] = COMPARE[how]
        operation, bank = COMPARED[type_]
        self._set(one, f"SETP_{operation}")
        self._with_predicate(one, operands[0], "p")
        for k in (1, 2):
            one["a"][k] = self._value(type_, bank, operands[k])

    def _with_predicate(self, one: Any, token: str, bank: str) -> None:
        """A result, and where there is one the predicate beside it."""
        for k, part in zip((0, 4), token.split("|"), strict=False):
            one["a"][k] = self.operand("p" if k else bank, part)

    def _shuffle(self, one: Any, name: str, operands: list[str]) -> None:
        self._set(one, "SHFL")
        one["kind"] = SHUFFLES.index(name.split(".")[2])
        self._with_predicate(one, operands[0], "r")
        one["a"][1], one["a"][2] = self.operand("r", operands[1]), self.operand("r", operands[2])
        one["immediate"] = _number(operands[3])
        if _number(operands[4]) & MASK["r"] != MASK["r"]:
            raise ValueError("a shuffle of some lanes")

    def _reduce(self, one: Any, name: str, operands: list[str]) -> None:
        self._set(one, REDUCTIONS[name.removeprefix("redux.sync.")])
        one["a"][0], one["a"][1] = (self.operand("r", token) for token in operands[:2])

    def _vote(self, one: Any, name: str, operands: list[str]) -> None:
        how = name.split(".")[2]
        self._set(one, f"VOTE{how.upper()}")
        one["a"][0] = self.operand("r" if how == "ballot" else "p", operands[0])
        one["a"][1] = self.predicate(one, operands[1])

    def _matrix(self, one: Any, name: str, operands: list[str]) -> None:
        fields = name.split(".")
        if "m8n8" not in fields:
            raise ValueError(name)
        if "trans" in fields:
            one["flags"] |= TRANSPOSED
        self._set(one, fields[0].upper())
        data, address = operands if fields[0] == "ldmatrix" else operands[::-1]
        values = _vector(data)
        one["vector"] = len(values)
        for k, token in enumerate(values):
            one["a"][k] = self.operand("r", token)
        self.address(one, address, True)


def _number(token: str) -> int:
    """The bits of a constant."""
    if token == "global_smem":
        return 0
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", token):
        return int(token[2:], 16)
    if re.fullmatch(r"-?\d+\.\d+", token):
        return struct.unpack("<I", struct.pack("<f", float(token)))[0]
    return int(token.rstrip("U"), 0)


def _split(text: str) -> list[str]:
    """At the commas that no bracket holds."""
    return [part.strip() for part in re.findall(r"(?:[^,{\[]|\{[^}]*\}|\[[^\]]*\])+", text)]


def _vector(token: str) -> list[str]:
    return [part.strip() for part in token.strip("{}").split(",")]
