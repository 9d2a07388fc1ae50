"""Kernels compiled as they would be launched, without a GPU, and what their machine code does."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .cubins import Code, disassembled
from .layouts import scattered

Line = tuple[int, str]  # where it is, and the instruction


class Counts(NamedTuple):
    """What one thread does in a stretch of code."""

    instructions: int
    loaded: int  # bytes, through global memory
    stored: int
    wide: int  # accesses of 128 bits
    narrow: int  # accesses of less
    exp2: int
    log2: int
    special: int  # all results of the special-function unit
    spills: int


class Compiled(NamedTuple):
    """A kernel as Triton has it."""

    kernel: Any
    name: str
    constants: dict[str, Any]  # its tl.constexpr arguments, by lower-case names
    programs: tuple[int, ...]


class Binary(NamedTuple):
    """A kernel by its machine code."""

    name: str
    constants: dict[str, Any]  # its tl.constexpr arguments, by lower-case names
    programs: tuple[int, ...]
    warps: int
    blocks: int  # that share a tile, in a cluster
    registers: int
    shared: int  # bytes
    all: Counts
    main: Counts  # all but the masked twin of a tile that is not masked
    loops: list[Counts]  # those that work on tiles, in the order of the code
    scattered: list[str]  # reductions that Triton may lower wrongly
    text: str  # of the machine code, with its encoding


class Isa(NamedTuple):
    """How to read one kind of machine code."""

    load: re.Pattern[str]
    kept: re.Pattern[str]  # a load with a word to the cache
    store: re.Pattern[str]
    widths: dict[str, int]  # bytes of an access by what its mnemonic holds; else 4
    exp2: re.Pattern[str]
    log2: re.Pattern[str]
    special: re.Pattern[str]
    spill: re.Pattern[str]
    arithmetic: re.Pattern[str]


SASS = Isa(
    re.compile(r"\bLDG\S*"),
    re.compile(r"\bLDG\S*\.E[FL]\b"),
    re.compile(r"\bSTG\S*"),
    {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1},
    re.compile(r"\bMUFU\.EX2\b"),
    re.compile(r"\bMUFU\.LG2\b"),
    re.compile(r"\bMUFU\b"),
    re.compile(r"\b(LDL|STL)\b"),
    re.compile(r"\bF(ADD|MUL|FMA)\b"),
)
GCN = Isa(
    re.compile(r"\b(global|buffer)_load_\S+"),
    re.compile(r"\b(global|buffer)_load_\S+"),
    re.compile(r"\b(global|buffer)_store_\S+"),
    {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "short": 2, "byte": 1},
    re.compile(r"\bv_exp_f32"),
    re.compile(r"\bv_log_f32"),
    re.compile(r"\bv_(exp|log|rcp|rsq|sqrt)_f32"),
    re.compile(r"\bscratch_(load|store)_"),
    re.compile(r"\bv_(pk_)?(add|mul|fma|fmac)_f32"),
)

_BRANCH = re.compile(r"\bBRA\b.*0x([0-9a-f]+)")
_APART = re.compile(r"\bBRA\.DIV\b.*0x([0-9a-f]+)")


def compiled(
    target: str, call: Callable[[], object], processors: int, cluster: int = 0, shared: int = 0
) -> list[Compiled]:
    """The kernels that `call` would launch on tensors without storage, on `target`.

    cluster: the columns that a cluster takes. shared: programs that share a row.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from fastkd.kernels import tuning

    gpu = (
        GPUTarget("hip", target, 64) if "gfx" in target else GPUTarget("cuda", int(target[3:]), 32)
    )

    class Driver:
        get_current_device = staticmethod(lambda: target)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: gpu)

    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, args, strict=False)) | options
        constants = {}
        for one in self.params:
            value = given.get(one.name) if one.is_constexpr else None
            if isinstance(value, tuple) and hasattr(value, "_asdict"):  # by its fields
                constants |= value._asdict()
            elif isinstance(value, int | str | tuple):
                constants[one.name.lower()] = value
        found.append(Compiled(kernel, self.__name__, constants, tuple(grid)))
        return kernel

    triton.runtime.driver.set_active(Driver())
    with (
        replaced(JITFunction, "run", compile_only),
        replaced(tuning, "multiprocessors", lambda device: processors),
        replaced(tuning, "generation", lambda device: gpu.arch // 10 if "sm_" in target else 0),
        replaced(tuning, "COLUMNS", tuning.COLUMNS | {"cluster": cluster}),
        replaced(tuning, "SHARED", shared),
    ):
        call()
    return found


@contextlib.contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


def read(target: str, kernels: Sequence[Compiled]) -> list[Binary]:
    if "gfx" in target:
        texts = [one.kernel.asm["amdgcn"] for one in kernels]
        codes = [Code(text, int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])) for text in texts]
    else:
        codes = disassembled(target, [one.kernel.asm["cubin"] for one in kernels])
    isa = GCN if "gfx" in target else SASS
    return [_read(*both, isa) for both in zip(kernels, codes, strict=True)]


def _read(compiled: Compiled, code: Code, isa: Isa) -> Binary:
    metadata = compiled.kernel.metadata
    lines, loops = gcn(code.text) if isa is GCN else sass(code.text)
    tiles = [
        body
        for body in loops
        if any(isa.load.search(line) for line in body)
        and any(isa.arithmetic.search(line) for line in body)
    ]
    # Every sweep tells the cache how to keep what it loads, but one that few rows take; what the
    # full tiles leave of a row is masked.
    swept = [
        body
        for body in tiles
        if any(isa.kept.search(line) and not line.startswith("@") for line in body)
    ]
    counted = [count(body, isa) for body in swept or tiles]
    whole = [line for _, line in lines]
    return Binary(
        compiled.name, compiled.constants, compiled.programs, metadata.num_warps,
        getattr(metadata, "num_ctas", 1), code.registers, metadata.shared,
        count(whole, isa), count(_main(lines) if isa is SASS else whole, isa), counted,
        scattered(compiled.kernel.asm["ttgir"]), code.text,
    )  # fmt: skip


def sass(text: str) -> tuple[list[Line], list[list[str]]]:
    lines = [
        (int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", text)
    ]
    # Behind the end stands what shuffles do where a warp's threads have gone apart, which none do.
    apart = [int(jump[1], 16) for _, line in lines if (jump := _APART.search(line))]
    lines = [
        (at, line)
        for at, line in lines
        if at < min(apart, default=at + 1) and not _APART.search(line)
    ]
    targets = [(int(back[1], 16), at) for at, line in lines if (back := _BRANCH.search(line))]
    return lines, _loops(lines, targets)


def gcn(text: str) -> tuple[list[Line], list[list[str]]]:
    lines, labels = [], {}
    for line in map(str.strip, text.splitlines()):
        if label := re.match(r"(\.LBB\S+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"[a-z]\w+(\s|$)", line):
            lines.append((len(lines), line))
    targets = [
        (labels[jump[1]], at)
        for at, line in lines
        if (jump := re.match(r"s_c?branch\S*\s+(\.LBB\S+)", line)) and jump[1] in labels
    ]
    return lines, _loops(lines, targets)


def _loops(lines: list[Line], jumps: list[tuple[int, int]]) -> list[list[str]]:
    """The bodies of the innermost loops: from where a jump goes back to, to that jump."""
    loops = [(begin, end) for begin, end in jumps if begin < end]
    return [
        [line for at, line in lines if begin <= at <= end]
        for begin, end in loops
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in loops)
    ]


def _main(lines: list[Line]) -> list[str]:
    """Up to the first stretch whose tile is masked, where a stretch before has it unmasked.

    Without what a branch passes over that touches no global memory: what few rows need.
    """
    for at, line in lines:
        jump = _BRANCH.search(line)
        if jump and int(jump[1], 16) > at:
            over = [text for place, text in lines if at < place < int(jump[1], 16)]
            if not any(re.search(r"\b(LDG|STG|BRA|EXIT)\b", text) for text in over):
                lines = [one for one in lines if not at < one[0] < int(jump[1], 16)]
    landings = {int(jump[1], 16) for _, line in lines if (jump := _BRANCH.search(line))}
    stretches: list[list[str]] = [[]]
    for at, line in lines:
        if at in landings:
            stretches.append([])
        stretches[-1].append(line)
        if re.search(r"\b(BRA|EXIT|RET)\b", line):
            stretches.append([])
    main: list[str] = []
    whole = False
    for stretch in stretches:
        loads = [line for line in stretch if re.search(r"LDG\S*\.128", line)]
        masked = bool(loads) and all(line.startswith("@") for line in loads)
        if masked and whole:
            break
        whole |= bool(loads) and not masked
        main += stretch
    return main


def width(access: str, isa: Isa) -> int:
    """Bytes that a thread loads or stores by it."""
    return next((n for key, n in isa.widths.items() if key in access), 4)


def count(body: list[str], isa: Isa) -> Counts:
    def widths(pattern: re.Pattern[str]) -> list[int]:
        return [width(hit[0], isa) for line in body if (hit := pattern.search(line))]

    def times(pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.search(line)) for line in body)

    loads, stores = widths(isa.load), widths(isa.store)
    return Counts(
        len(body), sum(loads), sum(stores),
        sum(width == 16 for width in loads + stores), sum(width < 16 for width in loads + stores),
        times(isa.exp2), times(isa.log2), times(isa.special), times(isa.spill),
    )  # fmt: skip
