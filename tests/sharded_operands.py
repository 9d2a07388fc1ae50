"""Cases of heads and listed teachers beside a sharded student, for tests/test_sharded.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastkd
from fastkd import chunks, linear, sharding
from tests import running, sharded
from tests.closeness import assert_close

N, V, H, WIDER = 6, 23, 7, 11
LABELS = torch.tensor([3, 22, -100, 0, 12, 5])
ROWS = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.7, 1.0])


def summed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def heads() -> None:
    """Column-parallel, the student's and a wider teacher's, which may be on every rank in whole."""
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    other, other_weight = torch.randn(N, WIDER), torch.randn(V, WIDER) / 2
    mine = sharded.columns(V)
    truth = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    z = truth[0] @ truth[1].t() + truth[2]
    y = other.double() @ other_weight.double().t()
    for kind, settings in (
        (fastkd.ForwardKL(), {"alpha": 0.5, "temperature": ROWS}),
        (fastkd.JSD(beta=0.2), {"standardize": True, "entropy_weight": 0.1}),
    ):
        true, _ = running.defined(z, y, LABELS, divergence=kind, **settings)
        wanted = torch.autograd.grad(true, truth, torch.tensor(0.7).double(), retain_graph=True)
        for mode in ("forward", "backward"):
            for theirs in (other_weight[mine], other_weight):
                leaves = [hidden.clone(), weight[mine].clone(), bias[mine].clone()]
                for leaf in leaves:
                    leaf.requires_grad_()
                copied = sharding.copied(leaves[0], dist.group.WORLD)
                loss = fastkd.distillation_loss(
                    fastkd.LinearHead(copied, *leaves[1:]), fastkd.LinearHead(other, theirs),
                    LABELS, divergence=kind, vocab_size=V, gradient=mode, group=dist.group.WORLD,
                    **settings,
                )  # fmt: skip
                with sharded.Counted() as backward:
                    loss.backward(torch.tensor(0.7))
                assert backward.count == 1  # of `copied`
                assert_close(loss, true)
                assert_close(leaves[0].grad, wanted[0], "gradient")
                for leaf, grad in zip(leaves[1:], wanted[1:], strict=True):
                    assert_close(leaf.grad, grad[mine], "gradient")


def a_part_of_the_gradient() -> None:
    """Without `copied` each rank has its part of the gradient to hidden states."""
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    teacher, mine = torch.randn(N, V), sharded.columns(V)
    part = hidden.clone().requires_grad_()
    head = fastkd.LinearHead(part, weight[mine])
    fastkd.distillation_loss(head, teacher, vocab_size=V, group=dist.group.WORLD).backward()
    alone = hidden.clone().requires_grad_()
    fastkd.distillation_loss(fastkd.LinearHead(alone, weight), teacher).backward()
    assert_close(summed(part.grad), alone.grad.double(), "gradient")
    assert (part.grad - alone.grad).abs().max() > 0.01 * alone.grad.abs().max()


def trained_teacher_head() -> None:
    """Gradients to both heads, whose chunks gather together."""
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    other, other_weight = torch.randn(N, WIDER), torch.randn(V, WIDER) / 2
    mine = sharded.columns(V)
    truth = [x.double().requires_grad_() for x in (hidden, weight, other, other_weight)]
    true, _ = running.defined(
        truth[0] @ truth[1].t(), truth[2] @ truth[3].t(), divergence="reverse_kl", temperature=2.0
    )
    true.backward()
    leaves = [x.clone() for x in (hidden, weight[mine], other, other_weight[mine])]
    for leaf in leaves:
        leaf.requires_grad_()
    with sharded.Counted() as gathers:
        loss = fastkd.distillation_loss(
            fastkd.LinearHead(*leaves[:2]), fastkd.LinearHead(*leaves[2:]), vocab_size=V,
            divergence="reverse_kl", temperature=2.0, teacher_grad=True, group=dist.group.WORLD,
        )  # fmt: skip
    assert gathers.count == 1
    loss.backward()
    assert_close(loss, true)
    for leaf, full in zip(leaves[::2], truth[::2], strict=True):
        assert_close(summed(leaf.grad), full.grad, "gradient")
    for leaf, full in zip(leaves[1::2], truth[1::2], strict=True):
        assert_close(leaf.grad, full.grad[mine], "gradient")


def lists() -> list[Any]:
    scores = torch.randn(N, V) * 2
    values, indices = scores.log_softmax(-1).topk(5)
    indices[1, 3] = -1
    return [
        *(fastkd.TopK(indices, values, tail=tail) for tail in ("bucket", "renormalize", "drop")),
        fastkd.TopK(indices, values, tail="label"),
        fastkd.Sampled(torch.randint(V, (N, 6)), torch.randint(1, 4, (N, 6))),
    ]


def listed() -> None:
    """Ids are those of the whole vocabulary; each rank uses its own."""
    teachers, student, mine = lists(), torch.randn(N, V) * 2, sharded.columns(V)
    for teacher in teachers:
        for kind in (fastkd.ForwardKL(), fastkd.ReverseKL(), fastkd.SkewKL(alpha=0.2)):
            for settings in (
                {}, {"alpha": 0.4, "entropy_weight": 0.2, "label_smoothing": 0.1},
                {"temperature": ROWS, "teacher_temperature": 1.0, "reduction": "none"},
                {
                    "alpha": 0.4, "temperature": 2.0, "teacher_temperature": 1.0,
                    "gradient": "backward",
                },
            ):  # fmt: skip
                one_list(student, teacher, mine, {"divergence": kind} | settings)


def one_list(student: Tensor, teacher: Any, mine: slice, settings: dict[str, Any]) -> None:
    found = []
    for columns, group in ((mine, dist.group.WORLD), (slice(None), None)):
        leaf = student[:, columns].clone().requires_grad_()
        given = {
            name: x.clone().requires_grad_() if isinstance(x, Tensor) else x
            for name, x in settings.items()
        }
        with sharded.Counted() as gathers:
            loss, metrics = fastkd.distillation_loss(
                leaf, teacher, LABELS, vocab_size=V, group=group, return_metrics=True, **given
            )
        assert gathers.count == (2 if group else 0)
        with sharded.Counted() as gathers:
            loss.backward(torch.linspace(0.3, 2.0, max(loss.numel(), 1)).view(loss.shape))
        assert gathers.count == 0
        temperature_grad = getattr(given.get("temperature"), "grad", None)
        grad = leaf.grad
        if group:
            pieces: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(pieces, grad)
            grad = torch.cat(pieces, -1)
        found.append((loss, grad, temperature_grad, *metrics))
    for number, (ours, alone) in enumerate(zip(*found, strict=True)):
        if alone is not None and alone[alone.isfinite()].count_nonzero():
            kind = "gradient" if number in (1, 2) else "value"
            assert_close(ours, alone.detach().double(), kind)


def overlap() -> None:
    """A chunk's gather is on its way while the next one's logits are made, and its sums taken."""
    events: list[str] = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, product = getattr(dist, name), linear.logits

    class Watched:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def watched(*arguments: Any, async_op: bool = False, **keywords: Any) -> Any:
        events.append("gather" if async_op else "gather at once")
        work = gather(*arguments, async_op=async_op, **keywords)
        return Watched(work) if async_op else work

    def making(*arguments: Any) -> Tensor:
        events.append("product")
        return product(*arguments)

    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    head = fastkd.LinearHead(hidden, weight[sharded.columns(V)].requires_grad_())
    setattr(dist, name, watched)
    linear.logits = making
    budget, chunks.CPU_BYTES, chunks.LEAST_ROWS = chunks.CPU_BYTES, 1, 2
    first, more, last = ["product", "gather"], ["product", "gather", "wait"], ["wait"]
    try:
        for mode in ("forward", "backward"):
            events.clear()
            loss = fastkd.distillation_loss(
                head, torch.randn(N, V), vocab_size=V, gradient=mode, group=dist.group.WORLD
            )
            assert events == first + 2 * more + last
            loss.backward()
    finally:
        setattr(dist, name, gather)
        linear.logits = product
        chunks.CPU_BYTES, chunks.LEAST_ROWS = budget, 16


CASES = {
    f"operands {case.__name__}": case
    for case in (heads, overlap, a_part_of_the_gradient, trained_teacher_head, listed)
}
