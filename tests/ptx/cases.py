"""The list of problems: every kernel, schedule, option, dtype and placement of operands.

To add a kernel, add a group that launches it; the first case of `every` should fail first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

import fastkd

from .launches import in_place, kl_div, listed, replayed, shards, shared
from .problems import Run, loss

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
DTYPES = (BF16, FP32, FP16)
FORWARD_KL, JSD = fastkd.ForwardKL(), fastkd.JSD(beta=0.3)
DIVERGENCES = (
    FORWARD_KL, fastkd.ReverseKL(), fastkd.Jeffreys(0.3, 1.2), JSD, fastkd.SkewKL(alpha=0.1),
    fastkd.SkewReverseKL(alpha=0.1), fastkd.TVD(), fastkd.AlphaDivergence(alpha=0.5),
    fastkd.Renyi(alpha=2.0),
)  # fmt: skip
ENDS = (
    fastkd.SkewKL(alpha=0.0), fastkd.SkewReverseKL(alpha=0.0), fastkd.AlphaDivergence(alpha=2.0),
    fastkd.AlphaDivergence(alpha=-0.5), fastkd.Renyi(alpha=0.5), fastkd.JSD(beta=0.5),
    fastkd.Jeffreys(),
)  # fmt: skip
LABEL_AWARE = (fastkd.DKD(1.0, 8.0), fastkd.NKD(1.5))
# Outer and inner rows, and columns, for each way to lay a row out on 132 processors.
SHAPES = (
    (1, 5, 10), (5, 1, 37), (2, 3, 100), (1, 3, 1000), (2, 1, 2049), (1, 2, 4096),
    (1, 3, 5000), (2, 2, 8195), (1, 2, 16387),
)  # fmt: skip
PLACES = ("plain", "slice", "wide", "shifted", "transposed", "slice3", "wide8")
KINDS = ("plain", "full", "labels", "rows", "std", "stdfull")
# Of each group the sixth and every tenth after it: test_ptx.py holds them to meet every option.
FIRST_IN_CI, IN_CI = 5, 10


class Case(NamedTuple):
    name: str
    run: Run


def every() -> list[Case]:
    found = [case for group in GROUPS for case in group()]
    assert len({case.name for case in found}) == len(found), "two cases have one name"
    return found


def few() -> list[Case]:
    """Those that stand for all, of each group at least one."""
    groups = [list(group()) for group in GROUPS]
    return [one for group in groups for one in group[FIRST_IN_CI % len(group) :: IN_CI]]


def _loss(
    divergence: fastkd.Divergence, shape: tuple[int, int, int], dtype: torch.dtype, mode: str,
    place: str, kind: str, seed: int = 0, nature: str = "", upstream: float = 1.0,
    teacher_dtype: torch.dtype | None = None,
) -> Case:  # fmt: skip
    if dtype == FP16 and mode in ("fused", "inplace"):
        mode = "backward"  # which fastkd asks for, as the loss scale comes in between
    words = [
        str(divergence), "x".join(map(str, shape)), NAMES[dtype], mode, place, kind,
        *([nature] if nature else []), *([NAMES[teacher_dtype]] if teacher_dtype else []),
    ]  # fmt: skip
    run = loss(divergence, shape, dtype, mode, place, kind, seed, nature, upstream, teacher_dtype)
    return Case(" ".join(words), run)


def _place(mode: str, turn: int) -> str:
    """fastkd takes logits in place where their rows are its own."""
    place = PLACES[turn % len(PLACES)]
    beside = mode == "inplace" and place in ("slice", "slice3", "shifted")
    return ("plain", "wide", "transposed")[turn % 3] if beside else place


def logits_in_place() -> Iterator[Case]:
    for n, (shape, kind) in enumerate(itertools.product(SHAPES, ("plain", "full", "stdfull"))):
        place = ("plain", "wide", "transposed", "wide8")[n % 4]
        dtype = DTYPES[(n + n // 3) % 3]
        yield _loss(FORWARD_KL, shape, dtype, "inplace", place, kind, shape[2], upstream=3.0)


def slices_in_place() -> Iterator[Case]:
    widths = (37, 1000, 5000, 8195, 16389)
    grid = itertools.product(widths, ("slice", "slice3", "shifted"), (False, True))
    for n, (columns, place, labelled) in enumerate(grid):
        if (n + n // 6) % 2 and not labelled:
            continue
        dtype, divergence = DTYPES[n % 3], DIVERGENCES[n // 6 % 2]
        name = f"slice {divergence} {columns} {NAMES[dtype]} {place}{' labels' * labelled}"
        yield Case(name, in_place(divergence, (2, 2, columns), dtype, place, labelled))


def padded() -> Iterator[Case]:
    """Columns that are a multiple of less than the stride between rows is."""
    for columns, dtype, mode, place, kind in (
        (252, BF16, "inplace", "pad16", "plain"), (250, BF16, "backward", "pad16", "plain"),
        (100, BF16, "inplace", "pad16", "full"), (100, FP16, "fused", "stride16", "full"),
        (250, FP32, "inplace", "pad16", "plain"), (101, FP32, "all", "pad16", "full"),
        (60, BF16, "inplace", "stride16", "labels"), (500, BF16, "forward", "pad16", "plain"),
        (1004, BF16, "inplace", "pad16", "full"), (20, BF16, "inplace", "pad16", "plain"),
        (36, FP16, "inplace", "pad16", "full"), (3001, BF16, "inplace", "pad16", "plain"),
        (100, BF16, "inplace", "pad16", "stdfull"), (5001, BF16, "inplace", "pad16", "full"),
        (250, BF16, "inplace", "teacher16", "plain"), (1002, BF16, "inplace", "teacher16", "plain"),
    ):  # fmt: skip
        yield _loss(FORWARD_KL, (1, 4, columns), dtype, mode, place, kind, columns)
    yield _loss(FORWARD_KL, (1, 600, 252), BF16, "inplace", "pad16", "plain", 252)
    yield _loss(fastkd.Bernoulli(1, 1), (1, 4, 100), BF16, "inplace", "pad16", "heads full")


def far_apart() -> Iterator[Case]:
    """Offsets beyond 2^31 entries."""
    for columns, dtype, mode, place, kind in (
        (1000, BF16, "inplace", "far30", "full"), (1000, BF16, "backward", "far31", "std"),
        (5000, BF16, "inplace", "far31", "labels"), (8195, FP32, "inplace", "far30", "full"),
        (16387, BF16, "inplace", "far30", "full"), (100, FP16, "inplace", "far31", "full"),
    ):  # fmt: skip
        shape = (1, 4, columns)
        yield _loss(FORWARD_KL, shape, dtype, mode, place, kind, columns, upstream=3.0)
    for columns, place in ((1000, "far31"), (5000, "far30")):
        heads = fastkd.Bernoulli(1, 1)
        yield _loss(heads, (1, 4, columns), BF16, "inplace", place, "heads full")


def entry_by_entry() -> Iterator[Case]:
    shapes = (
        ((4, 100), (4, 100)), ((3, 5000), (3, 5000)), ((2, 8192), (2, 8192)), ((2, 3001), (2, 1)),
        ((3, 1, 4100), (1, 2, 4100)), ((7,), (7,)),
    )  # fmt: skip
    ways = (("none", "xt"), ("sum", "x"), ("batchmean", "t"))
    grid = itertools.product(shapes, (False, True), ways)
    for n, ((shape, target), log_target, (reduction, trains)) in enumerate(grid):
        dtype = DTYPES[(n + n // 3) % 3]
        name = f"kl_div {shape} {target} {NAMES[dtype]}{' log' * log_target} {reduction} {trains}"
        yield Case(name, kl_div(shape, target, dtype, log_target, reduction, trains))
    for dtype, place in zip(DTYPES, ("slice", "transposed", "slice"), strict=True):
        run = kl_div((4, 4097), (4, 4097), dtype, False, "none", "xt", place)
        yield Case(f"kl_div {place} {NAMES[dtype]}", run)


def many_rows() -> Iterator[Case]:
    """Several to a warp and to a program."""
    shapes = (
        (1, 300, 10), (9, 1000, 10), (1, 1500, 100), (3, 200, 37), (1, 700, 16), (5, 1, 1),
        (3, 1, 2), (1, 9, 17),
    )  # fmt: skip
    for n, shape in enumerate(shapes):
        for mode, kind in (("inplace", "full"), ("backward", "plain")):
            if shape[2] == 1 and kind == "plain":
                continue  # all that it computes is 0
            yield _loss(FORWARD_KL, shape, DTYPES[n % 3], mode, "plain", kind, shape[2])


def divergences() -> Iterator[Case]:
    shapes = ((2, 3, 100), (1, 3, 1000), (1, 3, 5000), (2, 2, 8195), (1, 2, 16387))
    turn = 0
    for d, divergence in enumerate(DIVERGENCES):
        for (n, shape), mode in itertools.product(enumerate(shapes), ("inplace", "backward")):
            if divergence is FORWARD_KL and mode == "inplace":
                continue
            turn += 1
            kind = KINDS[turn % len(KINDS)] if turn % 3 else "plain"
            # With smoothed labels a mask makes all losses infinite.
            bounded = divergence.name in ("jsd", "tvd") and kind not in ("full", "stdfull")
            nature = "masked" if bounded and n % 2 == 0 else ""
            dtype, place = DTYPES[(d + n) % 3], _place(mode, turn)
            yield _loss(divergence, shape, dtype, mode, place, kind, turn, nature)
    for n, columns in enumerate((10, 100, 1000, 5000, 16389)):
        for divergence in (fastkd.ReverseKL(), JSD):
            shape, dtype = (2, 3, columns), (BF16, FP32)[n % 2]
            yield _loss(divergence, shape, dtype, "inplace", "plain", "plain", n, "saturated")
    for divergence in ENDS:
        yield _loss(divergence, (1, 2, 5000), FP32, "inplace", "plain", "plain")


def multi_label() -> Iterator[Case]:
    widths = (10, 37, 1000, 5000, 8195, 16387)
    for n, (columns, mode) in enumerate(itertools.product(widths, ("inplace", "all"))):
        full = n % 4 in (0, 3)
        heads, kind = fastkd.Bernoulli(1, int(full)), "heads full" if full else "heads"
        yield _loss(heads, (2, 2, columns), DTYPES[n % 3], mode, _place(mode, n), kind)


def edges() -> Iterator[Case]:
    """Widths of resident rows; boundaries of a sweep's tiles and of splits."""
    widths = (
        16, 24, 33, 65, 127, 129, 256, 257, 384, 511, 513, 700, 1025, 1500, 2048, 3000, 3500, 4095,
        4096,
    )  # fmt: skip
    for n, columns in enumerate(widths):
        kind = ("plain", "full")[n % 2]
        yield _loss(FORWARD_KL, (1, 3, columns), DTYPES[n % 3], "inplace", "plain", kind, columns)
    longer = (4097, 4104, 8191, 8192, 8193, 12288, 12289, 16384, 16385, 20000, 33000)
    for n, columns in enumerate(longer):
        place, kind = ("plain", "slice")[n % 2], ("plain", "full")[n // 2 % 2]
        yield _loss(JSD, (1, 2, columns), DTYPES[n % 3], "fused", place, kind, columns)
    for columns in (16391, 33000, 70001):
        skew = fastkd.SkewKL(alpha=0.1)
        yield _loss(skew, (1, 2, columns), BF16, "inplace", "plain", "full", columns)
        yield _loss(FORWARD_KL, (2, 1, columns), FP32, "all", "slice", "rows", columns)


def other_gradients() -> Iterator[Case]:
    """Of the teacher and of the temperatures; out of place; the loss alone; of two dtypes."""
    grid = itertools.product((FORWARD_KL, JSD), (37, 1000, 5000, 8195))
    for n, (divergence, columns) in enumerate(grid):
        kind, dtype = ("full", "rows", "std")[n % 3], (FP32, BF16)[n % 2]
        yield _loss(divergence, (2, 2, columns), dtype, "all", "plain", kind, columns)
    for d, divergence in enumerate(DIVERGENCES):
        shape, dtype = SHAPES[(2 * d + 4) % len(SHAPES)], DTYPES[d % 3]
        yield _loss(divergence, shape, dtype, "fused", PLACES[d % len(PLACES)], KINDS[d % 4], d)
        shape, dtype = SHAPES[(d + 5) % len(SHAPES)], DTYPES[(d + 1) % 3]
        place, kind = PLACES[(d + 3) % len(PLACES)], KINDS[(d + 1) % 4]
        yield _loss(divergence, shape, dtype, "forward", place, kind, d)
    for columns in (64, 1000, 5000, 16387):
        shape, seed = (1, 3, columns), columns
        yield _loss(FORWARD_KL, shape, BF16, "fused", "plain", "plain", seed, teacher_dtype=FP32)
        yield _loss(
            DIVERGENCES[1], shape, FP32, "inplace", "plain", "full", seed, teacher_dtype=BF16
        )


def columns_of_owners() -> Iterator[Case]:
    """Of two, of three of whom one has none, and of four; 45 columns in all."""
    labelled = {"labels": torch.tensor([3, 40]), "alpha": 0.6, "smoothing": 0.1, "padding": 3}
    yield Case("shards TVD", shards(fastkd.TVD(), (0, 20, 45), {}))
    yield Case("shards JSD full", shards(JSD, (0, 20, 20, 45), labelled | {"metrics": True}))
    standardized = shards(FORWARD_KL, (0, 11, 11, 30, 45), labelled | {"standardize": True})
    yield Case("shards ForwardKL() std", standardized)


def listed_teachers() -> Iterator[Case]:
    """Whole rows and split ones, at any place in memory; more listed columns than threads."""
    for n, (divergence, columns, count) in enumerate((
        (FORWARD_KL, 5000, 7), (JSD, 8195, 64), (fastkd.ReverseKL(), 100, 100),
        (fastkd.Renyi(alpha=2.0), 16387, 300),
    )):  # fmt: skip
        mode, dtype = ("all", "fused", "inplace", "all")[n], (BF16, FP32, FP32, FP32)[n]
        place = ("plain", "slice3", "wide", "slice")[n]
        tail = "renormalize" if n == 1 else "bucket"
        name = f"listed {divergence} {columns} {count} {NAMES[dtype]} {mode} {place} {tail}"
        yield Case(name, listed(divergence, (1, 3, columns), dtype, mode, place, count, tail))


def beside_labels() -> Iterator[Case]:
    """Rows that are swept without their label."""
    grid = itertools.product(LABEL_AWARE, ((2, 3, 100), (1, 3, 1000), (1, 3, 5000), (1, 2, 16387)))
    for n, (divergence, shape) in enumerate(grid):
        mode, kind = ("inplace", "backward", "all")[n % 3], ("full", "labels")[n // 2 % 2]
        yield _loss(divergence, shape, DTYPES[n % 2], mode, _place(mode, n), kind, shape[2])
    owners = {"labels": torch.tensor([3, 40]), "alpha": 0.6, "metrics": True, "padding": 3}
    yield Case("shards DKD", shards(LABEL_AWARE[0], (0, 20, 20, 45), owners))


def shared_rows() -> Iterator[Case]:
    """By programs that run at the same time: every divergence, options, rows that do not count."""
    for d, divergence in enumerate(DIVERGENCES):
        columns, kind = (5000, 4099, 8200)[d % 3], ("plain", "full", "rows", "stdfull")[d % 4]
        mode, place = ("inplace", "forward")[d % 3 == 1], ("plain", "slice")[d % 3 == 1]
        yield _shared(divergence, (1, 7, columns), (BF16, FP32)[d % 2], mode, place, kind, d)
    for divergence in (FORWARD_KL, JSD):
        yield Case(f"shared rows replayed {divergence}", replayed(divergence, (1, 5, 4099)))
    for divergence in (DIVERGENCES[1], JSD):
        shape = (1, 6, 5000)
        yield _shared(divergence, shape, BF16, "inplace", "plain", "plain", 3, "saturated")


def _shared(divergence: fastkd.Divergence, shape: tuple[int, int, int], dtype: torch.dtype,
            mode: str, place: str, kind: str, seed: int, nature: str = "") -> Case:  # fmt: skip
    run = shared(divergence, shape, dtype, mode, place, kind, seed, nature)
    words = str(divergence), "x".join(map(str, shape)), NAMES[dtype], mode, place, kind, nature
    return Case(" ".join(("shared rows", *filter(None, words))), run)


def infinite() -> Iterator[Case]:
    """Rows whose gradient is 0: what a sweep wrote is blanked, by other threads than wrote it."""
    for columns in (5000, 16389):
        shape = (1, 2, columns)
        yield _loss(fastkd.ReverseKL(), shape, BF16, "inplace", "plain", "plain", 0, "apart")


GROUPS = (
    logits_in_place, slices_in_place, padded, far_apart, entry_by_entry, many_rows, divergences,
    multi_label, edges, other_gradients, columns_of_owners, beside_labels, listed_teachers,
    shared_rows, infinite,
)  # fmt: skip
