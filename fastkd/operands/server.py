"""What inference servers answer when they are asked for log-probabilities, as plain JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

TOKEN_ID = "token_id:"  # vLLM spells tokens so with return_tokens_as_token_ids

Entries = list[tuple[int, float]]
TokenId = Callable[[str], int | None]


def entries(position: Any, token_id: TokenId | None) -> Entries:
    """Ids and log-probabilities of one position, in the order of the answer.

    None, of a first token, lists nothing; nor does an entry without a log-probability.
    """
    if position is None:
        return []
    if not isinstance(position, Mapping | list | tuple):
        raise ValueError("neither an object nor a list")
    if isinstance(position, Mapping):
        if "top_logprobs" in position:  # chat completions: the chosen token, and the best ones
            best = position["top_logprobs"] or []
            listed = [(item["token"], item["logprob"]) for item in best]
            if position["token"] not in dict(listed):
                listed.append((position["token"], position["logprob"]))
        elif all(isinstance(value, Mapping) for value in position.values()):  # vLLM's own
            return [(int(key), value["logprob"]) for key, value in position.items()]
        else:  # completions
            listed = list(position.items())
    elif all(isinstance(item, Mapping) for item in position):
        listed = [(item["token"], item["logprob"]) for item in position]
    elif not all(isinstance(item, list | tuple) for item in position):
        raise ValueError("neither objects nor lists")
    else:  # SGLang: log-probability, id, text
        listed = [(item[1], item[0]) for item in position]
    found = [(_id(token, token_id), value) for token, value in listed if value is not None]
    return [(known, value) for known, value in found if known is not None]


def _id(token: int | str, token_id: TokenId | None) -> int | None:
    if isinstance(token, int):
        return token
    if token.startswith(TOKEN_ID):
        return int(token.removeprefix(TOKEN_ID))
    if token_id is None:
        raise TypeError(
            f"TopK.from_server: the answer spells tokens as text, such as {token!r}: pass "
            "token_id, a function from text to id, or ask vLLM with return_tokens_as_token_ids"
        )
    return token_id(token)
