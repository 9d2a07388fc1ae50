"""Dense predictions: every pixel is a row, whatever the layout of the logits.

python examples/segmentation.py
"""

import torch
from torch import nn

import fastkd

CLASSES, VOID = 7, 255


def network(width):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, CLASSES, 3, padding=1)
    )


def loss_of(student, teacher, labels, **settings):
    """From [B, C, H, W] and [B, H, W]."""
    return fastkd.distillation_loss(student, teacher, labels, dim=1, ignore_index=VOID, **settings)


def main():
    """The KL to the teacher per pixel of new images, before and after."""
    torch.manual_seed(0)
    teacher, student = network(32), network(4)
    for weight in teacher.parameters():
        weight.data *= 3
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)

    def batch(count):
        images = torch.randn(count, 3, 16, 16)
        with torch.no_grad():
            target = teacher(images)
        labels = target.argmax(1)
        labels[:, :2] = VOID  # the border counts nowhere
        return images, target, labels

    held_out = batch(16)

    @torch.no_grad()
    def judged():
        images, target, labels = held_out
        return loss_of(student(images), target, labels).item()

    before = judged()
    for _ in range(80):
        images, target, labels = batch(8)
        loss = loss_of(student(images), target, labels, temperature=2.0, alpha=0.8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, judged()


if __name__ == "__main__":
    print("KL to the teacher: {:.3f} before, {:.3f} after".format(*main()))
