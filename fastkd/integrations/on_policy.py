"""What a student writes itself, to learn from."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .models import evaluating
from .served import Server, ServerError


@dataclass(frozen=True)
class OnPolicy:
    """Steps in which the student learns from what it writes, at the places that it reaches.

    Of each sequence of such a batch one document is drawn. What stands there before its last
    completion is the prompt; of plain text, which is learnt from the first token on, so many
    tokens of it. The student samples what follows, and the loss is the divergence alone on the
    tokens that it wrote, its end token included. A step is on policy, and writes what it writes,
    by seed and number: a run that is resumed does as one that never stopped.

    Args:
        share: of the optimizer steps, in (0, 1]; lambda of GKD.
        temperature: at which it samples.
        top_p: samples are of the likeliest tokens with this mass together.
        new_tokens: at most so many are written.
        prompt_tokens: of plain text.
        end: ids that end what is written; none: those of the model's generation_config.
        server: address of a server that writes in the student's place, such as vLLM's or SGLang's.
            It is asked for tokens by OpenAI's /v1/completions. Its weights are the server's affair:
            as they fall behind, what is written is less the student's own. The loss is still the
            whole divergence at the places that are reached, which needs no correction for that.

    Raises:
        ValueError: for what is out of range.

    Source: Agarwal et al. 2024 (GKD), arXiv 2306.13649.

    Example:
        >>> [OnPolicy(share=0.5).at(step, seed=0) for step in range(6)]
        [True, True, True, False, False, True]
    """

    share: float
    temperature: float = 1.0
    top_p: float = 1.0
    new_tokens: int = 128
    prompt_tokens: int = 16
    end: tuple[int, ...] = ()
    server: str = ""

    def __post_init__(self) -> None:
        for name in ("share", "top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        for name in ("new_tokens", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def at(self, step: int, seed: int) -> bool:
        """Whether a step is on policy."""
        return random.Random(f"{seed} {step}").random() < self.share

    @contextlib.contextmanager
    def random(self, seed: int, step: int, process: int) -> Iterator[None]:
        """Samples that depend on these three alone, and leave the generators as they were."""
        with torch.random.fork_rng():
            torch.manual_seed(random.Random(f"{seed} {step} {process}").getrandbits(63))
            yield

    @torch.no_grad()
    def written(
        self, student: Any, inputs: Mapping[str, Any], vocab_size: int | None = None
    ) -> dict[str, Tensor]:
        """A batch of prompts and what the student goes on to, which alone is to be learnt."""
        prompts = [self._prompt(inputs, row) for row in range(len(inputs["input_ids"]))]
        ends = torch.tensor(self._ends(student), device=prompts[0].device)
        longest = max(map(len, prompts))
        padding = int(ends[0]) if len(ends) else 0
        ids = pad_sequence(prompts, True, padding, "left")
        seen = pad_sequence([torch.ones_like(each) for each in prompts], True, 0, "left")
        if self.server:
            ids, real = self._served(student, prompts, ids, padding, vocab_size)
        else:
            with evaluating(student):
                ids = student.generate(
                    input_ids=ids,
                    attention_mask=seen,
                    generation_config=self._generation(student, padding, vocab_size),
                )
            real = torch.ones_like(ids[:, longest:]).bool()
        ended = torch.isin(ids[:, longest:], ends).long()
        kept = (ended.cumsum(-1) - ended == 0) & real  # the end token itself is learnt
        seen = torch.cat([seen, kept.long()], -1)
        own = torch.cat([torch.zeros_like(seen[:, :longest]).bool(), kept], -1)
        return {
            "input_ids": ids,
            "attention_mask": seen,
            "position_ids": (seen.cumsum(-1) - 1).clamp_min(0),
            "labels": ids.masked_fill(~own, -100),
        }

    def _served(
        self, student: Any, prompts: list[Tensor], ids: Tensor, padding: int, vocab_size: int | None
    ) -> tuple[Tensor, Tensor]:
        """The padded prompts and what the server writes, and where in the latter it wrote."""
        written = Server(self.server).complete(
            [prompt.tolist() for prompt in prompts],
            self._ends(student),
            max_tokens=self.new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=int(torch.randint(2**31 - 1, ())),
        )
        width = student.config.get_text_config().vocab_size
        if any(not 0 <= token < width for row in written for token in row):
            raise ServerError(f"{self.server} writes tokens beyond the {width} of the student")
        # A server draws from columns that are padding as well: what goes on from one is no text.
        tokens = range(vocab_size or width)
        written = [list(itertools.takewhile(tokens.__contains__, row)) for row in written]
        longest = max(1, *map(len, written))
        new = torch.tensor([row + [padding] * (longest - len(row)) for row in written])
        real = torch.tensor([[place < len(row) for place in range(longest)] for row in written])
        return torch.cat([ids, new.to(ids)], -1), real.to(ids.device)

    def _prompt(self, inputs: Mapping[str, Any], row: int) -> Tensor:
        ids, learnt = inputs["input_ids"][row], inputs["labels"][row] != -100
        if inputs.get("attention_mask") is not None and inputs["attention_mask"].dim() == 2:
            real = inputs["attention_mask"][row].bool()
            ids, learnt = ids[real], learnt[real]
        starts = [0]
        if inputs.get("position_ids") is not None and len(ids) == inputs["position_ids"].size(-1):
            starts = sorted({0, *(inputs["position_ids"][row] == 0).nonzero().flatten().tolist()})
        pieces = zip(starts, [*starts[1:], len(ids)], strict=True)
        taught = [slice(*piece) for piece in pieces if learnt[slice(*piece)].any()]
        part = taught[int(torch.randint(len(taught), ()))] if taught else slice(0, len(ids))
        ids, learnt = ids[part], learnt[part]
        begins = learnt & ~F.pad(learnt, (1, 0))[:-1]
        at = int(begins.nonzero()[-1]) if begins.any() else 0
        at = at if at > 1 else min(self.prompt_tokens, max(1, len(ids) - 1))
        most = max(1, inputs["input_ids"].size(-1) - self.new_tokens)
        return ids[max(0, at - most) : at]

    def _ends(self, student: Any) -> list[int]:
        known = self.end or student.generation_config.eos_token_id
        if known is None:
            return []
        return list(known) if isinstance(known, tuple | list) else [known]

    def _generation(self, student: Any, padding: int, vocab_size: int | None) -> Any:
        from transformers import GenerationConfig

        width = student.config.get_text_config().vocab_size
        unused = list(range(vocab_size or width, width))  # columns that are padding
        return GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0,
            max_new_tokens=self.new_tokens,
            eos_token_id=self._ends(student) or None,
            pad_token_id=padding,
            suppress_tokens=unused or None,
        )
