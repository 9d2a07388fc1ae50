"""The Trainer of transformers on several processes: divided weights, and a divided vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from .columns import Columns, Indivisible
from .models import Head


class ProcessesTrainer(Trainer):
    """What a DistillationTrainer is told of the processes that it shares its work with."""

    student_head: Head | None
    vocab_size: int | None
    columns: Columns | None = None  # this process's, where the vocabulary is divided

    def _fsdp_version(self) -> int:
        """0: without FSDP."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin.fsdp_version if plugin is not None else 0

    def _sharded(self) -> bool:
        """Whether the head may be in pieces outside of the model's own forward."""
        wrapped = self.is_deepspeed_enabled or self.get_tp_size() > 1
        return bool(wrapped or self._fsdp_version() == 1 or self.args.torch_compile)

    def _divide_vocabulary(self, processes: int) -> None:
        """Over so many neighbours, which see the same batches from then on."""
        if processes == 1:
            return
        if self.student_head is None:
            raise Indivisible(
                "tensor_parallel divides an output head, and the student's logits are not those of "
                "a linear head, or heads=False makes them whole: leave it out"
            )
        self.columns = Columns(processes, self.vocab_size or self.student_head.layer.out_features)

    def _vocabulary(self) -> dict[str, Any]:
        group = None if self.columns is None else self.columns.group
        return {"vocab_size": self.vocab_size, "group": group}

    def _mine(self, operand: Any) -> Any:
        """The operand with this process's columns of the vocabulary."""
        return operand if self.columns is None else self.columns.of(operand)

    def _divided(self, num_items_in_batch: Tensor | int | None) -> int:
        """By what DistributedDataParallel divides what the count of tokens has divided before."""
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size() // self._sharing()

    def _sharing(self) -> int:
        """How many processes see the same batch."""
        return 1 if self.columns is None else self.columns.size

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        return loader if self.columns is None else self.columns.shared(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        loader = super().get_eval_dataloader(eval_dataset)
        return loader if self.columns is None else self.columns.shared(loader)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        if self.columns is not None:
            raise NotImplementedError(
                "predictions where the vocabulary is divided: predict by a Trainer of one process"
            )
        return super().get_test_dataloader(test_dataset)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        items = super()._get_num_items_in_batch(batch_samples, device)
        if items is None or not self.args.average_tokens_across_devices:
            return items
        return items // self._sharing()

    def _gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, without sequences that only fill up the last batch of one."""
        if self.columns is None:
            return self.accelerator.gather_for_metrics(rows)
        found = self.columns.once(self.accelerator.gather(rows))
        state = self.accelerator.gradient_state
        fills = state.end_of_dataloader and state.remainder > 0
        return found[: state.remainder] if fills else found

    def _save_rng_state(self, output_dir: str) -> None:
        """That of all processes is there before the file which says that a save is whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights that are tied are saved once: gathered by FSDP they are no longer one tensor."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        if state_dict:
            state_dict.update({k: state_dict[v] for k, v in tied.items() if v in state_dict})
        super()._save(output_dir, state_dict)
