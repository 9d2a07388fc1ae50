"""Rows whose columns are spread over owners: shards in one process, each a thread.

Triton's interpreter serves one thread at a time: a thread hands the baton on where it gathers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")

import fastkd
from fastkd import autograd, moments, sharding
from fastkd.eager import columns, shards
from fastkd.kernels import tuning
from fastkd.problem import CE, KD, Coefficients, Problem, packed_numbers
from fastkd.sharding import Merge, registered
from tests import oracle
from tests.cases import KINDS
from tests.closeness import assert_close, assert_zero
from tests.conftest import DEVICE

BACKENDS = ["torch", "triton"]
V = 45


class Table:
    """What the owners of rows share: the columns edges[i] to edges[i + 1] are the i-th's."""

    def __init__(self, edges: Sequence[int]) -> None:
        self.edges, self.size = edges, len(edges) - 1
        self.pieces: list[Any] = [None] * self.size
        self.full, self.baton = threading.Barrier(self.size, timeout=60), threading.Lock()


class Shard(Merge):
    """One of several owners in this process; it counts what it gathers."""

    def __init__(self, rank: int, table: Table) -> None:
        self.rank, self.size, self.table, self.gathers = rank, table.size, table, 0
        self.first_column, self.columns = table.edges[rank], table.edges[-1]

    def gather(self, fields: Tensor) -> Tensor:
        self.gathers += 1
        table = self.table
        table.pieces[self.rank] = fields.clone()
        table.baton.release()
        try:
            table.full.wait()
            found = torch.stack(table.pieces)
            table.full.wait()  # before anybody puts down the next
        finally:
            table.baton.acquire()
        return found


def on_shards(edges: Sequence[int], work: Callable[[Shard], Any]) -> list[Any]:
    """The results of work(shard) of every owner."""
    table, errors = Table(edges), []
    results: list[Any] = [None] * table.size

    def one(shard: Shard) -> None:
        with table.baton:
            try:
                results[shard.rank] = work(shard)
            except BaseException as error:
                errors.append(error)
                table.full.abort()

    shards = [Shard(rank, table) for rank in range(table.size)]
    with ExitStack() as stack:
        for shard in shards:
            stack.enter_context(registered(f"shard {shard.rank}", shard))
        threads = [threading.Thread(target=one, args=(shard,)) for shard in shards]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results


class Case(NamedTuple):
    """Rows of a loss and its options. padding: columns of the last owner beyond the vocabulary."""

    divergence: fastkd.Divergence
    student: Tensor
    teacher: Tensor
    temperature: Tensor
    own: Tensor | None = None
    labels: Tensor | None = None
    alpha: float = 1.0
    smoothing: float = 0.0
    entropy: float = 0.0
    metrics: bool = False
    standardize: bool = False
    padding: int = 0

    @property
    def targets(self) -> Tensor | None:
        """The labels, where the kernels read them."""
        return None if self.labels is None else self.labels.to(DEVICE)

    @property
    def counted(self) -> Tensor | None:
        sigmoids = self.targets is None or self.targets.dim() > 1
        return None if sigmoids else self.targets != -100

    @property
    def coefficients(self) -> Coefficients:
        rows = torch.linspace(0.5, 1.5, len(self.student), device=DEVICE)
        kd, ce, entropy = (x * rows for x in (self.alpha, 1 - self.alpha, self.entropy))
        return Coefficients(
            kd, ce if self.labels is not None else None, entropy if self.entropy else None
        )

    def leaves(self, shard: Shard) -> list[Any]:
        """This owner's columns of student and teacher, and the temperatures."""
        columns = slice(*shard.table.edges[shard.rank : shard.rank + 2])
        padding = self.padding if shard.rank == shard.size - 1 else 0
        sides = (x[:, columns] for x in (self.student, self.teacher))
        sides = (torch.nn.functional.pad(x, (0, padding), value=50.0) for x in sides)
        found = (*sides, self.temperature, self.own)
        return [None if x is None else x.float().clone().to(DEVICE).requires_grad_() for x in found]

    def problem(self, shard: Shard, backend: str, leaves: Sequence[Any]) -> Problem:
        first, last = shard.table.edges[shard.rank : shard.rank + 2]
        labels = self.targets
        if labels is not None and labels.dim() > 1:
            labels = labels[:, first:last].contiguous()
        problem = Problem(
            leaves[0][None], leaves[1][None], *leaves[2:], labels, self.counted, self.smoothing,
            self.divergence.name, *self.divergence.parameters, last - first,
            merge=f"shard {shard.rank}", temperature_trains=True,
        )  # fmt: skip
        return moments.standardized(problem, backend) if self.standardize else problem

    def outcome(self, shard: Shard, backend: str) -> dict[str, Any]:
        """Values and all gradients, with one pair of gathers for all."""
        leaves = self.leaves(shard)
        problem = self.problem(shard, backend, leaves)
        name, (a, b), factor = self.divergence.dual()
        values, *_ = autograd.Rows.apply(
            self.entropy != 0, self.metrics, backend, name, packed_numbers(a, b, factor),
            *problem.flat(),
        )  # fmt: skip
        forward = shard.gathers
        self.coefficients.weigh(values).sum().backward()
        found = {"values": values.detach(), "forward": forward}
        for name, leaf in zip(GRADIENTS, leaves, strict=True):
            found[name] = None if leaf is None else leaf.grad
        return found | {"backward": shard.gathers - forward}

    def fused(
        self, shard: Shard, backend: str, reads_teacher: bool = True, inplace: bool = True
    ) -> dict[str, Any]:
        """Loss rows and the student's gradient at once, in place of the logits or beside them."""
        leaves = [None if x is None else x.detach() for x in self.leaves(shard)]
        problem = self.problem(shard, backend, leaves)._replace(temperature_trains=False)
        problem = problem if reads_teacher else problem._replace(teacher=None)
        module = autograd.operators.backend(backend, problem)
        out = problem.student if inplace else None
        loss, _, gradient = module.fused(problem, self.coefficients, self.metrics, out)
        return {"loss": loss, "student": gradient.view(leaves[0].shape), "forward": shard.gathers}

    def truth(self) -> dict[str, Any]:
        """By definition, of all columns."""
        leaves = [
            None if x is None else x.float().double().requires_grad_()
            for x in (self.student, self.teacher, self.temperature, self.own)
        ]
        loss, metrics = oracle.distillation_loss(
            leaves[0], leaves[1], self.labels,
            divergence=(self.divergence.name, vars(self.divergence)), temperature=leaves[2],
            teacher_temperature=leaves[3], scale_by_temperature=False,
            standardize=self.standardize, alpha=self.alpha, label_smoothing=self.smoothing,
            entropy_weight=self.entropy, reduction="none",
        )  # fmt: skip
        rows = loss * torch.linspace(0.5, 1.5, len(loss)).double()
        rows.sum().backward()
        found = {"loss": rows.detach(), "metrics": [x for x in metrics if x is not None]}
        for name, leaf in zip(GRADIENTS, leaves, strict=True):
            found[name] = None if leaf is None else leaf.grad
        return found


GRADIENTS = ("student", "teacher", "temperature", "own temperature")


def hold(case: Case, edges: Sequence[int], backend: str) -> None:
    """Values and gradients are right, bit-equal between owners, and few gathers find them."""
    true = case.truth()
    most = 3 if case.standardize else 2
    found = on_shards(edges, lambda shard: case.outcome(shard, backend))
    for one in found:
        assert one["backward"] == 0
        assert 0 < one["forward"] <= most
        for name in ("values", *GRADIENTS[2:]):  # whole on every owner
            assert (one[name] is None) == (found[0][name] is None)
            assert one[name] is None or torch.equal(one[name], found[0][name]), name
    values = found[0]["values"]
    if case.metrics:
        kinds = (0, 1, 2, 3, 4) if case.labels is not None else (0, 2, 3, 4)
        for kind, metric in zip(kinds, true["metrics"], strict=True):
            assert_close(values[kind], metric)
    assert_close(case.coefficients.weigh(values), true["loss"])
    for name in GRADIENTS[2:]:
        if true[name] is not None:
            assert_close(found[0][name], true[name], "gradient")
    close_by_rows(_whole(found, "student"), true["student"])
    assert_close(_whole(found, "teacher"), true["teacher"], "gradient")

    found = on_shards(edges, lambda shard: case.fused(shard, backend))
    assert all(
        one["forward"] <= most and torch.equal(one["loss"], found[0]["loss"]) for one in found
    )
    assert_close(found[0]["loss"], true["loss"])
    close_by_rows(_whole(found, "student"), true["student"])


def close_by_rows(ours: Tensor, true: Tensor) -> None:
    """Each row by its own size, however small: a saturated one's is."""
    for one, exact in zip(ours, true, strict=True):
        if exact.count_nonzero():
            assert_close(one, exact, "gradient")
        else:
            assert_zero(one)


def _whole(found: Sequence[dict[str, Any]], name: str) -> Tensor:
    """The owners' columns side by side, without the padding, whose gradient is 0."""
    gradient = torch.cat([one[name] for one in found], -1)
    assert not gradient[:, V:].count_nonzero()
    return gradient[:, :V]


def rows(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    teacher = 2 * torch.randn(count, V)
    student = teacher + torch.randn(count, V)
    return student, teacher, torch.linspace(0.7, 3.0, count)


LABELS = torch.tensor([3, -100, 40, 44])
EDGES = {
    "one": (0, V), "two": (0, 20, V), "three": (0, 1, 36, V), "four": (0, 11, 11, 30, V),
    "empty ends": (0, 0, 17, V, V),
}  # fmt: skip


@pytest.mark.parametrize("divergence", [fastkd.ForwardKL(), fastkd.JSD(0.3), fastkd.Renyi(0.4)])
def test_nothing_is_made_on_the_default_device(divergence):
    """With one temperature for all rows, as the call has it."""
    student, teacher, temperature = rows()
    case = Case(divergence, student, teacher, temperature, labels=LABELS, metrics=True)

    def values(shard: Shard, device: str) -> Tensor:
        problem = case.problem(shard, "torch", case.leaves(shard))
        problem = problem._replace(student_temperature=torch.tensor(2.0).expand(len(student)))
        with torch.device(device), torch.no_grad():
            found, state = sharding.run(problem.merge, shards.phases(problem, False, True))
            upstream = Coefficients(torch.ones_like(found[KD]), None, None)
            gradient, _ = shards.backward(problem, state, upstream, True, False)
        return torch.cat([found.flatten(), gradient.flatten()])

    plain, ours = (
        on_shards(EDGES["two"], lambda shard, device=device: values(shard, device))
        for device in ("cpu", "meta")
    )
    for one, other in zip(plain, ours, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_every_divergence(divergence, backend, force):
    """Of three owners, one of a single column; logits far from 0."""
    force("sweep")
    student, teacher, temperature = rows(2)
    case = Case(divergence, student - 300, teacher - 200, temperature, own=torch.tensor([1.5, 2.0]))
    hold(case, EDGES["three"], backend)


@pytest.mark.parametrize("divergence", [*KINDS, None], ids=str)
def test_a_gradient_beside_the_logits(divergence, monkeypatch):
    """The student's exponentials stay there between the sweeps: of owners far above others and far
    below, and in blocks of which a row is computed anew, in fp64. None: cross-entropy.
    """
    monkeypatch.setattr(columns, "largest", lambda problem: 2)
    student, teacher, temperature = rows(8)
    student[0, :20] -= 30
    student[1, 20:] -= 2
    student[2, :20] -= 3
    student[4] = teacher[4] + 1e-4 * torch.randn(V)
    teacher[6, :20] = -torch.inf
    student[7, 20:] -= 25
    labels = None if divergence else torch.tensor([3, 40, 44, 0, 3, 44, 21, 25])
    case = Case(
        divergence or fastkd.ForwardKL(), student, teacher, temperature, labels=labels,
        alpha=1.0 if divergence else 0.0,
    )  # fmt: skip

    def fused(shard: Shard) -> dict[str, Any]:
        return case.fused(shard, "torch", reads_teacher=divergence is not None, inplace=False)

    close_by_rows(_whole(on_shards(EDGES["two"], fused), "student"), case.truth()["student"])


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_a_gradient_in_place_of_the_logits(divergence, standardize):
    """Which are read for all of its parts before it overwrites them."""
    student, teacher, temperature = rows()
    case = Case(
        divergence, student, teacher, temperature, labels=torch.tensor([3, 40, 44, 0]), alpha=0.6,
        entropy=0.2, standardize=standardize,
    )  # fmt: skip
    found = on_shards(EDGES["two"], lambda shard: case.fused(shard, "torch"))
    close_by_rows(_whole(found, "student"), case.truth()["student"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edges", EDGES.values(), ids=EDGES)
def test_every_option(edges, backend, force):
    """Labels in some shards, out of others; a row that does not count; smoothing over all."""
    force("sweep")
    case = Case(
        fastkd.JSD(0.3), *rows(), labels=LABELS, alpha=0.6, smoothing=0.1, entropy=0.2,
        metrics=True, padding=3,
    )  # fmt: skip
    hold(case, edges, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", [fastkd.ForwardKL(), fastkd.Jeffreys()], ids=str)
def test_standardized(divergence, backend, force):
    force("sweep")
    case = Case(divergence, *rows(), labels=LABELS, alpha=0.9, standardize=True)
    hold(case, EDGES["four"], backend)


@pytest.mark.parametrize(
    ("divergence", "edges", "plan"),
    [
        (fastkd.DKD(1.0, 8.0), "three", "sweep"),
        pytest.param(fastkd.NKD(1.5), "two", "split", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_label_that_another_owner_has(divergence, edges, plan, force):
    """Which its divergence looks at: its logits on both sides come by the owner's statistics."""
    force(plan)
    student, teacher, temperature = rows()
    case = Case(
        divergence, student - 300, teacher - 200, temperature, labels=LABELS, alpha=0.6,
        smoothing=0.1, entropy=0.2, metrics=True, padding=3, standardize=plan == "split",
    )  # fmt: skip
    hold(case, EDGES[edges], "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "divergence", [fastkd.ReverseKL(), fastkd.Jeffreys(), fastkd.TVD()], ids=str
)
def test_saturated(divergence, backend, force):
    """The student is certain of one column; what its owner lacks the others have to see."""
    force("split")
    student, teacher, _ = rows(3)
    student[torch.arange(3), torch.tensor([2, 30, 44])] += 14.0
    hold(Case(divergence, student, teacher, torch.ones(3)), EDGES["two"], backend)


@pytest.mark.parametrize(
    "divergence",
    [
        fastkd.ReverseKL(), fastkd.JSD(0.5), fastkd.SkewReverseKL(0.1), fastkd.SkewReverseKL(1e-3),
        fastkd.TVD(),
    ],
    ids=str,
)  # fmt: skip
def test_a_certain_student_far_from_the_teacher(divergence):
    """The larger its slopes, and the nearer to their bound, the fewer digits fp32 leaves."""
    student, teacher = torch.randn(64, V), 30 * torch.randn(64, V)
    student[:, 2] += torch.linspace(4, 12, 64)
    case = Case(divergence, student, teacher, torch.ones(64))
    found = on_shards(EDGES["two"], lambda shard: case.outcome(shard, "torch"))
    true = case.truth()
    assert_close(case.coefficients.weigh(found[0]["values"]), true["loss"])
    close_by_rows(_whole(found, "student"), true["student"])


ONE_SWEEP = [
    fastkd.ForwardKL(), fastkd.ReverseKL(), fastkd.Jeffreys(0.7, 0.3), fastkd.AlphaDivergence(0.5),
    fastkd.AlphaDivergence(0.1), fastkd.Renyi(2.0),
]  # fmt: skip


@pytest.mark.parametrize("divergence", ONE_SWEEP, ids=str)
def test_rows_in_fp64(divergence):
    """Those whose sides are near to each other, of an owner that finds so; far from 0 all join."""
    teacher = 2 * torch.randn(3, V)
    student = teacher + torch.randn(3, V)
    student[1] = teacher[1] + 1e-2 * torch.randn(V)
    student[2, :20] = teacher[2, :20] + 1e-2 * torch.randn(20)
    case = Case(divergence, student - 3000, teacher - 2000, torch.full((3,), 0.5))
    true = case.truth()

    def found(shard: Shard) -> dict[str, Any]:
        leaves = [None if x is None else x.detach() for x in case.leaves(shard)]
        problem = case.problem(shard, "torch", leaves)
        shared = leaves[2][:1].expand(3)  # of all rows: fp32 scales and shifts at once
        problem = problem._replace(student_temperature=shared, temperature_trains=False)
        values, state = sharding.run(problem.merge, shards.phases(problem, False, False))
        student, _ = shards.backward(problem, state, case.coefficients, True, False)
        return {"exact": state[0].tolist(), "values": values[KD], "student": student[0]}

    owners = on_shards(EDGES["two"], found)
    assert [one["exact"] for one in owners] == [[0, 1, 1], [0, 1, 0]]
    rows = case.coefficients.kd
    assert_close(owners[0]["values"] * rows, true["loss"])
    close_by_rows(_whole(owners, "student"), true["student"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend, force):
    """-inf on both sides: in some columns, in all of an owner, in all but one column."""
    force("sweep")
    student, teacher, temperature = rows(3)
    student[0, ::3] = teacher[0, ::3] = -torch.inf
    student[1, 20:] = teacher[1, 20:] = -torch.inf
    student[2, :44] = teacher[2, :44] = -torch.inf
    case = Case(fastkd.SkewKL(0.1), student, teacher, temperature, entropy=0.3)
    hold(case, EDGES["two"], backend)


def test_labels_out_of_range(force):
    """Of a kernel, which nobody asks before: NaN with every owner, and not another owner's."""
    force("sweep")
    student, teacher, temperature = rows(3)
    labels = torch.tensor([V, -7, 5])
    case = Case(fastkd.ForwardKL(), student, teacher, temperature, labels=labels, alpha=0.5)
    for one in on_shards(EDGES["two"], lambda shard: case.outcome(shard, "triton")):
        assert one["values"][CE].isnan().tolist() == [True, True, False]
        assert one["values"][KD].isfinite().all()
        assert one["student"].isnan().all(-1).tolist() == [True, True, False]


@pytest.mark.parametrize("columns", [0, 1, 4096])
def test_a_shard_is_swept_however_narrow(columns):
    plan = tuning.schedule(4, columns, 4, torch.device("cpu"), once=True, swept=True)
    assert (plan.kind, plan.splits) == ("sweep", 1)


def test_cross_entropy_alone(force):
    """Without a teacher the kernels have no sums to gather."""
    force("sweep")
    student, teacher, temperature = rows()
    case = Case(fastkd.TVD(), student, teacher, temperature, labels=LABELS, alpha=0.0)

    def fused(shard: Shard) -> dict[str, Any]:
        return case.fused(shard, "triton", reads_teacher=False)

    found, true = on_shards(EDGES["two"], fused), case.truth()
    assert [one["forward"] for one in found] == [1, 1]
    assert_close(found[0]["loss"], true["loss"])
    close_by_rows(_whole(found, "student"), true["student"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [0.0, 0.5])
def test_sigmoids(reverse, backend):
    student, teacher, temperature = rows(3)
    labels = (torch.rand(3, V) < 0.3).float()
    case = Case(
        fastkd.Bernoulli(1.0, reverse), student, teacher, temperature, labels=labels, alpha=0.7,
        entropy=0.2, metrics=True, padding=2,
    )  # fmt: skip
    hold(case, EDGES["four"], backend)
