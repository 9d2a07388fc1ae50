"""The job that the recipes share: scikit-learn's digits, a teacher, and many students at once.

Every seed has its own split, teacher and initial student. All seeds, and all settings that differ
by numbers alone, train together as one batch of independent models: a sweep is one training.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd

from .report import need

TRAINING = 1000  # of 1797 images; the others test

# loss(student logits [M, N, C], teacher logits [M, N, C], labels [M, N], step): a sum over models.
Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Linears(nn.Module):
    """M independent linear layers: [M, N, in] to [M, N, out]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(weight.size(0), 1, weight.size(2)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class MLPs(nn.Module):
    """M = copies x seeds independent networks: [M, N, in] to [M, N, out]. Those of one seed start
    out equal.
    """

    def __init__(self, seeds: int, widths: Iterable[int], copies: int = 1) -> None:
        super().__init__()
        self.models = copies * seeds
        self.layers = nn.ModuleList()
        for layer, (width, out) in enumerate(pairwise(widths)):
            draws = [
                torch.rand(width, out, generator=_generator(seed, layer)) for seed in range(seeds)
            ]
            weight = (2 * torch.stack(draws) - 1) / math.sqrt(width)
            self.layers.append(Linears(weight.repeat(copies, 1, 1)))

    def forward(
        self, x: Tensor, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = torch.relu(x)
            if dropout:
                kept = torch.rand(x.shape, generator=generator) >= dropout
                x = x * kept / (1 - dropout)
            x = layer(x)
        return x


class Digits:
    """Splits and trained teachers of `seeds` seeds.

    Attributes:
        x, y: training images [seeds, 1000, 64] in [0, 1] and labels [seeds, 1000].
        x_test, y_test: the 797 others.
        teacher: the teachers' logits on x, [seeds, 1000, 10].
    """

    def __init__(self, quick: bool = False) -> None:
        self.quick, self.seeds = quick, 2 if quick else 8
        bunch = need("sklearn.datasets", "scikit-learn").load_digits()
        images = torch.tensor(bunch.data, dtype=torch.float32) / 16
        labels = torch.tensor(bunch.target)
        orders = torch.stack(
            [torch.randperm(len(labels), generator=_generator(s)) for s in range(self.seeds)]
        )
        train, test = orders[:, :TRAINING], orders[:, TRAINING:]
        self.x, self.y = images[train], labels[train]
        self.x_test, self.y_test = images[test], labels[test]
        # 97.7 % of the others are right.
        self.networks = self.teachers(self.x, noise=0.1)
        with torch.no_grad():
            self.teacher = self.networks(self.x)

    def teachers(self, x: Tensor, noise: float = 0.0) -> MLPs:
        """Networks of 128-128-10 on all training images as x has them, with dropout."""
        networks = MLPs(self.seeds, (x.size(-1), 128, 128, 10))
        optimizer = adam(networks.parameters(), 2e-3)
        generator, rows = _generator(0), torch.arange(self.seeds)[:, None]
        for _ in range(30 if self.quick else 600):
            batch = torch.randint(TRAINING, (self.seeds, 128), generator=generator)
            seen = x[rows, batch]
            if noise:
                seen = seen + noise * torch.randn(seen.shape, generator=generator)
            logits = networks(seen, dropout=0.3, generator=generator)
            loss = F.cross_entropy(logits.flatten(0, 1), self.y[rows, batch].flatten())
            optimizer.zero_grad()
            (self.seeds * loss).backward()
            optimizer.step()
        return networks

    def students(
        self,
        loss: Loss,
        copies: int = 1,
        images: int = 100,
        extra: Iterable[nn.Parameter] = (),
    ) -> MLPs:
        """Train copies x seeds students 64-16-10 on the first images of each seed's split; the
        model at [copy * seeds + seed] is that of copy and seed.
        """
        x, y, teacher = (
            each[:, :images].repeat(copies, *[1] * (each.dim() - 1))
            for each in (self.x, self.y, self.teacher)
        )
        networks = MLPs(self.seeds, (64, 16, 10), copies)
        return train(networks, x, lambda z, step: loss(z, teacher, y, step), self.steps, extra)

    @property
    def steps(self) -> int:
        return 20 if self.quick else 400

    def accuracy(self, networks: MLPs, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """In per cent, [copies, seeds], on x [seeds, N, 64] and y: the test images, or others."""
        x, y = (self.x_test, self.y_test) if x is None or y is None else (x, y)
        copies = networks.models // self.seeds
        with torch.no_grad():
            answers = networks(x.repeat(copies, 1, 1)).argmax(-1)
        right = (answers == y.repeat(copies, 1)).double().mean(-1)
        return 100 * right.view(copies, self.seeds)

    def score(self, loss: Loss, **options: Any) -> Tensor:
        """Accuracy of the students that `loss` trains: [seeds], or [copies, seeds]."""
        scores = self.accuracy(self.students(loss, **options))
        return scores if "copies" in options else scores[0]


def train(
    networks: MLPs,
    x: Tensor,
    loss: Callable[[Tensor, int], Tensor],
    steps: int,
    extra: Iterable[nn.Parameter] = (),
) -> MLPs:
    """The networks, after steps on the loss of their logits on all of x, and of the step."""
    optimizer = adam([*networks.parameters(), *extra], 3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss(networks(x), step).backward()
        optimizer.step()
    return networks


def adam(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=learning_rate, fused=True)


def kd(**settings: Any) -> Loss:
    """`distillation_loss` with these settings: a mean over each model's rows, summed over models.

    Temperatures may be sequences, one per copy of the seeds.
    """

    def loss(student: Tensor, teacher: Tensor, labels: Tensor, step: int) -> Tensor:
        own = dict(settings)
        for name in ("temperature", "teacher_temperature"):
            if isinstance(own.get(name), (list, tuple)):
                own[name] = per_model(own[name], student)
        return fastkd.distillation_loss(student, teacher, labels, num_items=student.size(-2), **own)

    return loss


def cross_entropy(**settings: Any) -> Loss:
    """Hard labels only."""
    return kd(alpha=0.0, **settings)


def per_model(values: Sequence[float] | Tensor, logits: Tensor) -> Tensor:
    """One value per copy, as one per row of the logits of copies x seeds models."""
    values = torch.as_tensor(values)
    models = values.repeat_interleave(logits.size(0) // len(values))
    return models[:, None].expand(logits.shape[:-1])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _generator(*seed: int) -> torch.Generator:
    number = sum(part * 1000**place for place, part in enumerate(seed))
    return torch.Generator().manual_seed(number)
