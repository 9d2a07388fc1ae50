"""kill -9 at random moments of every kind of job: what is lost, and what it ends with."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest

from tests.test_distill_user_models import ROOT, transformers
from tests.test_distill_user_models import home as home
from tests.test_distill_user_models import options as of_models

if not hasattr(os, "fork"):
    pytest.skip("there is no kill -9", allow_module_level=True)

STEPS, EVERY = 16, 4
# Imports once, then forks for each job, and kills it after so many seconds.
NURSERY = """if True:
    import json, os, signal, sys, time
    import torch
    import datasets, matplotlib.pyplot, peft, transformers
    from fastkd import __main__
    from fastkd.cache import writer
    from fastkd.distill import caching, default_job, user_models, watch
    writer.TOKENS_PER_SHARD = 256
    torch.set_num_threads(1)
    for line in sys.stdin:
        arguments, seconds = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if not child:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(os.open(arguments[-1] + ".said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os._exit(__main__.main(arguments[:-1]))
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if seconds and time.monotonic() - began > seconds:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(ended[1])
        print(json.dumps([code, time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def nursery():
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip

    def run(arguments, folder, seconds=0):
        """Exit code and seconds of a job; after so many it is killed."""
        print(json.dumps([[*map(str, arguments), str(folder)], seconds]), file=process.stdin)
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(60)


def options(kind, home):
    fixed = {"steps": STEPS, "save_every": EVERY, "log_every": 1, "evaluate_every": 2 * EVERY}
    if kind == "default":
        small = {
            "teacher_steps": 6, "teacher_width": 16, "student_width": 8, "vocabulary": 300,
            "sequence_length": 16, "students": 2, "batch_size": 2, "data": home / "text.txt",
        }  # fmt: skip
        return [f"--{k.replace('_', '-')}={v}" for k, v in (fixed | small).items()]
    more = {
        "models": {},
        "adapters": {"lora": "4"},
        "own": {"lora": "4", "teacher": home / "student", "alpha": 0.5},
        "on policy": {"on_policy": 0.5, "completion_length": 4, "prompt_length": 4},
        "several": {},
        "from a cache": {"temperature": 1},
    }[kind]
    both = [f"--teacher={home / 'student'}"] if kind == "several" else []
    chosen = [*of_models(home, **{**fixed, "epochs": 9, **more}), *both]
    if kind == "from a cache":
        chosen[0] = f"--teacher-cache={home / 'cache'}"  # in place of its teacher
    return chosen


def caching(home, out):
    return [
        "cache", f"--teacher={home / 'teacher'}", f"--data={home / 'text.txt'}", "--out", out,
        "--sequence-length=16", "--top-k=8", "--batch-size=4", "--device=cpu",
    ]  # fmt: skip


def reached(folder):
    """The last step that metrics.csv has, and that of the last save."""
    table = folder / "metrics.csv"
    rows = table.read_text().splitlines() if table.exists() else []
    saved = [int(p.parent.name.split("-")[1]) for p in folder.glob("*/trainer_state.json")]
    return max((int(row.split(",")[0]) for row in rows[1:]), default=0), max(saved, default=0)


def result(folder):
    """All that a job ends with, but for times."""
    if (folder / "student.safetensors").exists():
        return {"": (folder / "student.safetensors").read_bytes()}
    found = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    return {name: weight.numpy().tobytes() for name, weight in found.state_dict().items()}


KINDS = ["default", "models", "adapters", "own", "on policy", "several", "from a cache"]


@pytest.mark.parametrize(
    ("kind", "kills"),
    [("adapters", 2), *(pytest.param(kind, 20, marks=pytest.mark.full) for kind in KINDS)],
)
def test_kill_9(kind, kills, home, tmp_path, nursery):
    chosen, whole = options(kind, home), tmp_path / "whole"
    if kind == "from a cache":
        assert nursery(caching(home, home / "cache"), home / "cache")[0] == 0
    code, seconds = nursery(["distill", "--out", whole, *chosen], whole)
    assert code == 0, (tmp_path / "whole.said").read_text()
    truth, table = result(whole), (whole / "metrics.csv").read_bytes()
    draw, killed, ended, lost = random.Random(kind), 0, 0, [0]
    while killed < kills or not ended:
        folder = tmp_path / f"{ended}"
        again = ["--resume", folder] if (folder / "config.toml").exists() else None
        job = ["distill", *(again or ["--out", folder, *chosen])]
        code, _ = nursery(job, folder, draw.uniform(0.01, seconds) if killed < kills else 0)
        assert code in (0, -9), (tmp_path / f"{ended}.said").read_text()
        killed += code == -9
        if code == 0 or (folder / "metrics.json").exists():  # it may be killed in its last breath
            assert result(folder) == truth
            assert (folder / "metrics.csv").read_bytes() == table
            ended += 1
        elif kind != "default":
            logged, saved = reached(folder)
            lost.append(logged - saved)
    assert max(lost) <= EVERY + 1  # the save of a step comes after its row


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
def test_kill_9_of_fastkd_cache(kills, home, tmp_path, nursery):
    """The same command goes on where it was: shards that are whole are not written again."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    code, seconds = nursery(caching(home, whole), whole)
    assert code == 0, (tmp_path / "whole.said").read_text()
    truth = {path.name: path.read_bytes() for path in whole.glob("*.*")}
    draw, killed, code = random.Random(0), 0, 1
    while killed < kills or code:
        before = {path: path.stat().st_mtime_ns for path in folder.glob("0*.safetensors")}
        code, _ = nursery(
            caching(home, folder), folder, draw.uniform(0.01, seconds) if killed < kills else 0
        )
        assert code in (0, -9), (tmp_path / "killed.said").read_text()
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
        if code == 0:
            assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == truth
            if killed < kills:
                shutil.rmtree(folder)
        killed += code == -9
