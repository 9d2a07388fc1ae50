"""Models of transformers: what they take, what they predict, and their output heads."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.labels import soft
from fastkd.operands import LinearHead

TARGETS = ("labels", "shift_labels")
DECODER = {"decoder_input_ids", "decoder_inputs_embeds"}  # what a decoder reads
ROW = "row"  # of a batch: the rows of a TeacherCache
# Of logits that a head makes again: the largest difference, in units of the largest logit.
SAME, SAME_IN_HALF = 1e-4, 2e-2


def targets(inputs: Mapping[str, Any], shift: bool) -> Tensor:
    """The token that each place predicts, -100 where none.

    The last place of a sequence predicts none. To slice it off would cost a copy of the logits'
    gradient.
    """
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    labels = inputs.get("labels")
    if shift and soft(labels):
        raise ValueError(
            "labels in floating point are one place too early for a model that predicts the next "
            "token: give them as shift_labels, or shift=False where they are at their places"
        )
    if labels is None:
        raise ValueError(
            "the batch has no labels, which say what counts: let the collator add them, as "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False) does, with -100 where nothing "
            "is to be learnt"
        )
    return F.pad(labels[..., 1:], (0, 1), value=-100) if shift else labels


def counted(labels: Tensor, several: bool) -> Tensor:
    """Which places count, bool [...]; `several`: labels hold an answer for each class."""
    if several or soft(labels):
        return torch.ones(labels.shape[:-1], dtype=torch.bool, device=labels.device)
    return labels != -100


def by_sequence(rows: Tensor) -> Tensor:
    """Sums over all dimensions but the batch's."""
    return rows.flatten(1).sum(-1) if rows.dim() > 1 else rows


def model_inputs(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A batch without what only the model's own loss would take, nor a cache of the keys."""
    ours = (*TARGETS, ROW, "num_items_in_batch")
    others = {k: v for k, v in inputs.items() if k not in ours}
    if _shifts_its_labels(base(model)) and not inputs.keys() & DECODER:
        if inputs.get("labels") is None:
            raise ValueError(
                "the batch has no decoder_input_ids: let the collator make them of the labels, as "
                "DataCollatorForSeq2Seq(tokenizer, model=student) does"
            )
        of_labels = getattr(base(model), "prepare_decoder_input_ids_from_labels", None)
        if of_labels:
            others["decoder_input_ids"] = of_labels(labels=inputs["labels"])
        else:
            others["labels"] = inputs["labels"]  # Whisper's forward alone knows how
    if "use_cache" in inspect.signature(base(model).forward).parameters:
        others["use_cache"] = False
    return others


def _shifts_its_labels(plain: Any) -> bool:
    """Whether a decoder behind an encoder reads the labels, where it is given nothing else."""
    if hasattr(plain, "prepare_decoder_input_ids_from_labels"):
        return True
    writes = getattr(plain, "can_generate", lambda: False)()
    return writes and getattr(plain.config, "is_encoder_decoder", False)


def logits_of(outputs: Any) -> Tensor:
    """The logits among what a model returns."""
    mapping = isinstance(outputs, Mapping)
    found = outputs.get("logits") if mapping else getattr(outputs, "logits", None)
    if found is None:
        raise TypeError(
            "student and teacher must return their logits as `logits`, as the models of "
            f"transformers with a head do, got {type(outputs).__name__}"
        )
    return found


def is_causal(model: Any) -> bool:
    """Whether the model's own loss shifts the labels.

    The name of that loss says so for some only: GPT2LMHeadModel has none, and models of images and
    text that of encoders with decoders. What writes text without an encoder is causal, unless its
    loss counts the first label, as XLNet's and those of decoders without their encoder do.
    """
    plain = base(model)
    decoder_only = not getattr(getattr(plain, "config", None), "is_encoder_decoder", False)
    writes = getattr(plain, "can_generate", lambda: False)()
    named = writes or getattr(plain, "loss_type", None) == "ForCausalLM"
    return decoder_only and named and not _counts_the_first(model)


@torch.no_grad()
def _counts_the_first(model: Any) -> bool:
    """Whether the model's own loss has a term for the first label, which no place is before."""
    try:
        ids = torch.arange(4, device=next(model.parameters()).device)[None]
        labels = ids.masked_fill(ids > 0, -100)
        with evaluating(model):
            loss = model(input_ids=ids, labels=labels).loss
        return bool(loss.isfinite() and loss > 0)
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return False  # it takes other inputs, or its weights are not here


def freeze(teacher: Any, device: torch.device | None) -> None:
    """Sets a teacher to evaluation, without gradients; one whose device is chosen stays there."""
    teacher.eval().requires_grad_(False)
    placed = getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)
    if device is not None and not placed:
        teacher.to(device)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def base(model: Any) -> Any:
    """The model under peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass(frozen=True)
class Head:
    """The output head of a causal language model, and what its configuration does besides."""

    decoder: nn.Module
    layer: nn.Linear
    logit_scale: float | None
    logit_softcap: float | None

    def of(self, hidden: Tensor) -> LinearHead:
        layer = self.layer
        return LinearHead(hidden, layer.weight, layer.bias, self.logit_scale, self.logit_softcap)

    def __call__(self, model: Any, inputs: Mapping[str, Any]) -> LinearHead:
        """As `model(**inputs).logits`, by way of the model's own forward, wrapped or not."""
        kept: list[Tensor] = []
        for module in (self.layer, base(model)):
            keep_gathered(module)
        hook = self.decoder.register_forward_hook(lambda *call: kept.append(_hidden(call[-1])))
        none = torch.empty(0, dtype=torch.long, device=self.layer.weight.device)
        try:
            model(**inputs, logits_to_keep=none)
        finally:
            hook.remove()
        if not kept:
            raise RuntimeError(f"the model does not call its {type(self.decoder).__name__}")
        return self.of(kept[0])


def keep_gathered(module: Any) -> None:
    """What FSDP2 gathered for the forward of this module stays until its backward.

    A loss of hidden states reads the head for every chunk of rows, outside of that forward.
    """
    keep = getattr(module, "set_reshard_after_forward", None)
    if keep is not None:
        keep(False, recurse=False)


def head_of(model: Any) -> Head | None:
    """None where the model makes logits in another way; tried on four tokens."""
    plain = base(model)
    layer = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    places = getattr(plain, "hf_device_map", None) or {}
    if type(layer) is not nn.Linear or len(set(places.values())) > 1:
        return None
    if "logits_to_keep" not in inspect.signature(plain.forward).parameters:
        return None
    shape = plain.config.get_text_config()
    scale = getattr(shape, "logit_scale", None) or getattr(shape, "lm_head_multiplier", None)
    if getattr(shape, "logits_scaling", None):
        scale = 1 / shape.logits_scaling
    decoders = [getattr(plain, "base_model", plain)]
    if hasattr(plain, "get_decoder"):
        decoders.append(plain.get_decoder())  # of OPT's, which calls but a part of its base model
    for decoder in dict.fromkeys(decoders):
        head = Head(decoder, layer, scale, getattr(shape, "final_logit_softcapping", None))
        if decoder is not plain and _makes_its_logits(head, model):
            return head
    return None


@torch.no_grad()
def _makes_its_logits(head: Head, model: Any) -> bool:
    ids = torch.arange(4, device=head.layer.weight.device)[None]
    inputs = {"input_ids": ids, "use_cache": False}
    try:
        with evaluating(model):
            wanted, found = model(**inputs).logits, head(model, inputs).logits()
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return False  # it takes other inputs, or its weights are no plain tensors
    if found.shape != wanted.shape:
        return False
    limit = SAME if wanted.dtype == torch.float32 else SAME_IN_HALF
    return bool((found.float() - wanted.float()).abs().max() <= limit * wanted.float().abs().max())


def _hidden(outputs: Any) -> Tensor:
    found = getattr(outputs, "last_hidden_state", None)
    return outputs[0] if found is None else found
