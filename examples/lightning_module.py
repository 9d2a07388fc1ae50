"""Distillation in Lightning: the loss is one line of training_step.

    python examples/lightning_module.py

Lightning averages gradients over processes. With sequences of unequal length that weights short
batches too much; the exact mean is `num_items=` all tokens of all processes / their number.
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd


def network(width):
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 10))


class Distillation(lightning.LightningModule):
    def __init__(self, teacher, student, **settings):
        super().__init__()
        self.teacher, self.student = teacher.eval().requires_grad_(False), student
        self.criterion = fastkd.DistillationLoss(return_metrics=True, **settings)

    def training_step(self, batch, index):
        inputs, labels = batch
        loss, metrics = self.criterion(self.student(inputs), self.teacher(inputs), labels)
        self.log_dict({"loss": loss, "kd": metrics.kd.mean(), "ce": metrics.ce.mean()})
        return loss

    def validation_step(self, batch, index):
        inputs, _ = batch
        self.log("kl", fastkd.distillation_loss(self.student(inputs), self.teacher(inputs)))

    def configure_optimizers(self):
        trained = [*self.student.parameters(), *self.criterion.parameters()]  # a temperature too
        return torch.optim.Adam(trained, lr=1e-2)


def batches(teacher, count):
    inputs = torch.randn(count, 16)
    with torch.no_grad():
        labels = teacher(inputs).argmax(-1)
    return DataLoader(TensorDataset(inputs, labels), batch_size=64)


def main():
    """The KL to the teacher on held-out inputs, before and after."""
    torch.manual_seed(0)
    teacher, student = network(128), network(8)
    for weight in teacher.parameters():
        weight.data *= 3
    module = Distillation(teacher, student, temperature=2.0, alpha=0.9)
    training, held_out = batches(teacher, 2048), batches(teacher, 512)
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    judge = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (before,) = judge.validate(module, held_out, verbose=False)
    trainer.fit(module, training)
    (after,) = judge.validate(module, held_out, verbose=False)
    return before["kl"], after["kl"]


if __name__ == "__main__":
    print("KL to the teacher: {:.3f} before, {:.3f} after".format(*main()))
