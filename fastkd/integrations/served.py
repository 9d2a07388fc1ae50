"""Completions by a server with OpenAI's interface that speaks tokens, as vLLM and SGLang do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen


class ServerError(RuntimeError):
    """The server is not there, or does not answer as it should."""


@dataclass(frozen=True)
class Server:
    """The first model that a server has.

    Its weights are the server's own: nothing here sends it those of the student.

    Args:
        url: where it listens, without /v1.
        patience: seconds to wait for an answer.
    """

    url: str
    patience: float = 600.0

    def model(self) -> str:
        """Its name. Raises ServerError."""
        answer = self._ask("/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"{self.url} names no model in /v1/models") from None

    def complete(
        self, prompts: list[list[int]], end: list[int], **sampling: Any
    ) -> list[list[int]]:
        """Token ids that follow on each of the prompts, the first of `end` where it stopped.

        `sampling` are arguments of /v1/completions, such as max_tokens, temperature and seed.
        Raises ServerError.
        """
        wanted = {"model": self.model(), "prompt": prompts, "return_token_ids": True, **sampling}
        answer = self._ask("/v1/completions", wanted)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            written = [[*map(int, choice["token_ids"])] for choice in choices]
            stopped = [choice["finish_reason"] == "stop" for choice in choices]
        except (KeyError, TypeError, ValueError):
            raise ServerError(
                f"{self.url} answers without token_ids, which it is asked for by return_token_ids: "
                "vLLM and SGLang have them"
            ) from None
        if len(written) != len(prompts):
            raise ServerError(f"{self.url} answers {len(written)} of {len(prompts)} prompts")
        for ids, ended in zip(written, stopped, strict=True):
            if ended and end and (not ids or ids[-1] not in end):
                ids.append(end[0])
        return written

    def _ask(self, path: str, values: dict[str, Any] | None = None) -> Any:
        data = None if values is None else json.dumps(values).encode()
        request = Request(self.url.rstrip("/") + path, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=self.patience) as answer:
                return json.load(answer)
        except (OSError, ValueError) as error:  # of the network, of HTTP, of JSON
            raise ServerError(f"{self.url}{path}: {error}") from None
