"""On-policy distillation: the student writes, the teacher scores every token that it could write.

    python examples/on_policy.py

Reverse KL over the whole vocabulary, at the places that the student's own samples reach
(arXiv 2306.13649, 2306.08543).
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastkd

PROMPT, LENGTH, END = 2, 12, 0


def model(width, spread):
    shape = LlamaConfig(
        vocab_size=32, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=spread, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


@torch.no_grad()
def written(student, prompts):
    """Prompts and what the student goes on to, and which places predict a token of its own."""
    ids = student.generate(prompts, max_length=LENGTH, do_sample=True, top_k=0)
    own = torch.arange(ids.size(1)) >= PROMPT
    ended = (ids[:, PROMPT:] == END).cumsum(-1) - (ids[:, PROMPT:] == END).int()
    kept = torch.cat([own[:PROMPT].expand(len(ids), -1), ended == 0], -1)
    return ids, kept[:, 1:]  # the logits of a place predict the next token


def loss_of(student, teacher, ids, kept):
    with torch.no_grad():
        target = teacher(input_ids=ids).logits[:, :-1]
    return fastkd.distillation_loss(
        student(input_ids=ids).logits[:, :-1], target, divergence="reverse_kl", weight=kept
    )


def main():
    """The reverse KL on the student's own samples, before and after."""
    torch.manual_seed(0)
    teacher, student = model(32, 0.3), model(16, 0.02)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-2)

    @torch.no_grad()
    def judged():
        return loss_of(
            student, teacher, *written(student, torch.randint(1, 32, (64, PROMPT)))
        ).item()

    before = judged()
    for _ in range(80):
        ids, kept = written(student, torch.randint(1, 32, (16, PROMPT)))
        loss = loss_of(student, teacher, ids, kept)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, judged()


if __name__ == "__main__":
    print("reverse KL on its own samples: {:.3f} before, {:.3f} after".format(*main()))
