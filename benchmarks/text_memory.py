"""Memory that `fastkd distill` takes for the text: `python -m benchmarks.text_memory`.

A file of so many megabytes is distilled between two tiny models, in a process of its own, and the
peak of its resident memory stands beside that of the same job on a text of 0.1 MB. Pages of the
tokens on disk that the kernel holds for the process are part of it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

MEGABYTE = 10**6
SMALL = 0.1
# VmHWM is the process's own; ru_maxrss may be that of the process which started it.
CHILD = """
import re, sys
from fastkd.__main__ import main
code = main(sys.argv[1:])
print("KIB", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def main(arguments: Sequence[str]) -> None:
    top = argparse.ArgumentParser(prog="benchmarks.text_memory", description=__doc__)
    top.add_argument("--megabytes", type=float, default=100, help="of text; default: 100")
    options = top.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models(folder)
        write(folder / "held-out.txt", SMALL)
        base, _ = peak(folder, SMALL)
        most, seconds = peak(folder, options.megabytes)
    print(
        f"{options.megabytes:g} MB of text: {most:.0f} MiB at most, of which {base:.0f} MiB are "
        f"there with {SMALL:g} MB: {most - base:.0f} MiB for the text, in {seconds:.0f} s"
    )


def models(folder: Path) -> None:
    """Teacher and student of one small layer, over a tokenizer of 4000 tokens."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(topics.values(), 4000, special_tokens=["<end>"], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<end>"
    )
    shape = transformers.LlamaConfig(
        vocab_size=4000, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    for name in ("teacher", "student"):
        transformers.LlamaForCausalLM(shape).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write(path: Path, megabytes: float) -> None:
    """Paragraphs of Python's reference pages in random order."""
    parts = [part for text in topics.values() for part in text.split("\n\n")]
    draw, left = random.Random(0), megabytes * MEGABYTE
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            left -= file.write(draw.choice(parts) + "\n\n")


def peak(folder: Path, megabytes: float) -> tuple[float, float]:
    """MiB that were resident at once, and seconds."""
    write(folder / "text.txt", megabytes)
    command = [
        sys.executable, "-c", CHILD, "distill",
        *(f"--{name}={folder / name}" for name in ("teacher", "student")),
        f"--data={folder / 'text.txt'}", f"--eval-data={folder / 'held-out.txt'}",
        f"--out={folder / f'{megabytes:g}'}", "--steps=20", "--device=cpu", "--threads=1",
    ]  # fmt: skip
    began = time.monotonic()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = re.search(r"KIB (\d+)", done.stdout)
    assert found
    return int(found[1]) / 2**10, time.monotonic() - began


if __name__ == "__main__":
    main(sys.argv[1:])
