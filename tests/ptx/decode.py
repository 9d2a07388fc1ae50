"""PTX text into the instructions of `machine.cpp`. What is not known raises: add it here, or its
mnemonic to `mnemonics.py`."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .mnemonics import BANKS, COMPARE, COMPARED, PLAIN, REDUCTIONS, SHUFFLES, SPECIAL

INSTRUCTION = np.dtype(
    [("op", "i4"), ("kind", "i4"), ("vector", "i4"), ("guard", "i4"), ("a", "i4", 10),
     ("immediate", "i8"), ("line", "i4"), ("flags", "i4")]
)  # fmt: skip
NEGATED, ADDRESS_32, SIGNED, WIDENS, TRANSPOSED = 1, 2, 4, 8, 16
BASE = 9  # the operand that an address begins at

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
            "stmatrix": self._matrix, "atom": self._atomic, "red": self._atomic,
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
        if not re.fullmatch(r"(atom|red)\.global\.cta\.relaxed\.or\.b32", name):
            raise ValueError(name)
        self._set(one, "ATOMOR")
        *old, address, bits = operands  # of a red nobody asks for the old ones
        one["a"][0] = self.operand("r", old[0]) if old else -1
        one["a"][1] = self.operand("r", bits)
        self.address(one, address, False)

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
