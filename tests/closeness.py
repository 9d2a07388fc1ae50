"""The one tolerance policy, and the only numbers of that kind in the suite."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {"value": 1e-5, "gradient": 1e-4}
FLAW = 0.98  # a result off by 2 % must not pass


def assert_close(
    ours: Tensor, truth: Tensor, kind: str = "value", eager: Tensor | None = None
) -> None:
    """Passes where `ours` is as close to `truth` (fp64) as its dtype permits.

    fp32 and fp64: within TOLERANCE[kind] of the largest true entry. bf16 and fp16: no further off
    than twice `eager`, the same result by plain PyTorch in that dtype, plus a rounding.
    Raises too where zeros, or 0.98 times the truth, would pass: such a comparison says nothing.
    """
    assert ours.shape == truth.shape, f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    truth = truth.detach().to(ours.device, torch.float64)
    got = ours.detach().double()
    special = ~truth.isfinite()
    assert torch.equal(got[special].nan_to_num(nan=0.5), truth[special].nan_to_num(nan=0.5)), (
        f"{got[special]} where {truth[special]} was expected"
    )
    truth, got = truth[~special], got[~special]
    if not truth.numel():
        return
    size = truth.abs().max()
    allowed = _allowed(ours.dtype, kind, truth, eager, special)
    _refuse_vacuous(truth, allowed)
    error = (got - truth).abs().max()
    assert error <= allowed, f"error {error:.3e} of {size:.3e}: {error / size:.1e} relative"


def assert_zero(ours: Tensor) -> None:
    """Passes where every entry is exactly 0."""
    assert not ours.detach().count_nonzero(), f"largest entry {ours.abs().max():.3e}, expected 0"


def _allowed(
    dtype: torch.dtype, kind: str, truth: Tensor, eager: Tensor | None, special: Tensor
) -> Tensor:
    size = truth.abs().max()
    if dtype in (torch.float32, torch.float64):
        return TOLERANCE[kind] * size
    rounding = torch.finfo(dtype).eps * size
    if eager is None:
        return rounding
    return 2 * (eager.detach().double()[~special] - truth).abs().max() + rounding


def _refuse_vacuous(truth: Tensor, allowed: Tensor) -> None:
    size = truth.abs().max()
    if not size:
        raise AssertionError("the truth is all zeros: use assert_zero, or a better case")
    if (1 - FLAW) * size <= allowed:
        raise AssertionError(
            f"vacuous: {FLAW} times the truth, whose size is {size:.3e}, is within {allowed:.3e}"
        )
