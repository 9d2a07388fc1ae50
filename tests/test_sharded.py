"""The vocabulary over 2 and 4 real processes, against the oracle on the whole of it."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastkd
from fastkd import checks, sharding, tracing
from tests import (
    running,
    sharded,
    sharded_compiled,
    sharded_dtensors,
    sharded_edges,
    sharded_operands,
    sharded_several,
    sharded_training,
)
from tests.cases import DIVERGENCES, KINDS
from tests.closeness import assert_close, assert_zero
from tests.sharded_truth import agree, everything, whole
from tests.test_label_aware import Decoupled

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


class Hellinger(fastkd.Divergence):
    """One of a test's own, by its value alone."""

    name = "hellinger of test_sharded"

    @staticmethod
    def value(lp, lq, a, b):
        return 0.5 * ((lp / 2).exp() - (lq / 2).exp()) ** 2


N, V = 5, 23
ROWS = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.7])
WEIGHT = torch.tensor([1.0, 0.0, 2.5, 0.3, 1.0])
LABELS = torch.tensor([3, 17, -100, 0, 12])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed": {
        "alpha": 0.4, "label_smoothing": 0.2, "entropy_weight": 0.3, "temperature": 2.0,
        "weight": WEIGHT, "reduction": "sum",
    },
    "rows": {"temperature": ROWS, "teacher_temperature": ROWS.flip(0), "reduction": "none"},
    "shared temperature": {
        "temperature": torch.tensor(1.5), "entropy_weight": -0.2, "reduction": "batchmean",
    },
    "standardized": {
        "standardize": True, "temperature": ROWS, "alpha": 0.5, "entropy_weight": 0.1,
        "num_items": 7,
    },
    "padded": {"vocab_size": V - 5, "alpha": 0.7, "scale_by_temperature": False},
}  # fmt: skip


# --- cases ------------------------------------------------------------------------------------


def every_option(divergence: Any, options: dict[str, Any]) -> None:
    student, teacher = torch.randn(2, N, V) * 2
    student[3, 8] = teacher[3, 8] = -math.inf
    agree(student, teacher, LABELS, divergence=divergence, **options)


def masked(divergence: Any) -> None:
    """Whole shards, whole rows, both sides; rows that are certain; rows that do not count."""
    student, teacher = torch.randn(2, N, V) * 2
    first = -(-V // dist.get_world_size())
    for side, row, columns in (
        (student, 0, slice(0, first)), (teacher, 0, slice(0, first)), (teacher, 1, slice(first, V)),
        (student, 2, slice(0, 4)), (student, 3, slice(0, V)),
    ):  # fmt: skip
        side[row, columns] = -math.inf
    student[4, 20] += 60
    agree(student, teacher, torch.tensor([V - 1, 1, 9, 3, 5]), divergence=divergence)


def near(divergence: Any) -> None:
    """A divergence of 1e-7 and less, which fp32 could not tell from 0."""
    student = torch.randn(N, V) * 2
    agree(student, student + 1e-4 * torch.randn(N, V), divergence=divergence, reduction="none")


def hot(divergence: Any) -> None:
    student, teacher = torch.randn(2, N, V) * 2
    for temperature in (1e3, 1e9):
        agree(student, teacher, divergence=divergence, temperature=temperature)


def certain(divergence: Any) -> None:
    """A student that is nearly one-hot against a broad teacher, and far from 0."""
    student, teacher = torch.randn(2, N, V)
    student[torch.arange(N), torch.tensor([0, 5, 11, 17, 22])] += 14
    agree(student + 1000, teacher - 300, divergence=divergence, reduction="none")


def offset() -> None:
    """Logits far from 0 at a low temperature, where a product with 1 / T rounds by whole units."""
    student, teacher = 100 + torch.randn(2, N, V) / 500
    for kind in (fastkd.ReverseKL(), fastkd.JSD(beta=0.3)):
        agree(student, teacher, divergence=kind, temperature=1e-3, reduction="none")


def empty_shard() -> None:
    size = 2 * dist.get_world_size() + 1 if dist.get_world_size() > 2 else 1
    student, teacher = torch.randn(2, N, size)
    assert sharded.columns(size).stop >= sharded.columns(size).start
    labels = torch.tensor([0, size - 1, 0, -100, 0])
    for divergence in KINDS:
        if size > 1:
            agree(student, teacher, labels, divergence=divergence, alpha=0.5, temperature=ROWS)
            agree(student, teacher, labels, divergence=divergence, standardize=True)


def nothing_counts() -> None:
    student, teacher = torch.randn(2, N, V)
    student[0], teacher[1] = math.nan, math.nan
    agree(student, teacher, torch.full((N,), -100), alpha=0.5)


def faults_stay_visible() -> None:
    student, teacher = torch.randn(2, N, V)
    student[1, 2], teacher[3, V - 1], student[4, 4] = math.nan, math.nan, math.inf
    for divergence in KINDS:
        ours = everything(student, teacher, LABELS, divergence=divergence, reduction="none")
        broken = torch.tensor([False, True, False, True, True])
        assert torch.equal(ours["loss"].isnan(), broken)
        assert torch.equal(ours["to student"].isnan().all(-1), broken)
        assert torch.equal(ours["to student"].isnan().any(-1), broken)


def no_rows() -> None:
    student, teacher = torch.randn(2, 0, V)
    loss = everything(student, teacher, None, reduction="sum")["loss"]
    assert loss == 0


def multi_label() -> None:
    student, teacher = torch.randn(2, N, V) * 3
    student[0, 1] = teacher[0, 1] = -math.inf
    labels = torch.randint(2, (N, V)).double()
    for settings in (
        {}, {"alpha": 0.3, "temperature": ROWS, "entropy_weight": 0.2, "reduction": "none"},
    ):  # fmt: skip
        for kind in (fastkd.Bernoulli(), fastkd.Bernoulli(forward=0.5, reverse=1.5)):
            ours = everything(student, teacher, labels, divergence=kind, **settings)
            true = running.everything(
                student, teacher, labels, divergence=kind, backend=None, **settings
            )
            for name in true:
                if true[name].count_nonzero():
                    assert_close(ours[name], true[name], "gradient" if "to " in name else "value")


def by_label() -> None:
    student, teacher = torch.randn(2, N, V) * 2
    kind = Decoupled()
    labels = torch.tensor([3, 22, -100, 0, 12])
    ours = everything(student, teacher, labels, divergence=kind, temperature=1.5)
    alone = student.clone().requires_grad_()
    loss = fastkd.distillation_loss(
        alone, teacher, labels, divergence=kind, temperature=1.5, backend="reference"
    )
    (gradient,) = torch.autograd.grad(loss, alone, torch.tensor(-0.3))
    assert_close(ours["loss"], loss.detach().double())
    assert_close(ours["to student"], gradient.double(), "gradient")


def replicated_teacher() -> None:
    """What has the columns of all is sliced, and nothing is sent for it."""
    student, teacher = torch.randn(2, N, V)
    student = student[:, sharded.columns(V)]
    losses = []
    for side in (teacher, teacher[:, sharded.columns(V)], torch.nn.functional.pad(teacher, (0, 9))):
        with sharded.Counted() as gathers:
            losses.append(
                fastkd.distillation_loss(student, side, vocab_size=V, group=dist.group.WORLD)
            )
        assert gathers.count == 1
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def evenly_padded() -> None:
    """As many columns on all ranks, of which the last are padding."""
    student, teacher = torch.randn(2, N, 24)
    each = 24 // dist.get_world_size()
    mine = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    for size in (V, V - 1, 11, 1):
        z = student[:, mine].clone().requires_grad_()
        loss = fastkd.distillation_loss(
            z, teacher[:, mine], vocab_size=size, divergence="reverse_kl", group=dist.group.WORLD
        )
        leaf = student.double().requires_grad_()
        true, _ = running.defined(leaf, teacher, divergence="reverse_kl", vocab_size=size)
        true.backward()
        loss.backward()
        if size == 1:
            assert loss == 0
            assert_zero(whole(z.grad))
        else:
            assert_close(loss, true)
            assert_close(whole(z.grad), leaf.grad, "gradient")


def gathers(divergence: Any, expected: int) -> None:
    student, teacher = torch.randn(2, N, V)
    mine = sharded.columns(V)
    for mode in ("forward", "backward"):
        z = student[:, mine].clone().requires_grad_()
        with sharded.Counted() as forward:
            loss = fastkd.distillation_loss(
                z, teacher[:, mine], LABELS, divergence=divergence, alpha=0.5, vocab_size=V,
                entropy_weight=0.1, gradient=mode, group=dist.group.WORLD,
            )  # fmt: skip
        with sharded.Counted() as backward:
            loss.backward()
        assert (forward.count, backward.count) == (expected, 0)


def held_gradient(divergence: Any) -> None:
    """gradient="forward", in place and not, is the gradient that the backward recomputes."""
    student, teacher = torch.randn(2, N, V)
    mine = sharded.columns(V)
    found = []
    for mode, inplace in (("backward", False), ("forward", False), ("forward", True)):
        leaf = student[:, mine].clone().requires_grad_()
        loss = fastkd.distillation_loss(
            leaf * 1, teacher[:, mine], LABELS, divergence=divergence, alpha=0.5, vocab_size=V,
            temperature=2.0, label_smoothing=0.1, gradient=mode, inplace=inplace,
            group=dist.group.WORLD,
        )  # fmt: skip
        loss.backward(torch.tensor(0.7))
        found.append(whole(leaf.grad))
    assert found[0].count_nonzero()
    assert_close(found[1], found[0].double(), "gradient")
    assert torch.equal(found[1], found[2])


def uneven() -> None:
    """A vocabulary that divides by neither world, at its full size."""
    total = 151669
    student, teacher = torch.randn(2, 3, total) * 2
    agree(student, teacher, torch.tensor([0, total - 1, -100]), alpha=0.5)


def module() -> None:
    student, teacher = torch.randn(2, N, V)
    mine = sharded.columns(V)
    criterion = fastkd.DistillationLoss(group=dist.group.WORLD, vocab_size=V, temperature=2.0)
    loss = criterion(student[:, mine], teacher[:, mine])
    true, _ = running.defined(student, teacher, temperature=2.0)
    assert_close(loss, true)


def halves() -> None:
    """bf16, whose single gradient entries are rounded once, as in one process."""
    student, teacher = (torch.randn(2, N, V) * 2).bfloat16()
    mine = sharded.columns(V)
    grads = []
    for columns, group in ((mine, dist.group.WORLD), (slice(None), None)):
        z = student[:, columns].clone().requires_grad_()
        loss = fastkd.distillation_loss(
            z, teacher[:, columns], group=group, vocab_size=V, gradient="backward"
        )
        loss.backward()
        grads.append(whole(z.grad) if group else z.grad)
    assert_close(grads[0], grads[1].double(), "gradient")


def kernels(settings: dict[str, Any]) -> None:
    """The same by the Triton backend."""
    student, teacher = torch.randn(2, 2, V) * 2
    ours = everything(student, teacher, LABELS[:2], backend="triton", **settings)
    true = running.everything(student, teacher, LABELS[:2], backend=None, **settings)
    for name, one in ours.items():
        assert_close(one, true[name], "gradient" if name.startswith("to ") else "value")


def refused() -> None:
    student, teacher = torch.randn(2, N, V)
    mine = sharded.columns(V)
    call = partial(fastkd.distillation_loss, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"hold .* columns"):  # uneven, and nobody said so
        call(student[:, mine], teacher[:, mine])
    with pytest.raises(ValueError, match="pass both split alike"):
        call(student[:, mine], teacher[:, :1], vocab_size=V)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 23\)"):
        call(student[:, mine], teacher[:, mine], torch.full((N,), V), vocab_size=V)
    with pytest.raises(NotImplementedError, match="backend='reference' has no group"):
        call(student[:, mine], teacher[:, mine], vocab_size=V, backend="reference")
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup"):
        fastkd.distillation_loss(student, teacher, group="tp")


def other_rows() -> None:
    """A gather of as many numbers on all ranks, but of other rows, tells it by itself."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = sharding.Group(dist.group.WORLD, 4 * rank, 4 * size, 4)
    with pytest.raises(ValueError, match=r"have \[6, 4.*\] rows"):
        group.gather(torch.zeros(3, 4) if rank else torch.zeros(2, 6))


def shapes_differ() -> None:
    rows = N + dist.get_rank()
    tracing.DEBUG = True
    try:
        with pytest.raises(
            ValueError, match=r"different rows or options: .*\(\d+, 5\).*\(\d+, 6\)"
        ):
            fastkd.distillation_loss(
                torch.randn(rows, 4), torch.randn(rows, 4), group=dist.group.WORLD
            )
    finally:
        tracing.DEBUG = False


def one_raises() -> None:
    """Before anything is sent: the others run into the timeout of the group, and no longer."""
    from datetime import timedelta

    group = dist.new_group(timeout=timedelta(seconds=2))
    student, teacher = torch.randn(2, N, 8)
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="alpha"):
            fastkd.distillation_loss(student, teacher, alpha=2.0, group=group)
    else:
        with pytest.raises(RuntimeError, match=r"(?i)time|closed|reset"):
            fastkd.distillation_loss(student, teacher, alpha=1.0, group=group)


def cases(world: int) -> dict[str, sharded.Case]:
    found: dict[str, sharded.Case] = {}
    for kind in [*DIVERGENCES, Hellinger()]:
        for name in OPTIONS if kind in KINDS and world == 2 else ("mixed", "standardized"):
            if world == 2 or kind in KINDS:
                found[f"{kind} {name}"] = partial(every_option, kind, OPTIONS[name])
    for case in (masked, near, hot, certain):
        for kind in KINDS if world == 2 else DIVERGENCES if case is certain else []:
            found[f"{case.__name__} {kind}"] = partial(case, kind)
    if world == 4:
        found["masked"] = partial(masked, fastkd.JSD(beta=0.5))
    for kind in KINDS if world == 2 else []:
        found[f"held gradient {kind}"] = partial(held_gradient, kind)
        one = kind.constant != "slope_sum"
        found[f"gathers {kind}"] = partial(gathers, kind, 1 if one else 2)
    for case in (
        offset, empty_shard, nothing_counts, faults_stay_visible, no_rows, multi_label, by_label,
        replicated_teacher, evenly_padded, module, halves, refused, other_rows, shapes_differ,
    ):  # fmt: skip
        found[case.__name__] = case
    if world == 2 and os.environ.get("TRITON_INTERPRET") == "1" and checks.HAS_TRITON:
        options = {"alpha": 0.6, "label_smoothing": 0.1, "temperature": ROWS[:2]}
        found["kernels"] = partial(kernels, {"divergence": fastkd.JSD(beta=0.3)} | options)
        found["kernels standardized"] = partial(kernels, {"standardize": True} | options)
    found |= sharded_dtensors.CASES | sharded_operands.CASES | sharded_several.CASES
    if world == 4:
        found["uneven"] = uneven
    else:
        found |= sharded_training.CASES | sharded_compiled.CASES | sharded_edges.CASES
    found["one raises"] = one_raises  # the last: its group is of no use afterwards
    return found


CASES = [(world, name) for world in (2, 4) for name in cases(world)]


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    found: dict[int, dict[str, str]] = {}

    def of(world: int) -> dict[str, str]:
        if world not in found:
            found[world] = sharded.on_ranks(world, cases(world), tmp_path_factory.mktemp("ranks"))
        return found[world]

    return of


@pytest.mark.parametrize(("world", "name"), CASES)
def test_ranks(faults, world, name):
    fault = faults(world).get(name)
    assert fault is None, fault
