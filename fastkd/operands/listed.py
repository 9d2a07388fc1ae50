"""Teachers of which some entries in each row are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd import checks

from . import checked, server
from .checked import MOST_ENTRIES, PADDING

TAILS = ("bucket", "renormalize", "drop", "label")
ROUNDING = 1e-3  # by which a log-probability of an engine may lie above 0


@dataclass(frozen=True, eq=False)
class TopK:
    r"""A teacher of which K entries in each row are known, and perhaps the rest's mass.

    P is the listed mass, Q the student's on the same entries; the `tail` says what the rest is:

        bucket        one more event, of mass 1 - P for the teacher and 1 - Q for the student: a
                      true divergence over K + 1 events, and never above that of the full rows
        renormalize   nothing: the teacher is p / P, which makes students over-confident
        drop          left out: sum p (log p - log q) may be negative, and is not clamped
        label         the true token: its entry gains 1 - P

    The set may be anybody's: the teacher's best, the student's, ids that a server was asked for,
    the label besides. An id that is listed twice in a row counts once, where it comes first; -1
    lists nothing, so rows may have different numbers of entries.

    Log-probabilities are the teacher's at T = 1 over all of its vocabulary. At another temperature
    only `renormalize` is exact: the mass of a tail says nothing of its mass at T.

    6 K bytes per token with int32 ids and fp16 log-probabilities, 388 for K = 64 and a tail in
    fp16; a `fastkd.TeacherCache` holds the same in 267 or 205.

    Args:
        indices: the listed ids, [..., K], int32 or int64, K up to 1024; -1 is padding.
        log_probs: log p there, [..., K].
        tail: what the rest is.
        tail_log_prob: log(1 - P), [...]; None: it is made from `log_probs`. Where those were stored
            in fp16 that has no digits left on confident rows: off by up to e^5.7 where the tail's
            mass is 1e-6. `renormalize` and `drop` do not read it.

    Raises:
        TypeError, ValueError: with what was expected and what came.

    Source: the bucket is DistillKit's "symmetric uniform" and the ghost token of others; `label`
        and the bias of `renormalize`: Anshumann et al. 2025, arXiv 2503.16870.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[3.0, 1.0, 0.0, 2.0]])
        >>> teacher = TopK.from_logits(logits, 2)
        >>> teacher.indices.tolist()
        [[0, 3]]
        >>> round((teacher.log_probs.exp().sum() + teacher.tail_log_prob.exp()).item(), 4)
        1.0
    """

    indices: Tensor
    log_probs: Tensor
    tail: str = "bucket"
    tail_log_prob: Tensor | None = None

    def __post_init__(self) -> None:
        checked.listed("TopK", self.indices, "log_probs", self.log_probs)
        checked.floating("TopK: log_probs", self.log_probs)
        checks.choice("TopK: tail", self.tail, TAILS)
        rest = self.tail_log_prob
        if rest is not None:
            checked.floating("TopK: tail_log_prob", rest)
            if rest.shape != self.indices.shape[:-1]:
                raise ValueError(
                    f"TopK: tail_log_prob must be {tuple(self.indices.shape[:-1])}, one for each "
                    f"row, got {tuple(rest.shape)}"
                )
        checked.one_device(
            "TopK", indices=self.indices, log_probs=self.log_probs, tail_log_prob=rest
        )
        if checks.may_read(self.log_probs):
            listed = self.log_probs[self.indices != PADDING]
            for name, values in (("log_probs", listed), ("tail_log_prob", rest)):
                if values is not None and (values > ROUNDING).any():
                    raise ValueError(
                        f"TopK: {name} must be logarithms of probabilities, at most 0, got "
                        f"{values[values > ROUNDING][0].item():.4g}: of probabilities pass the "
                        "logarithm, of logits TopK.from_logits"
                    )

    @property
    def shape(self) -> torch.Size:
        """[..., K]"""
        return self.indices.shape

    @classmethod
    def at(cls, logits: Tensor, indices: Tensor, tail: str = "bucket") -> TopK:
        """What a teacher with these logits [..., V] says of these ids [..., K], -1 for none.

        The tail is summed over the rest of the row, so a mass of 1e-7 is right too.

        Example:
            >>> import torch
            >>> logits, labels = torch.randn(6, 50), torch.randint(50, (6,))
            >>> best = logits.topk(4).indices
            >>> TopK.at(logits, torch.cat([best, labels[:, None]], -1)).shape  # with the label
            torch.Size([6, 5])
        """
        checked.logits("TopK.at: logits", logits)
        checked.listed("TopK.at", indices)
        checked.one_device("TopK.at", logits=logits, indices=indices)
        if logits.shape[:-1] != indices.shape[:-1]:
            raise ValueError(
                "TopK.at: logits and indices must have equal leading shapes, got "
                f"{tuple(logits.shape)} and {tuple(indices.shape)}"
            )
        if checks.may_read(indices) and (indices >= logits.size(-1)).any():
            raise ValueError(
                f"TopK.at: indices must lie below {logits.size(-1)}, the columns of the logits, "
                f"got {indices.max().item()}"
            )
        logits = logits.detach()
        exact = logits.double() if logits.dtype == torch.float64 else logits.float()
        total = exact.logsumexp(-1)
        where = indices.long().clamp(min=0)
        listed = exact.gather(-1, where) - total[..., None]
        # One column more takes what padding would mark.
        marked = torch.where(indices == PADDING, exact.size(-1), indices.long())
        rest = torch.cat([exact, exact.new_full((*exact.shape[:-1], 1), -math.inf)], -1)
        rest.scatter_(-1, marked, -math.inf)
        listed = torch.where(indices == PADDING, -math.inf, listed)
        return cls(indices, listed, tail, rest.logsumexp(-1) - total)

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, tail: str = "bucket") -> TopK:
        """The k best entries of a teacher's logits [..., V]."""
        return cls.at(logits, _best("TopK.from_logits", logits, k), tail)

    @classmethod
    def from_student(cls, student: Tensor, teacher: Tensor, k: int, tail: str = "bucket") -> TopK:
        """What a teacher says of the k entries that the student thinks best: for reverse KL, whose
        mass is there. Logits [..., V] of both.

        Example:
            >>> import torch
            >>> student, teacher = torch.randn(4, 100), torch.randn(4, 100)
            >>> TopK.from_student(student, teacher, 8).shape
            torch.Size([4, 8])
        """
        return cls.at(teacher, _best("TopK.from_student", student, k), tail)

    @classmethod
    def from_server(
        cls,
        positions: Sequence[Any],
        token_id: Callable[[str], int | None] | None = None,
        tail: str = "bucket",
    ) -> TopK:
        """What a server answered for the positions of one sequence, as plain JSON: [T, K].

            vLLM           `prompt_logprobs`: K or, where the prompt's token is not among the best,
                           K + 1 entries
            SGLang         `meta_info["input_top_logprobs"]`, `["output_top_logprobs"]`, and
                           `["input_token_ids_logprobs"]` of ids that were asked for
            OpenAI, chat   `logprobs["content"]`: the chosen token, and `top_logprobs`
            OpenAI, legacy `logprobs["top_logprobs"]`

        Row i says how token i was predicted: it belongs to the student's logits at i - 1. A
        position without an answer, as a prompt's first, lists nothing: it must count nowhere.

        Args:
            positions: one item for each token.
            token_id: id of a token that is spelt as text; None where it is none of the student's,
                and its mass is in the tail then.
            tail: what the rest is.

        Raises:
            TypeError: tokens are spelt as text, and there is no `token_id`.
            ValueError: a position that none of these formats has.

        Example:
            >>> answer = [None, {"791": {"logprob": -0.1}, "5": {"logprob": -2.5}}]
            >>> teacher = TopK.from_server(answer)
            >>> teacher.indices.tolist()
            [[-1, -1], [791, 5]]
        """
        rows = []
        checks.several("TopK.from_server: positions", positions)
        for place, position in enumerate(positions):
            try:
                rows.append(server.entries(position, token_id))
            except (AttributeError, IndexError, KeyError, ValueError) as error:
                raise ValueError(
                    "TopK.from_server: expected positions as vLLM, SGLang or OpenAI answer them, "
                    f"got at {place}: {' '.join(str(position).split())[:80]}"
                ) from error
        width = max([1, *map(len, rows)])
        padded = [row + [(PADDING, -math.inf)] * (width - len(row)) for row in rows]
        indices = torch.tensor([[i for i, _ in row] for row in padded], dtype=torch.int64)
        log_probs = torch.tensor([[p for _, p in row] for row in padded], dtype=torch.float32)
        return cls(indices.view(-1, width), log_probs.view(-1, width), tail)

    @classmethod
    def pad(cls, parts: Sequence[TopK]) -> TopK:
        """A batch [B, T, K] of sequences [T_i, K_i]: what is missing lists nothing, at the end.

        Rows beyond a sequence's end must count nowhere: label -100, or weight 0.

        Example:
            >>> import torch
            >>> short, long = (TopK.from_logits(torch.randn(n, 9), k) for n, k in ((2, 3), (4, 2)))
            >>> TopK.pad([short, long]).shape
            torch.Size([2, 4, 3])
        """
        checks.several("TopK.pad: parts", parts)
        fit = all(isinstance(part, TopK) and part.indices.dim() == 2 for part in parts)
        if not len(parts) or not fit:
            raise ValueError("TopK.pad: parts must be TopKs of shape [T, K], at least one")
        if len({(part.tail, part.tail_log_prob is None) for part in parts}) > 1:
            raise ValueError("TopK.pad: parts must agree in tail, and all or none have its mass")
        rows, entries = (max(part.indices.size(dim) for part in parts) for dim in (0, 1))

        def batch(tensors: Sequence[Tensor], shape: tuple[int, ...], value: float) -> Tensor:
            out = tensors[0].new_full((len(tensors), *shape), value)
            for one, tensor in zip(out, tensors, strict=True):
                one[tuple(slice(size) for size in tensor.shape)] = tensor
            return out

        rest = [part.tail_log_prob for part in parts if part.tail_log_prob is not None]
        return cls(
            batch([part.indices for part in parts], (rows, entries), PADDING),
            batch([part.log_probs for part in parts], (rows, entries), -math.inf),
            parts[0].tail,
            batch(rest, (rows,), 0.0) if rest else None,
        )


@dataclass(frozen=True, eq=False)
class Sampled:
    r"""A teacher of which N draws in each row are known: p is estimated by counts / sum(counts).

    The mean over draws of the loss -sum c log q / sum c has the gradient of the full teacher's,
    where the gradient of a top-k's has a bias. With importance weights p / r of a proposal r in
    place of counts it stays so, but for the sum in the denominator, by O(1 / N).

    About 12 of 50 draws are distinct on text: 36 bytes per token in a `fastkd.TeacherCache`.

    Args:
        indices: the drawn ids, [..., K], int32 or int64; -1 is padding, repeated ids add up.
        counts: how often, or the weights, >= 0, [..., K].

    Raises:
        TypeError, ValueError: with what was expected and what came.

    Source: Anshumann et al. 2025 (random sampling KD), arXiv 2503.16870.

    Example:
        >>> import torch
        >>> teacher = Sampled.from_logits(torch.randn(3, 1000), 50)
        >>> teacher.counts.sum(-1).tolist()
        [50, 50, 50]
    """

    indices: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        checked.listed("Sampled", self.indices, "counts", self.counts)
        checks.dense("Sampled: counts", self.counts)
        if self.counts.dtype.is_complex or self.counts.dtype == torch.bool:
            raise TypeError(f"Sampled: counts must be numbers, got {self.counts.dtype}")
        checked.one_device("Sampled", indices=self.indices, counts=self.counts)
        if checks.may_read(self.counts) and (self.counts < 0).any():
            raise ValueError(
                f"Sampled: counts must be >= 0, got {self.counts[self.counts < 0][0].item()}"
            )

    @property
    def shape(self) -> torch.Size:
        """[..., K]"""
        return self.indices.shape

    @classmethod
    def from_logits(
        cls, logits: Tensor, draws: int, generator: torch.Generator | None = None
    ) -> Sampled:
        """`draws` draws with replacement from each row of a teacher's logits [..., V]: the distinct
        ids with their counts, K as many as the row with most of them has.
        """
        checked.logits("Sampled.from_logits: logits", logits)
        checks.at_least("Sampled.from_logits: draws", draws)
        rows = logits.detach().double().reshape(-1, logits.size(-1)).softmax(-1)
        drawn = torch.multinomial(rows, draws, True, generator=generator).sort(-1).values
        place = (drawn.diff(dim=-1) != 0).cumsum(-1)
        place = torch.cat([place.new_zeros(len(place), 1), place], -1)
        distinct = int(place.max()) + 1 if place.numel() else 1
        counts = drawn.new_zeros(len(drawn), distinct)
        counts.scatter_add_(-1, place, torch.ones_like(drawn))
        indices = drawn.new_full(counts.shape, PADDING).scatter_(-1, place, drawn)
        shape = (*logits.shape[:-1], distinct)
        return cls(indices.view(shape), counts.view(shape))


def _best(name: str, logits: Any, k: Any) -> Tensor:
    checked.logits(f"{name}: logits", logits)
    checks.at_least(f"{name}: k", k)
    if k > min(logits.size(-1), MOST_ENTRIES):
        raise ValueError(
            f"{name}: k must be at most {min(logits.size(-1), MOST_ENTRIES)}, got {k}: "
            f"there are {logits.size(-1)} columns, and {MOST_ENTRIES} entries are the limit"
        )
    best: Tensor = logits.detach().topk(k).indices
    return best
