"""The arguments of kernels, by name: what `launch.py` and the launchers fill in.

None in place of one is known to the compiler, which leaves out what it would serve.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


def varying(n: int) -> int:
    """A number that may change from launch to launch, as a tuple holds it; `number` gives it back.

    Triton compiles anew for every number in a tuple that is 1 or a multiple of 16, whatever
    `do_not_specialize` says: this is neither. What a kernel knows of a stride is ALIGN. From 2^27
    on it comes in 64 bits: of a number in 32 a kernel may take up to 16 times as much.
    """
    return 16 * n + 3


@triton.jit
def number(x):
    return x >> 4


@triton.jit
def multiple(x, ALIGN: tl.constexpr):
    """The same, of what the launcher found to be a multiple of ALIGN: the compiler learns it."""
    if x.dtype != tl.int64:
        x = x.to(tl.uint32)  # of which a quotient takes one instruction
    return x // (16 * ALIGN) * ALIGN


class Operand(NamedTuple):
    """Rows [outer, inner, columns] in memory, whose columns lie side by side; none by default.

    Triton 3.6 cannot compare a tuple that holds None with None: the pointer says whether it is.
    """

    pointer: Any = None
    outer: Any = None  # strides, varying; None: the rows lie at one stride
    inner: Any = None
    first: Any = None  # varying, the entries before the first row; None: 0


class PerRow(NamedTuple):
    """One number for each row, of any stride, varying."""

    pointer: Any
    stride: Any


class Owner(NamedTuple):
    """Which columns of a row these are, where other owners have others; both varying."""

    first_column: Any
    all_columns: Any


class Extent(NamedTuple):
    """How many rows there are, varying, and how they are shared out."""

    rows: Any
    columns: Any
    width: Any = None  # of the gradient, where it has columns beyond these, which are 0
    inner: Any = None  # varying, the inner size of the operands; None: the rows lie at one stride
    span: Any = None  # columns of a program, where a row has several
    owner: Any = None  # Owner; None: of all columns


class Temperatures(NamedTuple):
    student: Any  # PerRow
    teacher: Any  # PerRow; None: the student's
    moments: Any  # [2, 3, N], of logits that are standardised


class Targets(NamedTuple):
    """Labels, and which rows count; smoothing of the labels."""

    labels: Any
    counted: Any
    smoothing: Any


class Factors(NamedTuple):
    """The coefficients of the terms: PerRow each, None where a term is absent."""

    kd: Any
    ce: Any
    entropy: Any


class Formula(NamedTuple):
    """A divergence: `divergences.py` has its functions, a and b are its parameters."""

    evaluate: Any
    outer: Any
    at_label: Any
    slope: Any  # of a gradient alone, where the value is known
    constant: Any
    a: Any
    b: Any


class Outputs(NamedTuple):
    """Per row, each where it is wanted: [kinds, N] and [fields, N] of `problem.py`, then [N]."""

    value: Any = None  # `values`, a name that tuples of Triton have taken
    state: Any = None
    loss: Any = None
    temperature: Any = None  # its gradient, [N, SPLITS]


class Pieces(NamedTuple):
    """What the launches of a row hand on: see `pieces.py`."""

    statistics: Any = None
    sums: Any = None
    turn: Any = None  # of the row, where they are words: see `words.py`


class Tiling(NamedTuple):
    """How a row is laid out over a program; of `sweep`."""

    align: int  # divides where every row of the operands begins
    lanes: int
    vector: int
    splits: int  # programs that share a row
    pieces: int  # of a row, of all owners
    padded: int  # to a power of two
    shifted: int


class Held(NamedTuple):
    """How rows are held by a program of `resident`."""

    align: int
    lanes: int  # rows
    parts: tuple[tuple[int, int], ...]  # (first column, columns)
    piece: int  # columns that are loaded together
    stored: int  # and columns of the gradient that are written together
