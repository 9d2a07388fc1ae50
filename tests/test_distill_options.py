"""Options of `fastkd distill`, `tune` and `cache` beyond any use: one line, nothing written."""

import dataclasses
import math
import re
import sys
from typing import get_type_hints

import pytest
import torch

from fastkd import __main__
from fastkd.distill import devices, parsing, settings
from fastkd.distill.errors import RunError, Usage
from tests.test_distill_user_models import home as home
from tests.test_distill_user_models import options

NUMBERS = {
    (kind, item.name): (get_type_hints(kind)[item.name], item.metadata["within"])
    for kind in (settings.DefaultJob, settings.UserModels, settings.Search)
    for item in dataclasses.fields(kind)
    if get_type_hints(kind)[item.name] in (int, float)
}


def refused(capsys, folder, *arguments):
    """What is said where nothing may be left."""
    before = set(folder.rglob("*"))
    try:
        code = __main__.main([*map(str, arguments), f"--out={folder / 'out'}"])
    except SystemExit as exit:  # argparse
        code = exit.code
    said = capsys.readouterr().err.splitlines()
    assert code == 2, (arguments, said)
    assert set(folder.rglob("*")) == before
    assert re.match(r"fastkd (distill|tune|cache): ", said[-1])
    return said[-1]


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "1e30", "9" * 400])
def test_no_option_takes_what_is_no_number_of_use(tmp_path, capsys, value):
    for name in {name for kind, name in NUMBERS if kind is not settings.Search}:
        theirs = name not in settings.DefaultJob.__dataclass_fields__
        models = ["--teacher=x", "--student=x", f"--data={__file__}"] if theirs else []
        said = refused(capsys, tmp_path, "distill", *models, f"--{name.replace('_', '-')}={value}")
        assert re.search(name.replace("_", "[_-]"), said), said


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["tune"], "--trials=-1"), (["tune"], "--seeds=4000000000"), (["tune"], "--steps=1e30"),
        (["tune"], "--alpha=nan"), (["cache", f"--data={__file__}"], "--top-k=0"),
        (["cache", f"--data={__file__}"], "--samples=4000000000"),
        (["cache", f"--data={__file__}"], "--batch-size=inf"),
        (["cache", f"--data={__file__}"], "--held-out=1"),
    ],
)  # fmt: skip
def test_the_other_commands_neither(home, tmp_path, capsys, command, option):
    teacher = [f"--teacher={home / 'teacher'}"] if command[0] == "cache" else []
    refused(capsys, tmp_path, *command, *teacher, option)


@pytest.mark.parametrize(
    "text",
    [
        "--temperature={}", "--temperature=cosine:{},1", "--temperature=linear:2,1,{}",
        "--teacher-temperature={}", "--divergence=jeffreys:1,{}", "--divergence=renyi:{}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["nan", "-1e30", "inf", "1e30", "9" * 400])
def test_numbers_in_other_options_neither(tmp_path, capsys, text, value):
    refused(capsys, tmp_path, "distill", text.format(value))


@pytest.mark.parametrize("text", ["4000000000", "8,1e30", "8,nan", "8,0", "-8", "1e30", "nan"])
def test_adapters_neither(text):
    with pytest.raises(Usage, match="say a rank, or with alpha and layers"):
        parsing.lora(text)


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=str)
def test_the_ends_of_every_interval(kind, name):
    """A number beyond an end is refused, and one at it is not, unless the interval is open."""
    of, within = NUMBERS[kind, name]
    low, high = map(float, re.findall(r"[-\d.]+", within))
    step = 1 if of is int else 0
    beyond = (low - 1, high + 1) if step else (low - 1e-3, math.nextafter(high, math.inf))
    ends = [low if within[0] == "[" else 1e-9, high if within[-1] == "]" else high - 1e-9]
    refuses = [*beyond, *([low] * (within[0] == "(")), *([high] * (within[-1] == ")"))]
    for value in refuses:
        with pytest.raises(Usage, match=re.escape(f"{name} must lie in {within}, got {of(value)}")):
            settings.check_ranges(dataclasses.replace(kind(), **{name: of(value)}))
    for value in ends:
        settings.check_ranges(dataclasses.replace(kind(), **{name: of(value)}))


@pytest.mark.parametrize(
    "line",
    [f"alpha = {'9' * 400}", f"steps = {'9' * 9999}", "alpha = " + "[" * 9999, "steps = 1e3"],
)
def test_numbers_of_a_file_neither(tmp_path, capsys, line):
    (tmp_path / "mine.toml").write_text(line)
    refused(capsys, tmp_path, "distill", f"--config={tmp_path / 'mine.toml'}")


# --- what would do nothing -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        *(
            ({name: value}, f"{name}: without on_policy the student writes nothing: leave it out")
            for name, value in (
                ("sampling_server", "http://x"), ("sampling_temperature", 0.5), ("top_p", 0.9),
                ("completion_length", 8), ("prompt_length", 8),
            )
        ),
        ({"teacher_tail": "drop"}, "teacher_tail: it is of a teacher_cache"),
        ({"teacher": (), "teacher_cache": "c", "teacher_precision": "int8"}, "no teacher is loa"),
        ({"teacher": (), "teacher_cache": "c", "teacher_device": "cpu"}, "no teacher is loaded"),
        ({"chunked_logits": False, "chunk_mib": 8}, "chunk_mib: without chunked_logits"),
        ({"eval_data": ("e",), "held_out": 0.1}, "held_out: with eval_data nothing is held out"),
        ({"lr_schedule": "constant", "warmup": 9}, "warmup: lr_schedule constant has none"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_refused(more, said):
    values = {"teacher": ("t",), "student": "s", "data": ("d",), **more}
    with pytest.raises(Usage, match=said):
        settings.build(settings.UserModels, values)
    name = next(name for name in reversed(more))
    default = settings.UserModels.__dataclass_fields__[name].default
    settings.build(settings.UserModels, values | {name: default})


# --- what this machine cannot serve ----------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--device=cuda", "PyTorch finds no GPU"),
        ("--teacher-device=cuda", "PyTorch finds no GPUs here"),
        ("--teacher-device=cuda:7", "PyTorch finds no GPUs here"),
        *(
            (f"--teacher-device={name}", "there are cpu, cuda, cuda:1, and auto")
            for name in ("cuda:", "cuda:x", "cuda:-1", "cuda:²", "cpu:0", "mps", "meta", "disk")
        ),
        ("--teacher-precision=nf4", "needs bitsandbytes"),
        ("--teacher-precision=llm_int8", "needs bitsandbytes"),
        ("--teacher-precision=int8", "needs torchao"),
        ("--quantize=int4", "needs torchao"),
        ("--optimizer=adamw_anyprecision", "optimizer adamw_anyprecision"),
        ("--optimizer=adamw_torch_npu_fused", "torch_npu"),
        ("--lr-schedule=cosine_with_min_lr", "min_lr"),
        ("--lr-schedule=warmup_stable_decay", "num_decay_steps"),
        ("--report-to=os", "report_to: os is not supported"),
        ("--report-to=../x", "report_to: ../x is not supported"),
        ("--lora=17", "beyond the 16 hidden units of the student"),
        ("--vocab-size=2147483647", "beyond the 448 outputs of the teacher"),
    ],
)
def test_what_the_machine_or_a_model_has_not(home, tmp_path, capsys, monkeypatch, option, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for package in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    assert message in refused(capsys, tmp_path, "distill", *options(home), option)


def test_models_beyond_the_memory_of_the_machine(tmp_path, capsys):
    for more in (["--teacher-width=65536", "--teacher-layers=900"], ["--batch-size=65536"]):
        length = ["--sequence-length=3000"]
        assert "GiB" in refused(capsys, tmp_path, "distill", "--device=cpu", *length, *more)


def test_memory_that_is_full_is_one_line():
    with pytest.raises(RunError, match="this machine's memory is full"), devices.enough_memory():
        torch.empty(2**60, dtype=torch.uint8, device="cpu")
    with pytest.raises(RunError, match="this machine's memory is full"), devices.enough_memory():
        raise MemoryError
    with pytest.raises(RunError, match="the GPU's memory is full"), devices.enough_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes"), devices.enough_memory():
        raise RuntimeError("shapes do not match")
