"""What kernels hold of a row, and what may be wanted of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

# What else the first sweep gathers, as bits.
GAP = tl.constexpr(1)
MIXTURE = tl.constexpr(2)
UNIT = tl.constexpr(4)
MEAN = tl.constexpr(8)
ENTROPY = tl.constexpr(16)
TEACHER_ENTROPY = tl.constexpr(32)
SCALE_SLOPE = tl.constexpr(64)  # the derivatives to the temperature, in the sweep of sums
KL = tl.constexpr(128)  # the value of a Kullback-Leibler divergence
AGAIN = tl.constexpr(1024)  # beside KL: another sweep follows, and the value may come out NaN
LATE = tl.constexpr(2048)  # the gradient's sweep makes the sums, since it needs none of them
STANDARDIZED = tl.constexpr(512)  # logits over their deviation, through which the gradient goes
REST = tl.constexpr(256)  # what c lacks, in a sweep of rows whose student is saturated


class Temper(NamedTuple):
    """The temperatures of a row: rate = 1 / T, scale = log2(e) / T; a of the divergence.

    mean, width_slope and 1 / width of the student's row where its logits are standardised. label:
    its column, in a tuple, where the divergence looks at it and the sweeps leave it out; else ().
    """

    s_rate: Any
    t_rate: Any
    s_scale: Any
    t_scale: Any
    a: Any
    mean: Any
    width_slope: Any
    width: Any
    label: Any


class Statistics(NamedTuple):
    """Sums over a piece of a row, relative to the maxima of that piece; u, v = scaled (z, y) - max.

    mixture is relative to mixture_max, the maximum of w = (1 - a) u + a v.
    """

    s_max: Any
    t_max: Any
    mixture_max: Any
    s_sum: Any  # sum 2^u
    t_sum: Any  # sum 2^v
    mixture: Any  # sum 2^w
    gap: Any  # sum 2^u (u - v), or for forward KL's value sum 2^v (v - u)
    s_entropy: Any  # sum 2^u u
    t_entropy: Any  # sum 2^v v
    unit: Any  # sum exp(z - max): the student at T = 1
    total: Any  # sum (z - max) SHARE
    share: Any  # sum SHARE
    rise: Any  # sum 2^v - 2^u
    lift: Any  # sum 2^w - 2^u


class Label(NamedTuple):
    """The label of a row against all other columns, which are swept as a row of their own.

    odds: log2(p / (1 - p)) of its probability p.
    """

    s_logit: Any
    t_logit: Any
    s_odds: Any
    t_odds: Any
    d: Any  # log of the teacher's odds over the student's, with its own digits
    factor: Any  # of the other columns' slopes
    slope: Any  # of the label's logit: q times it, taken from the others, q without the label


class Row(NamedTuple):
    """What the later sweeps need of a row: they see z and y relative to their maxima only.

    Of a row whose divergence looks at its label, all but unit_log, unit_max and what is summed up
    at the end is of the other columns.
    """

    s_max: Any
    t_max: Any
    s_log: Any  # log2 of the sums
    t_log: Any
    gap: Any  # log(t_sum / s_sum)
    c: Any  # the constant of table 1
    rest: Any  # what c lacks
    mean_log2_exp: Any  # sum q u: the student's entropy is s_log less it
    t_entropy: Any
    unit_log: Any
    alive: Any  # both sides have a logit: else the row counts 0
    scale_slope: Any  # minus T times the derivative to T, of the divergence
    entropy_slope: Any  # and of the entropy
    unit_max: Any  # what unit_log is relative to: the largest logit, the label's too
    label: Any  # a Label, or (): then nothing is left out


class Sums(NamedTuple):
    """Sums of the second sweep."""

    value: Any
    slope: Any
    agreement: Any
    scale_slope: Any
    entropy_slope: Any


class Found(NamedTuple):
    """What is known of a row at its end."""

    stats: Any  # Statistics
    row: Any
    sums: Any
    cross_entropy: Any


class Differences(NamedTuple):
    """Sums of a sweep that few rows need, by the names of Statistics."""

    rise: Any
    lift: Any


class Gathered(NamedTuple):
    """What the last sweep sums up."""

    sums: Any  # Sums, where they were not known before
    temperature: Any  # minus T times the temperature's gradient


class Sides(NamedTuple):
    """What every step of a sweep sees: pointers to the row's position 0, and its parameters."""

    student: Any = None
    teacher: Any = None
    gradient: Any = None
    temper: Any = None
    a: Any = None
    b: Any = None
    labels: Any = None  # to them, where every entry has its own


class Piece(NamedTuple):
    """What a program works off of a row, and what every phase knows of that row."""

    index: Any
    turn: Any  # the index, or as `pieces` count rows
    rows: Any
    split: Any  # which piece it is
    all_columns: Any  # of all owners
    label: Any  # its position, or what `labels.py` has in place of one
    logits: Any  # the label's, of student and teacher; 0 where another piece has it
    smoothing: Any
    stretch: Any  # walk.Stretch
    sides: Any  # Sides


class Value(NamedTuple):
    """A row's value by the first sweep's sums, and whether it has its digits."""

    kl: Any
    known: Any


class Asked(NamedTuple):
    """What the last sweep needs of a row."""

    row: Any
    label: Any
    columns: Any  # of all owners
    smoothing: Any
    factors: Any  # of its terms


class Facts(NamedTuple):
    """What the compiler knows of a sweep."""

    WANT: Any  # bits
    DIVERGENCE: Any  # of `divergences.py`
    SAME: Any  # whether both sides have one temperature
    # Of the gradient's sweep: whether it makes the sums, and the temperature's gradient; which of
    # the other terms there are.
    SUMS: Any = False
    TEMPERATURE: Any = False
    CE: Any = False
    H: Any = False
    # Whether rows that `phases.kd_factor` says 0 of are blanked by the schedule, whatever the tiles
    # of their gradient hold: a choice for each entry would cost every row an instruction.
    BLANKED: Any = False


def replace(record: Any, **fields: Any) -> Any:
    """The same with others in place of the fields that are named."""
    if not isinstance(record, tl.tuple):  # of the interpreter, or of a launcher
        return record._replace(**fields)
    names = record.type.fields
    values = [fields.get(name, value) for name, value in zip(names, record.values, strict=True)]
    return tl.tuple(values, tl.tuple_type([value.type for value in values], names))


# Triton, which has no `_replace`, calls it as it compiles.
setattr(replace, tl.core.TRITON_BUILTIN, True)
