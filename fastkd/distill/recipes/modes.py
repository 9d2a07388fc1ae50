"""Which parts of a bimodal teacher does each divergence cover?

A discretised Gaussian of free mean and width, 121 bins on [-6, 6], is fitted to a teacher with
modes at -2 and 2.5 by each divergence, from four starts; the best counts. The student is too
small for the teacher: forward KL spreads it over both modes, reverse KL puts it on one. There are
no random numbers.

Expected: the means and widths of EXPECTED, from another implementation of this experiment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastkd

from .report import Report

BINS = torch.linspace(-6, 6, 121, dtype=torch.float64)
STARTS = [(-3.0, 1.0), (3.0, 1.0), (0.0, 3.0), (0.0, 0.5)]  # mean and width
MODES = (-2.0, 2.5)

# Divergence, expected mean, expected width.
EXPECTED: dict[str, tuple[Any, float, float]] = {
    "forward KL": ("forward_kl", 0.03, 2.43),
    "skew KL 0.1": (fastkd.SkewKL(0.1), 0.12, 2.43),
    "JSD 0.1": (fastkd.JSD(0.1), 0.07, 2.43),
    "alpha 0.75": (fastkd.AlphaDivergence(0.75), 0.15, 2.42),
    "alpha 0.5": (fastkd.AlphaDivergence(0.5), 0.34, 2.38),
    "JSD 0.5": (fastkd.JSD(0.5), 0.26, 2.43),
    "Jeffreys": ("jeffreys", 0.68, 2.15),
    "total variation": ("tvd", -1.82, 0.88),
    "alpha 0.25": (fastkd.AlphaDivergence(0.25), -2.00, 0.50),
    "JSD 0.9": (fastkd.JSD(0.9), -2.00, 0.50),
    "skew reverse KL 0.1": (fastkd.SkewReverseKL(0.1), -2.00, 0.50),
    "reverse KL": ("reverse_kl", -2.00, 0.50),
}
COVERING = ("forward KL", "skew KL 0.1", "JSD 0.1", "alpha 0.75")
SEEKING = ("alpha 0.25", "JSD 0.9", "skew reverse KL 0.1", "reverse KL")


def run(quick: bool) -> Report:
    teacher = bimodal()
    fits = {
        name: fit(teacher, divergence, 20 if quick else 600)
        for name, (divergence, _, _) in EXPECTED.items()
    }
    lines = [f"{'':20}  mean   width   expected"]
    off = {}
    for name, (mean, width) in fits.items():
        _, *expected = EXPECTED[name]
        off[name] = max(abs(mean - expected[0]), abs(width - expected[1]))
        verdict = "agrees" if off[name] < 0.02 else f"off by {off[name]:.2f}"
        wanted = "{:+.2f}  {:.2f}".format(*expected)
        lines.append(f"{name:20} {mean:+.2f}   {width:.2f}   {wanted}  {verdict}")
    claims = {
        "forward KL and its kin are wide and between the modes": all(
            abs(fits[name][0]) < 1 and fits[name][1] > 2 for name in COVERING
        ),
        "reverse KL and its kin sit on one mode": all(
            min(abs(fits[name][0] - mode) for mode in MODES) < 0.1 and fits[name][1] < 1
            for name in SEEKING
        ),
        "every mean and width is as expected, to 0.02": max(off.values()) < 0.02,
    }
    return Report(
        "Modes: a Gaussian student of a bimodal teacher, by divergence",
        claims=claims,
        notes={name: {"mean": mean, "width": width} for name, (mean, width) in fits.items()},
        text="\n".join(lines),
        draw=lambda figure: draw(figure, teacher, fits),
    )


def bimodal() -> Tensor:
    """Log-probabilities: 0.55 of the mass at -2, width 0.5; the rest at 2.5, width 0.7."""
    left, right = gaussian(torch.tensor([[-2.0, 0.5], [2.5, 0.7]], dtype=torch.float64)).exp()
    return (0.55 * left + 0.45 * right).log()


def gaussian(parameters: Tensor) -> Tensor:
    """Log-probabilities [N, 121] of means and widths [N, 2]."""
    mean, width = parameters[:, :1], parameters[:, 1:]
    return (-0.5 * ((BINS - mean) / width) ** 2).log_softmax(-1)


def fit(teacher: Tensor, divergence: Any, steps: int) -> tuple[float, float]:
    """Mean and width of the best of the starts."""
    starts = torch.tensor(STARTS, dtype=torch.float64)
    mean = starts[:, :1].clone().requires_grad_()
    log_width = starts[:, 1:].log().requires_grad_()
    optimizer = torch.optim.Adam([mean, log_width], lr=0.05)
    for _ in range(steps):
        student = gaussian(torch.cat([mean, log_width.exp()], -1))
        losses = fastkd.distillation_loss(
            student, teacher.expand_as(student), divergence=divergence, reduction="none"
        )
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    best = losses.argmin()
    return mean[best].item(), log_width[best].exp().item()


def draw(figure: Any, teacher: Tensor, fits: dict[str, tuple[float, float]]) -> None:
    figure.set_size_inches(11, 6.5)
    for axes, (name, fitted) in zip(
        figure.subplots(3, 4, sharex=True, sharey=True).flat, fits.items(), strict=True
    ):
        student = gaussian(torch.tensor([fitted], dtype=torch.float64))[0].exp()
        axes.fill_between(BINS, teacher.exp(), color="0.8", label="teacher")
        axes.plot(BINS, student, color="tab:red", label="student")
        axes.set_title(f"{name}: {fitted[0]:+.2f}, {fitted[1]:.2f}", fontsize=9)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle("One mode or both: the best Gaussian student (mean, width) by divergence")
