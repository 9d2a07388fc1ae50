"""Distillation of a re-ranker's scores into sentence embeddings, by sentence-transformers.

    python examples/sentence_embeddings.py

The loss is theirs; the divergence inside it is fastkd's: `KLDivLoss` for the same number, or any
other, as here the JSD.
"""

import tempfile

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.losses import DistillKLDivLoss
from sentence_transformers.models import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import fastkd

WORDS = [f"word{i}" for i in range(60)]


def encoder(width, spread):
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, WORDS[0]))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = spread * torch.randn(len(WORDS), width).numpy()
    static = StaticEmbedding(tokens, embedding_weights=weights)
    return SentenceTransformer(modules=[static], device="cpu")


class JSD(nn.Module):
    def forward(self, log_q, p):
        """Of the scores' log-probabilities and the teacher's probabilities, [queries, N]."""
        return fastkd.distillation_loss(
            log_q, p.log(), divergence=fastkd.JSD(0.5), reduction="batchmean"
        )


def rows(teacher, count):
    """A query, four candidates, and the teacher's scores of them."""
    chosen = torch.randint(len(WORDS), (5, count, 3)).tolist()
    texts = [[" ".join(WORDS[i] for i in ids) for ids in column] for column in chosen]
    query, *candidates = (teacher.encode(text, convert_to_tensor=True) for text in texts)
    scores = torch.stack([(query * candidate).sum(-1) for candidate in candidates], 1)
    names = ["query", "positive", "second", "third", "fourth"]
    return Dataset.from_dict({**dict(zip(names, texts, strict=True)), "label": scores.tolist()})


def main():
    """The loss of the first and of the last steps."""
    torch.manual_seed(0)
    teacher, student = encoder(32, 1.0), encoder(8, 0.3)
    loss = DistillKLDivLoss(student)
    loss.loss_fct = JSD()
    with tempfile.TemporaryDirectory() as folder:
        arguments = Arguments(
            folder, max_steps=150, per_device_train_batch_size=32, learning_rate=3e-2,
            logging_steps=25, report_to="none", save_strategy="no", use_cpu=True,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=student, args=arguments, train_dataset=rows(teacher, 512), loss=loss
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("JSD to the teacher: {:.3f} in the first steps, {:.3f} in the last".format(*main()))
