"""Rows of the user's data as tokens, and which of them the loss counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import RunError, Usage, one_line
from .files import Row, short
from .settings import UserModels


class Document(NamedTuple):
    """Token ids, and which of them are to be learnt.

    A `whole` one stays in one sequence. Others are cut where a sequence ends, and go on in the
    next one. One that `continues` belongs to the document before it. Offsets are of the tokens in
    the text, the end token's as if it were one character more; without them it is a conversation.
    """

    ids: list[int]
    learnt: list[bool]
    whole: bool
    continues: bool = False
    text: str = ""
    offsets: Sequence[tuple[int, int]] = ()


@dataclass
class Counts:
    """What became of the rows, and which files in folders of data were none of ours."""

    documents: int = 0
    empty: int = 0
    untaught: int = 0
    truncated: int = 0
    spelt: int = 0
    passed_over: list[str] = field(default_factory=list)

    def remarks(self, length: int) -> list[str]:
        """What was left out, as a user would want to know."""
        others = ", ".join(self.passed_over[:3]) + ", ..." * (len(self.passed_over) > 3)
        said = (
            (
                len(self.passed_over),
                f"files in folders of data left out, of no known kind: {others}",
            ),
            (self.empty, "rows without text left out"),
            (self.untaught, "rows with nothing to learn, such as a completion, left out"),
            (self.truncated, f"tokens of conversations beyond their first {length} cut off"),
            (
                self.spelt,
                "special tokens spelt in the text are read as plain text "
                "(--parse-special-tokens: as tokens)",
            ),
        )
        return [f"{count:,} {what}" for count, what in said if count]


@dataclass
class Reader:
    """Turns rows into documents."""

    tokenizer: Any
    chosen: UserModels
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        special = sorted(self.tokenizer.all_special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        end = self.tokenizer.eos_token_id
        self.end = [] if end is None or not self.chosen.end_of_text else [end]

    def documents(self, rows: Iterable[Row]) -> Iterator[Document]:
        for row in rows:
            document = self._document(row)
            if document is None:
                self.counts.empty += not row.continues
            elif not any(document.learnt):
                self.counts.untaught += 1
            else:
                self.counts.documents += not document.continues
                yield document

    def _document(self, row: Row) -> Document | None:
        """By the columns of the row: a conversation, a prompt with its completion, or text."""
        column = self.chosen.text
        if not column:
            if isinstance(row.values.get("prompt"), list):
                both = [*row.values["prompt"], *_list(row, "completion")]
                return self._chat(row, both, taught=len(row.values["prompt"]))
            names = ("messages", "prompt", "text")
            there = [name for name in names if name in row.values]
            # In a table of rows of several kinds, what others have is None.
            filled = [name for name in there if row.values[name] is not None]
            column = next(iter(filled or there), "")
        if column == "prompt" and not self.chosen.text:
            return self._pair(row)
        if column not in row.values:
            wanted = (
                f"no column {column!r}"
                if column
                else ("no column 'text', 'messages', or 'prompt' and 'completion'")
            )
            held = ", ".join(map(str, row.values)) or "none"
            raise RunError(f"{row.where} has {wanted}, but {held}: say which with --text")
        value = row.values[column]
        if isinstance(value, list):
            return self._chat(row, value)
        if column == "messages" and not self.chosen.text and value is not None:
            return self._chat(row, _list(row, column))  # which says that they are none
        return self._text(row, column)

    # --- text --------------------------------------------------------------------------------

    def _text(self, row: Row, column: str) -> Document | None:
        text = _string(row, column)
        if not text.strip() and not row.continues:
            return None
        ids, offsets = self.tokens(text, special=self.chosen.special_tokens and not row.continues)
        if not row.goes_on:
            ids, offsets = ids + self.end, offsets + end_offsets(text, self.end)
        # Nothing says what the first token of a document would be.
        learnt = [row.continues] + [True] * (len(ids) - 1)
        return Document(ids, learnt, False, row.continues, text, offsets)

    def _pair(self, row: Row) -> Document | None:
        self._need_offsets(row)
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        if not completion.strip():
            return None
        whole = prompt + completion
        ids, offsets = self.tokens(whole, special=self.chosen.special_tokens)
        start = 0 if self.chosen.loss_on == "all" else len(prompt)
        learnt = [end > start for _, end in offsets] + [True] * len(self.end)
        offsets = offsets + end_offsets(whole, self.end)
        return Document(ids + self.end, [False, *learnt[1:]], True, False, whole, offsets)

    def tokens(self, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        parse = self.chosen.parse_special_tokens
        if not parse:
            self.counts.spelt += sum(1 for _ in self._special.finditer(text))
        found = self.tokenizer(
            text,
            add_special_tokens=special,
            split_special_tokens=not parse,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,
        )
        ids = found["input_ids"]
        offsets = found.get("offset_mapping", [(0, 0)] * len(ids))
        if special and self.end and ids[-1:] == self.end:
            ids, offsets = ids[:-1], offsets[:-1]  # it is added below, to every kind
        return ids, offsets

    def _need_offsets(self, row: Row) -> None:
        if not self.tokenizer.is_fast:
            raise RunError(
                f"{row.where}: completions need a tokenizer with a tokenizer.json, which knows the "
                "place of each token in the text"
            )

    # --- conversations -----------------------------------------------------------------------

    def _chat(self, row: Row, messages: list[Any], taught: int = 0) -> Document | None:
        """A conversation by the template; of the turns from `taught` on, what the loss counts."""
        if not messages:
            return None
        if self.chosen.cross_tokenizer:
            raise RunError(
                f"{row.where} is a conversation, which each tokenizer writes by a template of its "
                "own: --cross-tokenizer takes text, or prompt and completion as text"
            )
        self._need_offsets(row)
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RunError(
                    f"{row.where}: expected messages with a role and content, got {short(message)}"
                )
        text = self._render(row, messages)
        spans = [(0, len(text))]
        if self.chosen.loss_on != "all":
            turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= taught]
            turns = turns[-1:] if self.chosen.loss_on == "last" else turns
            spans = [self._span(row, messages, text, turn) for turn in turns]
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        learnt = [
            any(end > first and start < last for first, last in spans)
            for start, end in found["offset_mapping"]
        ]
        return Document(found["input_ids"], [False, *learnt[1:]], True)

    def _render(self, row: Row, messages: list[Any], **options: Any) -> str:
        if not self.tokenizer.chat_template:
            raise Usage(
                f"{row.where} is a conversation, and the tokenizer has no chat template: name a "
                "file that holds one with --chat-template"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=row.values.get("tools"),
                tokenize=False,
                **options,
            )
            text.encode()
        except Exception as error:  # what a template raises is its own affair
            raise RunError(f"{row.where}: the chat template fails: {one_line(error)}") from None
        return text

    def _span(self, row: Row, messages: list[Any], text: str, turn: int) -> tuple[int, int]:
        """Where the template writes this turn: after what it writes to ask for it.

        A template may write a turn otherwise once others follow; what follows is then what it
        writes without this turn.
        """
        asked = self._render(row, messages[:turn], add_generation_prompt=True) if turn else ""
        if not text.startswith(asked):
            asked = self._render(row, messages[:turn])
        said = self._render(row, messages[: turn + 1])
        end = len(said)
        if not text.startswith(said):
            rest = self._render(row, messages[:turn] + messages[turn + 1 :])
            rest = rest[len(self._render(row, messages[:turn])) :]
            end = len(text) - len(rest) if text.endswith(rest) else -1
        if not text.startswith(asked) or end < len(asked):
            raise RunError(
                f"{row.where}: the chat template rewrites turn {turn + 1} once others follow, so "
                "that its tokens are not known: say --loss-on last, or --loss-on all"
            )
        return len(asked), end


def end_offsets(text: str, end: list[int]) -> list[tuple[int, int]]:
    """Of an end token: one character beyond the text, so that it has a place in it."""
    return [(len(text), len(text) + 1)] * len(end)


def _string(row: Row, column: str) -> str:
    if column not in row.values:
        raise RunError(f"{row.where} has no column {column!r}, but {', '.join(row.values)}")
    value = row.values[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RunError(f"{row.where}: column {column!r} holds {short(value)}, which is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RunError(
            f"{row.where}: column {column!r} holds half a character (a surrogate)"
        ) from None
    return value


def _list(row: Row, column: str) -> list[Any]:
    value = row.values.get(column)
    if not isinstance(value, list):
        raise RunError(
            f"{row.where}: column {column!r} holds {short(value)}, which are no messages"
        )
    return value
