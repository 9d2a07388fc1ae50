"""`fastkd cache`."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor

from fastkd.cache import Best, CacheError, Draws, Full, Hidden, Layout, write
from fastkd.integrations.models import head_of
from fastkd.integrations.teachers import asked
from fastkd.operands import LinearHead

from . import cli, models, report, sequences, settings
from .cached import APART, TOKENIZER, Corpus
from .errors import RunError, Usage, hush_torchao, needs
from .job import precision, set_up

CACHE = "Write what a teacher says of a text once, to train from it without the teacher."
ABOUT_CACHE = """
Runs a teacher over --data and writes to --out, for each token, its best entries, draws from it,
its hidden states, or all its log-probabilities, with the tokens. Ended at any moment, the same
command goes on where it was. fastkd.TeacherCache reads the folder.
"""
# The settings of `fastkd distill` that say which tokens the teacher sees.
SETTINGS = (
    "teacher", "data", "eval_data", "text", "loss_on", "chat_template", "special_tokens",
    "end_of_text", "parse_special_tokens", "sequence_length", "held_out", "seed", "vocab_size",
    "batch_size", "precision", "device", "threads",
)  # fmt: skip


def add(commands: Any) -> None:
    """Adds `cache` to the commands of `fastkd`."""
    parser = commands.add_parser("cache", help=CACHE, description=ABOUT_CACHE, allow_abbrev=False)
    parser.set_defaults(run=partial(cli.run, _cache))
    parser.add_argument("--out", metavar="DIR", required=True, help="where to write")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--top-k", type=int, metavar="K", default=64, help="the best entries; default: 64"
    )
    kinds.add_argument("--samples", type=int, metavar="N", help="draws with replacement")
    kinds.add_argument("--hidden", action="store_true", help="hidden states, and the head once")
    kinds.add_argument("--full", action="store_true", help="all log-probabilities, in fp16")
    parser.add_argument(
        "--log-prob-bits", type=int, choices=(8, 16), help="of --top-k; default: 16"
    )
    fields = {item.name: item for item in dataclasses.fields(settings.UserModels)}
    types = get_type_hints(settings.UserModels)
    for name in SETTINGS:
        about = {"help": "folder or hub name of the teacher"} if name == "teacher" else {}
        required = name in ("teacher", "data")
        cli.option(parser, fields[name], types[name], required=required, **about)


def _cache(options: argparse.Namespace) -> None:
    given = settings.absolute({k: v for k, v in vars(options).items() if k in SETTINGS})
    # The student plays no part, but these are the settings of a run that has one.
    if len(given["teacher"]) > 1:
        raise Usage("--teacher: a cache cites one teacher")
    chosen = settings.build(settings.UserModels, {"student": given["teacher"][0], **given})
    try:
        run(chosen, layout(options), Path(options.out))
    except CacheError as error:
        raise RunError(str(error)) from None


def layout(options: argparse.Namespace) -> Layout:
    others = options.samples is not None or options.hidden or options.full
    if not others:
        return Best(options.top_k, options.log_prob_bits or 16)
    if options.log_prob_bits:
        raise Usage("log_prob_bits are of --top-k: leave one of them out")
    if options.hidden:
        return Hidden()
    return Full() if options.full else Draws(options.samples)


def run(chosen: settings.UserModels, kept: Layout, folder: Path) -> None:
    """Writes the cache, and says what it takes."""
    hush_torchao()
    needs("transformers", "datasets", "accelerate", "rich", "safetensors")
    device = set_up(chosen)
    (name,) = chosen.teacher
    tokenizer = models.common_tokenizer(chosen.teacher, name, chosen.chat_template)
    vocab_size = models.vocabulary(tokenizer, chosen.vocab_size)
    try:
        kept.check(vocab_size)
    except ValueError as error:
        raise Usage(str(error)) from None
    models.check_shape("teacher", name, chosen, vocab_size)
    model = models.load(name, precision(chosen.precision, device)).to(device)
    hidden, separate = isinstance(kept, Hidden), models.keeps_documents_apart(model)
    if hidden and head_of(model) is None:
        raise RunError(
            "the teacher's logits are not those of its hidden states and output head: "
            "take --top-k, --samples or --full"
        )
    ask = asked(model, device, heads=hidden, sharded=False)
    with tempfile.TemporaryDirectory() as temporary, report.bars() as bars:
        training, held_out, counts = sequences.prepare(
            chosen, tokenizer, Path(temporary) / "tokens", lambda count: None
        )
        for remark in counts.remarks(chosen.sequence_length):
            report.say(remark)
        corpus = Corpus(training, held_out)

        def teacher(tokens: Tensor, rows: range) -> Tensor | LinearHead:
            batch = sequences.collate([corpus.rows[row] for row in rows], separate)
            said: Tensor | LinearHead = ask({k: v.to(device) for k, v in batch.items()})
            return said

        about = {
            "teacher": name,
            "weights": models.fingerprint(model),
            "held_out_rows": len(held_out),
            APART: separate,
        }
        bar = bars.add_task("sequences", total=len(corpus), text="")
        cache = write(
            folder,
            kept,
            corpus,
            teacher,
            vocab_size,
            batch_size=chosen.batch_size,
            about=about,
            progress=lambda rows: bars.update(bar, completed=rows),
        )
    tokenizer.save_pretrained(folder / TOKENIZER)
    print(
        f"{len(cache):,} sequences of {cache.manifest.positions} tokens, the last "
        f"{len(held_out):,} held out; {cache.bytes_per_token():.1f} bytes per token, where logits "
        f"in bf16 take {2 * vocab_size:,}\n\nSaved: {folder}/"
    )
