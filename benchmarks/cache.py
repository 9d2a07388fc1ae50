"""A Triton cache for `--suite gpu`, filled without a GPU: `python -m benchmarks.cache FOLDER`.

Where minutes are lent they should not go into compiling. Every launch of the suite is made here on
a stand-in (stub.py), by Triton's own path and hence under the keys that the GPU's Triton will look
for. It loads them if it is the same build for the same Python; else all still works, slower.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .assembly import replaced

ROOT = Path(__file__).parents[1]
ABOUT = "about.json"
GROUP = "__grp__"
# What a launch needs; the rest is how the compiler came to it.
KEPT = (".cubin", ".json", ".so")


def enter(folder: Path) -> None:
    """Lets this process and those that it starts keep kernels in a cache, wherever it lies."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for group in folder.glob(f"*/{GROUP}*"):
        paths = json.loads(group.read_text())["child_paths"]
        # Since Triton 3.8 a group of which one file is missing is none.
        here = {name: str(group.parent / name) for name in paths if (group.parent / name).exists()}
        if paths != here:
            group.write_text(json.dumps({"child_paths": here}))
    os.environ.update(_environment(folder))


def verdict() -> tuple[bool, str]:
    """Whether the kernels of the cache that was entered will be found, and as a sentence."""
    about = Path(os.environ.get("TRITON_CACHE_DIR", "")) / ABOUT
    if not about.exists():
        return False, "Triton cache: none was carried, kernels are compiled"
    there, here = json.loads(about.read_text()), _about()
    if there["triton_key"] != here["triton_key"]:
        return False, f"Triton cache: of no use, built for {_brief(there)}, this is {_brief(here)}"
    if there["code"] != here["code"]:
        return False, "Triton cache: built from other code, what has changed is compiled"
    return True, f"Triton cache: built for this Triton and code, {there['kernels']} kernels"


def _environment(folder: Path) -> dict[str, str]:
    """Line numbers would hold the folder of the checkout, and change the key."""
    return {"TRITON_CACHE_DIR": str(folder), "TRITON_DISABLE_LINE_INFO": "1"}


def _about() -> dict[str, Any]:
    from triton import __version__
    from triton.runtime.cache import triton_key

    # The kernels, what chooses among them, and what the suite launches.
    files = sorted((*ROOT.glob("kernels/*.py"), *ROOT.glob("benchmarks/*.py")))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {
        "triton": __version__, "python": platform.python_version(), "triton_key": triton_key(),
        "code": code,
    }  # fmt: skip


def _brief(about: dict[str, Any]) -> str:
    return f"Triton {about['triton']} for Python {about['python']}"


# --- the launches of the suite -------------------------------------------------------------------

Launch = Callable[[], object]


class Outlines(TorchFunctionMode):
    """New tensors have a shape and nothing else."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = dict(options or {})
        if function in (torch.randn, torch.rand, torch.randint, torch.arange):
            options["device"] = "meta"
            options.pop("generator", None)
        return function(*arguments, **options)


def untouched(x: Any) -> Any:
    """A tensor that lies like this one in memory that nobody reads, and that takes none so far."""
    if not isinstance(x, Tensor):
        return x
    if x.dim() < 2:  # checked by what it holds
        return torch.ones(x.shape, dtype=x.dtype)
    memory = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
    view = memory.as_strided(x.size(), x.stride(), x.storage_offset())
    return view.requires_grad_(x.requires_grad)


def launches() -> Iterator[tuple[str, Launch]]:
    """By name, in the order of the suite."""
    yield "doctor", _doctor
    from . import choices, verify

    for case in (*verify.cases(), *verify.FEW):
        if case.rows * case.columns < 1 << 31:
            yield f"verify {case}", partial(_verify, case)
    yield "ceilings", _ceilings
    yield from _table()
    for divergence, case in choices.PROBLEMS:
        for choice in choices.CHOICES:
            yield f"{divergence} {case}, {choice}", partial(_choice, divergence, case, choice)
    yield "training", _training


def _doctor() -> None:
    from fastkd import doctor

    student, teacher = torch.randn(2, 4, 5003).unbind()
    for gradient in ("forward", "backward"):
        doctor._distil("triton", gradient, student.requires_grad_(), teacher).backward()
    doctor._kl_div(student, teacher).backward()


def _verify(case: Any) -> None:
    from . import verify

    with Outlines():
        given = verify.operands(case, torch.device("cpu"))
    given = given._replace(
        **{name: untouched(getattr(given, name)) for name in ("student", "teacher", "labels")},
        options={name: untouched(value) for name, value in given.options.items()},
    )
    for upstream in (None, torch.ones(case.rows)):
        verify.loss_and_gradient(case, given, upstream)


def _ceilings() -> None:
    from .ceilings import L2_MIB
    from .reads import read
    from .stub import PROCESSORS

    for mib in L2_MIB:
        read(torch.empty((mib << 20) // 4), 1000, 4 * PROCESSORS)


def _table() -> Iterator[tuple[str, Launch]]:
    from . import cases
    from .run import groups_of

    for group in groups_of(cases.GPU):
        for provider in group.providers:
            if provider.ours:
                for part in group.parts:
                    yield f"{group} {provider.name} {part}", partial(_row, group, provider, part)


def _row(group: Any, provider: Any, part: str) -> None:
    from .cases import DTYPES
    from .truth import UPSTREAM, leaves

    dtype = DTYPES[group.dtype]
    if group.operator.name == "topk":
        operands = _listed(group.case, dtype)
    else:
        with Outlines():
            given = group.operator.operands(group.case, group.divergence, dtype, torch.Generator())
        operands = tuple(map(untouched, given))
    loss = provider.bind(group.operator.options(group.divergence, 2.0))
    with _no_products():
        if part == "forward":
            with torch.no_grad():
                loss(*operands)
            return
        value = loss(*operands)
        upstream = torch.full_like(value, UPSTREAM.get(dtype, 1.0))
        torch.autograd.grad(value, leaves(operands), upstream)


def _listed(case: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Student, and what a teacher lists, which is checked by what it holds."""
    from .operators.topk import K

    listed = min(K, case.vocab - 1)
    indices = torch.arange(listed).expand(case.rows, -1).contiguous()
    log_probs = torch.full((case.rows, listed), -math.log(listed + 1))
    student = torch.empty(case.rows, case.vocab, dtype=dtype, requires_grad=True)
    return student, indices, log_probs, log_probs[:, 0].clone()


@contextlib.contextmanager
def _no_products() -> Iterator[None]:
    """Heads make no logits, in chunks as large as on a GPU."""
    from fastkd import chunks, linear

    with (
        replaced(chunks, "CPU_BYTES", chunks.GPU_BYTES),
        replaced(chunks, "CPU_SPARE", chunks.GPU_SPARE),
        replaced(linear, "_converted", lambda head, n: [(slice(0, n), head.weight[:n])]),
        replaced(linear, "_product", lambda *_: None),
        replaced(linear, "_add_product", lambda *_: None),
    ):
        yield


def _choice(divergence: str, case: str, choice: Any) -> None:
    from . import choices
    from .cases import case_of

    shape = case_of(case)
    student, teacher = (
        torch.empty(shape.rows, shape.vocab, dtype=torch.bfloat16) for _ in range(2)
    )
    with choices.chosen(choice):
        choices.call(divergence, student.requires_grad_(), teacher)


def _training() -> None:
    from . import training

    rows, columns = training.BATCH[0] * training.BATCH[1], training.STUDENT.vocabulary
    student, teacher = (torch.empty(rows, columns, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    training.ours(student, teacher).backward()
    training.in_place(student.view_as(student), teacher)


# --- filling it ----------------------------------------------------------------------------------


def install() -> Counter[str]:
    """This process launches on the stand-in; how many kernels it has compiled and loaded so far."""
    torch.set_num_threads(1)
    from triton import knobs

    from . import stub

    total: Counter[str] = Counter()

    def heard(cache_hit: bool, **_: Any) -> None:
        total["loaded" if cache_hit else "compiled"] += 1

    knobs.compilation.listener = heard
    stub.install(_driver())
    return total


def fill(folder: Path, only: str, part: int, parts: int, until: float) -> Counter[str]:
    """Makes every parts-th launch whose name holds `only`, and begins none after `until`; how many
    kernels were compiled, and how many the cache had."""
    os.environ.update(_environment(folder))
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
    total = install()
    for name, launch in [one for one in launches() if only in one[0]][part::parts]:
        before, began = total.copy(), time.monotonic()
        if began > until:
            break
        try:
            launch()
            found = ", ".join(f"{n} {what}" for what, n in (total - before).items())
        except Exception as error:  # one launch that does not compile costs itself
            total["failed"] += 1
            found = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        print(f"{name}: {found or 'nothing new'}, {time.monotonic() - began:.1f} s", flush=True)
    return total


def fill_tests(folder: Path, only: str, part: int, parts: int) -> Counter[str]:
    """The same by the tests of every parts-th file that run on the device; see launched.py."""
    from . import gpu

    files = [file for file in gpu.tests_on_device() if only in file][part::parts]
    plugin = ("-p", "benchmarks.launched", "-p", "no:cacheprovider", "--quick", "-q", "--tb=no")
    done = subprocess.run(
        [sys.executable, "-O", "-m", "pytest", *plugin, *files],
        cwd=ROOT, env=os.environ | _environment(folder), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return Counter(json.loads(done.stdout.splitlines()[-1]))


def _driver() -> Any:
    """With Triton 3.6, which compiles a launcher for each signature, one that does so here."""
    from triton.backends.nvidia import driver

    from . import stub

    if not hasattr(driver, "make_launcher"):
        return stub.Driver()
    os.environ["TRITON_LIBCUDA_PATH"] = _libcuda()
    driver.CudaUtils()

    class Launcher(stub.Launcher):
        def __init__(self, source: Any, metadata: Any) -> None:
            driver.CudaLauncher(source, metadata)

    class Driver(stub.Driver):
        launcher_cls = Launcher

    return Driver()


def _libcuda() -> str:
    """The folder of a library without functions: launchers are linked to its name."""
    folder = tempfile.mkdtemp()
    library = f"{folder}/libcuda.so.1"
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null", "-o", library]
    subprocess.run(command, check=True)
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    sys.setdlopenflags(os.RTLD_LAZY)  # nobody calls what it lacks
    return folder


def prune(folder: Path) -> tuple[int, int]:
    """Leaves what launches need; kernels and bytes."""
    for file in folder.glob("*/*"):
        if file.is_file() and file.suffix not in KEPT and not file.name.startswith(GROUP):
            file.unlink()
    kernels = list(folder.glob("*/*.cubin"))
    about = {**_about(), "kernels": len(kernels)}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return len(kernels), sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="benchmarks.cache", description=__doc__)
    top.add_argument("folder", type=Path, help="is made, or added to")
    top.add_argument("--only", default="", help="launches, or files of tests, that hold this")
    top.add_argument("--tests", action="store_true", help="those of the tests on the device")
    top.add_argument("--jobs", type=int, default=1, help="processes that compile")
    top.add_argument("--limit", type=float, default=math.inf, help="seconds to begin launches in")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    folder, until = options.folder.resolve(), time.monotonic() + options.limit
    enter(folder)
    total: Counter[str] = Counter()
    filled = fill_tests if options.tests else partial(fill, until=until)
    with ProcessPoolExecutor(options.jobs) as pool:
        parts = [
            pool.submit(filled, folder, options.only, part=part, parts=options.jobs)
            for part in range(options.jobs)
        ]
        for part in parts:
            total += part.result()
    kernels, size = prune(folder)
    print(f"{total['compiled']} compiled, {total['loaded']} loaded, {total['failed']} failed")
    print(f"{folder}: {kernels} kernels, {size / 2**20:.1f} MiB, {_brief(_about())}")
    return int(total["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
