r"""fastkd under the trainers of TRL: `patch()` puts it in, `unpatch()` takes it out again.

TRL's trainers go on as they are, and call fastkd for their divergence:

    trainer          what is replaced                          what TRL goes on to compute
    GKD, GOLD        generalized_jsd_loss                      GOLD: across tokenizers
    IW-OPD           generalized_jsd_loss                      loss_top_k > 0 (its default is 1)
    Distillation     ChunkedDivergenceFunction                 under DeepSpeed ZeRO-3
    SDFT, SDPO       divergences of logits, of top-k sets      the sampled token

At beta = 0 and 1 TRL switches to forward and reverse KL, and so does this; in between its
beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, is `JSD(beta)`. Neither
multiplies by T^2. A call that fastkd has no equal of goes to TRL's own code: reduction="none" and
"mean" there are over the entries of the vocabulary, and `logits_are_probs` takes probabilities
without a norm. Arithmetic is fp32, where TRL computes in the dtype of the logits.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import Tensor

from fastkd.divergences import JSD, Divergence
from fastkd.functional import distillation_loss
from fastkd.operands import LinearHead

from . import numbers, require

OLDEST, BELOW = "1.12", "2"
LOGITS = ("student_logits", "teacher_logits")
BEFORE = (*LOGITS, "labels", "beta", "temperature", "reduction")


@dataclass(frozen=True)
class Place:
    """Something of TRL that fastkd replaces.

    Attributes:
        trainer: whose it is, as `patch` takes it.
        modules: that hold it by name, the one that defines it first.
        name: perhaps of a class's attribute.
        parameters: of the signature that is known.
        replacement: of TRL's own function or class, ours.
        since: the version of TRL that brought it.
    """

    trainer: str
    modules: tuple[str, ...]
    name: str
    parameters: tuple[str, ...]
    replacement: Callable[[Any], Any]
    since: str = OLDEST

    def owners(self) -> list[tuple[Any, str]]:
        """What holds it, and under which name."""
        *path, name = self.name.split(".")
        found = []
        for module in self.modules:
            owner = functools.reduce(getattr, path, _imported(module))
            if name in vars(owner):
                found.append((owner, name))
        return found

    def check(self, own: Any) -> None:
        """Refuses a signature other than the one that is known."""
        function = getattr(own, "forward", None) or _plain(own)
        got = tuple(name for name in inspect.signature(function).parameters if name != "ctx")
        if got != self.parameters:
            raise ImportError(
                f"fastkd.integrations.trl does not know this {self.name} of trl "
                f"{version('trl')}: it takes {', '.join(got)}; known is "
                f"{', '.join(self.parameters)}. Nothing was patched; "
                f"patch() takes the names of other trainers, and trl 1.16 is known"
            )


_own: dict[tuple[Any, str], Any] = {}  # what is replaced now, by its owner and its name there


def patch(*trainers: str) -> tuple[str, ...]:
    """Puts fastkd under trainers of TRL, for the whole process; twice is once.

    Args:
        trainers: of "gkd", "gold", "iw_opd", "distillation", "sdft", "sdpo"; none means all.

    Returns:
        What is replaced now, for a log.

    Raises:
        ImportError: where TRL is absent, of an unsupported version, or has a signature that is
            not known; then nothing is patched.
        ValueError: for a trainer that is not among these.

    Example:
        >>> import fastkd.integrations.trl as trl
        >>> with trl.patched("gkd"):  # doctest: +SKIP
        ...     GKDTrainer(...).train()
    """
    places = _chosen(trainers)
    require("trl", OLDEST, BELOW, extra="trl")
    installed = numbers(version("trl"))
    found = []
    for place in places:
        if installed < numbers(place.since):
            continue
        try:
            owners = place.owners()
        except (ImportError, RuntimeError):
            if trainers:
                raise
            continue  # what does not import here, for want of a package, cannot be used either
        if not owners:
            raise ImportError(
                f"trl {version('trl')} has no {place.name} in {place.modules[0]}; nothing was "
                "patched"
            )
        for owner, name in owners:
            own = _own.get((owner, name), vars(owner)[name])
            place.check(own)
            found.append((place, owner, name, own))
    for place, owner, name, own in found:
        _own[owner, name] = own
        ours = place.replacement(_plain(own))
        setattr(owner, name, staticmethod(ours) if isinstance(own, staticmethod) else ours)
    return tuple(sorted({f"{place.trainer}: {place.name}" for place, *_ in found}))


def unpatch() -> None:
    """Gives TRL back all that `patch` replaced."""
    while _own:
        (owner, name), own = _own.popitem()
        setattr(owner, name, own)


@contextlib.contextmanager
def patched(*trainers: str) -> Iterator[tuple[str, ...]]:
    """`patch` for the body of a with statement; what was patched before stays so."""
    before = dict(_own)
    try:
        yield patch(*trainers)
    finally:
        for owner, name in _own.keys() - before.keys():
            setattr(owner, name, _own.pop((owner, name)))


# --- the replacements ------------------------------------------------------------------------


def divergence_of(beta: float) -> str | Divergence:
    """TRL's generalised JSD: its ends are KL divergences, which the limits of the JSD are not."""
    if beta in (0, 1):
        return "reverse_kl" if beta else "forward_kl"
    return JSD(beta)


def _generalized_jsd(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Bound by keyword: what stands between `reduction` and `num_items_in_batch` differs."""
    signature = inspect.signature(own)

    @functools.wraps(own)
    def loss(*arguments: Any, **keywords: Any) -> Tensor:
        bound = signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        given = bound.arguments
        items, labels, reduction = (
            given[name] for name in ("num_items_in_batch", "labels", "reduction")
        )
        student, teacher = (given[name] for name in LOGITS)
        listed = 0 < given.get("top_k", 0) < student.size(-1)
        if given.get("logits_are_probs", False) or listed:
            return own(*arguments, **keywords)
        if items is not None or (reduction == "batchmean" and labels is not None):
            reduction = "mean"  # over the places that count, which is TRL's batchmean
        elif reduction not in ("sum", "batchmean"):
            return own(*arguments, **keywords)
        return distillation_loss(
            student,
            teacher,
            divergence=divergence_of(given["beta"]),
            temperature=given["temperature"],
            scale_by_temperature=False,
            weight=None if labels is None else labels != -100,
            reduction=reduction,
            num_items=items.to(student.device) if isinstance(items, Tensor) else items,
            teacher_grad=teacher.requires_grad,
        )

    return loss


def _rows(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of logits; log-probabilities are some, whose callers norm them and pass the gradient on."""
    signature = inspect.signature(own)

    @functools.wraps(own)
    def loss(*arguments: Any, **keywords: Any) -> Tensor:
        student, teacher, beta = signature.bind(*arguments, **keywords).arguments.values()
        return distillation_loss(
            student,
            teacher,
            divergence=divergence_of(beta),
            reduction="none",
            teacher_grad=teacher.requires_grad,
        )

    return loss


def _heads(own: Any) -> type:
    zero3 = _imported("transformers.integrations.deepspeed").is_deepspeed_zero3_enabled

    class ChunkedDivergence:
        """Takes the place of TRL's autograd Function of this signature."""

        @staticmethod
        def apply(*arguments: Any) -> tuple[Tensor, Tensor]:
            # Under ZeRO-3 the backward would find the heads in pieces.
            return own.apply(*arguments) if zero3() else _divergence_of_heads(*arguments)

    return ChunkedDivergence


def _divergence_of_heads(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None,
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None,
    beta: float, temperature: float = 1.0,
    student_logit_scale: float = 1.0, student_final_logit_softcapping: float | None = None,
    teacher_logit_scale: float = 1.0, teacher_final_logit_softcapping: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The divergence of each row and the student's entropy there, fp32 [N]."""
    bias = None if teacher_bias is None else teacher_bias.detach()
    rows, metrics = distillation_loss(
        LinearHead(
            student_hidden, student_weight, student_bias,
            student_logit_scale, student_final_logit_softcapping,
        ),
        LinearHead(
            teacher_hidden.detach(), teacher_weight.detach(), bias,
            teacher_logit_scale, teacher_final_logit_softcapping,
        ),
        divergence=divergence_of(beta), temperature=temperature,
        scale_by_temperature=False, reduction="none", return_metrics=True,
    )  # fmt: skip
    return rows, metrics.student_entropy


PLACES = (
    Place(
        "gkd", ("trl.experimental.gkd.gkd_trainer",), "GKDTrainer.generalized_jsd_loss",
        (*BEFORE, "num_items_in_batch"), _generalized_jsd,
    ),
    Place(
        "gold", ("trl.experimental.gold.gold_trainer",), "GOLDTrainer.generalized_jsd_loss",
        (*BEFORE, "logits_are_probs", "num_items_in_batch"), _generalized_jsd,
    ),
    Place(
        "iw_opd", ("trl.experimental.iw_opd.iw_opd_trainer",),
        "IWOPDTrainer.generalized_jsd_loss",
        (*BEFORE, "top_k", "add_tail", "num_items_in_batch"), _generalized_jsd,
    ),
    Place(
        "distillation",
        ("trl.kernels.chunked_divergence", "trl.trainer.distillation_trainer"),
        "ChunkedDivergenceFunction",
        ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight",
         "teacher_bias", "beta", "temperature", "student_logit_scale",
         "student_final_logit_softcapping", "teacher_logit_scale",
         "teacher_final_logit_softcapping"),
        _heads, since="1.15",
    ),
    *(
        Place(
            trainer,
            tuple(f"trl.experimental.{trainer}.{m}" for m in ("loss_utils", f"{trainer}_trainer")),
            name, parameters, _rows,
        )
        for trainer in ("sdft", "sdpo")
        for name, parameters in (
            ("compute_divergence", ("student_log_probs", "teacher_log_probs", "alpha")),
            ("compute_full_logit_self_distillation_loss", (*LOGITS, "distillation_alpha")),
        )
    ),
)  # fmt: skip


def _chosen(trainers: tuple[str, ...]) -> list[Place]:
    names = list(dict.fromkeys(place.trainer for place in PLACES))
    for trainer in trainers:
        if trainer not in names:
            raise ValueError(f"patch takes {', '.join(names)}, got {trainer!r}")
    return [place for place in PLACES if not trainers or place.trainer in trainers]


def _imported(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, says who imports it to use it
        return importlib.import_module(module)


def _plain(own: Any) -> Any:
    return own.__func__ if isinstance(own, staticmethod) else own
