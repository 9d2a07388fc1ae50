"""What is imported, what is shipped, and that a wheel works away from the checkout."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fastkd

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "fastkd").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def run(*command, cwd, **environment):
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- importing -------------------------------------------------------------------------------


def test_import_brings_in_nothing_but_torch_and_the_standard_library():
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        import fastkd
        roots = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(*roots - {"fastkd", "torch"} - sys.stdlib_module_names)
    """
    assert run(sys.executable, "-c", code, cwd=ROOT).split() == []


def test_what_documents_name_is_there_once_fastkd_is_imported():
    """But for what needs further packages, which has to be imported by its name."""
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"`fastkd\.(\w+)", page.read_text())}
    names = named - {"integrations"}
    assert {"distillation_loss", "temperature", "cross_tokenizer"} <= names
    code = f"import fastkd; print(*(name for name in {names} if not hasattr(fastkd, name)))"
    assert run(sys.executable, "-c", code, cwd=ROOT).split() == []


def test_kernels_is_never_importable_under_its_own_name():
    code = (
        "import importlib.util; print(getattr(importlib.util.find_spec('kernels'), 'origin', None))"
    )
    origin = run(sys.executable, "-c", code, cwd=ROOT).strip()
    assert Path(origin).parent != ROOT / "kernels"


# --- the tree --------------------------------------------------------------------------------


def test_kernels_is_flat_and_no_package():
    # A subfolder would be left out of the wheel; __init__.py would hide the package `kernels`.
    files = {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")}
    assert files
    assert all(len(path.parts) == 1 for path in files)
    assert Path("__init__.py") not in files


def test_the_symlink_is_relative():
    assert os.readlink(ROOT / "fastkd" / "kernels") == os.path.join("..", "kernels")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_file_asks_to_be_split(path):
    assert len(path.read_text().splitlines()) <= 400


def test_both_tables_list_the_same_divergences():
    pytest.importorskip("triton")
    from fastkd.kernels.divergences import TABLE

    public = (getattr(fastkd, name) for name in fastkd.__all__)
    kinds = {kind for kind in public if kind in fastkd.Divergence.__subclasses__()}
    kinds = {kind for kind in kinds if kind.has_device_function}
    assert {kind.name for kind in kinds} == set(TABLE)


@pytest.mark.parametrize("name", [n for n in fastkd.__all__ if not n.startswith("_")])
def test_public_names_are_documented(name):
    thing = getattr(fastkd, name)
    text = inspect.getdoc(thing) or ""
    assert re.search(r"^Example:\n+ +>>> ", text, re.MULTILINE)
    if inspect.isfunction(thing):
        for parameter in inspect.signature(thing).parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{parameter} is not explained"


# --- the wheel -------------------------------------------------------------------------------


@pytest.fixture(params=["checkout", "archive"])
def wheel(request, tmp_path):
    """Built from a copy of the tree; in an archive from the web the symlink is a text file."""
    source = tmp_path / "source"
    compiled = shutil.ignore_patterns("__pycache__")
    for folder in ("fastkd", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=compiled)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    if request.param == "archive":
        link = source / "fastkd" / "kernels"
        link.unlink()
        link.write_text("../kernels")
    run(
        *(sys.executable, "-m", "pip", "wheel", source, "--wheel-dir", tmp_path),
        *("--no-deps", "--no-index", "--no-build-isolation"),
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_wheel_holds_the_package_and_runs_outside_the_checkout(wheel, tmp_path):
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    names = (path.relative_to(ROOT).as_posix() for path in SOURCES)
    modules = {name if name.startswith("fastkd/") else f"fastkd/{name}" for name in names}
    assert shipped == modules | {"fastkd/py.typed"}

    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    run(
        *(sys.executable, "-m", "pip", "--python", home / "bin" / "python"),
        *("install", "--no-deps", "--no-index", wheel),
        cwd=tmp_path,
    )
    # torch and what it needs come from this environment, behind the new one's own packages.
    (site / "behind.pth").write_text(str(Path(torch.__file__).parents[1]))
    where = run(
        home / "bin" / "python", "-c", "import fastkd; print(fastkd.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).parent == site / "fastkd"
    assert "FAIL" not in run(home / "bin" / "fastkd", "doctor", cwd=tmp_path)
