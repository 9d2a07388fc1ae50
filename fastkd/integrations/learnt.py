"""What a Trainer's loss learns itself, as a temperature: leaf tensors outside of the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .processes import ProcessesTrainer
from .settings import Settings

VALUES = "loss.pt"  # of a checkpoint: what the loss has learnt until then


class LossTrainer(ProcessesTrainer):
    """A Trainer that trains what its loss is made of, along with the model.

    It has a group in the optimizer, without weight decay. transformers clears, averages, saves
    and loads what is in the model, and for the rest of the optimizer that is done here.
    """

    loss: Settings
    learnt: dict[Tensor, Tensor] | None = None  # with the values before training; None: not yet

    def set_initial_training_values(self, *arguments: Any, **options: Any) -> Any:
        """Here the steps of the run are known, and nothing is wrapped or loaded yet."""
        values = super().set_initial_training_values(*arguments, **options)
        found = outside(self.model, self.loss(0, values[-1]))
        if found and (self._fsdp_version() or self.is_deepspeed_enabled):
            raise NotImplementedError(
                "the loss learns a tensor of its own, as a temperature, and the optimizers of FSDP "
                "and DeepSpeed have the model's weights alone: pass a number, or train by DDP"
            )
        for tensor in found:
            tensor.data = tensor.data.to(self.args.device)
            if self.accelerator.num_processes > 1:
                dist.broadcast(tensor.data, 0)
        before = self.learnt or {}
        self.learnt = {each: before.get(each, each.detach().clone()) for each in found}
        return values

    def call_model_init(self, trial: Any = None) -> Any:
        """A run that begins with a new student begins with the first values of the loss."""
        for tensor, first in (self.learnt or {}).items():
            tensor.data.copy_(first)
        return super().call_model_init(trial)

    def create_optimizer(self, *arguments: Any, **options: Any) -> Any:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*arguments, **options)
        learnt = list(self.learnt or ())
        if made and learnt:
            optimizer.add_param_group({"params": learnt, "weight_decay": 0.0})
        known = {id(each) for group in optimizer.param_groups for each in group["params"]}
        if any(id(each) not in known for each in learnt):
            raise ValueError(
                "the loss learns a tensor that is in no group of the optimizer which you gave: "
                "add it there, or let the Trainer make the optimizer"
            )
        return optimizer

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """The batches of a step, which begins without gradients: the Trainer clears the model's."""
        for tensor in self.learnt or ():
            tensor.grad = None
        return super().get_batch_samples(*arguments, **options)

    def settings_of_step(self) -> Mapping[str, Any]:
        settings = self.loss(self.state.global_step, self.state.max_steps)
        if self.learnt is not None and not self.learnt.keys() >= set(outside(self.model, settings)):
            raise ValueError(
                f"the loss of step {self.state.global_step} learns a tensor that had no part in "
                "that of step 0, and so is in no optimizer: let the first step have it too"
            )
        return settings

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        """Averages over processes what DistributedDataParallel does not know."""
        loss = super().training_step(*arguments, **options)
        for tensor in self.learnt or ():
            if self.accelerator.sync_gradients and tensor.grad is not None:
                tensor.grad = self.accelerator.reduce(tensor.grad, "mean")
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.learnt and self.args.should_save:
            values = [tensor.detach().cpu() for tensor in self.learnt]
            torch.save(values, os.path.join(output_dir, VALUES))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_learnt(os.path.join(checkpoint, VALUES))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_learnt(self, path: str) -> None:
        learnt = list(self.learnt or ())
        values = torch.load(path, weights_only=True) if os.path.exists(path) else []
        if [each.shape for each in values] != [each.shape for each in learnt]:
            raise ValueError(
                f"{path} has {len(values)} tensors that a loss learnt, and this loss learns "
                f"{len(learnt)}, or others: go on with the loss that the run began with, from a "
                "checkpoint without save_only_model, or begin anew"
            )
        for tensor, value in zip(learnt, values, strict=True):
            tensor.data.copy_(value)


def leaves(settings: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a backward through these settings would give a gradient, each once."""
    tensors = [each for each in settings.values() if isinstance(each, Tensor)]
    waiting = [get_gradient_edge(each).node for each in tensors if each.requires_grad]
    seen, found = set(), {}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[id(variable)] = variable
        waiting.extend(before for before, _ in node.next_functions if before is not None)
    return list(found.values())


def outside(model: Any, settings: Mapping[str, Any]) -> list[Tensor]:
    """What trains in these settings, and is no weight of the model."""
    found = leaves(settings)
    weights = {id(weight) for weight in model.parameters()} if found else set()
    return [tensor for tensor in found if id(tensor) not in weights]
