"""Arithmetic in fp32 that the compiler makes more of than it takes, or rounds where it must not."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def fast_log2(x):
    """log2, to an absolute 2^-22 near 1; one instruction where tl.log2 takes twenty."""
    if INTERPRETED:
        return tl.log2(x)
    elif is_cuda():
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1
        )
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x):
    """1 / x to the last bit or two, 0 or infinite beyond 2^126; one instruction."""
    if INTERPRETED:
        return 1.0 / x
    elif is_cuda():
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1
        )
    else:
        return 1.0 / x


@triton.jit
def log2(x):
    """Of a normal number, to an absolute 2^-22 everywhere: a third of what tl.log2 takes."""
    if INTERPRETED:
        return tl.log2(x)
    elif is_cuda():
        bits = x.to(tl.int32, bitcast=True)
        fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        exponent = ((bits >> 23) - 127).to(tl.float32)
        return exponent + fast_log2(fraction) + x * 0.0  # NaN and infinity stay NaN
    else:
        return tl.log2(x)


@triton.jit
def log1p_remainder(x):
    """(x - log(1 + x)) / x^2 for |x| < 0.25, to a relative 2e-6."""
    y = 0.2497031 + x * (-0.19966024 + x * (0.17910081 + x * -0.15488996))
    return 0.50000104 + x * (-0.33333544 + x * y)


@triton.jit
def log1p(x):
    """log(1 + x), to a relative 1e-6."""
    return tl.where(tl.abs(x) < 0.25, x - x * (x * log1p_remainder(x)), log2(1.0 + x) * LN2)


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def product_sum(x, y, z):
    """x y + z, rounded once."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)
