"""distillation_loss: check, lay out as rows, choose the path, reduce."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import autograd, checks, chunks, dtensors, moments, reference, sharding, sides, tracing
from .divergences import Divergence
from .labels import soft as is_soft
from .operands import Ensemble, Student, Teacher
from .operators import caller, readable
from .problem import KD, Problem, packed_numbers
from .reduction import Metrics, factor_of_rows, factors_of_terms, rows_that_count, weighted
from .settings import Keywords, Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


@overload
def distillation_loss(
    student: Student,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    return_metrics: Literal[False] = False,
    **settings: Unpack[Keywords],
) -> Tensor: ...


@overload
def distillation_loss(
    student: Student,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    return_metrics: Literal[True],
    **settings: Unpack[Keywords],
) -> tuple[Tensor, Metrics]: ...


@overload
def distillation_loss(
    student: Student,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    return_metrics: bool,
    **settings: Unpack[Keywords],
) -> Tensor | tuple[Tensor, Metrics]: ...


def distillation_loss(
    student: Student,
    teacher: Teacher,
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
    dim: int = -1,
    group: ProcessGroup | sharding.Group | None = None,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Metrics]:
    r"""Knowledge-distillation loss of a student against a teacher.

    With q = softmax(student / T_s), p = softmax(teacher / T_t), D the divergence and H the
    entropy in nats, the loss of a row is

        alpha * T_s * T_t * D(p, q) + (1 - alpha) * CE(label, softmax(student))
            + entropy_weight * H(q).

    All arithmetic is fp32 (fp64 for fp64 logits), whatever the logits' dtype, and no [N, V]
    tensor is made besides the gradient. Hinton's loss, the value of
    `F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean") * T**2`, is
    `distillation_loss(s, t, temperature=T, reduction="batchmean")`.

    Args:
        student: logits [..., V], fp16, bf16, fp32 or fp64, dense; -inf masks an entry. Or a
            `LinearHead`, hidden states with their output head, whose logits are made for a chunk
            of rows at a time.
        teacher: logits [..., V], of any of these dtypes, or a `LinearHead`, or what is known of a
            teacher: `TopK`, `Sampled`; or an `Ensemble` of these. Log-probabilities are logits too.
            Tensors made under torch.inference_mode are taken, but by torch.compile, which cannot
            save them.
        labels: class indices [...], int64 or int32. They feed the cross-entropy and say, by
            `ignore_index`, which rows count. No shift is applied. Or a distribution [..., V] in
            floating point, of mixup say, as in F.cross_entropy: rows then count by `weight` alone.
            With `Bernoulli()`, multi-hot [..., V] in [0, 1].
        divergence: "forward_kl" (KL(p || q)), "reverse_kl", "jeffreys", "tvd", or an object:
            `JSD(beta)`, `SkewKL(alpha)`, `SkewReverseKL(alpha)`, `AlphaDivergence(alpha)`,
            `Renyi(alpha)`, `Jeffreys(forward, reverse)`, one of your own (`Divergence`), or, for
            multi-label heads, `Bernoulli()`: see there what changes.
        temperature: T_s > 0, at most 1e18, the student's: a float, a 0-d tensor, or one per row
            [...]. A tensor that requires a gradient gets one. A 0-d tensor may stay on the CPU
            while the logits are on a GPU: its number goes along with a kernel, and only its
            gradient waits for the GPU.
        teacher_temperature: T_t, likewise. None: the same as the student's.
        scale_by_temperature: multiply the divergence by T_s * T_t, which keeps the size of its
            gradient (TVD: by the square root). False is the convention of TRL, verl, torchtune.
        standardize: True takes p and q of z-scores, softmax((z - mean) / (std + 1e-7) / T), with
            mean and std (n - 1 in the variance) over the row's entries that are not -inf. A finite
            number is a logit like any other, were it the lowest of its dtype: mask by -inf. The
            loss then depends on the scale of neither side; divergence, entropies and metrics are
            those of the z-scores, the cross-entropy that of the logits. A row of equal logits is
            uniform and gets no gradient (below 1e-30).
        alpha: share of the divergence, in [0, 1]; below 1 needs labels. At 0 the teacher is read
            for metrics only, and gets a gradient of 0 if it trains.
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
            student and teacher be of different widths. With `group`: of all ranks together.
        teacher_grad: True gives the teacher a gradient too, where it requires one.
        gradient: "forward" computes the student's gradient together with the loss, holds it, and
            allows one backward; "backward" keeps the logits and recomputes, and gives gradients
            to teacher, temperatures and weight too; "auto" is "forward" for scalar losses in bf16,
            fp32 and fp64 where only the student trains, else "backward". fp16 has no "forward": a
            loss scale, which comes later, could not bring back what was rounded to 0. In bf16 what
            is held is rounded, and again by an upstream gradient that is no power of two.
        inplace: overwrite the student's logits with their gradient (needs "forward"). Refused where
            another operand lies in the same memory.
        backend: "triton" (GPU), "torch" (any device), "reference" (naive, differentiated by
            autograd), or "auto": triton on a GPU where it can run, else torch. Triton takes what
            lies more than 3e38 T below the largest logit of its row for -inf, and gives to 1e-7
            what is left of a gradient where JSD, TVD or a skewed divergence is at its bound.
        return_metrics: return (loss, Metrics) instead.
        dim: the classes' dimension. Dense predictions [B, C, H, W] have 1, and rows [B, H, W]; they
            are read without a copy in torch.channels_last.
        group: process group over which the vocabulary is sharded: see docs/sharded.md.
        chunk_bytes: what may be held beside operands and gradients where logits are made in chunks
            of rows, for a `LinearHead`, an `Ensemble`, a `TopK` or `Sampled` on a CPU. None: 512
            MiB on a GPU, 80 MiB on a CPU. Fewer take less memory and more time; a chunk has 16 rows
            at least. Loss and gradients change by rounding alone.

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
        inplace=inplace, backend=backend, return_metrics=return_metrics, dim=dim, group=group,
        chunk_bytes=chunk_bytes,
    )  # fmt: skip
    if dtensors.is_distributed(student) or dtensors.is_distributed(teacher):
        return dtensors.run(distillation_loss, student, teacher, labels, weight, num_items, given)
    student, teacher = (sides.classes_last(x, given.dim) for x in (student, teacher))
    soft = is_soft(labels) and not given.sigmoids
    labels = sides.classes_last(labels, given.dim) if soft or given.sigmoids else labels
    sides.check(given, student, teacher, labels)
    outline = sides.outline(student)
    merge = sharding.of_group(given.group, outline, given.vocab_size)
    teacher = sides.own_columns(teacher, merge, student)
    labels = sides.own_columns(labels, merge) if soft or given.sigmoids else labels
    outlines = outline, sides.outline(teacher, outline)
    columns = sides.columns(given, merge, *outlines, labels, weight)
    num_items = checks.num_items(num_items, reduction, outline)
    backend = _backend(given, *outlines)
    others = {"teacher": outlines[1], "weight": weight, **given.temperatures}
    trains, trained = tracing.trains(outline), tracing.trained_of(others)
    held = given.holds(trains, sides.in_half(student), trained) and backend != "reference"
    if inplace and trains:
        logits = sides.tensors("teacher", teacher)
        checks.inplace(outline, {"labels": labels, **others, **logits})

    double = torch.float64 in (outline.dtype, outlines[1].dtype)
    dtype = torch.float64 if double else torch.float32
    given, labels, weight = given.readable(dtype), readable(labels), readable(weight)
    counted, row_weight = rows_that_count(
        None if soft or given.sigmoids else labels, weight, given.ignore_index, dtype
    )
    factor = factor_of_rows(reduction, num_items, counted, row_weight, outline, dtype, merge)
    of_all = merge.columns or columns
    reads_teacher = _reads_teacher(given, trained)
    problem = Problem.of(
        given,
        sides.side_of(student, given, labels, columns, dtype),
        sides.side_of(teacher, given, labels, of_all, dtype) if reads_teacher else None,
        labels if _reads_labels(given) else None, counted, columns, dtype, trained,
        sharding.name_of(merge),
    )  # fmt: skip
    if standardize and problem.makes_logits:
        problem = problem._replace(standardize=True)
    elif standardize and backend != "reference":
        problem = moments.standardized(problem, backend)
    if isinstance(teacher, Ensemble):
        problem = chunks.normed(problem, backend)

    shape = outline.shape[:-1]
    if held:
        factors = factors_of_terms(given, row_weight, factor)
        loss, values, *_ = caller(autograd.Fused)(
            inplace, return_metrics, backend, *factors, *problem.flat()
        )
    else:
        if backend == "reference":
            values = reference.losses(problem, entropy_weight != 0, return_metrics, standardize)
        else:
            values, *_ = caller(autograd.Rows)(
                entropy_weight != 0, return_metrics, backend,
                *_dual(problem, given, trained, backend), *problem.flat(),
            )  # fmt: skip
        rows = weighted(values, factors_of_terms(given, row_weight, factor, values[KD]))
        loss = rows.view(shape) if reduction == "none" else rows.sum()
    return (loss, Metrics.of(values, shape, labels)) if return_metrics else loss


def _backend(given: Settings, student: Tensor, teacher: Tensor) -> str:
    """The backend that runs."""
    kind = given.divergence
    if given.backend == "auto" and student.is_cuda and not kind.has_device_function:
        warnings.warn(f"{type(kind).__name__} has no device function: using torch", stacklevel=3)
    backend = checks.backend(given.backend, student, teacher, kind.has_device_function)
    if given.group is not None and backend == "torch":
        checks.sharded(kind)
    return backend


def _reads_labels(given: Settings) -> bool:
    """Whether a term needs the labels; else they only say which rows count."""
    return given.alpha < 1 or given.return_metrics or given.divergence.label_aware


def _reads_teacher(given: Settings, trained: Collection[str]) -> bool:
    """Whether the teacher is read: not at alpha = 0, unless for its figures or a gradient of 0."""
    trains = "teacher" in trained or "teacher_temperature" in trained
    return given.alpha > 0 or given.return_metrics or trains


def _dual(
    problem: Problem, given: Settings, trained: Collection[str], backend: str
) -> tuple[str, Tensor | None]:
    """The divergence with the roles exchanged, where teacher or its temperature trains."""
    names = {"teacher", given.of_teacher[0]}
    if problem.teacher is None or names.isdisjoint(trained):
        return "", None
    kind = given.divergence
    name, (a, b), factor = kind.dual()
    if backend == "triton" and not Divergence.of_name(name).has_device_function:
        raise NotImplementedError(
            f"the gradient to teacher or temperature needs {type(kind).__name__} with the roles "
            "exchanged on the device too: define `dual`, or pass backend='torch'"
        )
    return name, packed_numbers(a, b, factor)
