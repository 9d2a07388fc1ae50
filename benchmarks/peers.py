"""Others that compute an operator's loss. What is not installed has no row; README.md says how to
bring it along."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .providers import NotOffered

IGNORED = -100

# --- logits: (student, teacher, labels | None, *, divergence, temperature, alpha) ----------------


def liger(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    divergence: str,
    temperature: float,
    alpha: float,
) -> Tensor:
    """Its kernels take probabilities: both softmaxes are part of the price."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss
    from liger_kernel.transformers.tvd import LigerTVDLoss

    if labels is not None and divergence in ("forward_kl", "tvd"):  # has no mask that leaves rows
        student, teacher = student[labels != IGNORED], teacher[labels != IGNORED]
    lq = F.log_softmax(student / temperature, -1)
    if divergence == "forward_kl":
        p = F.softmax(teacher / temperature, -1)
        return LigerKLDIVLoss(reduction="batchmean")(lq, p) * temperature**2
    if divergence == "tvd":
        return LigerTVDLoss()(lq.exp(), F.softmax(teacher / temperature, -1)) * temperature
    beta = {"jsd": 0.5, "reverse_kl": 1.0}.get(divergence)
    if beta is None:
        raise NotOffered("has forward_kl, reverse_kl, jsd and tvd")
    lp = F.log_softmax(teacher / temperature, -1)
    return LigerJSD(beta=beta, ignore_index=IGNORED)(lq, lp, labels) * temperature**2


def trl(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    divergence: str,
    temperature: float,
    alpha: float,
) -> Tensor:
    beta = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}.get(divergence)
    if beta is None:
        raise NotOffered("has forward_kl, reverse_kl and jsd")
    from trl.experimental.gkd import GKDTrainer

    loss = GKDTrainer.generalized_jsd_loss(
        student, teacher, labels, beta=beta, temperature=temperature
    )
    return loss * temperature**2


def orda(*operands: Tensor, **options: Any) -> Tensor:
    raise NotOffered("takes hidden states and an output head, not logits")


def speculators(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    divergence: str,
    temperature: float,
    alpha: float,
) -> Tensor:
    names = {"forward_kl": "kl_div", "reverse_kl": "reverse_kl_div", "jsd": "js_div", "tvd": "tv"}
    if divergence not in names:
        raise NotOffered("has forward_kl, reverse_kl, jsd and tvd")
    loss = getattr(_alone("speculators.losses.fused"), f"fused_{names[divergence]}_loss")
    if labels is not None:
        student, teacher = student[labels != IGNORED], teacher[labels != IGNORED]
    rows = loss(student[None] / temperature, teacher[None] / temperature)
    return rows.mean() * temperature ** (1 if divergence == "tvd" else 2)


# --- linear: (hidden, weight, teacher_hidden, teacher_weight) ------------------------------------


def liger_linear(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> Tensor:
    """Its chunks of 1024 rows, compiled; the weight's gradient is always part of the price."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    found: Tensor = loss(hidden, weight, other, other_weight, labels)
    return found


def liger_triton(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    if not hidden.is_cuda:
        raise NotOffered("its kernels are not offered on a CPU")
    found: Tensor = LigerFusedLinearJSD(jsd_beta=0.0)(hidden, weight, other, other_weight)
    return found


def trl_linear(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> Tensor:
    """Tiles of 4096 rows and 32768 columns, made again in the backward; kernels on a GPU."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    rows, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, other, other_weight, None, 0.0)
    found: Tensor = rows.mean()
    return found


# --- topk: (student, indices, log_probs, tail) ---------------------------------------------------


def trl_topk(student: Tensor, indices: Tensor, log_probs: Tensor, tail: Tensor) -> Tensor:
    """As its trainer has it for a teacher behind a server; both tails are 1 less what is listed."""
    from trl.experimental.server_distillation import server_distillation_trainer as theirs

    listed = torch.ones_like(log_probs, dtype=torch.bool)
    q, support = theirs._add_tail_bucket(student.log_softmax(-1).gather(-1, indices), listed)
    p, _ = theirs._add_tail_bucket(log_probs, listed)
    found: Tensor = theirs._jsd_divergence(q, p, beta=0.0, support_mask=support).sum(-1).mean()
    return found


def _alone(name: str) -> Any:
    """A module without what its packages import, which would have to be brought along too."""
    package, *inner = name.split(".")[:-1]
    found = importlib.util.find_spec(package)
    if found is None or found.submodule_search_locations is None:
        raise ImportError(f"No module named {package!r}")
    (folder,) = found.submodule_search_locations
    for path in (package, f"{package}.utils", *(f"{package}.{part}" for part in inner)):
        if path not in sys.modules:
            spec = ModuleSpec(path, None, is_package=True)
            spec.submodule_search_locations = ["/".join((folder, *path.split(".")[1:]))]
            sys.modules[path] = importlib.util.module_from_spec(spec)
    return importlib.import_module(name)
