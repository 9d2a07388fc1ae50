"""Who may import whom: the rooms of the house, as CONTRIBUTING shows them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "fastkd"
# Only where it is called, by those who write a cache: a folder of one run, whole files.
UPWARD = {("fastkd.cache.writer", "fastkd.distill.storage")}
# Neighbours in a room that know nothing of each other.
STRANGERS = [("eager", "kernels"), ("reference", "kernels"), ("reference", "eager")]


def rooms() -> list[tuple[str, set[str]]]:
    """The picture in CONTRIBUTING: each room's name and its modules, from the roof down."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (picture,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    lines = re.findall(r"^(\w[\w ]*?)  +(.+?)(?:  +#.*)?$", picture, re.MULTILINE)
    return [(name, set(re.findall(r"\w+", modules))) for name, modules in lines]


def imports(path: Path) -> Iterator[str]:
    """The modules of fastkd that a file imports, anywhere but for types: names below `fastkd.`"""
    package = [PACKAGE, *path.relative_to(ROOT / PACKAGE).parts[:-1]]
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = [*above, *(node.module or "").split(".")] if node.module else above
            if module[:1] == [PACKAGE]:
                names = [alias.name for alias in node.names]
                yield from (".".join([*module, name]) for name in names)


def room_of(module: str, house: list[tuple[str, set[str]]]) -> int:
    """The floor of a module, by the first name below `fastkd`; of fastkd's own names, the face."""
    first = [*module.split("."), ""][1]
    for floor, (_, modules) in enumerate(house):
        if first in modules:
            return floor
    return next(floor for floor, (_, modules) in enumerate(house) if "__init__" in modules)


def modules() -> Iterator[tuple[str, Path]]:
    kernels = (ROOT / PACKAGE / "kernels").glob(
        "*.py"
    )  # behind a link, which rglob does not follow
    for path in sorted({*(ROOT / PACKAGE).rglob("*.py"), *kernels}):
        yield ".".join([PACKAGE, *path.relative_to(ROOT / PACKAGE).with_suffix("").parts]), path


def test_every_module_stands_in_one_room():
    known = [name for _, names in rooms() for name in names]
    assert len(known) == len(set(known))
    found = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    found |= {path.parent.name for path in (ROOT / PACKAGE).glob("*/*.py")}
    assert found == set(known)


def test_imports_go_down():
    house = rooms()
    upward = [
        f"{module} ({house[room_of(module, house)][0]}) imports {imported}"
        for module, path in modules()
        for imported in imports(path)
        if room_of(imported, house) < room_of(module, house) and (module, imported) not in UPWARD
    ]
    assert not upward, upward


def test_the_ways_to_compute_know_nothing_of_each_other():
    for one, other in STRANGERS:
        for first, second in ((one, other), (other, one)):
            for module, path in modules():
                if module.split(".")[1] == first:
                    assert not [i for i in imports(path) if i.split(".")[1:2] == [second]], module


def test_the_lowest_room_imports_nothing_of_fastkd_but_itself():
    name, lowest = rooms()[-1]
    for module, path in modules():
        if module.split(".")[1] in lowest:
            outside = [i for i in imports(path) if i.split(".")[1] not in lowest]
            assert not outside, f"{name}: {module} imports {outside}"
