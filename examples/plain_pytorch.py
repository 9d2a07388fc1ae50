"""Distillation in a plain PyTorch loop: a wide classifier teaches a narrow one.

python examples/plain_pytorch.py
"""

import torch
from torch import nn

import fastkd


def network(width):
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 10))


def main():
    """The KL to the teacher on new inputs, before and after."""
    torch.manual_seed(0)
    teacher, student = network(128), network(8)
    for weight in teacher.parameters():
        weight.data *= 3  # a teacher that is sure of itself
    criterion = fastkd.DistillationLoss(temperature=2.0, alpha=0.9)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)

    def kl():
        inputs = torch.randn(1000, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return fastkd.distillation_loss(student(inputs), teacher(inputs)).item()

    before = kl()
    for _ in range(200):
        inputs = torch.randn(64, 16)
        with torch.no_grad():
            target = teacher(inputs)
        loss = criterion(student(inputs), target, target.argmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, kl()


if __name__ == "__main__":
    print("KL to the teacher: {:.3f} before, {:.3f} after".format(*main()))
