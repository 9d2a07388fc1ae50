"""Cases of compiled functions beside a sharded student, for tests/test_sharded.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_utils import CrossRefFakeMode
from torch.distributed.tensor import (
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import fastkd
from fastkd import checks, sharding
from tests import sharded

N, V, H = 6, 23, 5
MODES = ("forward", "backward")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LABELS = torch.tensor([3, 22, -100, 0, 12, 5])


def same(function: Callable[..., Tensor], collectives: tuple[int, int], *leaves: Tensor) -> None:
    """Compiled in one piece, the loss and all gradients are the same, and so the collectives."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled(*(leaf.clone().requires_grad_() for leaf in leaves))  # counting is not to be traced
    found = []
    for call in (function, compiled):
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        with sharded.Counted() as forward:
            loss = call(*given)
        with sharded.Counted() as backward:
            loss.backward(torch.tensor(0.7))
        assert (forward.count, backward.count) == collectives
        found.append([loss.detach(), *(leaf.grad for leaf in given)])
    for ours, plain in zip(*found, strict=True):
        assert ours.count_nonzero()
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-8)


def compiled() -> None:
    student, teacher = torch.randn(2, N, V)
    mine = sharded.columns(V)
    own, other = student[:, mine], teacher[:, mine]
    hidden, weight = torch.randn(N, H), torch.randn(V, H)[mine]
    given: dict[str, Any] = {"vocab_size": V, "group": dist.group.WORLD}

    def loss(z: Any, y: Any, **settings: Any) -> Tensor:
        found: Tensor = fastkd.distillation_loss(z, y, LABELS, **given | settings)
        return found

    mixed: dict[str, Any] = {
        "divergence": fastkd.JSD(beta=0.3), "alpha": 0.5, "entropy_weight": 0.1,
        "gradient": "backward",
    }  # fmt: skip
    same(lambda z: loss(z, other, standardize=True, **mixed), (3, 0), own)
    same(
        lambda z, y, heat: loss(z, y, temperature=heat, teacher_grad=True, **mixed), (2, 0),
        own, other, torch.tensor(1.5),
    )  # fmt: skip
    group = dist.group.WORLD
    assert group is not None
    same(
        lambda h, w: loss(fastkd.LinearHead(sharding.copied(h, group), w), other, alpha=0.4),
        (1, 1), hidden, weight,
    )  # fmt: skip
    logs, ids = teacher.log_softmax(-1).topk(4)
    same(lambda z: loss(z, fastkd.TopK(ids, logs), alpha=0.4, gradient="backward"), (2, 0), own)


def shapes_that_a_compiler_sees() -> None:
    """Of what each operator gives back, of all kinds of operands and both backends."""
    student, teacher = torch.randn(2, N, V)
    mine = sharded.columns(V)
    own, other = student[:, mine], teacher[:, mine]
    listed = fastkd.TopK(*teacher.log_softmax(-1).topk(4)[::-1])
    head = fastkd.LinearHead(torch.randn(N, H, requires_grad=True), torch.randn(V, H)[mine])
    heat = {"temperature": torch.tensor(1.5, requires_grad=True)}
    every: list[tuple[Any, Any, dict[str, Any]]] = [
        (own, other, {}), (own, other, heat | {"alpha": 0.5, "return_metrics": True}),
        (own, other, {"standardize": True, "entropy_weight": 0.1, "alpha": 0.5}),
        (own, listed, {}), (own, listed, {"alpha": 0.5}), (head, other, {"standardize": True}),
        (own, other.clone().requires_grad_(), heat | {"teacher_grad": True}),
        (own, fastkd.Ensemble([other, 2 * other]), {}),
        (own, other, {"alpha": 0.5, "labels": torch.rand(N, V)}),
        (own, other, {"divergence": fastkd.Bernoulli(), "labels": None} | heat),
    ]  # fmt: skip
    kinds = [fastkd.JSD(beta=0.3), fastkd.AlphaDivergence(alpha=0.5), fastkd.Renyi(alpha=2.0)]
    every += [(own, other, {"divergence": kind}) for kind in kinds]
    calls = [("torch", *case) for case in every]
    if checks.HAS_TRITON and INTERPRETED:
        calls += [("triton", *case) for case in (every[1], every[2], every[9])]
    for backend, z, y, settings in calls:
        given: dict[str, Any] = {"labels": LABELS} | settings
        only = backend == "triton" or "temperature" in given
        for mode in ("backward",) if only else MODES:
            leaf = z.clone().requires_grad_() if isinstance(z, Tensor) else z
            with CrossRefFakeMode():
                found = fastkd.distillation_loss(
                    leaf, y, vocab_size=V, group=dist.group.WORLD, gradient=mode, backend=backend,
                    **given,
                )  # fmt: skip
                (found[0] if isinstance(found, tuple) else found).backward()


def compiled_dtensors() -> None:
    """Logits as leaves, and as products of a sharded head in the function that is compiled."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()))
    student, teacher = torch.randn(2, N, V)
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    rows, both = (Shard(0), Replicate()), (Shard(0), Shard(1))
    y, labels = distribute_tensor(teacher, mesh, both), distribute_tensor(LABELS, mesh, rows)

    def loss(z: Tensor, *others: Any, **settings: Any) -> Tensor:
        found: Any = fastkd.distillation_loss(z, *others, num_items=7, **settings)
        return found.to_local()

    z, whole = distribute_tensor(student, mesh, both), distribute_tensor(teacher, mesh, rows)
    jsd = fastkd.JSD(beta=0.3)
    same(
        lambda z, y: loss(z, y, labels, alpha=0.4, divergence=jsd, teacher_grad=True), (2, 0), z, y
    )
    same(lambda z: loss(z, whole), (1, 0), z)
    h = distribute_tensor(hidden, mesh, rows)
    w = distribute_tensor(weight, mesh, (Replicate(), Shard(0)))
    same(lambda h, w: loss(h @ w.t(), y, labels, alpha=0.4, temperature=2.0), (1, 0), h, w)


CASES = {case.__name__: case for case in (compiled, compiled_dtensors, shapes_that_a_compiler_sees)}
