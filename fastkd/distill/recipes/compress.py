"""Pruning, quantisation, and what distillation brings back.

The 64-128-128-10 teacher is itself the network to compress, and the uncompressed one teaches:
teacher to student, not the other way round.

    magnitude pruning: the largest 5 % of each layer's weights stay (torch.nn.utils.prune);
    quantisation: weights rounded to b bits with one scale per output (round, not floor), and the
        gradient passed straight through the rounding while training goes on;
    recovery: 400 steps on the same 100 images, on their labels, or on the teacher's logits.

Size is what the weights need: 4 bytes each, or 6 (with a 16-bit index) for those that stay, or b
bits and a scale per output. Latency is of one 64-128-128-10 network in eager PyTorch, with int8
weights and activations by torchao: neither zeros nor int8 make so small a network faster there.

Expected: int8 loses nothing, coarser steps do, and on the same few images the teacher's logits
bring back more than the labels. No figures were measured before. Mind the learning rate: at a third
of the one used here, distillation of the network pruned to 5 % is far from its end after 400
steps, and the labels seem the better choice.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

from fastkd.distill.errors import hush_torchao

from .digits import Digits, Loss, MLPs, cross_entropy, kd, train
from .report import Report, Table, bars, need

DENSE = "dense"
KEPT = 0.05
BITS = (8, 3, 2)
RECOVERY = {"labels": cross_entropy(), "teacher, T=4": kd(temperature=4.0)}


class Magnitude(prune.BasePruningMethod):
    """Keeps the `share` of the weights [M, in, out] that are largest, in each of M networks."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, share: float) -> None:
        self.share = share

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        sizes = t.detach().abs().flatten(1)
        count = max(round(self.share * sizes.size(1)), 1)
        threshold = sizes.topk(count, dim=-1).values[:, -1]
        return default_mask * (t.detach().abs() >= threshold[:, None, None])


def run(quick: bool) -> Report:
    latency = latencies(quick)  # first: it needs torchao
    digits = Digits(quick)
    dense = digits.networks
    scores = {DENSE: digits.accuracy(dense)[0]}
    parameters = dict(dense.named_parameters())
    count, outputs = (
        sum(each.numel() for name, each in parameters.items() if kind in name) // digits.seeds
        for kind in ("weight", "bias")
    )
    sizes = {DENSE: 4 * (count + outputs)}
    compressed: dict[str, tuple[Any, float, float]] = {
        f"pruned to {KEPT:.0%}": (pruned, KEPT, 6 * KEPT * count + 4 * outputs)
    }
    for bits in BITS:
        size = bits * count / 8 + 8 * outputs
        compressed[f"{bits} bits"] = (quantised, bits, size)
    for name, (method, amount, size) in compressed.items():
        sizes[name] = round(size)
        scores[name] = digits.accuracy(method(dense, amount))[0]
        for by, loss in RECOVERY.items():
            student = recover(digits, method(dense, amount), loss)
            scores[f"{name}, {by}"] = digits.accuracy(student)[0]
    table = Table("Accuracy, compressed and recovered", scores, DENSE)
    lines = ["Size of the weights in bytes:"]
    lines += [f"  {name:14} {size:7d}  {sizes[DENSE] / size:5.1f}x" for name, size in sizes.items()]
    lines += ["Latency in microseconds, median, one thread (zeros are multiplied like any number):"]
    lines += [
        f"  {name:14} " + "  ".join(f"{rows} rows {value:6.0f}" for rows, value in each.items())
        for name, each in latency.items()
    ]
    return Report(
        "Compress: pruning and quantisation, recovered by distillation (digits)",
        [table],
        claims(table),
        {"bytes": sizes, "microseconds": latency},
        text="\n".join(lines),
        draw=lambda figure: draw(figure, table),
    )


def claims(table: Table) -> dict[str, bool]:
    damaged = [f"pruned to {KEPT:.0%}", "2 bits"]
    labels, teacher = RECOVERY

    def gain(name: str) -> float:
        return (
            (table.scores[f"{name}, {teacher}"] - table.scores[f"{name}, {labels}"]).mean().item()
        )

    return {
        "8 bits lose under 0.2 points": table.difference("8 bits")[0] > -0.2,
        f"pruning to {KEPT:.0%} and 2 bits lose over 5 points": all(
            table.difference(name)[0] < -5 for name in damaged
        ),
        "distillation recovers over half of what they lost": all(
            table.difference(f"{name}, {teacher}")[0] > table.difference(name)[0] / 2
            for name in damaged
        ),
        "it recovers more than labels on the same images do": all(
            gain(name) > 0 for name in damaged
        ),
    }


def pruned(dense: MLPs, share: float) -> MLPs:
    """A copy whose small weights are masked; the masks stay while it trains."""
    networks = copy.deepcopy(dense)
    for layer in networks.layers:
        Magnitude.apply(layer, "weight", share)
    return networks


def quantised(dense: MLPs, bits: int) -> MLPs:
    """A copy whose weights are rounded wherever they are used."""
    networks = copy.deepcopy(dense)
    for layer in networks.layers:
        register_parametrization(layer, "weight", Rounded(bits))
    return networks


class Rounded(nn.Module):
    """Weights [M, in, out] on a symmetric grid of b bits, with a scale for each output."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.top = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().amax(1, keepdim=True) / self.top
        rounded = (weight / scale).round().clamp(-self.top, self.top) * scale
        return weight + (rounded - weight).detach()  # the gradient goes straight through


def recover(digits: Digits, networks: MLPs, loss: Loss) -> MLPs:
    x, y, teacher = digits.x[:, :100], digits.y[:, :100], digits.teacher[:, :100]
    return train(networks, x, lambda z, step: loss(z, teacher, y, step), digits.steps)


def latencies(quick: bool) -> dict[str, dict[int, float]]:
    """Microseconds by number of rows."""
    hush_torchao()
    ao = need("torchao.quantization", "torchao")
    dense = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    zeros, int8 = copy.deepcopy(dense), copy.deepcopy(dense)
    for layer in list(zeros)[::2]:
        prune.l1_unstructured(layer, "weight", 1 - KEPT)
        prune.remove(layer, "weight")
    ao.quantize_(int8, ao.Int8DynamicActivationInt8WeightConfig())
    networks = {"dense": dense, "pruned": zeros, "int8": int8}
    return {
        name: {rows: microseconds(network, torch.rand(rows, 64), quick) for rows in (1, 1024)}
        for name, network in networks.items()
    }


@torch.inference_mode()
def microseconds(network: nn.Module, x: Tensor, quick: bool) -> float:
    times = []
    for _ in range(10 if quick else 100):
        start = time.perf_counter()
        network(x)
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[len(times) // 2]


def draw(figure: Any, table: Table) -> None:
    figure.set_size_inches(8, 4.5)
    axes = figure.subplots()
    bars(axes, table)
    axes.set_xlim(-15, 2)
