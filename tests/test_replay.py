"""Code made by hand, whose clocks follow from its control codes: see benchmarks/replay.py."""

from __future__ import annotations

import pytest

from benchmarks import model, replay

GPU = model.GPUS["sm_90"]
CLOCK = GPU.processors * GPU.clock * 1e9
TILE = 32 * 16  # bytes that a warp loads by one instruction of 128 bits


def line(at, code, stall=1, result=7, read=7, waits=0):
    control = stall | result << 5 | read << 8 | waits << 11
    return f"/*{at:04x}*/  {code} ;  /* 0x{0:016x} */\n  /* 0x{control << 41:016x} */"


def kernel(*body, warps=1, programs=1, rounds=100, hit=0.0):
    """One sweep of as many rounds, whose loop holds these lines."""
    code = [*body, ("@P0 BRA 0x0000", {})]
    lines = [line(16 * n, text, **control) for n, (text, control) in enumerate(code)]
    lines.append(line(16 * len(code), "EXIT"))
    loads = sum("LDG" in text for text, _ in code)
    columns = rounds * loads * TILE * warps // 4
    return replay.Kernel("\n".join(lines), warps, programs, 4, columns, False, hit)


def clocks(*body, **more):
    return replay.Processor(kernel(*body, **more), GPU).clocks_per_row()


LOAD = ("LDG.E.EF.128 R4, [R2.64]", {"result": 0})
USE = ("FADD R4, R4, R5", {"waits": 1})


def test_a_warp_alone_waits_for_each_load():
    assert clocks(LOAD, USE) == pytest.approx(100 * replay.DRAM, rel=0.1)


def test_warps_hide_each_other_s_loads():
    assert clocks(LOAD, USE, programs=4) == pytest.approx(100 * replay.DRAM / 4, rel=0.15)


def test_many_warps_are_bound_by_dram():
    """Beyond 32 loads under way the rate counts: bytes of a row by bytes per clock."""
    bound = 100 * 8 * TILE / (GPU.copy * 1e12 / CLOCK)
    assert clocks(LOAD, USE, warps=8, programs=8) == pytest.approx(bound, rel=0.1)


@pytest.mark.parametrize(
    ("code", "each"), [("FFMA R1, R1, R1, R1", 1), ("FSEL R1, R1, R2", 2), ("MUFU.EX2 R1, R1", 8)]
)
def test_a_pipe_takes_its_time(code, each):
    """16 warps, four to a scheduler, so that none waits for a load."""
    body = [LOAD, *[(code, {})] * 512]
    assert clocks(*body, warps=16, rounds=4) == pytest.approx(4 * 4 * 512 * each, rel=0.1)


def test_stalls_of_a_warp_alone():
    body = [LOAD, *[("FFMA R1, R1, R1, R1", {"stall": 4})] * 500]
    assert clocks(*body, rounds=4) == pytest.approx(4 * 500 * 4, rel=0.1)


def test_a_second_sweep_finds_what_l2_holds():
    """Behind the first one's loop the same loads come out of L2, as far as it holds them."""
    first = kernel(LOAD, USE)
    second = first.text.replace("0000*/", "0100*/").replace("0010*/", "0110*/")
    second = second.replace("0020*/", "0120*/").replace("0030*/", "0130*/")
    second = second.replace("0x0000", "0x0100")
    text = first.text.replace("EXIT", "NOP") + "\n" + second
    for hit, each in ((0.0, replay.DRAM), (1.0, replay.L2)):
        found = replay.Processor(first._replace(text=text, hit=hit), GPU).clocks_per_row()
        assert found == pytest.approx(100 * (replay.DRAM + each), rel=0.1)


def test_rare_loops_are_passed_over():
    text = kernel(LOAD, USE).text
    rare = "\n".join([
        line(0x40, "@P1 BRA 0x0080"), line(0x50, "LDG.E.128 R4, [R2.64]"),
        line(0x60, "@P2 BRA 0x0050"), line(0x70, "MUFU.EX2 R1, R1"), line(0x80, "EXIT"),
    ])  # fmt: skip
    with_rare = kernel(LOAD, USE)._replace(text=text.replace("EXIT", "NOP") + "\n" + rare)
    codes = [one.pipe for one, _ in replay.trace(with_rare)]
    assert "special" not in codes
    assert len(codes) == 100 * 3 + 3


MASKED = ("@P1 LDG.E.EF.128 R4, [R2.64]", {"result": 0})


@pytest.mark.parametrize("taken_out", [False, True])
def test_a_row_that_begins_anywhere_has_one_masked_tile(taken_out):
    """Its loop stands before the full tiles', with its first round before it or not; both are of
    the first sweep, and the masked tile moves what these leave."""
    loop = [MASKED, USE, ("@P1 BRA {0:#06x}", {})]
    lines = [*([MASKED, USE] if taken_out else []), *loop, LOAD, USE, ("@P0 BRA {1:#06x}", {})]
    begins = [16 * (2 * taken_out), 16 * (2 * taken_out + 3)]
    lines = [line(16 * n, of.format(*begins), **more) for n, (of, more) in enumerate(lines)]
    lines.append(line(16 * len(lines), "EXIT"))
    columns = int(100.25 * TILE / 4)
    one = replay.Kernel("\n".join(lines), 1, 1, 4, columns, False, 1.0)
    issued = list(replay.trace(one))
    assert len(issued) == 3 - taken_out + 100 * 3 + 1
    assert not any(again for part, again in issued if part.loaded)
    assert sum(part.loaded for part, _ in issued) == 4 * columns


@pytest.mark.parametrize(("width", "count"), [(".128", 512), (".64", 256), ("", 128), (".U16", 64)])
def test_bytes_of_an_access_by_a_warp(width, count):
    for code in (f"LDG.E.EL{width} R4, [R2.64]", f"@P3 STG.E{width} [R2.64], R4"):
        one = kernel((code, {}), ("LDG.E.EF R4, [R2.64]", {}))
        first, _ = next(replay.trace(one))
        assert first.loaded + first.stored == count
