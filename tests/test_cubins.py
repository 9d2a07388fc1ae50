"""What is read of several cubins at once, against cuobjdump on one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the tools come with it")

import triton

from benchmarks.cubins import disassembled

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PTX = """
.version 8.0
.target TARGET
.address_size 64
.visible .entry NAME(.param .u64 place) .reqntid 32
{
    .reg .pred %p;
    .reg .b64 %a;
    .reg .b32 %r<4>;
    ld.param.u64 %a, [place];
    ld.global.u32 %r1, [%a];
    mov.u32 %r2, 100;
again:
    mad.lo.u32 %r1, %r1, %r2, %r1;
    STORES
    sub.u32 %r2, %r2, %r1;
    setp.ne.u32 %p, %r2, 0;
    @%p bra again;
    ret;
}
"""
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;\s+/\* (0x[0-9a-f]{16}) \*/")


def lines(text: str) -> list[tuple[int, str, str]]:
    """Place and instruction from the first one on, jumps too, and the encoding."""
    found = LINE.findall(text)
    first = int(found[0][0], 16)

    def from_first(jump: re.Match[str]) -> str:
        return f"{jump[1]}{int(jump[2], 16) - first:#x}"

    return [
        (int(at, 16) - first, re.sub(r"(\bBRA.* )0x([0-9a-f]+)$", from_first, line), code)
        for at, line, code in found
    ]


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_kernels_disassembled_together(target, tmp_path):
    cubins = []
    for name, stores in (("first", 50), ("second", 1)):
        source, cubin = tmp_path / f"{name}.ptx", tmp_path / f"{name}.cubin"
        text = PTX.replace("TARGET", target).replace("NAME", name)
        source.write_text(text.replace("STORES", "st.volatile.global.u32 [%a], %r1;" * stores))
        command = (TOOLS / "ptxas", f"--gpu-name={target}", source, "-o", cubin)
        subprocess.run(command, check=True)
        cubins.append(cubin.read_bytes())
    ours = disassembled(target.removesuffix("a"), cubins)
    command = (TOOLS / "cuobjdump", "-sass", "-res-usage", tmp_path / "second.cubin")
    true = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert lines(ours[1].text) == lines(true)
    assert any("BRA 0x" in line for _, line, _ in lines(true))
    assert ours[1].registers == int(re.search(r"REG:(\d+)", true)[1])
    assert lines(ours[0].text) != lines(true)
