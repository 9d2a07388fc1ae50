"""A teacher that is run once: its top-k is kept on disk, and students learn from there.

python examples/top_k_cache.py
"""

import tempfile

import torch
from torch import nn

import fastkd
from fastkd import cache

VOCABULARY, ROWS, LENGTH = 200, 64, 16


class Bigram(nn.Module):
    """Logits of the next token from the last one."""

    def __init__(self, width, spread):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.head = nn.Linear(width, VOCABULARY)
        self.embedding.weight.data *= spread

    def forward(self, ids):
        return self.head(self.embedding(ids))


def main():
    """The exact KL to the teacher, before and after learning from 8 of its 200 entries."""
    torch.manual_seed(0)
    teacher, student = Bigram(64, 8.0), Bigram(16, 1.0)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH))
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)

    @torch.no_grad()
    def judged():
        return fastkd.distillation_loss(student(tokens), teacher(tokens)).item()

    before = judged()
    with tempfile.TemporaryDirectory() as folder:
        with torch.no_grad():
            kept = cache.write(
                folder, cache.Best(k=8), tokens, lambda ids, rows: teacher(ids), VOCABULARY
            )
        for step in range(200):
            rows = [(8 * step + i) % ROWS for i in range(8)]
            # The rest of the vocabulary is one more event, on both sides.
            loss = fastkd.distillation_loss(student(kept.tokens(rows)), kept[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return before, judged()


if __name__ == "__main__":
    print("KL to the teacher: {:.3f} before, {:.3f} after".format(*main()))
