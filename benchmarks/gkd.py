"""TRL's GKDTrainer and `fastkd distill` on one job: `python -m benchmarks.gkd --out FOLDER`.

The same tiny models, chats, batches and settings: JSD(0.5) at T = 1 on completions, off-policy.
Each trains in a process of its own on one thread, first the one, then the other, then in the other
order. A step is the time between two steps of the optimizer; its memory, what is resident at most
beyond what is resident before it. On a busy machine only the ratios mean something.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from fastkd import doctor

from . import machine
from .publish import publish_table
from .results import check_folder

STEPS, BATCH, LENGTH, VOCABULARY = 16, 4, 128, 16000
CHATS = STEPS * BATCH
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GKD, FASTKD = "GKDTrainer", "fastkd distill"
PACKAGES = ("torch", "transformers", "trl", "accelerate")


def main(arguments: Sequence[str]) -> None:
    top = argparse.ArgumentParser(prog="benchmarks.gkd", description=__doc__)
    top.add_argument("--out", type=Path, help="results.json and table.md")
    top.add_argument("--train", choices=(GKD, FASTKD), help=argparse.SUPPRESS)
    options = top.parse_args(arguments)
    if options.train:
        print(json.dumps(trained(options.train, options.out)))
        return
    if options.out:
        check_folder(options.out, ours=False)
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        runs = []
        for name in (GKD, FASTKD, FASTKD, GKD):
            runs.append({"trainer": name, **in_a_process(name, Path(temporary))})
            print(f"{name}: {line(runs[-1])}", flush=True)
    torch.set_num_threads(1)
    header = machine.header(torch.device("cpu"), arguments, None, "benchmarks.gkd")
    header["versions"] = doctor.versions(*PACKAGES)
    text = table(runs)
    print("\n" + text)
    if options.out:
        publish_table(options.out, text, header, runs=runs)


def prepare(folder: Path) -> None:
    """Two models over one tokenizer, and chats of which each fills a sequence by itself."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    special = ["<end>", "<pad>", "<|user|>", "<|assistant|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(topics.values(), 4000, special_tokens=special, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<pad>",
        chat_template=TEMPLATE,
    )  # fmt: skip
    for seed, (name, width) in enumerate((("teacher", 128), ("student", 64))):
        torch.manual_seed(seed)
        shape = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1,
            eos_token_id=0, pad_token_id=1, bos_token_id=None,
        )  # fmt: skip
        transformers.LlamaForCausalLM(shape).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    ids = tokenizer("\n".join(topics.values()), verbose=False)["input_ids"]
    draw, chats = random.Random(0), []
    while len(chats) < CHATS:
        first = draw.randrange(len(ids) - LENGTH)
        words = tokenizer.decode(ids[first : first + draw.randint(LENGTH // 2, LENGTH - 20)])
        messages = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": words}]
        size = len(tokenizer.apply_chat_template(messages)["input_ids"])
        if LENGTH // 2 < size <= LENGTH:
            chats.append({"messages": messages})
    for name, some in (("chats", chats), ("held-out", chats[:4])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))


def in_a_process(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gkd", "--train", name, "--out", str(folder)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def trained(name: str, folder: Path) -> dict[str, Any]:
    """Loss of each step, seconds of all but the first, and MiB beyond what a step begins with."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(1)
    times, resident = [], []

    def step(*_: object) -> None:
        times.append(time.perf_counter())
        resident.append(memory())

    with register_optimizer_step_post_hook(step):
        losses = (with_gkd if name == GKD else with_fastkd)(folder)
    assert len(times) == len(losses) == STEPS
    seconds = [after - before for before, after in pairwise(times)]
    beyond = max(peak - before for (before, _), (_, peak) in pairwise(resident))
    return {"losses": losses, "seconds": seconds, "mib": beyond}


def memory() -> tuple[float, float]:
    """MiB resident now, and at most since this was last asked."""
    now, most = machine.resident()
    return now / 2**20, most / 2**20


def with_gkd(folder: Path) -> list[float]:
    import datasets
    import transformers

    warnings.simplefilter("ignore")  # that it is experimental
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / name)
        for name in ("student", "teacher")
    )
    trainer = GKDTrainer(
        student,
        teacher,
        args=GKDConfig(
            str(folder / "gkd"), max_steps=STEPS, per_device_train_batch_size=BATCH, lmbda=0.0,
            beta=0.5, temperature=1.0, max_length=LENGTH, learning_rate=1e-3,
            lr_scheduler_type="linear", logging_steps=1, save_strategy="no", report_to="none",
            use_cpu=True, bf16=False, disable_tqdm=True, seed=0, gradient_checkpointing=False,
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "student"),
        train_dataset=datasets.Dataset.from_json(str(folder / "chats.jsonl")),
    )  # fmt: skip
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def with_fastkd(folder: Path) -> list[float]:
    from fastkd.__main__ import main as fastkd

    out = folder / f"fastkd-{os.getpid()}"
    options = {
        "teacher": folder / "teacher", "student": folder / "student",
        "data": folder / "chats.jsonl", "eval-data": folder / "held-out.jsonl", "out": out,
        "sequence-length": LENGTH, "steps": STEPS, "batch-size": BATCH, "alpha": 1,
        "divergence": "jsd:0.5", "temperature": 1, "learning-rate": 1e-3, "lr-schedule": "linear",
        "warmup": 0, "log-every": 1, "device": "cpu", "threads": 1, "seed": 0,
        "save-every": STEPS, "vocab-size": VOCABULARY,
    }  # fmt: skip
    assert fastkd(["distill", *(f"--{name}={value}" for name, value in options.items())]) == 0
    with open(out / "metrics.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def line(run: dict[str, Any]) -> str:
    return f"{statistics.median(run['seconds']):.2f} s a step, {run['mib']:.0f} MiB"


def table(runs: list[dict[str, Any]]) -> str:
    """Both orders, and the curves side by side."""
    lines = [
        f"| first | second | times as long a step in {GKD} | times as much memory |",
        "|---|---|---|---|",
    ]
    for pair in (runs[:2], runs[2:]):
        gkd, ours = sorted(pair, key=lambda run: run["trainer"] != GKD)
        slower = statistics.median(gkd["seconds"]) / statistics.median(ours["seconds"])
        said = " | ".join(f"{run['trainer']}: {line(run)}" for run in pair)
        lines.append(f"| {said} | {slower:.2f} | {gkd['mib'] / ours['mib']:.2f} |")
    lines += ["", f"| step | loss of {GKD} | of {FASTKD} |", "|---|---|---|"]
    curves = zip(runs[0]["losses"], runs[1]["losses"], strict=True)
    lines += [f"| {step} | {a:.6f} | {b:.6f} |" for step, (a, b) in enumerate(curves, 1)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
