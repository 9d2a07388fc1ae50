"""`fastkd distill` where something is wrong: one line, the exit code, nothing half written."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import __main__
from fastkd.distill import config, default_job, settings, storage
from fastkd.distill.errors import RunError

for module in ("matplotlib", "rich", "safetensors", "tokenizers"):
    pytest.importorskip(module)

ROOT = Path(__file__).parents[1]
TINY = [
    "--students=1",
    "--steps=2",
    "--teacher-steps=1",
    "--teacher-width=8",
    "--student-width=8",
    "--device=cpu",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "file").write_text("")
    (tmp_path / "rows.csv").write_text("text\nof a row\n")
    (tmp_path / "typo.toml").write_text("temprature = 3")
    (tmp_path / "kind.toml").write_text('alpha = "hot"')
    (tmp_path / "broken.toml").write_text("temperature =")
    return tmp_path


def one_line(capsys):
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("fastkd distill: ")
    return err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temprature=3"], 2, "unknown option --temprature=3; did you mean --temperature?"),
        (["--temp=3"], 2, "unknown option --temp=3; did you mean --temperature?"),
        (["--temperature=0"], 2, "value must be a finite temperature > 0, got 0.0"),
        (["--temperature=nan"], 2, "value must be a finite temperature > 0, got nan"),
        (["--temperature=hot"], 2, "temperature 'hot': could not convert string to float"),
        (["--temperature=cosin:8,1"], 2, "schedule 'cosin' is unknown: did you mean 'cosine'?"),
        (["--temperature=cosine:8"], 2, "'cosine:8': expected two temperatures, got 1 numbers"),
        (["--temperature=cosine:8,0"], 2, "Cosine: end must be a finite temperature > 0, got 0.0"),
        (["--temperature=linear:8,1,2"], 2, "the share of the run must lie in (0, 1], got 2.0"),
        (["--teacher-temperature=-1"], 2, "value must be a finite temperature > 0, got -1.0"),
        (["--entropy-weight=inf"], 2, "entropy_weight must lie in [-1000, 1000], got inf"),
        (["--alpha=2"], 2, "alpha must lie in [0, 1], got 2.0"),
        (["--steps=0"], 2, "steps must lie in [1, 2147483647], got 0"),
        (["--student-share=0"], 2, "student_share must lie in (0, 1], got 0.0"),
        (["--batch-size=-1"], 2, "batch_size must lie in [1, 65536], got -1"),
        (["--student-width=9"], 2, "student_width must be a multiple of heads=4"),
        (["--divergence=forwrd_kl"], 2, "did you mean 'forward_kl'?"),
        (["--divergence=jsd:1"], 2, "beta must lie in (0, 1)"),
        (["--divergence=tvd:1"], 2, "divergence 'tvd:1': tvd takes no numbers, got 1"),
        (["--divergence=jsd:0.1,1"], 2, "'jsd:0.1,1': jsd takes 1 numbers, got 2"),
        (["--seed=4294967296"], 2, "seed must lie in [0, 2147483647], got 4294967296"),
        (["--device=mps"], 2, "there are auto, cpu, cuda"),
        (["--accumulation=2"], 2, "'accumulation' is for --teacher and --student"),
        (["--teacher=x", "--student=x"], 2, "--data is missing"),
        (["--teacher=x"], 2, "--student is missing"),
        (["--config=nope.toml"], 2, "cannot read nope.toml: No such file"),
        (["--config=typo.toml"], 2, "setting 'temprature' is unknown: did you mean 'temperature'?"),
        (["--config=kind.toml"], 2, "alpha must be a number, got 'hot'"),
        (["--config=broken.toml"], 2, "broken.toml is not TOML"),
        (["--data=nope.txt"], 1, "distill: nope.txt: there is no such file"),
        (["--data=empty.txt"], 1, "there is no text in "),
        (["--data=short.txt"], 1, "the text is too short"),
        (["--data=bytes.txt"], 1, "bytes.txt is not text in UTF-8"),
        (["--data=rows.csv"], 1, "rows.csv holds rows, which go with --teacher and --student"),
        (["--data=hf:me/rows"], 1, "hf:me/rows holds rows, which go with --teacher"),
        (["--out=file"], 2, "cannot write to file: File exists"),
        (["--resume=nope"], 2, "--resume nope: there is no such folder"),
        (["--resume=."], 2, "holds no config.toml"),
        (["--resume=.", "--steps=4"], 2, "leave the other options out"),
    ],
)
def test_bad_input_is_one_line(here, capsys, arguments, code, message):
    before = set(here.rglob("*"))
    try:
        ended = __main__.main(["distill", *arguments])
    except SystemExit as exit:  # argparse
        ended = exit.code
    assert ended == code
    assert message in one_line(capsys)
    # A folder named after the date may remain, with the settings, where the text was at fault.
    assert not [path for path in set(here.rglob("*")) - before if path.is_file()]


def test_an_unwritable_folder(here, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write everywhere
    assert __main__.main(["distill", "--out=x/y"]) == 2
    assert "cannot write to x/y: Permission denied" in one_line(capsys)


def test_a_finished_run_is_not_overwritten(here, capsys):
    (here / "metrics.json").write_text("{}")
    assert __main__.main(["distill", "--out=."]) == 2
    assert "already holds a run" in one_line(capsys)


def test_a_stopped_run_is_not_overwritten(here, capsys):
    (here / "config.toml").write_text("")
    assert __main__.main(["distill", "--out=."]) == 2
    assert "--resume" in one_line(capsys)


@pytest.mark.parametrize("command", ["distill", "tune"])
@pytest.mark.parametrize("name", ["student/weights", "metrics.csv", ".hidden"])
def test_a_folder_with_anything_in_it_is_left_alone(tmp_path, capsys, command, name):
    held = tmp_path / "out" / name
    held.parent.mkdir(parents=True)
    held.write_text("the user's")
    before = sorted(tmp_path.rglob("*"))
    assert __main__.main([command, f"--out={tmp_path / 'out'}"]) == 2
    first = name.partition("/")[0]
    assert f"is not empty: it holds {first}; choose" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert held.read_text() == "the user's"


def test_a_folder_serves_one_run_at_a_time(tmp_path, capsys):
    with storage.new_folder(str(tmp_path / "out")):
        assert __main__.main(["distill", f"--out={tmp_path / 'out'}"]) == 2
        assert "another run is using" in one_line(capsys)
        (tmp_path / "out" / "config.toml").write_text("")
        assert __main__.main(["distill", f"--resume={tmp_path / 'out'}"]) == 2
        assert "another run is using" in one_line(capsys)
    with storage.old_folder(str(tmp_path / "out")):
        pass


def test_signals_ask_for_an_end_and_the_second_ctrl_c_takes_it():
    """torchrun sends SIGTERM after the terminal's SIGINT; nohup ignores SIGHUP, and so do we."""
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with default_job.Stop() as stop:
            assert not stop.asked
            signal.raise_signal(kind)
            assert stop.asked
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with default_job.Stop():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[2])
    after = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert after == before


def test_the_command_line_says_what_it_can(capsys):
    assert __main__.main([]) == 0
    assert "distill" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        __main__.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"fastkd {fastkd.__version__}\n"
    with pytest.raises(SystemExit):
        __main__.main(["distill", "--help"])
    help = capsys.readouterr().out
    assert all(kind.name in help for kind in fastkd.Divergence.__subclasses__()[:9])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short", None])
def test_a_broken_checkpoint(here, capsys, content):
    chosen = settings.build(settings.DefaultJob, {"vocabulary": 300})
    (here / "config.toml").write_text(config.text(chosen))
    if content is None:  # it reads, and is of another run
        storage.save_checkpoint(here, {"fingerprint": "of another text"})
    else:
        (here / "checkpoint.pt").write_bytes(content)
    assert __main__.main(["distill", "--resume=."]) == 1
    message = one_line(capsys)
    assert ("is broken and cannot be read" in message) == (content is not None)
    assert ("does not fit this run" in message) == (content is None)
    assert not (here / "metrics.json").exists()


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    """The system's own refusal: no file of this process may grow beyond a kilobyte."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        from fastkd.distill import errors, storage
        target = Path(sys.argv[1])
        storage.write(target, "old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
        try:
            storage.write(target, b"new" * 1024)
        except errors.RunError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "file"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == f"cannot write {tmp_path / 'file'}: {os.strerror(errno.EFBIG)}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_full_disk_ends_the_command_with_one_line(tmp_path):
    """The first checkpoint does not fit: one line, and what is there is whole."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of {i % 7} words" for i in range(300)))
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "fastkd", "distill", f"--data={text}", f"--out={out}", *TINY,
         "--vocabulary=300", "--sequence-length=16"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"\nfastkd distill: cannot write {out}/checkpoint.pt: File too large\n"
    )
    assert "Traceback" not in done.stderr
    assert [path.name for path in out.iterdir()] == ["config.toml"]


def test_a_missing_extra_says_what_to_install(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert __main__.main(["distill", "--out=out"]) == 2
    assert 'pip install "fastkd[distill]"' in one_line(capsys)
    assert not (here / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(here, capsys, monkeypatch):
    monkeypatch.setattr(settings, "check_ranges", lambda settings: None)
    (here / "text.txt").write_text("\n\n".join(f"line {i} of {i % 7} words" for i in range(300)))
    small = ["--vocabulary=300", "--sequence-length=16", "--learning-rate=1e30"]
    assert __main__.main(["distill", "--data=text.txt", "--out=out", *small, *TINY]) == 1
    assert "lower the learning rate" in capsys.readouterr().err.splitlines()[-1]


def test_settings_survive_the_file():
    chosen = settings.build(
        settings.UserModels,
        {"teacher": 'a "b" \\ ü', "student": "s", "data": ["x", "y"], "checkpointing": True},
    )
    text = config.text(chosen)
    assert "checkpointing = true" in text
    if sys.version_info >= (3, 11):
        import tomllib

        values = tomllib.loads(text)
        assert settings.build(settings.UserModels, values) == chosen


def test_importing_the_command_line_imports_no_extra():
    code = "import sys, fastkd.__main__; print(*{n.partition('.')[0] for n in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    extras = {"rich", "matplotlib", "tokenizers", "safetensors", "transformers", "datasets"}
    assert not extras & set(done.stdout.split())


def test_a_checkpoint_of_another_kind_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="is no checkpoint of fastkd distill"):
        storage.load_checkpoint(tmp_path)


@pytest.mark.parametrize("page", ["README.md", "docs/distilling.md", "docs/caching.md"])
def test_every_option_in_the_documents_exists(page, capsys):
    known = set()
    for command in ("distill", "tune", "recipe", "cache"):
        with pytest.raises(SystemExit):
            __main__.main([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    text = (ROOT / page).read_text()
    used = set(re.findall(r"(?<=`)--[a-z][a-z-]+", text))
    for line in re.findall(r"fastkd (?:distill|tune|recipe|cache) .*", text):
        used |= set(re.findall(r" (--[a-z][a-z-]+)", line))
    assert len(used) > 3
    assert used - {"--quick", "--full"} <= known  # pytest's
