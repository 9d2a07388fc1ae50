"""fastkd under TRL's GKDTrainer: two lines, the rest is TRL's.

python examples/trl_gkd.py
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

import fastkd.integrations.trl

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
)
CHATS = [
    [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]
    for n in range(64)
]


def tokenizer():
    text = " ".join(message["content"] for chat in CHATS for message in chat)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], 300, special_tokens=["<end>", "<pad>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


def model(tokens, width, spread):
    shape = LlamaConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=1, num_attention_heads=2, initializer_range=spread,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


def main():
    """The loss of the first and of the last steps."""
    torch.manual_seed(0)
    tokens = tokenizer()
    with tempfile.TemporaryDirectory() as folder, fastkd.integrations.trl.patched("gkd") as what:
        print("fastkd is under", *what)
        arguments = GKDConfig(
            folder, lmbda=0.0, beta=0.1, max_steps=40, per_device_train_batch_size=8,
            learning_rate=1e-2, logging_steps=10, report_to="none", use_cpu=True, bf16=False,
            save_strategy="no",
        )  # fmt: skip
        trainer = GKDTrainer(
            model(tokens, 16, 0.02), model(tokens, 32, 0.3), arguments,
            train_dataset=Dataset.from_dict({"messages": CHATS}), processing_class=tokens,
        )  # fmt: skip
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("loss: {:.3f} in the first ten steps, {:.3f} in the last".format(*main()))
