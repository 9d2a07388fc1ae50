"""What a cache keeps of a teacher: by kind, its tensors in a shard, and the operand they become.

A layout turns a teacher's logits [n, T, V] into tensors [n, T, ...] (`observe`), those of a shard
into what is stored (`encode`), and rows of that back (`decode`), from which `operand` makes what
`distillation_loss` takes. `check` raises ValueError for a vocabulary that it does not suit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastkd.operands import LinearHead, Sampled, TopK
from fastkd.operands.checked import MOST_ENTRIES

from .bits import pack, unpack, width

Tensors = dict[str, Tensor]
Operand = TopK | Sampled | LinearHead | Tensor

LOG_PROB_BITS = (8, 16)
# exp of less is 0 in fp16, and 8 bits would be spent on it.
LEAST = -50.0


@dataclass(frozen=True)
class Best:
    """The k best entries: ids, log-probabilities, and the log of the rest's mass in fp16.

    8 bits hold the square root of a log-probability's share of the row's least: its steps are finer
    where the mass is.
    """

    kind: ClassVar[str] = "top-k"
    k: int
    log_prob_bits: int = 16

    def check(self, vocab_size: int) -> None:
        most = min(vocab_size, MOST_ENTRIES)
        if not 1 <= self.k <= most:
            raise ValueError(
                f"the best k entries of {vocab_size} tokens must be 1 to {most}, got k={self.k}"
            )
        if self.log_prob_bits not in LOG_PROB_BITS:
            raise ValueError(f"log_prob_bits must be 8 or 16, got {self.log_prob_bits}")

    def observe(self, logits: Tensor, seeds: list[int]) -> Tensors:
        best = TopK.from_logits(logits, self.k)
        assert best.tail_log_prob is not None
        return {"ids": best.indices, "log_probs": best.log_probs, "tail": best.tail_log_prob}

    def encode(self, observed: Tensors, vocab_size: int) -> Tensors:
        stored = {
            "ids": pack(observed["ids"].flatten(), width(vocab_size)),
            "tail": observed["tail"].half(),
        }
        log_probs = observed["log_probs"]
        if self.log_prob_bits == 16:
            return {**stored, "log_probs": log_probs.half()}
        log_probs = log_probs.clamp(LEAST, 0)
        least = log_probs.amin(-1).half()
        share = log_probs / least.float()[..., None].clamp(max=-1e-6)
        codes = (255 * share.clamp(0, 1).sqrt()).round().to(torch.uint8)
        return {**stored, "log_probs": codes, "least": least}

    def decode(self, shard: Tensors, rows: Tensor, vocab_size: int) -> Tensors:
        positions = shard["tail"].size(1)
        first = (rows[:, None] * positions + torch.arange(positions, device="cpu")) * self.k
        ids = unpack(
            shard["ids"], first[..., None] + torch.arange(self.k, device="cpu"), width(vocab_size)
        )
        log_probs = shard["log_probs"][rows].float()
        if self.log_prob_bits == 8:
            log_probs = (log_probs / 255).square() * shard["least"][rows].float()[..., None]
        # Rounding has made the masses of a row sum to 1.001 or so: a divergence needs 1.
        tail = shard["tail"][rows].float()
        total = torch.cat([log_probs, tail[..., None]], -1).logsumexp(-1)
        return {"ids": ids, "log_probs": log_probs - total[..., None], "tail": tail - total}

    def operand(self, rows: Tensors, tail: str) -> TopK:
        return TopK(rows["ids"], rows["log_probs"], tail, rows["tail"])


@dataclass(frozen=True)
class Draws:
    """Draws with replacement: distinct ids with their counts, as many as there are in each row."""

    kind: ClassVar[str] = "samples"
    samples: int

    def check(self, vocab_size: int) -> None:
        if not 1 <= min(self.samples, vocab_size) <= MOST_ENTRIES:
            raise ValueError(
                f"samples must be 1 to {MOST_ENTRIES}, of which all may differ, got {self.samples}"
            )

    def observe(self, logits: Tensor, seeds: list[int]) -> Tensors:
        # One generator for each row, so that batches of other sizes draw the same.
        rows = [
            Sampled.from_logits(one, self.samples, torch.Generator(logits.device).manual_seed(seed))
            for one, seed in zip(logits, seeds, strict=True)
        ]
        return {
            "ids": _stack([row.indices for row in rows], -1),
            "counts": _stack([row.counts for row in rows], 0),
        }

    def encode(self, observed: Tensors, vocab_size: int) -> Tensors:
        kept = observed["counts"] > 0
        numbers = observed["ids"][kept] * self.samples + observed["counts"][kept] - 1
        kind = torch.uint8 if self.samples < 256 else torch.int16
        return {
            "draws": pack(numbers, width(vocab_size * self.samples)),
            "distinct": kept.sum(-1).to(kind),
        }

    def decode(self, shard: Tensors, rows: Tensor, vocab_size: int) -> Tensors:
        distinct = shard["distinct"].long()
        ends = distinct.flatten().cumsum(0).view_as(distinct)[rows]
        distinct = distinct[rows]
        place = torch.arange(int(distinct.max()), device="cpu")
        kept = place < distinct[..., None]
        where = torch.where(kept, (ends - distinct)[..., None] + place, 0)
        numbers = unpack(shard["draws"], where, width(vocab_size * self.samples))
        return {
            "ids": torch.where(kept, numbers // self.samples, -1),
            "counts": torch.where(kept, numbers % self.samples + 1, 0),
        }

    def operand(self, rows: Tensors, tail: str) -> Sampled:
        return Sampled(rows["ids"], rows["counts"])


class _AsObserved:
    """Of any vocabulary; stored as it is."""

    def check(self, vocab_size: int) -> None:
        """Any vocabulary will do."""

    def encode(self, observed: Tensors, vocab_size: int) -> Tensors:
        return observed

    def decode(self, shard: Tensors, rows: Tensor, vocab_size: int) -> Tensors:
        return {name: tensor[rows] for name, tensor in shard.items() if name != "tokens"}


@dataclass(frozen=True)
class Hidden(_AsObserved):
    """Hidden states, in the teacher's dtype; the head is stored once beside the shards."""

    kind: ClassVar[str] = "hidden"

    def observe(self, hidden: Tensor, seeds: list[int]) -> Tensors:
        return {"hidden": hidden}


@dataclass(frozen=True)
class Full(_AsObserved):
    """All log-probabilities, in fp16."""

    kind: ClassVar[str] = "full"

    def observe(self, logits: Tensor, seeds: list[int]) -> Tensors:
        return {"log_probs": logits.float().log_softmax(-1).half()}

    def operand(self, rows: Tensors, tail: str) -> Tensor:
        return rows["log_probs"]


Layout = Best | Draws | Hidden | Full
LAYOUTS: dict[str, type[Layout]] = {layout.kind: layout for layout in (Best, Draws, Hidden, Full)}


def join(parts: list[Tensors]) -> Tensors:
    """One batch after the other; rows with fewer entries are filled up."""
    return {
        name: _cat([part[name] for part in parts], -1 if name == "ids" else 0) for name in parts[0]
    }


def _stack(tensors: list[Tensor], value: int) -> Tensor:
    return _cat([tensor[None] for tensor in tensors], value)


def _cat(tensors: list[Tensor], value: int) -> Tensor:
    most = max(tensor.size(-1) for tensor in tensors)
    pad = torch.nn.functional.pad
    return torch.cat([pad(tensor, (0, most - tensor.size(-1)), value=value) for tensor in tensors])
