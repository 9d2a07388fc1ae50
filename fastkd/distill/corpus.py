"""The text of the default job: English that every Python carries, or the user's; its tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import files, hub
from .errors import RunError

# Of so many blocks of paragraphs, the last is held out.
HELD_OUT, PARAGRAPHS = 10, 32


@dataclass(frozen=True)
class Corpus:
    """Token ids [n] to train on and to validate on, and the tokenizer they come from, as JSON."""

    training: Tensor
    validation: Tensor
    vocabulary: int
    tokenizer: str

    def fingerprint(self) -> str:
        """Changes with any token: a run is only resumed on the text that it began with."""
        ids = torch.cat([self.training, self.validation])
        return hashlib.sha256(ids.numpy().tobytes()).hexdigest()

    def share(self, part: float) -> Corpus:
        """The corpus as if only the first part of its text were there to train on."""
        return replace(self, training=self.training[: round(part * len(self.training))])

    def batch(self, seed: int, step: int, size: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and next tokens [size, length]; a function of seed and step alone."""
        draw = random.Random(f"{seed} {step}")
        starts = [draw.randrange(len(self.training) - length) for _ in range(size)]
        windows = torch.stack([self.training[i : i + length + 1] for i in starts])
        return windows[:, :-1], windows[:, 1:]

    def held_out(self, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and next tokens [windows, length], one window after the other."""
        whole = (len(self.validation) - 1) // length * length
        return (
            self.validation[:whole].view(-1, length),
            self.validation[1 : whole + 1].view(-1, length),
        )


def prepare(data: Sequence[str], vocabulary: int, length: int, share: float = 1.0) -> Corpus:
    """Reads, splits, trains the tokenizer on the training part alone, and tokenizes.

    Of the training part, a share must be long enough.
    """
    from tokenizers import ByteLevelBPETokenizer

    training, validation = split(paragraphs(read(data) if data else bundled()))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([training], vocab_size=vocabulary, show_progress=False)
    corpus = Corpus(
        torch.tensor(tokenizer.encode(training).ids),
        torch.tensor(tokenizer.encode(validation).ids),
        tokenizer.get_vocab_size(),
        tokenizer.to_str(),
    )
    least = len(corpus.share(share).training)
    if min(least, len(corpus.validation)) <= length:
        raise RunError(
            f"the text is too short: {least} tokens for the students to train on and "
            f"{len(corpus.validation)} held out, where more than sequence_length={length} of each "
            "are needed"
        )
    return corpus


def bundled() -> list[str]:
    """The reference pages behind Python's `help()`."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def read(names: Sequence[str]) -> list[str]:
    texts = []
    for name in files.find(names).files:
        if name.startswith(hub.PREFIX) or files.kind(name) in files.READERS:
            raise RunError(
                f"{name} holds rows, which go with --teacher and --student: without these, text "
                "is read as it stands"
            )
        with files.readable(name), files.opened(name) as file:
            texts.append(file.read())
    if not any(text.strip() for text in texts):
        raise RunError(f"there is no text in {', '.join(names)}")
    return texts


def paragraphs(texts: Iterable[str]) -> list[str]:
    """Each once: the topics repeat one another, and what is held out must not be trained on."""
    parts = (part.strip("\n") for text in texts for part in text.split("\n\n"))
    return list(dict.fromkeys(part for part in parts if part.strip()))


def split(parts: Sequence[str]) -> tuple[str, str]:
    """The text to train on, and every tenth block of paragraphs held out."""
    size = max(1, min(PARAGRAPHS, len(parts) // HELD_OUT))
    blocks = [parts[i : i + size] for i in range(0, len(parts), size)]
    sides: tuple[list[str], list[str]] = ([], [])
    for index, block in enumerate(blocks):
        sides[index % HELD_OUT == HELD_OUT - 1].extend(block)
    training, validation = ("\n\n".join(side) + "\n" for side in sides)
    return training, validation
