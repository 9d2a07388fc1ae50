"""Labels of rows; and rows whose divergence looks at them.

Such a row is swept without its label's column, as a row of its own: with p' and q' the
distributions over the other columns, and the odds of the label on both sides, neither 1 - p nor
1 - q is a difference, however certain a side is of the label. What the sweeps found is joined with
the label once per row. Of other divergences `temper.label` and `row.label` are empty, and all of
this leaves no trace.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels import memory as M
from fastkd.kernels import records
from fastkd.kernels import rows as R
from fastkd.kernels.arguments import number
from fastkd.kernels.arithmetic import LN2, LOG2E, log2
from fastkd.kernels.terms import binary_entropy, probabilities, times

# In place of a label's column: it is in no owner's columns, or in another's.
NOWHERE, ELSEWHERE = tl.constexpr(-1), tl.constexpr(-2)
# Rows of the state that hold what a gradient needs of the label: see problem.py.
FACTOR, SLOPE, ODDS, LOGIT = map(tl.constexpr, (10, 11, 12, 13))


@triton.jit
def label_of(label, columns, owner):
    """As a 32-bit column of these; NOWHERE or ELSEWHERE where it is none."""
    if owner is None:
        return tl.where((label >= 0) & (label < columns), label, NOWHERE).to(tl.int32)
    else:
        column = label.to(tl.int64) - number(owner.first_column)
        mine = (column >= 0) & (column < columns)
        known = (label >= 0) & (label < number(owner.all_columns))
        other = tl.where(known, ELSEWHERE, NOWHERE)
        return tl.where(mine, column, other).to(tl.int32)


# --- in the sweeps -----------------------------------------------------------------------------


@triton.jit
def leave_out(temper, label, AT_LABEL: tl.constexpr):
    """For sweeps that leave the label out, where the divergence looks at it."""
    if AT_LABEL is None:
        return temper
    else:
        return records.replace(temper, label=(label,))


@triton.jit
def others(z, y, at, temper):
    """A tile without the label."""
    if len(temper.label) == 0:
        return z, y
    else:
        label = at == temper.label[0]
        return tl.where(label, -float("inf"), z), tl.where(label, -float("inf"), y)


@triton.jit
def inside_others(inside, at, temper):
    """The mask of a tile without the label; inside None: the tile is full."""
    if inside is None:
        return at != temper.label[0]
    else:
        return inside & (at != temper.label[0])


@triton.jit
def of_all(value, slope, q, at, row, temper):
    """Values and slopes of a tile that the label was not taken from, as if it were another."""
    if len(row.label) == 0:
        return value, slope
    else:
        label = at == temper.label[0]
        slope = row.label.factor * slope - row.label.slope * q
        return tl.where(label, 0.0, value), tl.where(label, row.label.slope, slope)


@triton.jit
def entropy_terms(q, log2_exp, at, row, temper):
    """q and (log q + H) / log 2 of all columns, from those of the others."""
    if len(row.label) == 0:
        return q, log2_exp
    else:
        mine, rest = probabilities(row.label.s_odds)
        apart = distance(row)
        label = at == temper.label[0]
        q = tl.where(label, mine, q * rest)
        return q, tl.where(label, times(rest, apart), log2_exp - times(mine, apart))


# --- once per row ------------------------------------------------------------------------------


@triton.jit
def join(row, stats, label, s_logit, t_logit, temper, SAME: tl.constexpr, WANT: tl.constexpr,
         AT_LABEL: tl.constexpr):  # fmt: skip
    """The row of the others beside its label, whose logits are given."""
    if AT_LABEL is None:
        return row
    else:
        inf = float("inf")
        fault = (label == NOWHERE) | (s_logit == inf) | (t_logit == inf)
        fault = tl.where(fault, float("nan"), 0.0)
        t_odds, s_odds, _, _, d, _ = R.elements(s_logit, t_logit, row, temper, SAME)
        # Of a side that has no other column it is certain.
        s_some, t_some = stats.s_sum != 0, stats.t_sum != 0
        s_odds, t_odds = tl.where(s_some, s_odds, inf), tl.where(t_some, t_odds, inf)
        d = tl.where(s_some & t_some, d, (t_odds - s_odds) * LN2)
        d = tl.where((s_odds == t_odds) & (tl.abs(s_odds) == inf), 0.0, d)
        alive = (s_some | (s_logit != -inf)) & (t_some | (t_logit != -inf))
        s_odds, t_odds = tl.where(alive, s_odds, 0.0), tl.where(alive, t_odds, 0.0)
        zero = tl.zeros_like(row.s_max)
        beside = records.Label(
            s_logit, t_logit, s_odds + fault, t_odds + fault, d + fault, zero, zero
        )
        t_entropy = row.t_entropy
        if records.TEACHER_ENTROPY & WANT:
            t_entropy = row.t_log - stats.t_entropy / R.positive(stats.t_sum)
            t_entropy = tl.where(alive, entropy_of_all(t_odds, t_entropy * LN2), 0.0)
        return with_label(row, beside, stats.unit, t_entropy, alive)


@triton.jit
def with_label(row, label, unit, t_entropy, alive):
    """unit: the sum at T = 1 over the others, relative to their maximum."""
    unit_max = tl.maximum(row.s_max, label.s_logit)
    unit *= tl.exp2((row.s_max - unit_max) * LOG2E)
    unit += tl.exp2((label.s_logit - unit_max) * LOG2E)
    return records.replace(
        row, t_entropy=t_entropy, unit_log=log2(R.positive(unit)), alive=alive, unit_max=unit_max,
        label=label,
    )  # fmt: skip


@triton.jit
def with_slopes(row, total, a, b, WANT: tl.constexpr, AT_LABEL: tl.constexpr):
    """The row, whose divergence is known: with the slopes of all of its logits.

    total: of the others; NaN where it is not known yet, since its gradient needs no constant.
    """
    if AT_LABEL is None:
        return row
    else:
        label, scale_slope, entropy_slope = row.label, row.scale_slope, row.entropy_slope
        inf = float("inf")
        factor, slope = AT_LABEL(total_of(row, total), row.c, a, b, label)
        infinite = tl.abs(slope) == inf  # then the row has no gradient
        factor = tl.where(beside_others(label) & (infinite == 0), factor, 0.0)
        # A student without other columns is certain of its label, whatever the logit.
        slope = tl.where(infinite | (label.s_odds == inf), 0.0, slope)
        if records.SCALE_SLOPE & WANT:
            mine, rest = probabilities(label.s_odds)
            apart = distance(row) * LN2
            scale_slope = factor * scale_slope + times(slope, apart)
            entropy_slope = rest * entropy_slope - times(mine * rest, apart * apart)
        label = records.replace(label, factor=factor, slope=slope)
        return records.replace(
            row, scale_slope=scale_slope, entropy_slope=entropy_slope, label=label
        )


@triton.jit
def beside_others(label):
    """Whether both sides have other columns, as far as that is known."""
    return (label.s_odds != float("inf")) & (label.t_odds != float("inf"))


@triton.jit
def total_of(row, total):
    """The sum of the others' values: 0 where a side has none, but for a mass that nothing meets;
    NaN where the label or another column is, of which a divergence may ask no more than this."""
    s_odds, t_odds = row.label.s_odds, row.label.t_odds
    total = tl.where(beside_others(row.label) | (total == float("inf")), total, 0.0)
    return tl.where((s_odds == s_odds) & (t_odds == t_odds), total, float("nan"))


@triton.jit
def divergence(row, total, a, b, OUTER: tl.constexpr):
    if len(row.label) == 0:
        return OUTER(total, row.c, a, b)
    else:
        return OUTER(total_of(row, total), row.c, a, b, row.label)


@triton.jit
def distance(row):
    """log2 of the student's label over the others' geometric mean, weighted by q."""
    return row.label.s_odds + (row.s_log - row.mean_log2_exp)


@triton.jit
def entropy_of_all(odds, entropy):
    """From that of the others."""
    _, rest = probabilities(odds)
    return binary_entropy(odds) + rest * entropy


@triton.jit
def student_entropy(row):
    entropy = (row.s_log - row.mean_log2_exp) * LN2
    if len(row.label) != 0:
        entropy = entropy_of_all(row.label.s_odds, entropy)
    return tl.where(row.alive, entropy, 0.0)


@triton.jit
def agreement(row, others):
    """Whether both sides have one best column; others: whether they have among the others."""
    if len(row.label) == 0:
        return others
    else:
        z, y = row.label.s_logit, row.label.t_logit
        others = tl.where((z <= row.s_max) & (y <= row.t_max), others, 0.0)
        return tl.where((z >= row.s_max) & (y >= row.t_max), 1.0, others)


@triton.jit
def sum_of_logits(stats, row):
    """The sum of (z - unit_max) SHARE."""
    if len(row.label) == 0:
        return stats.total
    else:
        total = stats.total + stats.share * (row.s_max - row.unit_max)
        return total + R.SHARE * (row.label.s_logit - row.unit_max)


# --- the state ---------------------------------------------------------------------------------


@triton.jit
def write_label(state, index, rows, live, row):
    if len(row.label) != 0:
        M.row_store(state + FACTOR * rows, row.label.factor, index, live)
        M.row_store(state + SLOPE * rows, row.label.slope, index, live)
        M.row_store(state + ODDS * rows, row.label.s_odds, index, live)
        M.row_store(state + LOGIT * rows, row.label.s_logit, index, live)


@triton.jit
def restore_label(state, rows, row, unit, live, AT_LABEL: tl.constexpr):
    """`row` beside its label; state: of these rows."""
    if AT_LABEL is None:
        return row
    else:
        zero = tl.zeros_like(row.s_max)
        factor = M.row_load(state, FACTOR * rows, live, 0.0)
        slope = M.row_load(state, SLOPE * rows, live, 0.0)
        odds = M.row_load(state, ODDS * rows, live, 0.0)
        logit = M.row_load(state, LOGIT * rows, live, 0.0)
        label = records.Label(logit, zero, odds, zero, zero, factor, slope)
        return with_label(row, label, unit, row.t_entropy, row.alive)
