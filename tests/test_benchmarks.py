"""The harness is honest: the wrong, the lazy and the forgetful are shown up, the others timed."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

import fastkd
from benchmarks import cases, host
from benchmarks.__main__ import main
from benchmarks.check import Problem
from benchmarks.operators import OPERATORS
from benchmarks.providers import Provider
from benchmarks.results import ABSENT, BEGUN, FAILED, OK, REFUSED, Results

ROOT = Path(__file__).parent.parent
QUICK = ["--device", "cpu", "--threads", "1", "--seconds", "0"]
SMALL = [*QUICK, "--case", "16x200"]


# --- providers with a flaw each ---------------------------------------------------------------


def right(student, teacher, labels, *, divergence, temperature, alpha):
    return fastkd.distillation_loss(
        student, teacher, labels, divergence=divergence, temperature=temperature, alpha=alpha
    )


class _Gradient(torch.autograd.Function):
    """A loss with whatever gradient a function makes of the right one."""

    @staticmethod
    def forward(ctx, student, loss, gradient):
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient, None, None


def _with_gradient(change, *operands, **options):
    loss = right(*operands, **options)
    (gradient,) = torch.autograd.grad(loss, operands[0]) if loss.requires_grad else (None,)
    return _Gradient.apply(operands[0], loss.detach(), change(gradient))


def wrong_gradient(*operands, **options):
    return _with_gradient(lambda g: g if g is None else 0.98 * g, *operands, **options)


def zeros(student, *_, **__):
    return (student * 0).sum()


def caching(*operands, _memory={}, **options):  # noqa: B006 (the flaw)
    if "answer" not in _memory:
        loss = right(*operands, **options)
        (gradient,) = torch.autograd.grad(loss, operands[0])
        _memory["answer"] = loss.detach(), gradient
    loss, gradient = _memory["answer"]
    return _Gradient.apply(operands[0], loss, gradient.clone())


def caching_later(*operands, _calls=[], _memory={}, **options):  # noqa: B006 (the flaw)
    """Behaves for as long as it thinks it is watched."""
    _calls.append(0)
    if len(_calls) < 4:
        return right(*operands, **options)
    return caching(*operands, _memory=_memory, **options)


class _Unread(torch.Tensor):
    """Does the work when somebody looks."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
        return function(*plain, **(kwargs or {}))


def lazy(*operands, **options):
    return right(*operands, **options).as_subclass(_Unread)


def lazy_thread(*operands, **options):
    """Hands out a gradient that another thread still has to write."""

    def later(gradient):
        if gradient is None:
            return None
        empty = torch.zeros_like(gradient)
        threading.Thread(target=lambda: (time.sleep(0.3), empty.copy_(gradient))).start()
        return empty

    return _with_gradient(later, *operands, **options)


def overwriting(student, *others, **options):
    loss = right(student, *others, **options)
    student.data[-1] = 0
    return loss


def raising(*_, **__):
    raise KeyError("no such kernel\nand a second line")


def hungry(student, *_, **__):
    return torch.empty(2**60).sum() + student.sum()


def deadly(*_, **__):
    raise KeyboardInterrupt


# --- what becomes of them -----------------------------------------------------------------------

FLAWS = {
    wrong_gradient: (REFUSED, "gradient off by 2.0e-02"),
    zeros: (REFUSED, "all zeros"),
    caching: (REFUSED, "an old answer"),
    caching_later: (REFUSED, "when the clock stopped"),
    lazy: (REFUSED, "not a plain tensor"),
    lazy_thread: (REFUSED, "gradient off by"),
    overwriting: (REFUSED, "it wrote over its inputs"),
    raising: (FAILED, "raised KeyError: 'no such kernel\\nand a second line'"),
    hungry: (FAILED, "out of memory"),
}


def _name(flaw):
    return f"{__name__}:{flaw.__name__}"


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("flaws")
    providers = ["eager", *map(_name, FLAWS), _name(right), "fastkd", "orda"]
    assert main([*SMALL, "--out", str(out), "--provider", *providers]) == 0
    return out


@pytest.mark.parametrize("flaw", FLAWS, ids=lambda flaw: flaw.__name__)
def test_a_flaw_costs_the_figure(measured, flaw):
    rows = {row.provider: row for row in Results.load(measured / "results.json").rows}
    row = rows[_name(flaw)]
    status, note = FLAWS[flaw]
    assert (row.status, row.times, row.peak_bytes) == (status, None, None)
    assert note in row.note
    assert "\n" not in row.note
    assert row.note in (measured / "table.md").read_text()


@pytest.mark.parametrize("provider", ["eager", _name(right), "fastkd"])
def test_the_others_are_measured(measured, provider):
    rows = {row.provider: row for row in Results.load(measured / "results.json").rows}
    row = rows[provider]
    assert (row.status, row.note) == (OK, "")
    assert 0 < row.times.p20 <= row.times.median <= row.times.p80
    assert len(row.times.medians) == 2
    assert max(row.errors) < 1e-5
    assert row.peak_bytes >= row.rows * row.vocab * 4  # its gradient


def test_who_does_not_take_part_is_named_once(measured):
    text = (measured / "table.md").read_text()
    assert text.count("orda: not offered: takes hidden states") == 1


def test_a_wrong_row_of_ours_is_an_exit_code(monkeypatch, capsys):
    broken = Provider("fastkd", zeros)
    monkeypatch.setitem(OPERATORS["logits"].providers, "fastkd", broken)
    assert main([*SMALL, "--provider", "eager", "fastkd"]) == 1
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("op", ["logits", "kl_div"])
def test_half_the_gradient_never_passes(tmp_path, dtype, op):
    """In 16 bits the limit follows eager's own error, but not that far."""
    providers = ["eager", "fastkd"]
    options = [*SMALL, "--op", op, "--dtype", dtype, "--pass", "backward", "full"]
    assert main([*options, "--out", str(tmp_path), "--provider", *providers]) == 0
    rows = Results.load(tmp_path / "results.json").rows
    assert [row.status for row in rows] == [OK] * 4
    assert max(row.errors.gradient for row in rows) < 0.1


@pytest.mark.parametrize(("off", "allowed"), [(1e-5, 1e-3), (2e-3, 4e-3), (0.1, 1e-2)])
def test_fp32_is_as_far_off_as_twice_eager_but_not_that_far(monkeypatch, off, allowed):
    def eager(*operands, **options):
        loss = right(*operands, **options)
        return loss + off * (loss - loss.detach())

    operator = OPERATORS["logits"]
    monkeypatch.setitem(operator.providers, "eager", Provider("eager", eager))
    case = cases.case_of("16x200")
    problem = Problem(operator, case, "tvd", torch.float32, torch.device("cpu"), 2.0)
    assert problem.truth.allowed.loss == 1e-3
    assert problem.truth.allowed.gradient == pytest.approx(allowed, rel=1e-2)


def test_rows_may_be_ignored_and_labels_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setitem(cases.CASES, "masked", cases.Case("masked", 16, 200, ignored=0.3))
    options = ["--divergence", "forward_kl", "jsd", "forward_kl+ce", "--case", "masked"]
    options += ["--provider", "eager", "fastkd", "--out", str(tmp_path)]
    assert main([*QUICK, *options]) == 0
    assert {row.status for row in Results.load(tmp_path / "results.json").rows} == {OK}


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "egaer"], "unknown provider 'egaer': one of eager, compile"),
        (["--provider", "no.such:thing"], "unknown provider 'no.such:thing': No module named"),
        (["--provider", "math:thing"], "unknown provider 'math:thing': module 'math' has no"),
        (["--case", "llama9"], "unknown case 'llama9': one of llama2-8192"),
        (["--case", "0x10"], "unknown case '0x10'"),
        (["--divergence", "kl"], "unknown divergence 'kl': logits has forward_kl"),
        (["--device", "cuda:99"], "no device 'cuda:99' here"),
        (["--device", "toaster"], "no device 'toaster' here"),
        (["--device", "cpu", "--pass", "replay"], "pass replay needs a CUDA device"),
        (["--suite", "cpu", "--case", "16x200"], "--suite fixes the case: leave it out"),
        (["--suite", "gpu", "--device", "cpu"], "--suite gpu needs a CUDA device"),
        (["--suite", "cpu", "--dry-run"], "--dry-run and --step go with --suite gpu"),
        (["--op", "sorted"], "invalid choice: 'sorted'"),
        (["--compare", "no/such.json"], "cannot read results no/such.json"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=0), "is of version 0, this suite reads 1"),
        (lambda data: data.pop("version"), "is of version None"),
        (lambda data: data.pop("header"), "is no results file"),
        (lambda data: data["rows"][0].update(speed=1), "is no results file"),
    ],
)
@pytest.mark.parametrize("option", ["--load", "--compare"])
def test_another_file_is_refused(measured, tmp_path, capsys, option, change, message):
    data = json.loads((measured / "results.json").read_text())
    change(data)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SystemExit) as stop:
        main([option, str(path)])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1


# --- files and suites -----------------------------------------------------------------------------


def test_compare_says_what_changed(measured, tmp_path, capsys):
    path = measured / "results.json"
    old = Results.load(path)
    for row in old.rows:
        if row.provider == "fastkd":
            row.times = row.times._replace(median=1e3, p20=9e2, p80=1.1e3)
    old.header["versions"]["torch"] = "0.1"
    old.save(tmp_path / "old.json")
    assert main(["--load", str(path), "--compare", str(tmp_path / "old.json")]) == 0
    said = capsys.readouterr().out
    assert "torch 0.1, now " in said
    assert "2 rows unchanged within their noise, 0 not in the old file" in said
    assert "1000 -> " in said


def test_resume_measures_only_what_is_missing(measured, capsys):
    before = Results.load(measured / "results.json").rows
    options = ["--out", str(measured), "--resume", "--provider", "eager", "fastkd-torch-backward"]
    assert main([*SMALL, *options]) == 0
    after = Results.load(measured / "results.json").rows
    assert after[:-1] == before
    assert after[-1].provider == "fastkd-torch-backward"


@pytest.mark.parametrize(
    ("options", "held", "hint"),
    [
        (SMALL, "notes.txt", "choose a new or empty folder"),
        (SMALL, "results.json", "--resume adds to it"),
        ([*SMALL, "--resume"], "results.json", "cannot read results"),
        (["--suite", "gpu", "--dry-run"], "suite.log", "choose a new or empty folder"),
    ],
)
def test_files_of_somebody_else_are_left_as_they_are(tmp_path, capsys, options, held, hint):
    (tmp_path / held).write_text("mine")
    with pytest.raises(SystemExit):
        main([*options, "--out", str(tmp_path)])
    assert hint in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_list_names_everything(capsys):
    assert main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "renyi" in said
    assert "liger" in said


def test_a_process_that_dies_leaves_word_and_is_gone_on_after(tmp_path):
    options = [*QUICK, "--case", "4x20", "--out", str(tmp_path), "--resume"]
    options += ["--provider", "eager", _name(deadly)]
    with pytest.raises(KeyboardInterrupt):
        main(options)
    died = Results.load(tmp_path / "results.json").rows
    assert [row.status for row in died] == [BEGUN, BEGUN]
    assert {row.note for row in died} == {"the process ended while this group was measured"}
    assert main([*options, "--dtype", "bf16", "--provider", "eager"]) == 0
    assert [row.status for row in Results.load(tmp_path / "results.json").rows] == [
        BEGUN,
        BEGUN,
        OK,
    ]


def test_time_may_run_out_and_be_given_again(tmp_path):
    options = [*SMALL, "--provider", "eager", "--out", str(tmp_path)]
    assert main([*options, "--limit", "0"]) == 0
    (row,) = Results.load(tmp_path / "results.json").rows
    assert (row.status, row.note) == (ABSENT, "not measured: out of time")
    assert main([*options, "--resume"]) == 0
    (row,) = Results.load(tmp_path / "results.json").rows
    assert (row.status, row.note) == (OK, "")


def test_the_host_suite_tells_the_parts_of_a_call(tmp_path, monkeypatch, capsys):
    for name, value in {"BLOCKS": 2, "CALLS": 2, "WARM": 1, "CASES": {"torch": ((4, 20),)}}.items():
        monkeypatch.setattr(host, name, value)
    monkeypatch.setattr(host.stub, "install", lambda: host.CASES.update(triton=()))
    assert main(["--suite", "host", "--out", str(tmp_path / "new")]) == 0
    found = json.loads((tmp_path / "new" / "host.json").read_text())
    assert {(row["divergence"], row["gradient"]) for row in found["rows"]} == {
        (name, gradient) for name in host.DIVERGENCES for gradient in ("forward", "backward")
    }
    for row in found["rows"]:
        parts = (float(row[name]) for name in ("loss, us", "backward, us"))
        assert min(parts := tuple(parts)) > 0
        assert abs(sum(parts) - float(row["both, us"])) <= 1
    assert "python -m benchmarks --suite host" in capsys.readouterr().out
