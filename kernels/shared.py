"""Loss and gradient of long rows, each swept by several programs that run at the same time.

One cooperative launch takes the place of a launch for each phase: the phases are those of
`sweep.py`, and what its launches hand on, these programs exchange by words (`words.py`). With fewer
rows under way, what a sweep has read is still in L2 when the next one wants it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels import phases as P
from fastkd.kernels import records
from fastkd.kernels import rows as R
from fastkd.kernels import walk as W
from fastkd.kernels.arguments import Targets, number
from fastkd.kernels.pieces import read_statistics
from fastkd.kernels.sweep import phases


@triton.jit
def lacks(index, rows, temperatures, divergence, pieces, WANT: tl.constexpr, TILE: tl.constexpr):
    """Whether c lacks digits that the gradient needs, so that the sums come before it."""
    a, _, _ = P.singles(divergence.a, divergence.b, 0.0)
    temper = P.temper_of(temperatures, index, rows, None, a)
    stats, _, _, _ = read_statistics(
        pieces.statistics, pieces.turn, rows, temper, WANT, TILE.pieces, TILE.padded
    )
    row = R.summarize(stats, temper, divergence.constant, WANT)
    return P.lacking(row, R.saturated(stats) | R.huge(stats, temper))


@triton.jit
def shared(
    student, teacher, gradient, extent, temperatures, targets, factors, divergence, outputs,
    pieces, SUMMED: tl.constexpr, WANT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All phases; a group of TILE.splits programs works off every row that is its own.

    SUMMED: whether the sums are wanted. pieces: mailboxes, see `words.py`.
    """
    group, split = tl.program_id(0) // TILE.splits, tl.program_id(0) % TILE.splits
    groups, rows = tl.num_programs(0) // TILE.splits, number(extent.rows)
    all_count = Targets(targets.labels, None, targets.smoothing)
    index = group.to(tl.int64)
    turn = index * 0
    while index < rows:
        live = True
        if targets.counted is not None:
            live = tl.load(targets.counted + index) != 0
        if live:
            turn += 1
            words = records.replace(pieces, turn=turn)
            phases(
                index, split, student, teacher, gradient, extent, temperatures, all_count,
                factors, divergence, outputs, words, P.STATISTICS, P.STATISTICS, WANT, TILE,
            )  # fmt: skip
            first = SUMMED and records.LATE & WANT == 0
            if records.LATE & WANT and records.REST & WANT:
                first = lacks(index, rows, temperatures, divergence, words, WANT, TILE)
            if first:
                phases(
                    index, split, student, teacher, gradient, extent, temperatures,
                    all_count, factors, divergence, outputs, words, P.SUMS, P.SUMS, WANT, TILE,
                )  # fmt: skip
            phases(
                index, split, student, teacher, gradient, extent, temperatures, all_count,
                factors, divergence, outputs, words, P.GRADIENT, P.GRADIENT, WANT, TILE,
            )  # fmt: skip
        else:
            W.blank(index, split, student, teacher, gradient, extent, TILE)
        index += groups
