"""Rows that break losses, their columns spread over owners, each a thread: held to the oracle."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import fastkd
from fastkd import sharding
from tests import running, test_nasty_rows
from tests.closeness import assert_close

EDGES = {3: (0, 1, 1, 3), 17: (0, 5, 5, 17), 70: (0, 30, 64, 70)}  # by the number of columns


class Table:
    """What the owners share."""

    def __init__(self, edges: tuple[int, ...]) -> None:
        self.edges, self.size = edges, len(edges) - 1
        self.pieces: list[Any] = [None] * self.size
        self.all = threading.Barrier(self.size, timeout=30)


class Owner(sharding.Group):
    """One of them, as a process of a group would be."""

    def __init__(self, rank: int, table: Table) -> None:
        self.rank, self.size, self.table = rank, table.size, table
        self.first_column, self.columns = table.edges[rank], table.edges[-1]
        self.mine = table.edges[rank + 1] - self.first_column
        self.process_group = SimpleNamespace(group_name=f"owner {rank}")

    start = sharding.Merge.start

    @property
    def slice(self) -> slice:
        return slice(self.first_column, self.first_column + self.mine)

    def gather(self, fields: Tensor) -> Tensor:
        self.table.pieces[self.rank] = fields.clone()
        self.table.all.wait()
        found = torch.stack(self.table.pieces)
        self.table.all.wait()
        return found


def of_owners(columns: int, find: Callable[[Owner], Any]) -> list[Any]:
    """What each finds."""
    table = Table(EDGES[columns])
    found: list[Any] = [None] * table.size

    def work(rank: int) -> None:
        owner = Owner(rank, table)
        try:
            with sharding.registered(sharding.name_of(owner), owner):
                found[rank] = find(owner)
        except Exception as error:
            found[rank] = error
            table.all.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(table.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, Exception) and not isinstance(one, threading.BrokenBarrierError):
            raise one
    return found


def everything(student: Tensor, teacher: Tensor, backend: str | None, **given: Any) -> Any:
    """What running.everything gives, of the columns of all owners."""
    if backend is None:
        return running.everything(student, teacher, backend=None, **given)
    found = of_owners(student.size(-1), lambda owner: of_owner(owner, student, teacher, given))
    joined = {}
    for name, first in found[0].items():
        pieces = [one[name] for one in found]
        if name in ("to student", "to teacher"):
            joined[name] = torch.cat(pieces, -1)
        else:
            joined[name] = first
            assert all(torch.equal(x.nan_to_num(), first.nan_to_num()) for x in pieces)
    return joined


def of_owner(owner: Owner, student: Tensor, teacher: Tensor, given: dict[str, Any]) -> Any:
    mine = owner.slice
    given = {"student": student[:, mine], "teacher": teacher[:, mine]} | given
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in given.items()
        if isinstance(value, Tensor)
    }
    sides = leaves["student"], leaves["teacher"]
    rest = {name: leaves.get(name, value) for name, value in given.items()}
    del rest["student"], rest["teacher"]
    loss, metrics = fastkd.distillation_loss(
        *sides, teacher_grad=True, return_metrics=True, backend="torch", group=owner, **rest
    )
    upstream = torch.tensor(-0.3)
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream, materialize_grads=True)
    figures = {name: x for name, x in metrics._asdict().items() if x is not None}
    return {"loss": loss.detach(), **figures} | {
        f"to {name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def as_given(group: Any, shape: Any, vocab_size: Any) -> Any:
    return group if isinstance(group, Owner) else sharding.LOCAL


def check(divergence: Any, sides: Any, heat: Any, standardize: bool) -> None:
    with (
        mock.patch.object(sharding, "of_group", as_given),
        mock.patch.object(test_nasty_rows, "everything", everything),
    ):
        test_nasty_rows.check(divergence, sides, heat, standardize, "torch")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(*test_nasty_rows.CASES)
def test_owners(divergence, sides, heat, standardize):
    check(divergence, sides, heat, standardize)


def test_rows_far_apart_with_a_small_divergence():
    """By its parameter."""
    divergence = fastkd.SkewKL(0.999)
    for _ in range(20):
        teacher = 1e-3 * torch.randn(1, 17)
        student = teacher + 1e-3 * torch.rand(1) * torch.randn(1, 17)
        check(divergence, (student, teacher), {"temperature": torch.tensor(1e-3)}, False)


@pytest.mark.parametrize("orders", [(1.5, 3.0), (1.5, 1.0), (1.0, 1.0)])
def test_alpha_beta_of_certain_sides_that_differ_little(orders):
    teacher = torch.randn(30, 70)
    teacher[:, 3] += torch.linspace(10.0, 13.0, 30)
    student = teacher + torch.randn(30, 70)
    settings = {"divergence": fastkd.AlphaBeta(*orders), "reduction": "sum"}

    def find(owner):
        return running.run(
            student[:, owner.slice], teacher[:, owner.slice], group=owner, backend="torch",
            **settings,
        )  # fmt: skip

    with mock.patch.object(sharding, "of_group", as_given):
        gradient = torch.cat([gradient for _, gradient in of_owners(70, find)], -1)
    for rows in zip(gradient, running.truth(student, teacher, **settings)[1], strict=True):
        assert_close(*rows, "gradient")


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_logit_beside_a_listed_teacher(broken, tail):
    """Each owner's gradient shows it, wherever the logit is, and whether it is listed."""
    student, other = torch.randn(2, 3, 17).unbind()
    teacher = fastkd.TopK.from_logits(other, 4, tail)
    listed = teacher.indices[1].tolist()
    for column in (listed[0], next(i for i in range(17) if i not in listed)):
        given = student.clone()
        given[1, column] = broken

        def find(owner, given=given):
            leaf = given[:, owner.slice].clone().requires_grad_()
            heat = torch.ones(3, requires_grad=True)
            fastkd.distillation_loss(
                leaf, teacher, group=owner, temperature=heat, teacher_temperature=1.0
            ).backward()
            return torch.cat([leaf.grad, heat.grad[:, None]], -1)

        with mock.patch.object(sharding, "of_group", as_given):
            for gradient in of_owners(17, find):
                assert gradient[1].isnan().all()
                assert gradient[[0, 2]].isfinite().all()
