"""A teacher that sees more, or something else, than its student.

The upper and the lower half of a digit are two views; the sums of its rows and columns are another
modality than its pixels. Teachers train on 1000 labelled images, students have 100 of those labels,
or 1000 pairs of what the teacher sees and what the student sees, without labels:

    two views     a student of the upper half; a teacher of both halves, or of the upper
    modalities    a student of the sums; a teacher of the pixels, or of the sums

What the lower half says cannot reach the student as such: where two digits look alike above, a
teacher of the whole is sure of one, and a teacher of the upper half says how often it is which.

Expected: distillation beats the same labels, and unlabelled pairs beat labels, since there are ten
times as many. Nothing was measured before. Seen here: a teacher of both halves is 7 points better
than one of the upper half, and no better at teaching it; a teacher of pixels is 3 points better
than one of sums, and teaches sums a point better. Teachers stand in parentheses in the tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .digits import TRAINING, Digits, Loss, MLPs, cross_entropy, kd, train
from .report import Report, Table, mean_and_error

LABELS = 100
CE, FEW, PAIRS = "100 labels", "100 images", "1000 pairs"
UPPER, WHOLE, SUMS, PIXELS = "the upper half", "both halves", "sums", "pixels"


def run(quick: bool) -> Report:
    digits = Digits(quick)
    pairs = {
        "Two views": (upper, UPPER, WHOLE),
        "Modalities": (sums, SUMS, PIXELS),
    }
    tables = [compare(digits, title, *each) for title, each in pairs.items()]
    return Report(
        "Multimodal: a teacher that sees more, or something else (digits)",
        tables,
        claims(*tables),
    )


def upper(images: Tensor) -> Tensor:
    return images[..., :32]


def sums(images: Tensor) -> Tensor:
    """The sums of rows and of columns over 8, [..., 16]."""
    square = images.unflatten(-1, (8, 8))
    return torch.cat([square.mean(-1), square.mean(-2)], -1)


def standardized(x: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    """Each feature about 0, all of them on one scale, by the training images of each seed."""
    mean = x.mean(1, keepdim=True)
    scale = (x - mean).std((1, 2), keepdim=True)
    return (x - mean) / scale, (x_test - mean) / scale


def compare(digits: Digits, title: str, view: Any, own: str, other: str) -> Table:
    x, x_test = standardized(view(digits.x), view(digits.x_test))
    of_view = digits.teachers(x)
    with torch.no_grad():
        teachers = {own: of_view(x), other: digits.teacher}
    scores = {
        f"({own})": digits.accuracy(of_view, x_test, digits.y_test)[0],
        f"({other})": digits.accuracy(digits.networks)[0],
    }
    students = {CE: (cross_entropy(), digits.teacher, LABELS)}
    for name, logits in teachers.items():
        students[f"{name}, {FEW}"] = (kd(temperature=4.0, alpha=0.9), logits, LABELS)
        students[f"{name}, {PAIRS}"] = (kd(temperature=4.0), logits, TRAINING)
    for name, (loss, logits, images) in students.items():
        student = taught(digits, x[:, :images], logits[:, :images], loss)
        scores[name] = digits.accuracy(student, x_test, digits.y_test)[0]
    return Table(title, scores, CE)


def claims(views: Table, modalities: Table) -> dict[str, bool]:
    both = (views, modalities)
    paired = views.scores[f"{WHOLE}, {PAIRS}"] - views.scores[f"{UPPER}, {PAIRS}"]
    few = views.scores[f"{WHOLE}, {FEW}"] - views.scores[f"{UPPER}, {FEW}"]
    better = views.scores[f"({WHOLE})"] - views.scores[f"({UPPER})"]
    gain, error = mean_and_error(paired)
    return {
        "unlabelled pairs gain over 5 points over 100 labels, whatever the teacher sees": all(
            table.difference(name)[0] > 5
            for table in both
            for name in table.scores
            if name.endswith(PAIRS)
        ),
        "on the labelled images alone every teacher gains, over 2 standard errors": all(
            mean > 2 * error
            for table in both
            for mean, error in [table.difference(n) for n in table.scores if n.endswith(FEW)]
        ),
        "a teacher of both halves is over 5 points better than one of the upper": bool(
            better.mean() > 5
        ),
        "but teaches no better on pairs, and worse on few images": gain < 2 * error
        and bool(few.mean() < 0),
        "a teacher of another modality teaches better on pairs than the student's own": bool(
            (modalities.scores[f"{PIXELS}, {PAIRS}"] - modalities.scores[f"{SUMS}, {PAIRS}"]).mean()
            > 0
        ),
    }


def taught(digits: Digits, x: Tensor, teacher: Tensor, loss: Loss) -> MLPs:
    """Students 16-10 on the first images as x has them."""
    networks, labels = MLPs(digits.seeds, (x.size(-1), 16, 10)), digits.y[:, : x.size(1)]
    return train(networks, x, lambda z, step: loss(z, teacher, labels, step), digits.steps)
