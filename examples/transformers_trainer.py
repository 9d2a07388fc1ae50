"""Distillation in the Trainer of transformers, in place of your own Trainer.

    python examples/transformers_trainer.py

With `AutoModelForCausalLM.from_pretrained` and your data it is the same.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from fastkd.integrations.transformers import DistillationTrainer


def model(width, spread):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=spread,
        )
    )


def rows(count):
    """The first four tokens are a prompt: -100 leaves them out of the loss."""
    ids = torch.randint(64, (count, 16))
    return [{"input_ids": row, "labels": row.index_fill(0, torch.arange(4), -100)} for row in ids]


def main():
    """The KL to the teacher on held-out sequences, before and after."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=100,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,  # changes nothing in the gradient
            learning_rate=2e-2,
            logging_steps=50,  # loss, and by token kd, ce, entropies, agreement
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        trainer = DistillationTrainer(
            model=model(24, 0.02),
            teacher=model(32, 0.2),
            loss={"temperature": 2.0, "alpha": 1.0},
            args=arguments,
            train_dataset=rows(256),
            eval_dataset=rows(32),
        )
        before = trainer.evaluate()["eval_kl_to_teacher"]
        trainer.train()
        return before, trainer.evaluate()["eval_kl_to_teacher"]


if __name__ == "__main__":
    print("KL to the teacher: {:.3f} before, {:.3f} after".format(*main()))
