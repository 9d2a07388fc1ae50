"""LoRA with the model itself as teacher: adapters on for the student, off for the teacher.

    python examples/lora_self_distillation.py

One copy of the weights. The adapters learn new data by cross-entropy, while the divergence keeps
the model near to what it was: alpha weighs the two.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from fastkd.integrations.transformers import DistillationTrainer

SHAPE = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, initializer_range=0.1,
)  # fmt: skip


def rows(count):
    """New data: the model does not yet know that tokens count upwards."""
    first = torch.randint(64, (count, 1))
    return [{"input_ids": row, "labels": row} for row in (first + torch.arange(12)) % 64]


def tuned(alpha):
    """Held-out loss and KL to the model as it was, before and after."""
    torch.manual_seed(0)
    adapters = LoraConfig(
        task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]
    )
    student = get_peft_model(LlamaForCausalLM(SHAPE), adapters)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=60, per_device_train_batch_size=16, learning_rate=1e-2,
            save_strategy="no", report_to="none", use_cpu=True, logging_steps=30,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model=student, teacher=None, loss={"alpha": alpha}, args=arguments,
            train_dataset=rows(256), eval_dataset=rows(64),
        )  # fmt: skip
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    names = ("eval_validation_loss", "eval_kl_to_teacher")
    return [(before[name], after[name]) for name in names]


def main():
    """The loss on new data, before and after."""
    for alpha in (0.0, 0.5):
        (before, after), (_, drift) = tuned(alpha)
        print(f"alpha {alpha}: loss {before:.3f} -> {after:.3f}, moved by a KL of {drift:.3f}")
    return before, after


if __name__ == "__main__":
    main()
