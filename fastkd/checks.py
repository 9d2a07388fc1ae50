"""Every public error message: what was expected, what came, what to do. Nothing here synchronises
with a device unless FASTKD_DEBUG=1 asks for it.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .divergences import Divergence
from .scalars import number
from .sharding import Group
from .tracing import frozen, may_read, opaque, traced, trains, watched

REDUCTIONS = ("none", "sum", "mean", "batchmean")
GRADIENTS = ("auto", "forward", "backward")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("auto", "triton", "torch", "reference")
HOTTEST = 1e18  # whose square leaves fp32 room for what multiplies it
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choice(name: str, value: Any, options: Sequence[str], other: str = "") -> str:
    """Refuses what is none of the options; `other` says what else the argument may be."""
    got, near = "None" if value is None else f"a {type(value).__name__}", []
    if isinstance(value, str):
        if value in options:
            return value
        got, near = repr(value), difflib.get_close_matches(value, options, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(options)}{other}, got {got}{hint}")


def several(name: str, value: Any) -> None:
    """Refuses what is no list, and what can be gone through but once."""
    try:
        len(value), iter(value)
    except TypeError:
        raise TypeError(f"{name} must be a list, got {type(value).__name__}") from None


def divergence(value: Any) -> Divergence:
    """The object of a name or an object."""
    if isinstance(value, Divergence):
        if Divergence.of_name(value.name) is not type(value):
            raise ValueError(
                f"divergence is an object of {type(value).__name__} as it was before the class "
                "was defined again: make the object anew"
            )
        return value
    if isinstance(value, type) and issubclass(value, Divergence):
        raise TypeError(f"divergence must be an object, got the class: write {value.__name__}()")
    if not isinstance(value, str):
        raise TypeError(
            f"divergence must be a name or a fastkd.Divergence, got {type(value).__name__}"
        )
    name, colon, numbers = value.partition(":")  # as on the command line
    if name not in Divergence._classes:
        choice("divergence", value, Divergence.names(), ", or an object such as fastkd.JSD(0.1)")
    kind = Divergence.of_name(name)
    if colon or not kind.by_name:
        raise ValueError(
            f"divergence {value!r} has a parameter: pass an object, such as "
            f"fastkd.{kind.__name__}({', '.join(numbers.split(','))})"
        )
    return kind()


def dense(name: str, tensor: Tensor) -> None:
    """Refuses tensors whose numbers do not lie in memory row by row."""
    if hasattr(tensor, "device_mesh"):
        found, instead = "a DTensor beside plain tensors", "full_tensor() or to_local()"
    elif type(tensor).__name__ == "AsyncCollectiveTensor":
        found, instead = "still under way between processes", "wait()"
    elif tensor.is_nested:
        found, instead = "a nested tensor", "values(), whose rows need no padding"
    elif tensor.layout != torch.strided:
        found, instead = f"in the layout {tensor.layout}", "to_dense()"
    elif tensor.is_quantized:
        found, instead = "quantised", "dequantize()"
    else:
        return
    raise NotImplementedError(f"{name} is {found}: pass {name}.{instead}")


def group(name: str, value: Any) -> Any:
    kinds = torch.distributed.ProcessGroup, Group
    if not any(isinstance(value, kind) for kind in kinds):  # torch.compile knows it by no tuple
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup, got {type(value).__name__}: a mesh "
            "has it as get_group()"
        )
    return value


def logits(student: Any, teacher: Any, vocab_size: Any, shard: bool = False) -> int:
    """The number of columns that are vocabulary."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor):
            instead = ": pass its logits" if hasattr(tensor, "logits") else ""
            raise TypeError(
                f"{name} must be a tensor of logits, got {type(tensor).__name__}{instead}"
            )
        dense(name, tensor)
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must hold logits in float16, bfloat16, float32 or float64, got "
                f"{tensor.dtype}; class indices go to `labels`"
            )
        if tensor.dim() == 0:
            raise ValueError(f"{name} must have shape [..., V], got a 0-d tensor")
    if student.device != teacher.device:
        raise ValueError(
            f"student and teacher must be on one device, got {student.device} and "
            f"{teacher.device}: move one of them"
        )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student and teacher must have equal leading shapes, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: slice and flatten both alike"
        )
    widths = student.size(-1), teacher.size(-1)
    if shard:  # which may be empty
        if min(widths) < vocab_size:
            raise ValueError(
                f"this rank of `group` has {vocab_size} columns, but student and teacher have "
                f"{widths[0]} and {widths[1]}: pass both split alike, or a teacher with the "
                "columns of all"
            )
        return vocab_size
    if vocab_size is None:
        if widths[0] != widths[1]:
            raise ValueError(
                f"student and teacher have {widths[0]} and {widths[1]} columns: if the wider one "
                f"is padded, pass vocab_size (at most {min(widths)}), the tokenizer's true size"
            )
        vocab_size = widths[0]
    if not 1 <= vocab_size <= min(widths):
        raise ValueError(
            f"vocab_size must lie between 1 and the narrower width, got {vocab_size} for a "
            f"student of {widths[0]} and a teacher of {widths[1]} columns"
        )
    return vocab_size


def beside(name: str, tensor: Tensor, student: Tensor) -> None:
    if tensor.device != student.device:
        raise ValueError(f"{name} is on {tensor.device}, the logits on {student.device}: move it")


def per_row(name: str, tensor: Any, student: Tensor) -> None:
    rows = student.shape[:-1]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    dense(name, tensor)
    if tensor.shape != rows:
        raise ValueError(
            f"{name} must have the shape of the rows, {tuple(rows)}, got {tuple(tensor.shape)}: "
            "one for each row of the logits, sliced and flattened as they are"
        )
    beside(name, tensor, student)


def multi_label(standardize: bool, label_smoothing: float, ignore_index: int) -> None:
    """Refuses what multi-label heads have no use for."""
    for name, value, default, instead in (
        ("standardize", standardize, False, "leave it out"),
        ("label_smoothing", label_smoothing, 0, "smooth the labels themselves"),
        ("ignore_index", ignore_index, -100, "leave out rows by `weight`"),
    ):
        if value != default:
            raise ValueError(
                f"{name}={value!r} is for softmax heads, and Bernoulli() for sigmoids: {instead}"
            )


def weight(tensor: Any, student: Tensor) -> None:
    per_row("weight", tensor, student)
    if tensor.dtype != torch.bool and tensor.dtype not in FLOATS:
        raise TypeError(
            f"weight must be floating-point or bool, got {tensor.dtype}: of a mask pass mask.bool()"
        )


def temperature(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        value = number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {value!r}")
        if value > HOTTEST:
            raise ValueError(
                f"{name} must be at most {HOTTEST:g}, got {value!r}: the loss, scaled by T^2, has "
                "its limit long before"
            )
        return value
    if hasattr(value, "device_mesh"):  # of a DTensor each rank checks its own part
        return value
    dense(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating-point, of 16 bits or more, got {value.dtype}")
    if may_read(value) and not (right := (value > 0) & (value <= HOTTEST)).all():
        raise ValueError(
            f"{name} must be finite and > 0 in every row, at most {HOTTEST:g}, got "
            f"{value[~right][0].item()}"
        )
    return value


def temperature_rows(name: str, value: Any, student: Tensor) -> None:
    if isinstance(value, Tensor):
        if value.dim():
            per_row(name, value, student)
        else:
            scalar_device(name, value, student)


def whole(name: str, value: Any) -> Any:
    value = number(name, value)
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    return value


def at_least(name: str, value: Any, least: int = 1) -> Any:
    value = whole(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def unit(name: str, value: Any) -> Any:
    value = number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return value


def finite(name: str, value: Any) -> Any:
    value = number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value!r}")
    return value


def flag(name: str, value: Any) -> Any:
    if type(value) is bool:
        return value
    if isinstance(value, Tensor) or not isinstance(value, Hashable) or value not in (True, False):
        shown = repr(value) if isinstance(value, str | float) else f"a {type(value).__name__}"
        raise TypeError(f"{name} must be True or False, got {shown}")
    return value


def num_items(value: Any, reduction: str, student: Tensor) -> Any:
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(f"num_items replaces the divisor of reduction='mean', got {reduction!r}")
    if not isinstance(value, Tensor):
        value = number("num_items", value)
        if not 0 < value < math.inf:
            raise ValueError(f"num_items must be finite and > 0, got {value!r}")
        return value
    dense("num_items", value)
    if value.dim():
        raise ValueError(f"num_items must be a 0-d tensor, got shape {tuple(value.shape)}")
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"num_items must hold a number, got {value.dtype}")
    scalar_device("num_items", value, student)
    if value.requires_grad:
        raise ValueError("num_items requires a gradient, which it does not get: detach it")
    if may_read(value) and not value >= 0:
        raise ValueError(f"num_items must be >= 0, got {value.item()}")
    return value


def scalar_device(name: str, tensor: Tensor, student: Tensor) -> None:
    dense(name, tensor)
    if tensor.device.type != "cpu" and tensor.device != student.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the logits on {student.device}: move it there, or to "
            "the CPU"
        )


def held_gradient(reduction: str, inplace: bool, gradient: str) -> None:
    """Refuses what no gradient can be held for."""
    if gradient == "backward" and inplace:
        raise ValueError("inplace=True needs gradient='forward' or 'auto', got 'backward'")
    if (gradient == "forward" or inplace) and reduction == "none":
        raise ValueError(
            "gradient='forward' and inplace=True need a scalar loss, got reduction='none': "
            "pass gradient='backward', or reduce"
        )


def student_alone(trained: Sequence[str]) -> None:
    """Refuses other operands that train, where only the student's gradient is held."""
    if trained:
        raise ValueError(
            "gradient='forward' and inplace=True give the student's gradient only, but "
            f"{' and '.join(trained)} requires one too: pass gradient='backward'"
        )


def not_half(half: bool) -> None:
    if half:
        raise ValueError(
            "gradient='forward' and inplace=True would round a float16 gradient before the loss "
            "scale lifts it, which makes small entries 0: pass gradient='backward', or "
            "a student in float32"
        )


def inplace(student: Tensor, operands: dict[str, Any]) -> None:
    """Refuses logits that another holds; `operands` are what the loss reads besides."""
    if student.is_leaf:
        raise ValueError(
            "inplace=True would overwrite a leaf that requires a gradient: pass inplace=False"
        )
    base = student._base
    if base is not None and base.numel() != student.numel():
        raise ValueError(
            f"inplace=True would overwrite part of a larger tensor of shape {tuple(base.shape)}: "
            "pass inplace=False, or the whole of it"
        )
    if frozen(student):
        raise ValueError("inplace=True would write to a view autograd keeps: pass inplace=False")
    if any(stride == 0 and size > 1 for stride, size in zip(student.stride(), student.shape)):  # noqa: B905 (Dynamo)
        raise ValueError("inplace=True needs a tensor of its own, got an expanded one: clone it")
    if not traced() and student.is_neg():
        raise ValueError("inplace=True would write to a lazily negated tensor: pass inplace=False")
    for name, operand in operands.items():
        if isinstance(operand, Tensor) and _overlap(student, operand):
            raise ValueError(
                f"inplace=True would overwrite {name}, which shares memory with the student: "
                f"pass inplace=False, or {name}.clone()"
            )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors may have bytes in common; not known of tensors that hold no numbers."""
    if watched() or opaque(one) or opaque(other):
        return False
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    (start, stop), (first, last) = _bytes(one), _bytes(other)
    return start < last and first < stop


def _bytes(tensor: Tensor) -> tuple[Any, Any]:
    """From where to where in its storage a tensor lies."""
    if not tensor.numel():
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))  # noqa: B905 (Dynamo)
    start = tensor.storage_offset()
    return start * tensor.element_size(), (start + reach + 1) * tensor.element_size()


def teacher_gradient(teacher: Tensor, teacher_grad: bool) -> None:
    if trains(teacher) and not teacher_grad:
        raise ValueError(
            "teacher, the second argument, requires a gradient: detach it, or say teacher_grad=True"
        )


def sharded(divergence: Divergence) -> None:
    if not divergence.sharded:
        raise NotImplementedError(
            f"{type(divergence).__name__} takes a row in one piece, and `group` spreads it over "
            "ranks: gather the logits, take all sums by the pair (see value_and_descent), or "
            "give it a device function and use backend='triton'"
        )


def backend(name: str, student: Tensor, teacher: Tensor, has_device_function: bool) -> str:
    """The backend that runs, for the name that was asked for."""
    if name not in ("auto", "triton"):
        return name
    double = torch.float64 in (student.dtype, teacher.dtype)
    if name == "auto":
        usable = student.is_cuda and HAS_TRITON and not double and has_device_function
        return "triton" if usable else "torch"
    if not HAS_TRITON:
        raise NotImplementedError("backend='triton' needs triton: pip install triton")
    if not student.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs a GPU, got tensors on {student.device}: move them, pass "
            "backend='torch', or set TRITON_INTERPRET=1 before the first import of triton"
        )
    if double:
        raise NotImplementedError("backend='triton' has no float64: pass backend='torch'")
    return name
