"""How the entries of a tile lie over the lanes of a warp, read from a kernel's .ttgir.

A reduction over the n lanes that hold a row takes shuffles by n / 2, ..., 2, 1 times the offset of
the first such lane in Triton 3.7.1, right only where the bits of their numbers are neighbours. In a
layout such as lane = [[0, 8], [0, 16], [1, 0], [2, 0], [0, 32]] they are apart, and what it finds
is the sum of other rows. Later and earlier versions move them side by side first.
"""

from __future__ import annotations

import re
from ast import literal_eval

_LINEAR = re.compile(r"^(#\w+) = #ttg\.linear<\{.*?lane = (\[.*?\]), warp", re.MULTILINE)
# The tensor that a reduction takes, its first one where there are several.
_REDUCED = re.compile(
    r'"tt\.reduce"\(.*?<\{axis = (\d+).*?^\s*\}\) : \(tensor<([^,>]+), (#.*?)>(?:, tensor|\) ->)',
    re.MULTILINE | re.DOTALL,
)
_SLICE = re.compile(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>")


def scattered(ttgir: str) -> list[str]:
    """The reductions over lanes whose bits are no neighbours: shape, layout and these bits."""
    layouts = {name: literal_eval(lanes) for name, lanes in _LINEAR.findall(ttgir)}
    found = []
    for axis, shape, layout in _REDUCED.findall(ttgir):
        lanes = _lanes(layout, layouts)
        bits = [bit for bit, step in enumerate(lanes) if step[int(axis)]]
        if bits and bits[-1] - bits[0] >= len(bits):
            found.append(f"{shape} by lane bits {bits} of {lanes}")
    return found


def _lanes(layout: str, layouts: dict[str, list[list[int]]]) -> list[list[int]]:
    """By bit of a lane's number, the step along each axis; [] for a layout in blocks, which has
    the bits of an axis side by side."""
    if slice_ := _SLICE.fullmatch(layout):
        dropped = int(slice_[1])
        inner = _lanes(slice_[2], layouts)
        return [[*step[:dropped], *step[dropped + 1 :]] for step in inner]
    return layouts.get(layout, [])
