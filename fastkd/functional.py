"""distillation_loss: check, flatten to rows, choose the path, reduce, unflatten."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, checks, moments, reference
from .divergences import Divergence
from .operators import readable
from .problem import CE, ENTROPY, KD, Problem
from .settings import Settings

CPU = torch.device("cpu")


class Metrics(NamedTuple):
    """Per-row figures, fp32, detached, of the shape of the rows; 0 in rows that do not count.

    Attributes:
        kd: the divergence, before alpha, temperature scaling and weights.
        ce: cross-entropy with the labels, smoothing included; None without labels.
        student_entropy: in nats, at the student's temperature.
        teacher_entropy: in nats, at the teacher's temperature.
        agreement: 1 where some entry is a maximum of both rows, else 0.

    Example:
        >>> import torch, fastkd
        >>> _, metrics = fastkd.distillation_loss(
        ...     torch.randn(4, 10), torch.randn(4, 10), return_metrics=True)
        >>> metrics.agreement.shape
        torch.Size([4])
    """

    kd: Tensor
    ce: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_by_temperature: bool = True,
    standardize: bool = False,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    entropy_weight: float = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    teacher_grad: bool = False,
    gradient: str = "auto",
    inplace: bool = False,
    backend: str = "auto",
    return_metrics: bool = False,
) -> Any:  # Tensor, or (Tensor, Metrics)
    r"""Knowledge-distillation loss of a student against a teacher, both given as logits.

    With q = softmax(student / T_s), p = softmax(teacher / T_t), D the divergence and H the
    entropy in nats, the loss of a row is

        alpha * T_s * T_t * D(p, q) + (1 - alpha) * CE(label, softmax(student))
            + entropy_weight * H(q).

    All arithmetic is fp32 (fp64 for fp64 logits), whatever the logits' dtype, and no [N, V]
    tensor is made besides the gradient. Hinton's loss, the value of
    `F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean") * T**2`, is
    `distillation_loss(s, t, temperature=T, reduction="batchmean")`.

    Args:
        student: logits [..., V], fp16, bf16, fp32 or fp64, dense. -inf masks an entry.
        teacher: logits [..., V], of any of these dtypes. Log-probabilities are logits too.
        labels: class indices [...], int64 or int32. They feed the cross-entropy and say, by
            `ignore_index`, which rows count. No shift is applied. With `Bernoulli()`, multi-hot
            [..., V] in [0, 1].
        divergence: "forward_kl" (KL(p || q)), "reverse_kl", "jeffreys", "tvd", or an object:
            `JSD(beta)`, `SkewKL(alpha)`, `SkewReverseKL(alpha)`, `AlphaDivergence(alpha)`,
            `Renyi(alpha)`, `Jeffreys(forward, reverse)`, one of your own (`Divergence`), or, for
            multi-label heads, `Bernoulli()`: see there what changes.
        temperature: T_s > 0, the student's: a float, a 0-d tensor, or one per row [...]. A tensor
            that requires a gradient gets one. A 0-d tensor may stay on the CPU while the logits are
            on a GPU: its number goes along with a kernel, and only its gradient waits for the GPU.
        teacher_temperature: T_t, likewise. None: the same as the student's.
        scale_by_temperature: multiply the divergence by T_s * T_t, which keeps the size of its
            gradient (TVD: by the square root). False is the convention of TRL, verl, torchtune.
        standardize: True takes p and q of z-scores, softmax((z - mean) / (std + 1e-7) / T), with
            mean and std (n - 1 in the variance) over the row's entries that are not -inf. The
            loss then depends on the scale of neither side; divergence, entropies and metrics are
            those of the z-scores, the cross-entropy that of the logits. A row of equal logits is
            uniform and gets no gradient (below 1e-30).
        alpha: share of the divergence, in [0, 1]; below 1 needs labels.
        label_smoothing: of the cross-entropy, in [0, 1], as in F.cross_entropy.
        entropy_weight: factor of the student's entropy: > 0 sharpens, < 0 is a confidence penalty.
        ignore_index: rows with this label count nowhere; they may hold NaN.
        weight: per-row weights [...], floating-point or bool; rows of weight 0 are not read.
        reduction: "none": weighted rows, 0 where ignored; "sum"; "mean": over the summed weights
            of the rows that count; "batchmean": sum / student.size(0), as in PyTorch.
        num_items: replaces the divisor of "mean", for gradient accumulation over uneven
            micro-batches: a number > 0, or a 0-d tensor on the logits' device or the CPU, which is
            never synchronised. Of a tensor 0 is allowed where no row counts, and the loss is 0;
            else it is NaN, as it is for a negative one that may not be read.
        vocab_size: columns from here on are padding, on either side: no mass, gradient 0. Lets
            student and teacher be of different widths.
        teacher_grad: True gives the teacher a gradient too, where it requires one.
        gradient: "forward" computes the student's gradient together with the loss, holds it, and
            allows one backward; "backward" keeps the logits and recomputes, and gives gradients
            to teacher, temperatures and weight too; "auto" is "forward" for scalar losses in bf16,
            fp32 and fp64 where only the student trains, else "backward". fp16 has no "forward": a
            loss scale, which comes later, could not bring back what was rounded to 0.
        inplace: overwrite the student's logits with their gradient (needs "forward"). Refused where
            another operand lies in the same memory.
        backend: "triton" (GPU), "torch" (any device), "reference" (naive, differentiated by
            autograd), or "auto": triton on a GPU where it can run, else torch.
        return_metrics: return (loss, Metrics) instead.

    Returns:
        The loss, fp32 (fp64 for fp64 logits): 0-d, or [...] with reduction="none". With all rows
        ignored it is 0, with gradient 0. A divergence that the masks make infinite is +inf, never
        NaN; its row's gradient stays finite.

    Raises:
        ValueError, TypeError, NotImplementedError: before anything is computed, naming the
            argument. Labels out of range are caught on the CPU; on a GPU they give a NaN row, and
            an error when FASTKD_DEBUG=1 is set, which synchronises.

    Example:
        >>> import torch, fastkd
        >>> student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)
        >>> labels = torch.randint(100, (8,))
        >>> loss = fastkd.distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.9)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([8, 100])

    Source: Hinton, Vinyals & Dean 2015, arXiv 1503.02531; each divergence names its own.
    Standardised logits: Sun et al. 2024, arXiv 2403.01427, with T = 2 and a weight of 9 on the
    divergence against 0.1 on the cross-entropy.
    """
    given = Settings.of(
        divergence=divergence, temperature=temperature, teacher_temperature=teacher_temperature,
        scale_by_temperature=scale_by_temperature, standardize=standardize, alpha=alpha,
        label_smoothing=label_smoothing, entropy_weight=entropy_weight, ignore_index=ignore_index,
        reduction=reduction, vocab_size=vocab_size, teacher_grad=teacher_grad, gradient=gradient,
        inplace=inplace, backend=backend, return_metrics=return_metrics,
    )  # fmt: skip
    kind = given.divergence
    columns = checks.logits(student, teacher, given.vocab_size)
    for name, value in given.temperatures.items():
        checks.temperature_rows(name, value, student)
    if labels is None and given.alpha < 1:
        raise ValueError(f"alpha={alpha} mixes in a cross-entropy, which needs labels: pass them")
    if labels is not None and given.sigmoids:
        checks.multi_hot(labels, student, columns)
    elif labels is not None:
        checks.labels(labels, student, columns, given.ignore_index)
    if weight is not None:
        checks.weight(weight, student)
    if num_items is not None:
        num_items = checks.num_items(num_items, reduction, student)
    checks.teacher_gradient(teacher, teacher_grad)
    engine = checks.backend(backend, student, teacher, has_device_function(type(kind)))
    if backend == "auto" and student.is_cuda and not has_device_function(type(kind)):
        warnings.warn(f"{type(kind).__name__} has no device function: using torch", stacklevel=2)
    others = {"teacher": teacher, "weight": weight, **given.temperatures}
    mode = given.gradient_mode(student, others)
    trains = student.requires_grad and torch.is_grad_enabled()
    if inplace and trains:
        checks.inplace(student, {"labels": labels, **others})

    student, teacher = readable(student), readable(teacher)
    labels, weight = readable(labels), readable(weight)
    given = given._replace(
        temperature=readable(given.temperature),
        teacher_temperature=readable(given.teacher_temperature),
    )
    size = student.shape[:-1]
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    counted, row_weight = _rows_that_count(
        None if given.sigmoids else labels, weight, given.ignore_index, dtype
    )
    factor = _reduction_factor(reduction, num_items, counted, row_weight, student, dtype)
    if torch.compiler.is_compiling() and not isinstance(factor, Tensor):
        factor = _scalar(factor, dtype, student.device)
    factors = _factors(given, row_weight)
    problem = _problem(
        given, student, teacher, labels if given.alpha < 1 or return_metrics else None, counted,
        columns, dtype,
    )  # fmt: skip

    if standardize and engine != "reference":
        problem = moments.standardized(problem, engine)

    if engine == "reference":
        values = reference.losses(problem, entropy_weight != 0, return_metrics, standardize)
        rows = _combine(values, factors)
    elif mode == "forward" and trains:
        rows = problem.student_temperature
        coefficients = [
            None if f is None else _per_row(f * factor, rows.numel(), rows.dtype, rows.device)
            for f in factors
        ]
        loss, values, _ = autograd.Fused.apply(
            inplace, *_arguments(problem), *coefficients, return_metrics, engine
        )
        return (loss, _metrics(values, size, labels)) if return_metrics else loss
    else:
        values, _ = autograd.Rows.apply(
            *_arguments(problem),
            entropy_weight != 0,
            return_metrics,
            engine,
            *_dual(kind, others, engine),
        )
        rows = _combine(values, factors)

    loss = (rows * factor).view(size) if reduction == "none" else (rows * factor).sum()
    return (loss, _metrics(values, size, labels)) if return_metrics else loss


# --- the pieces ------------------------------------------------------------------------------


def has_device_function(kind: type[Divergence]) -> bool:
    return kind.device is not None or kind.__module__.startswith("fastkd.divergences")


def _rows_that_count(
    labels: Tensor | None, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Which rows count, bool [N], and their weights [N]; None where all do, or weigh 1."""
    counted = None if labels is None else (labels != ignore_index).flatten()
    if weight is None:
        return counted, None
    weight = weight.flatten()
    weighed = weight if weight.dtype == torch.bool else weight != 0
    counted = weighed if counted is None else counted & weighed
    if weight.dtype == torch.bool:
        return counted, None
    return counted, torch.where(counted, weight.to(dtype), 0.0)


def _reduction_factor(
    reduction: str,
    num_items: int | Tensor | None,
    counted: Tensor | None,
    row_weight: Tensor | None,
    student: Tensor,
    dtype: torch.dtype,
) -> float | Tensor:
    if reduction in ("none", "sum"):
        return 1.0
    if reduction == "batchmean":
        return 1 / max(student.size(0), 1)
    if isinstance(num_items, Tensor):
        return 1 / _divisor(num_items, counted, student, dtype)
    if num_items is not None:
        return 1 / num_items
    counts = counted if row_weight is None else row_weight
    if counts is None:
        return 1 / max(student.numel() // student.size(-1), 1)
    total = counts.sum().to(dtype)
    return 1 / torch.where(total == 0, 1.0, total)


def _divisor(
    num_items: Tensor, counted: Tensor | None, student: Tensor, dtype: torch.dtype
) -> Tensor:
    """num_items; NaN where it is not positive, but for 0 items where no row counts, which is 1."""
    items = _scalar(num_items, dtype, student.device)
    divisor = torch.where(items > 0, items, math.nan)
    if counted is not None:
        return torch.where((items == 0) & ~counted.any(), 1.0, divisor)
    return divisor if student.numel() else torch.where(items == 0, 1.0, divisor)


def _factors(given: Settings, row_weight: Tensor | None) -> list[float | Tensor | None]:
    """What the divergence, cross-entropy and entropy of a row are multiplied by; None: absent."""
    scale: float | Tensor = 1.0
    if given.scale_by_temperature:
        student, teacher = given.temperature, given.teacher_temperature
        scale = student if isinstance(student, Tensor) else float(student)
        scale = scale * (student if teacher is None else teacher)
        power = given.divergence.temperature_power
        scale = scale if power == 2 else scale ** (power / 2)
        scale = scale.flatten() if isinstance(scale, Tensor) and scale.dim() else scale
    weight = 1.0 if row_weight is None else row_weight
    alpha, entropy_weight = given.alpha, given.entropy_weight
    return [
        alpha * scale * weight if alpha > 0 else 0.0,
        (1 - alpha) * weight if alpha < 1 else None,
        entropy_weight * weight if entropy_weight != 0 else None,
    ]


def _combine(values: Any, factors: Sequence[float | Tensor | None]) -> Tensor:
    """The weighted rows: a term whose factor is the number 0 is left out, were it infinite."""
    terms = [
        factor * values[kind]
        for kind, factor in zip((KD, CE, ENTROPY), factors, strict=True)
        if isinstance(factor, Tensor) or factor
    ]
    return sum(terms[1:], terms[0]) if terms else values[KD] * 0


def _problem(
    given: Settings,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    counted: Tensor | None,
    vocab_size: int,
    dtype: torch.dtype,
) -> Problem:
    row_dims = student.dim() - 1
    student, teacher = _as_rows(student, teacher)
    a, b = given.divergence.parameters
    rows, device = student.size(0) * student.size(1), student.device
    return Problem(
        student, teacher,
        _per_row(given.temperature, rows, dtype, device),
        None
        if given.teacher_temperature is None
        else _per_row(given.teacher_temperature, rows, dtype, device),
        None if labels is None else labels.reshape(rows, *labels.shape[row_dims:]).contiguous(),
        counted, given.label_smoothing, given.divergence.name, a, b, vocab_size,
    )  # fmt: skip


def _as_rows(*tensors: Tensor) -> list[Tensor]:
    """Views [O, I, width] with one split for all; a copy only where the strides allow none."""
    tensors = tuple(t if t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous() for t in tensors)
    seams = {seam for tensor in tensors for seam in _seams(tensor)}
    if len(seams) > 1:
        tensors, seams = tuple(t.contiguous() for t in tensors), set()
    split = max(seams, default=0)
    leading = tensors[0].shape[:-1]
    outer, inner = math.prod(leading[:split]), math.prod(leading[split:])
    return [tensor.view(outer, inner, tensor.size(-1)) for tensor in tensors]


def _seams(tensor: Tensor) -> list[int]:
    """The leading dimensions that do not merge with the one before."""
    leading = range(tensor.dim() - 1)
    dims = [(i, tensor.size(i), tensor.stride(i)) for i in leading if tensor.size(i) != 1]
    return [i for (_, _, before), (i, size, stride) in pairwise(dims) if before != size * stride]


def _per_row(value: float | Tensor, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, a 0-d tensor or one per row, as [N]."""
    if isinstance(value, Tensor) and value.dim():
        return value.to(dtype).flatten()
    return _scalar(value, dtype, device).expand(rows)


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-d, on the device."""
    if isinstance(value, Tensor):
        value = value.to(dtype)
        # To copy from the CPU would wait for the device; as a factor the number goes along.
        return (
            value if value.device == device else torch.ones((), dtype=dtype, device=device) * value
        )
    if torch.compiler.is_compiling():  # torch.full would compile again for each value
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


def _numbers(*values: float) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.stack([_scalar(value, torch.float64, CPU) for value in values])
    return torch.tensor(values, dtype=torch.float64, device=CPU)


def _arguments(problem: Problem) -> autograd.Arguments:
    numbers = _numbers(problem.label_smoothing, problem.a, problem.b)
    return autograd.Arguments(
        *problem[:6], problem.moments, numbers, problem.divergence, problem.vocab_size
    )


def _dual(kind: Divergence, others: Mapping[str, Any], engine: str) -> autograd.Dual:
    """The roles exchanged; asked for where teacher or temperature trains."""
    names = ("teacher", "temperature", "teacher_temperature")
    if not any(checks.trains(others[name]) for name in names):
        return autograd.Dual("", torch.empty(0, device=CPU), 0.0)
    name, (a, b), factor = kind.dual()
    if engine == "triton" and not has_device_function(Divergence.of_name(name)):
        raise NotImplementedError(
            f"the gradient to teacher or temperature needs {type(kind).__name__} with the roles "
            "exchanged on the device too: define `dual`, or pass backend='torch'"
        )
    return autograd.Dual(name, _numbers(0.0, a, b), factor)


def _metrics(values: Any, size: torch.Size, labels: Tensor | None) -> Metrics:
    rows: list[Any] = [None if value is None else value.detach().view(size) for value in values]
    if labels is None:
        rows[CE] = None
    return Metrics(*rows)
