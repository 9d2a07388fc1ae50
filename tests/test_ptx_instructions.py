"""Single instructions of the PTX machine that CI's own Triton does not emit: others do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ptx import machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing())),
]
KERNEL = """.visible .entry one(
	.param .u64 .ptr .global .align 1 one_param_0,
	.param .u64 .ptr .global .align 1 one_param_1
)
.reqntid 32
{
	ld.param.b64 	%rd1, [one_param_0];
	ld.param.b64 	%rd2, [one_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, BYTES;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
	ld.global.TYPE 	BANK8, [ %rd4 + 0 ];
	ld.global.TYPE 	BANK9, [ %rd5 + 0 ];
	NAME 	OPERANDS;
	st.global.TYPE 	[ %rd5 + 0 ], BANK9;
	ret;
}
"""
REGISTERS = {2: ("b16", "%rs"), 4: ("b32", "%r"), 8: ("b64", "%rd")}
OF_TWO = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "max": torch.fmax, "min": torch.fmin,
    "max.NaN": torch.maximum, "min.NaN": torch.minimum,
}  # fmt: skip
OF_ONE = {"neg": torch.neg, "abs": torch.abs}


def execute(
    name: str, operands: str, x: Tensor, y: Tensor, size: int, ulp: int = 0, seed: int = 1
) -> Tensor:
    """What 32 threads make of x and y, of `size` bytes each: BANK8 and BANK9 hold them."""
    type_, bank = REGISTERS[size]
    text = KERNEL.replace("OPERANDS", operands).replace("BANK", bank).replace("TYPE", type_)
    kernel = machine.Kernel(text.replace("BYTES", str(size)).replace("NAME", name))
    memory = [x.clone(), y.clone()]
    places = [
        machine.Allocation(name, one.data_ptr(), one.element_size(), written, written)
        for name, one in zip("xy", memory, strict=True)
        for written in [np.ones(len(one), np.uint8)]
    ]
    pointers = [one.data_ptr() for one in memory]
    found, _ = kernel.launch(pointers, [1], 0, places, seed=seed, mode=1, window=1, ulp=ulp)
    assert found == []
    return memory[1]


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_16_bits(dtype, pair):
    x, y = torch.randn(2, 64 if pair else 32).mul(30).to(dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 6e4], dtype=dtype)
    x[:12], y[:6], y[9:15] = special.repeat(2), special, special
    type_ = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype] + "x2" * pair
    for name, function in (OF_TWO | OF_ONE).items():
        operands = "BANK9, BANK8" + ", BANK9" * (name in OF_TWO)
        found = execute(f"{name}.{type_}", operands, x, y, 4 if pair else 2)
        truth = function(x, y) if name in OF_TWO else function(x)
        torch.testing.assert_close(found, truth, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("first", [0, 1, 23, 31, 40, 63, 70])
@pytest.mark.parametrize("count", [0, 1, 9, 32, 41, 64])
def test_bits_of_a_number(first, count):
    x = torch.randint(-(2**63), 2**63 - 1, (32,))
    bits = min(count, max(64 - first, 0))
    for type_ in "us":
        name = f"bfe.{type_}64"
        found = execute(name, f"BANK9, BANK8, {first}, {count}", x, x, 8).tolist()
        for number, field in zip(x.tolist(), found, strict=True):
            truth = (number >> first) & ((1 << bits) - 1)
            last = number >> 63 if first + count > 64 else truth >> (bits - 1) if bits else 0
            if type_ == "s" and count and last & 1:
                truth -= 1 << bits
            assert field & (2**64 - 1) == truth & (2**64 - 1), (number, first, count)


def test_results_that_are_off_stay_numbers():
    """Beside the smallest of all too; 2^0 is exact."""
    x = torch.tensor([-149.0, -148.0, -1.5, 0.0]).repeat(8)
    results = [
        execute("ex2.approx.f32", "BANK9, BANK8", x, x, 4, ulp=2, seed=seed) for seed in range(20)
    ]
    found = torch.stack(results)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert (found[:, 3::4] == 1).all()
    assert (found[:, 1::4] != 2.0**-148).any()
