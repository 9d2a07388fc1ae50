"""What is in a cubin: its machine code as text, and the registers of a thread."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

# Of ELF files of 64 bits: https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.sheader.html.
SECTIONS_AT, SECTIONS = struct.Struct("<40xQ10x"), struct.Struct("<3H")
SECTION = struct.Struct("<I20x2Q24x")  # where its name, where it is, bytes
# Records of .nv.info, as cuobjdump -elf names them: the form, the attribute, and the bytes after.
RECORD, IN_BYTES, REGISTERS = struct.Struct("<2BH"), 4, 0x2F


class Code(NamedTuple):
    """Addresses grow from one kernel to the next that was disassembled along with it."""

    text: str
    registers: int


def disassembled(target: str, cubins: Sequence[bytes]) -> list[Code]:
    """All in one go: nvdisasm takes half a second to begin."""
    import triton

    if not cubins:
        return []
    sections = [_sections(cubin) for cubin in cubins]
    codes = [_code(of) for of in sections]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    number = target.removeprefix("sm_")
    kind = f"SM{number}{'a' * (int(number) >= 90)}"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = (tool, "--binary", kind, "-hex", "-novliw", file.name)
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    begins = [text.index(f"/*{at:04x}*/") for at in accumulate(map(len, codes[:-1]), initial=0)]
    return [
        Code(text[begin:end], _registers(of[".nv.info"]))
        for begin, end, of in zip(begins, [*begins[1:], None], sections, strict=True)
    ]


def _sections(cubin: bytes) -> dict[str, bytes]:
    (at,) = SECTIONS_AT.unpack_from(cubin)
    size, count, of_names = SECTIONS.unpack_from(cubin, SECTIONS_AT.size)
    found = [SECTION.unpack_from(cubin, at + i * size) for i in range(count)]
    names = found[of_names][1]
    return {
        cubin[names + name : cubin.index(b"\0", names + name)].decode(): cubin[begin : begin + n]
        for name, begin, n in found
    }


def _code(sections: dict[str, bytes]) -> bytes:
    (code,) = (data for name, data in sections.items() if name.startswith(".text."))
    return code


def _registers(info: bytes) -> int:
    at = 0
    while at < len(info):
        form, attribute, size = RECORD.unpack_from(info, at)
        at += RECORD.size
        if form != IN_BYTES:
            continue
        if attribute == REGISTERS:
            return struct.unpack_from("<2I", info, at)[1]
        at += size
    raise ValueError("no count of registers in the cubin")
