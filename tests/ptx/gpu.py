"""A stand-in for a GPU: fastkd's launches are compiled for sm_90 and their PTX is executed.

Tensors stay on the CPU, and kernels work in their memory. Every launch runs under several orders of
warps and programs, from the same memory, and all must agree in every byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from benchmarks.layouts import scattered
from benchmarks.stub import pretend

from .machine import Allocation, Kernel

TARGET = "sm_90"
ORDERS = ({"mode": 1, "window": 3}, {"mode": 2, "window": 1}, {"mode": 3, "window": 2})
# Of what is larger, as rows that lie 2^30 entries apart, only the rows are there.
WHOLE = 1 << 30


class Argument(NamedTuple):
    """Of a launch, in the order of the kernel's parameters; those of a tuple have a dotted name."""

    name: str
    value: Any


class Gpu:
    """Findings are sentences; an empty list says that all is well."""

    def __init__(self, ulp: int = 0, seed: int = 0) -> None:
        self.ulp, self.seed = ulp, seed
        self.findings: list[str] = []
        self.launched: list[str] = []  # the kernels, since `begin`
        self.last: dict[str, Kernel] = {}  # by name, as launched last
        self.kernels: dict[str, Kernel] = {}  # by PTX
        self.steps = 0
        self.mutate = lambda text: text  # a kernel's PTX, for faults put in on purpose
        self.dropped = lambda kernel: -1  # the place of a barrier to leave out
        # What torch.empty made, by its address: the tensor, and the cells that have a value.
        self.fresh: dict[int, tuple[torch.Tensor, np.ndarray]] = {}

    def begin(self) -> None:
        self.findings.clear()
        self.launched.clear()
        self.fresh.clear()

    def install(self) -> Gpu:
        """From now on every kernel of this process runs here."""
        # Triton keeps kernels without machine code too: under keys that no GPU's launch asks for.
        of_all = CUDABackend.hash
        CUDABackend.hash = lambda backend: f"{of_all(backend)}, no machine code"
        CUDABackend.make_cubin = lambda backend, src, metadata, options, capability: b""
        target = GPUTarget("cuda", int(TARGET[3:]), 32)

        class Driver:
            get_current_device = staticmethod(lambda: TARGET)
            get_current_stream = staticmethod(lambda device: 0)
            get_current_target = staticmethod(lambda: target)

        triton.runtime.driver.set_active(Driver())
        compile_only = JITFunction.run

        def run(jit: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            compiled = compile_only(jit, *args, grid=grid, warmup=True, **dict(kwargs))
            if not warmup:
                bound, types, _ = jit.device_caches[TARGET][4](*args, **kwargs)
                arguments = [
                    one
                    for (name, value), (type_, _) in zip(bound.items(), types, strict=True)
                    for one in _flattened(name, value, type_)
                ]
                self.launch(compiled, arguments, grid)
            return compiled

        JITFunction.run = run
        pretend()
        for owner, name in (
            (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"),
        ):  # fmt: skip
            setattr(owner, name, self._poisoning(getattr(owner, name)))
        return self

    def _poisoning(self, make: Any) -> Any:
        """The same tensor full of NaN, and known to be unwritten."""

        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            if type(x) is torch.Tensor and x.device.type == "cpu" and x.numel():
                storage = x.untyped_storage()
                torch.tensor([], dtype=torch.uint8).set_(storage).fill_(0xFF)
                cells = np.zeros(storage.nbytes() // x.element_size(), np.uint8)
                self.fresh[storage.data_ptr()] = x, cells
            return x

        return poisoned

    # --- a launch ----------------------------------------------------------------------------

    def launch(self, compiled: Any, arguments: Sequence[Argument], grid: Sequence[int]) -> None:
        text = self.mutate(compiled.asm["ptx"])
        if text not in self.kernels:
            self.kernels[text] = Kernel(text)
        kernel = self.last[self.kernels[text].name] = self.kernels[text]
        self.launched.append(kernel.name)
        self.findings += [f"{kernel.name} reduces {x}" for x in scattered(compiled.asm["ttgir"])]
        values = [_bits(one.value) for one in arguments]
        # Beyond them come two pointers of Triton's own.
        assert len(kernel.decoded.parameters) == len(values) + 2, arguments
        places = self._allocations(arguments)
        before = [(one.bytes.copy(), one.written.copy()) for one in places]
        first: list[np.ndarray] = []
        for number, order in enumerate(ORDERS):
            for one, (bytes_, written) in zip(places, before, strict=True):
                one.bytes[:], one.written[:] = bytes_, written
            # With results that are off, all runs must be off alike.
            seed = self.seed + 1 + (0 if self.ulp else 7919 * number)
            if compiled.metadata.launch_cooperative_grid:
                order = order | {"window": int(np.prod(grid))}
            found, steps = kernel.launch(
                values, grid, compiled.metadata.shared, places,
                seed=seed, ulp=self.ulp, dropped=self.dropped(kernel), **order,
            )  # fmt: skip
            self.findings += found
            self.steps += steps
            after = [one.bytes.copy() for one in places]
            first = first or after
            for one, ours, theirs in zip(places, after, first, strict=True):
                if not np.array_equal(ours, theirs):
                    self.findings.append(f"{kernel.name}: {one.name} depends on the order")

    def _allocations(self, arguments: Sequence[Argument]) -> list[Allocation]:
        """A tensor's entries may be read and written, what is beside them in its storage read."""
        storages: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, operand in _operands(arguments):
            if operand.numel():
                storages.setdefault(operand.untyped_storage().data_ptr(), []).append(
                    (name, operand)
                )
        found = []
        for base, views in storages.items():
            if views[0][1].untyped_storage().nbytes() > WHOLE:
                found += _rows(views)
                continue
            name, cell = "/".join(name for name, _ in views), views[0][1].element_size()
            count = views[0][1].untyped_storage().nbytes() // cell
            writable = np.zeros(count, np.uint8)
            for _, x in views:
                assert x.element_size() == cell, (name, "one storage, two dtypes")
                np.lib.stride_tricks.as_strided(
                    writable[x.storage_offset() :], tuple(x.shape), tuple(x.stride())
                )[...] = 1
            written = np.ones(count, np.uint8)
            if base in self.fresh and len(self.fresh[base][1]) == count:
                written = self.fresh[base][1]
            found.append(Allocation(name, base, cell, writable, written))
        return found


def _rows(views: Sequence[tuple[str, torch.Tensor]]) -> list[Allocation]:
    """Each row as memory of its own."""
    rows: dict[tuple[int, int, int], list[str]] = {}
    for name, x in views:
        for at in np.ndindex(x.shape[:-1]):
            row = x[at]
            place = row.data_ptr(), row.numel(), row.element_size()
            rows.setdefault(place, []).append(name)
    return [
        Allocation("/".join(names), base, cell, np.ones(n, np.uint8), np.ones(n, np.uint8))
        for (base, n, cell), names in rows.items()
    ]


def _flattened(name: str, value: Any, type_: Any) -> Iterator[Argument]:
    if isinstance(type_, tuple | list):
        names = getattr(value, "_fields", range(len(value)))
        for field, part, inner in zip(names, value, type_, strict=True):
            yield from _flattened(f"{name}.{field}", part, inner)
    elif type_ != "constexpr":
        yield Argument(name, value)


def _bits(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value)


# --- what knows fastkd's names --------------------------------------------------------------------


def _operands(arguments: Sequence[Argument]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a launch; pointers of a sweep may lie `first` entries before them."""
    by_name = dict(arguments)
    for name, value in arguments:
        if isinstance(value, torch.Tensor):
            owner, _, field = name.rpartition(".")
            first = by_name.get(f"{owner}.first") if field == "pointer" else None
            if first is not None and first >> 4:
                size, stride, offset = value.size(), value.stride(), value.storage_offset()
                value = value.as_strided(size, stride, offset + (first >> 4))
            yield owner if field == "pointer" else name, value
