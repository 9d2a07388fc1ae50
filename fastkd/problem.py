"""What the eager path and the kernels are asked to compute: one type, three functions each.

`eager/logits.py` and `kernels/logits.py` both offer

    phases(problem, entropy, metrics)             -> values, state; gathers where it yields
    backward(problem, state, upstream, gradient, temperature) -> gradient | None, temperature rows
    fused(problem, coefficients, metrics, out)    -> loss rows, values | None, gradient

with the layouts below, so that `autograd.py` does not know which of them it calls.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import sharding, tracing
from .constants import constant
from .divergences import Divergence
from .forms import (
    Events,
    Head,
    Mixture,
    kind_of,
    numbers_of,
    one_dimension,
    rows_of_sides,
    side_of,
    sources,
)

if TYPE_CHECKING:
    from .settings import Settings

CPU = torch.device("cpu")

# Rows of `values`, fp32 [1, N], [3, N] where ce or entropy is wanted, [5, N] with metrics.
KD, CE, ENTROPY, TEACHER_ENTROPY, AGREEMENT = range(5)

# Rows of `state`, fp32 [6, N], [8, N] where ce or entropy is wanted, [10, N] where the logits are
# standardised or others hold columns too: two are -T times the derivatives of kd and entropy to T.
# max is of the raw logits, sum is of exp((logit - max) / T), gap is the logarithm of
# the teacher's sum over the student's, -inf where a side is masked throughout; constant is c of
# table 1, rest what it lacks, unit_sum the sum at T = 1. Where the divergence looks at the label,
# [14, N], of the other columns; the last four are kernels/labels.py's, of the label.
STUDENT_MAX, STUDENT_SUM, TEACHER_MAX, GAP, CONSTANT, REST = range(6)
STUDENT_ENTROPY, UNIT_SUM, SCALE_SLOPE, ENTROPY_SCALE_SLOPE = range(6, 10)

# Rows of `moments`, of the n finite entries of a row: their mean; the width std + eps, by which a
# backend multiplies the temperature, whose gradient it still gives; the slope 1 / ((n - 1) std), by
# which the derivative of the width is width_slope * (logit - mean).
MEAN, WIDTH, WIDTH_SLOPE = range(3)
EPS = 1e-7  # added to the standard deviation
# The width of a row without spread: the softmax is uniform over its entries, the gradient gone.
FLAT = 1e30


class Coefficients(NamedTuple):
    """Factors of the three terms; None: the term is absent.

    As upstream gradients of a backward, fp32 [N], of any stride; or as the weights of the terms in
    a fused loss, which may be numbers and 0-d tensors too.
    """

    kd: Any
    ce: Any
    entropy: Any

    @property
    def of_no_divergence(self) -> bool:
        """Whether the divergence surely has the factor 0, as at alpha = 0: a teacher that is read
        for figures alone may be NaN, and 0 times its slopes too.
        """
        return not isinstance(self.kd, Tensor) and self.kd == 0

    def rows(self, problem: Problem) -> Coefficients:
        """Each as [N]."""
        of = problem.rows, problem.dtype, problem.student_temperature.device
        return Coefficients._make(None if x is None else per_row(x, *of) for x in self)

    def numbers(self) -> Coefficients:
        """A number in place of a tensor where all rows share it, of which a device is asked."""
        return Coefficients._make(_number(x) if isinstance(x, Tensor) else x for x in self)

    def part(self, rows: Any) -> Coefficients:
        """Those of some rows, a slice or indices."""
        return Coefficients._make(x[rows] if isinstance(x, Tensor) and x.dim() else x for x in self)

    def weigh(self, values: Sequence[Tensor] | Tensor) -> Tensor:
        """The weighted loss rows: a term whose factor is 0 is left out, were it infinite."""
        terms = [
            torch.where(factor == 0, 0.0, factor * row) if isinstance(factor, Tensor)
            else factor * row
            for factor, row in zip(self, values, strict=False)
            if isinstance(factor, Tensor) or factor
        ]  # fmt: skip
        return sum(terms[1:], terms[0]) if terms else torch.zeros_like(values[KD])


class Packed(NamedTuple):
    """A Problem as an operator takes it. A new field of a Problem comes in here, and nowhere else.

    Numbers that may change from step to step come in a tensor: as plain floats they would make the
    compiler compile again for each value.
    """

    tensors: Sequence[Tensor | None]
    numbers: Tensor  # fp64, on the CPU
    vocab_size: int
    spec: str


class Problem(NamedTuple):
    """A batch of N = O * I rows; logits keep their strides, [O, I, V] with last stride 1."""

    student: Any  # Tensor [O, I, >= V], or a Head
    teacher: Any  # likewise, or Events, or a Mixture; None: not read, and the divergence is 0
    student_temperature: Tensor  # [N], of any stride
    teacher_temperature: Tensor | None  # [N]; None: the student's
    labels: Tensor | None  # [N], integer, or [N, V], soft or of sigmoids; None: no cross-entropy
    counted: Tensor | None  # [N], bool: the rows that count; None: all
    label_smoothing: float
    divergence: str  # a name of table 1
    a: float
    b: float
    vocab_size: int  # V: columns from here on are padding
    moments: Tensor | None = None  # [2, 3, N], student's and teacher's; None: not standardised
    merge: str = ""  # of sharding.py: who else holds columns of these rows
    standardize: bool = False  # whether moments are to come, chunk by chunk
    temperature_trains: bool = False  # whether a gradient to either temperature may be asked for
    chunk_bytes: int | None = None  # of a chunk of rows; None: as chunks.py has it

    @staticmethod
    def of(
        given: Settings,
        student: Any,
        teacher: Any,
        labels: Tensor | None,
        counted: Tensor | None,
        vocab_size: int,
        dtype: torch.dtype,
        trained: Collection[str],
        merge: str = "",
    ) -> Problem:
        """The problem of what distillation_loss was given, checked.

        dtype: of the arithmetic. trained: names of the keywords that train.
        """
        source = sources(student)[0]
        row_dims, rows, device = source.dim() - 1, math.prod(source.shape[:-1]), source.device
        sides = [student] if teacher is None else [student, teacher]
        soft = labels is not None and labels.is_floating_point() and not given.sigmoids
        sides = [one_dimension(side) for side in sides] if soft else rows_of_sides(sides)
        a, b = given.divergence.parameters
        teacher_temperature = None
        if given.teacher_temperature is not None:
            teacher_temperature = per_row(given.teacher_temperature, rows, dtype, device)
        if labels is not None:
            labels = labels.reshape(rows, *labels.shape[row_dims:]).contiguous()
        return Problem(
            sides[0], None if teacher is None else sides[1],
            per_row(given.temperature, rows, dtype, device), teacher_temperature, labels, counted,
            given.label_smoothing, given.divergence.name, a, b, vocab_size, merge=merge,
            temperature_trains="temperature" in trained or "teacher_temperature" in trained,
            chunk_bytes=given.chunk_bytes,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """N."""
        return self.student_temperature.size(0)

    @property
    def dtype(self) -> torch.dtype:
        """That of the arithmetic and of everything per row: fp32, or fp64 for fp64 logits."""
        return self.student_temperature.dtype

    @property
    def soft(self) -> bool:
        """Whether the labels are a distribution over the classes of a softmax."""
        several = self.labels is not None and self.labels.dim() == 2
        return several and Divergence.of_name(self.divergence).rows == "logits"

    def state_rows(self, kinds: int) -> int:
        """How many rows of `state` the kernels keep beside so many of `values`."""
        if Divergence.of_name(self.divergence).label_aware:
            return 14
        if self.standardize or self.moments is not None or self.merge:
            return 10
        return 8 if kinds > 1 else 6

    @property
    def makes_logits(self) -> bool:
        """Whether the logits of a side are made for a chunk of rows at a time."""
        return any(isinstance(side, (Head, Mixture)) for side in (self.student, self.teacher))

    @property
    def columns(self) -> int:
        """V of all owners of the rows together."""
        columns = sharding.of(self.merge).columns
        return self.vocab_size if columns is None else columns

    def kinds(self, entropy: bool, metrics: bool) -> int:
        """The rows of `values` that are wanted."""
        return 5 if metrics else 3 if entropy or self.labels is not None else 1

    def part(self, rows: Any) -> Problem:
        """The problem of some of the N rows, a slice or indices; logits are [1, N, width]."""

        def logits(x: Any) -> Any:
            if isinstance(x, Head):
                return x._replace(hidden=x.hidden[rows])
            if isinstance(x, Events):
                return Events._make(some(tensor) for tensor in x)
            if isinstance(x, Mixture):
                members = tuple(logits(member) for member in x.members)
                norms = None if x.norms is None else x.norms[..., rows]
                return x._replace(members=members, weights=x.weights[:, rows], norms=norms)
            return None if x is None else x[:, rows]

        def some(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return self._replace(
            student=logits(self.student),
            teacher=logits(self.teacher),
            student_temperature=self.student_temperature[rows],
            teacher_temperature=some(self.teacher_temperature),
            labels=some(self.labels),
            counted=some(self.counted),
            moments=None if self.moments is None else self.moments[..., rows].contiguous(),
        )

    def exchanged(self, divergence: str, a: float, b: float) -> Problem:
        """The roles exchanged, of the divergence alone: for the gradient to the teacher."""
        first, second = self.student_temperature, self.teacher_temperature
        return self._replace(
            student=self.teacher,
            teacher=self.student,
            student_temperature=first if second is None else second,
            teacher_temperature=None if second is None else first,
            labels=self.labels if Divergence.of_name(divergence).label_aware else None,
            label_smoothing=0.0,
            divergence=divergence,
            a=a,
            b=b,
            moments=None if self.moments is None else self.moments.flip(0),
        )

    def pack(self) -> Packed:
        sides = self.student, self.teacher
        scales = [x for side in sides for x in numbers_of(side)]
        flags = f"{self.standardize:d}{self.temperature_trains:d}{self.chunk_bytes or ''}"
        spec = "|".join((*map(kind_of, sides), flags, self.merge, self.divergence))
        numbers = packed_numbers(self.label_smoothing, self.a, self.b, *scales)
        return Packed(self._tensors(), numbers, self.vocab_size, spec)

    def _tensors(self) -> list[Tensor | None]:
        return [
            *sources(self.student), *sources(self.teacher), self.student_temperature,
            self.teacher_temperature, self.labels, self.counted, self.moments,
        ]  # fmt: skip

    def flat(self) -> list[Any]:
        """For an autograd Function, which looks for tensors one by one: they come last. The problem
        goes along as it is where no transform changes its tensors on their way.
        """
        if not tracing.traced():
            return [self, 0, "", *self._tensors()]
        tensors, *rest = self.pack()
        return [*rest, *tensors]

    @staticmethod
    def unpack(
        tensors: Sequence[Tensor | None], numbers: Tensor | Problem, vocab_size: int, spec: str
    ) -> Problem:
        if isinstance(numbers, Problem):
            return numbers
        *kinds, flags, merge, divergence = spec.split("|", 4)
        found = iter(tensors)
        label_smoothing, a, b, *scales = unpacked_numbers(numbers)
        scale = iter(scales)
        sides = [side_of(kind, found, scale) for kind in kinds]
        *rows, moments = found
        return Problem._make((
            *sides, *rows, label_smoothing, divergence, a, b, vocab_size, moments, merge,
            flags[0] == "1", flags[1] == "1", int(flags[2:]) if flags[2:] else None,
        ))  # fmt: skip


# --- rows and numbers ------------------------------------------------------------------------


def shared(rows: Tensor) -> bool:
    """Whether [N] is one number, expanded."""
    return rows.stride(0) == 0 and len(rows) > 0


def _number(factor: Tensor) -> float | Tensor:
    if factor.dim():
        return factor[0].item() if shared(factor) else factor
    return factor.item()


def per_row(value: float | Tensor, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, a 0-d tensor or one per row, as [N]."""
    if isinstance(value, Tensor) and value.dim():
        return value.to(dtype).flatten()
    return scalar(value, dtype, device).expand(rows)


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-d, on the device."""
    if isinstance(value, Tensor):
        if value.device == device:
            return value.to(dtype)
        # To copy from the CPU would wait for the device; as a factor the number goes along.
        return constant(1.0, dtype, device) * value.to(dtype)
    if torch.compiler.is_compiling():  # torch.full would compile again for each value
        return torch.ones((), dtype=dtype, device=device) * value
    return constant(held_by(dtype, value), dtype, device)


def held_by(dtype: torch.dtype, value: float) -> float:
    """Infinite where it is beyond what the dtype holds, which PyTorch refuses of a number."""
    return math.copysign(math.inf, value) if abs(value) > torch.finfo(dtype).max else value


def packed_numbers(*values: float) -> Tensor:
    if torch.compiler.is_compiling() or isinstance(values[0], Tensor):
        return torch.stack([scalar(value, torch.float64, CPU) for value in values])
    return torch.tensor(values, dtype=torch.float64, device=CPU)


def unpacked_numbers(numbers: Tensor) -> Sequence[Any]:
    """Floats; 0-d tensors where a tracer looks on, which hands them on and has no values."""
    unread = tracing.watched() or tracing.opaque(numbers)
    return numbers.unbind() if unread else numbers.tolist()
