"""What students learn from caches of a teacher: `python -m benchmarks.teacher_caches --out FOLDER`.

The default job's text, teacher and student, as Hugging Face models: `fastkd cache` writes what the
teacher says, `fastkd distill` trains a student from it, by forward KL at T = 1 alone, and all
students see the same batches. Hard labels get the best of three learning rates. Loss and KL to the
teacher are measured here, on held-out text, over the whole vocabulary. Differences are paired by
seed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastkd.__main__ import main as fastkd
from fastkd.cache import TeacherCache
from fastkd.distill import corpus
from fastkd.distill.gpt import GPT
from fastkd.distill.settings import DefaultJob
from fastkd.distill.train import Training

from . import machine
from .publish import publish_table
from .results import check_folder

ONLINE, HARD = "the teacher itself", "hard labels"
FULL, HIDDEN = "--full", "--hidden"
CACHES = ("--samples 50", "--top-k 64", "--top-k 12", FULL, HIDDEN)
TAILS = ("renormalize", "bucket")
# Of the learning rate, for hard labels: the best on the held-out text itself.
RATES = (0.1, 0.3, 1.0)


def main(arguments: Sequence[str]) -> None:
    top = argparse.ArgumentParser(prog="benchmarks.teacher_caches", description=__doc__)
    top.add_argument("--out", type=Path, help="results.json and table.md")
    top.add_argument("--seeds", type=int, default=3, help="students of each kind; default: 3")
    top.add_argument(
        "--share", type=float, default=0.1,
        help="of the teacher's text that the students see; default: 0.1, the default job's",
    )  # fmt: skip
    top.add_argument("--steps", type=int, default=200, help="of a student; default: 200")
    top.add_argument("--teacher-steps", type=int, default=600, help="default: 600")
    options = top.parse_args(arguments)
    if options.out:
        check_folder(options.out, ours=False)
    torch.set_num_threads(1)
    header = machine.header(torch.device("cpu"), arguments, None, "benchmarks.teacher_caches")
    with tempfile.TemporaryDirectory() as temporary:
        job = Job(options, Path(temporary))
        rows = [job.of_teacher()]
        for name, source in job.sources().items():
            rows.append(job.row(name, source, options.seeds))
            print(line(rows[-1], rows[1]), flush=True)
            if options.out:  # so that a run that is cut off leaves what it found
                publish_table(options.out, table(rows, options), header, rows=rows)
    print("\n" + table(rows, options))


class Job:
    """Teacher, text and caches in a folder, and what is trained from them."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.folder, self.steps = folder, options.steps
        chosen = DefaultJob(
            teacher_steps=options.teacher_steps, student_share=options.share, threads=1
        )
        self.chosen, length = chosen, chosen.sequence_length
        text = corpus.prepare(chosen.data, chosen.vocabulary, length, chosen.student_share)
        self.held_out = text.held_out(length)
        training = Training(chosen, text, torch.device("cpu"), ())
        for _ in range(chosen.teacher_steps):
            training.train_teacher()
        self.teacher = transferred(training.teacher, chosen)
        self._write(text)
        self.bytes = {cache: self._cache(cache) for cache in CACHES}

    def _write(self, text: corpus.Corpus) -> None:
        """Models and text, where the commands find them."""
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer.from_str(text.tokenizer)
        self.teacher.save_pretrained(self.folder / "teacher")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(self.folder / "teacher")
        shape = self.teacher.config.to_dict() | {"n_embd": self.chosen.student_width}
        type(self.teacher.config).from_dict(shape).save_pretrained(self.folder / "student")
        lesson = text.share(self.chosen.student_share)
        for name, ids in (("text", lesson.training), ("held-out", text.validation)):
            (self.folder / f"{name}.txt").write_text(tokenizer.decode(ids.tolist()))

    def _data(self) -> list[str]:
        return [
            f"--data={self.folder / 'text.txt'}", f"--eval-data={self.folder / 'held-out.txt'}",
            f"--sequence-length={self.chosen.sequence_length}", "--device=cpu", "--threads=1",
            f"--batch-size={self.chosen.batch_size}",
        ]  # fmt: skip

    def _cache(self, cache: str) -> float:
        """Writes one; its bytes per token."""
        folder = self.folder / cache.replace(" ", "")
        quietly(
            "cache", *cache.split(), *self._data(), f"--teacher={self.folder / 'teacher'}",
            f"--out={folder}",
        )  # fmt: skip
        return TeacherCache(folder).bytes_per_token()

    def sources(self) -> dict[str, tuple[str, list[str]]]:
        """By name: a cache, or the teacher, and what else is said to `fastkd distill`."""
        found: dict[str, tuple[str, list[str]]] = {ONLINE: (ONLINE, [])}
        for cache in CACHES:
            if "top" in cache:
                found |= {f"{cache}, {tail}": (cache, [f"--teacher-tail={tail}"]) for tail in TAILS}
            else:
                found[cache] = (cache, [])
        return found | {HARD: (ONLINE, ["--alpha=0"])}

    def row(self, name: str, source: tuple[str, list[str]], seeds: int) -> dict[str, Any]:
        """Students of one kind; of hard labels, those at the rate that is best for the first."""
        tried = [self.student(source, 0, rate) for rate in (RATES if name == HARD else (1.0,))]
        best = min(tried, key=lambda found: found["loss"])
        others = [self.student(source, seed, best["rate"]) for seed in range(1, seeds)]
        size = self.bytes.get(source[0])
        return {"name": name, "bytes": size, "students": [best, *others], "tried": tried}

    def student(self, source: tuple[str, list[str]], seed: int, rate: float) -> dict[str, float]:
        """Trains one, at a share of the learning rate; what it is worth."""
        from transformers import AutoModelForCausalLM

        kept, more = source
        where = "teacher" if kept == ONLINE else kept.replace(" ", "")
        option = "teacher" if kept == ONLINE else "teacher-cache"
        with tempfile.TemporaryDirectory() as temporary:
            out, began = Path(temporary) / "out", time.perf_counter()
            quietly(
                "distill", f"--{option}={self.folder / where}", f"--out={out}",
                f"--student={self.folder / 'student' / 'config.json'}", *self._data(),
                f"--steps={self.steps}", f"--evaluate-every={self.steps}", f"--seed={seed}",
                f"--save-every={self.steps}", f"--learning-rate={rate * self.chosen.learning_rate}",
                "--weight-decay=0.1", "--temperature=1", "--alpha=1", *more,
            )  # fmt: skip
            seconds = time.perf_counter() - began
            student = AutoModelForCausalLM.from_pretrained(out / "student")
        return {"seed": seed, "rate": rate, "seconds": seconds, **self.worth(student)}

    @torch.no_grad()
    def worth(self, student: Any) -> dict[str, float]:
        """Nats per token of held-out text: cross-entropy, and KL to the teacher."""
        loss = kl = 0.0
        for ids, labels in zip(*(each.split(16) for each in self.held_out), strict=True):
            p, q = (
                model(ids).logits.flatten(0, 1).double().log_softmax(-1)
                for model in (self.teacher, student)
            )
            loss += F.nll_loss(q, labels.flatten(), reduction="sum").item()
            kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
        count = self.held_out[1].numel()
        return {"loss": loss / count, "kl": kl / count}

    def of_teacher(self) -> dict[str, Any]:
        return {"name": "teacher", "bytes": None, "students": [self.worth(self.teacher)]}


def transferred(model: GPT, chosen: DefaultJob) -> Any:
    """The default job's model as the GPT-2 that it is."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=model.tokens.num_embeddings, n_positions=chosen.sequence_length,
        n_embd=chosen.teacher_width, n_layer=chosen.teacher_layers, n_head=chosen.heads,
        activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    names = {
        "tokens": "wte", "positions": "wpe", "norm": "ln_f", "blocks": "h",
        "before_attention": "ln_1", "before_mlp": "ln_2", "qkv": "attn.c_attn",
        "attention_out": "attn.c_proj", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj",
    }  # fmt: skip
    weights = {}
    for name, weight in model.state_dict().items():
        # GPT-2's linear layers hold their weights turned.
        turned = weight.dim() == 2 and name.startswith("blocks")
        to = ".".join(names.get(part, part) for part in name.split("."))
        weights[f"transformer.{to}"] = weight.mT if turned else weight
    found = GPT2LMHeadModel(shape).eval()
    found.load_state_dict(weights | {"lm_head.weight": model.tokens.weight})
    ids = torch.arange(chosen.sequence_length)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids))
    return found


def quietly(*arguments: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = fastkd([str(each) for each in arguments])
    if code:
        raise SystemExit(
            f"fastkd {' '.join(map(str, arguments))} ended with {code}:\n{said.getvalue()}"
        )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def line(row: dict[str, Any], online: dict[str, Any]) -> str:
    """Loss, its paired difference to the students of the teacher itself, and KL."""
    losses = [each["loss"] for each in row["students"]]
    size = "" if row["bytes"] is None else f"{row['bytes']:,.0f}"
    said = f"| {row['name']} | {size} | {statistics.mean(losses):.3f} |"
    pairs = zip(losses, (each["loss"] for each in online["students"]), strict=False)
    mean, error = mean_and_error([mine - other for mine, other in pairs])
    difference = "" if row["name"] in ("teacher", ONLINE) else f"{mean:+.4f} ± {error:.4f}"
    kl = statistics.mean(each["kl"] for each in row["students"])
    return f"{said} {difference} | {kl:.3f} |"


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        f"{options.seeds} seeds, {options.steps} steps, {options.share:.0%} of the teacher's text; "
        "nats per token of held-out text, ± one standard error of paired differences.",
        "",
        f"| learnt from | bytes per token | loss | to {ONLINE} | KL to the teacher |",
        "|---|---|---|---|---|",
        *(line(row, rows[1]) for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
