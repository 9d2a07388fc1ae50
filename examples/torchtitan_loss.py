"""fastkd in the loss slot of torchtitan: the teacher's logits come as one of `loss_inputs`.

    python examples/torchtitan_loss.py

The count of valid tokens is over all ranks, so torchtitan's gradient sums need nothing else. Its
ChunkedLossWrapper cuts `teacher_logits` along the tokens as it does the student's.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss

import fastkd


class DistillationLoss(BaseLoss):
    """alpha KD + (1 - alpha) cross-entropy, sum / global_valid_tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        temperature: float = 1.0
        alpha: float = 0.9

    def __init__(self, config, *, compile_config=None):
        self.settings = {"temperature": config.temperature, "alpha": config.alpha}

    def __call__(self, pred, labels, global_valid_tokens=None, *, teacher_logits, **_):
        divisor = (
            {"reduction": "sum"}
            if global_valid_tokens is None
            else {"reduction": "mean", "num_items": global_valid_tokens}
        )
        loss, metrics = fastkd.distillation_loss(
            pred, teacher_logits, labels, ignore_index=IGNORE_INDEX, return_metrics=True,
            **self.settings, **divisor,
        )  # fmt: skip
        return loss, {"kd": metrics.kd.sum(), "ce": metrics.ce.sum()}


def model(width, spread):
    embedding = nn.Embedding(64, width)
    embedding.weight.data *= spread
    return nn.Sequential(embedding, nn.Linear(width, 64))


def main():
    """The KL to the teacher per token, before and after, in two micro-batches to a step."""
    torch.manual_seed(0)
    teacher, student = model(64, 6.0), model(16, 1.0)
    criterion = DistillationLoss(DistillationLoss.Config(temperature=2.0))
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    found = []
    for _ in range(150):
        ids = torch.randint(64, (8, 17))
        labels = ids[:, 1:].clone()
        labels[:3, :9] = IGNORE_INDEX
        valid, kd = (labels != IGNORE_INDEX).sum(), 0.0
        for part in (slice(0, 4), slice(4, 8)):
            with torch.no_grad():
                target = teacher(ids[part, :-1])
            pred = student(ids[part, :-1])
            loss, metrics = criterion(pred, labels[part], valid, teacher_logits=target)
            loss.backward()
            kd += metrics["kd"].item()
        optimizer.step()
        optimizer.zero_grad()
        found.append(kd / valid.item())
    return found[0], found[-1]


if __name__ == "__main__":
    print("KL to the teacher: {:.3f} before, {:.3f} after".format(*main()))
