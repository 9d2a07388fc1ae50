"""Loading the user's models, and refusing pairs whose tokens do not mean the same."""

from __future__ import annotations

import difflib
import hashlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastkd.dtensors import is_distributed
from fastkd.integrations.models import evaluating, model_inputs

from . import quantised
from .devices import out_of_memory, placement
from .errors import RunError, Usage, needs, one_line
from .parsing import Adapters, lora
from .settings import UserModels

# What two tokenizers must split alike: words, numbers, code, accents, other scripts, white space.
PROBE = "The quick brown fox, it's 1234.56 km!\n\tdef f(x):  return x**2  # naïve café 你好 🙂"


def load(name: str, dtype: torch.dtype | str, **options: Any) -> Any:
    """A causal language model from a folder, or from the hub where it is no local path.

    All weights of the model must be there, and no others: what is missing would be random.
    """
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "output_loading_info": True, **options}
    model, found = _load(AutoModelForCausalLM, name, "model", **options)
    _check_causal(name, model)
    for keys, what in ((found["missing_keys"], "lack"), (found["unexpected_keys"], "hold")):
        if keys:
            some, others = sorted(keys)[:3], len(keys) - 3
            more = f" and {others} more" if others > 0 else ""
            but = (
                ", which would be random" if what == "lack" else ", which its config has no use for"
            )
            raise RunError(f"the weights of {name} {what} {', '.join(some)}{more}{but}")
    return model


def teacher(name: str, chosen: UserModels, dtype: torch.dtype, device: torch.device) -> Any:
    """A model in the precision and on the device of teachers."""
    wanted = chosen.teacher_precision
    if wanted in ("bf16", "fp32"):
        dtype = torch.bfloat16 if wanted == "bf16" else torch.float32
    placed = placement(chosen.teacher_device)
    model = load(name, dtype, **quantised.loading(wanted, dtype), **placed)
    if wanted == "int8":
        quantised.quantise(model if placed else model.to(device), wanted)
    return model


def student(name: str, seed: int) -> tuple[Any, torch.dtype]:
    """A model in fp32, and the precision that it came in; of a config.json, random weights."""
    from transformers import AutoModelForCausalLM

    if is_config(name):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configuration(name)).float()
        _check_causal(name, model)
        return model, torch.float32
    model = load(name, "auto")
    came = model.dtype
    return model.float(), came


def adapted(
    name: str,
    dtype: torch.dtype,
    adapters: Adapters,
    seed: int,
    recomputed: bool,
    checkpoint: Path | None,
) -> Any:
    """A model that keeps its weights, with new adapters in fp32, or with those of a checkpoint."""
    needs("peft", extra="trainers")
    import peft

    if is_config(name):
        raise Usage("--lora adapts weights that are there: give --student a model, no config.json")
    model = load(name, dtype)
    if recomputed:
        recompute(model)  # before, so that peft lets gradients through the frozen embedding
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks
    if checkpoint is not None:
        return peft.PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
    torch.manual_seed(seed)
    chosen = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]  # peft divides it by the rank
        target_modules=list(adapters.targets) or "all-linear",
        revision=revised(name)[1],
    )
    try:
        return peft.get_peft_model(model, chosen)
    except ValueError as error:  # a layer that is not there
        raise Usage(f"--lora: {one_line(error)}") from None


def recompute(model: Any) -> None:
    """Activations are computed again in the backward pass."""
    model.train()
    # transformers 5.23 renamed it.
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)()


def fingerprint(model: Any) -> str:
    """Changes with any weight but an adapter's, but for chance.

    Of a model in shards all processes call it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.state_dict().items():
        if ".lora_" in name:
            continue
        weight = weight.full_tensor() if is_distributed(weight) else weight
        bits = [torch.hash_tensor(part).item() for part in _parts(weight) if part.numel()]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {bits or 0}".encode())
    return digest.hexdigest()


def _parts(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of numbers that a weight is made of, one unless it is quantised."""
    if not is_traceable_wrapper_subclass(weight):
        return [weight.detach()]
    return [getattr(weight, name).detach() for name in weight.__tensor_flatten__()[0]]


def keeps_documents_apart(model: Any) -> bool:
    """Whether a packed document is to this model as it is alone.

    The positions of the tokens say where one begins, and most models let none attend to the one
    before it; tried on two pairs of documents that differ in the first.
    """
    ids = torch.tensor([[0, 1, 2, 3], [2, 3, 2, 3]])
    places = torch.tensor([[0, 1, 0, 1]]).expand(2, 4)
    training = model.training
    try:
        with torch.no_grad():
            batch = {"input_ids": ids.to(model.device), "position_ids": places.to(model.device)}
            first, second = model.eval()(**batch, use_cache=False).logits[:, 2:]
    except (TypeError, ValueError, RuntimeError):  # it takes no positions
        return False
    finally:
        model.train(training)
    return torch.equal(first, second)


def _check_causal(name: str, model: Any) -> None:
    """Refuses an encoder, which would learn, or teach, to copy what it is to predict."""
    if sees_what_follows(model):
        raise RunError(
            f"{name} looks at the tokens that it is to predict, as an encoder does: take a causal "
            "language model (BERT and its kind are, with is_decoder in their config.json)"
        )


def sees_what_follows(model: Any) -> bool:
    """Whether the logits at a place depend on later tokens: by a gradient, which is 0 if not."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        ids = torch.arange(4, device=model.device)[None]
        with evaluating(model), torch.enable_grad():
            logits = model(**model_inputs({"input_ids": ids}, model)).logits[:, 1].float()
            (found,) = torch.autograd.grad(logits.square().sum(), kept[:1])
    except (IndexError, TypeError, ValueError, RuntimeError):  # it has no such gradient
        return False
    finally:
        hook.remove()
    size = found.flatten(0, 1).float().norm(dim=-1)  # the one sequence comes first or second
    return bool(size[2:].max() > 1e-6 * size[:2].max())


def configuration(name: str) -> Any:
    from transformers import AutoConfig

    return _load(AutoConfig, name, "model configuration")


def positions(shape: Any) -> int:
    """The most tokens that a model reads."""
    most = getattr(shape.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else sys.maxsize


def check_shape(what: str, name: str, chosen: UserModels, size: int) -> Any:
    """The configuration of a model; refuses one too small for the vocabulary or the sequences."""
    shape, length = configuration(name), chosen.sequence_length
    check_width(what, shape, size, chosen.vocab_size)
    if (most := positions(shape)) < length:
        raise Usage(f"sequence_length={length} is beyond the {most} positions of the {what}")
    return shape


def common_tokenizer(teachers: Sequence[str], student: str, template: str = "") -> Any:
    """The one tokenizer of all models, of which some may come without.

    `template` is a file with a chat template in place of its own.
    """
    _check_path(student)
    tokens = [_tokenizer(name) for name in dict.fromkeys(teachers)]
    tokens += [] if is_config(student) or student in teachers else [_tokenizer(student)]
    found = [each for each in tokens if each is not None]
    if not found:
        raise RunError(f"neither {', '.join(teachers)} nor {student} holds a tokenizer")
    for other in found[1:]:
        check_tokenizers(found[0], other)
    if template:
        found[0].chat_template = _text(template)
    return found[0]


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"cannot read {file}: {one_line(error)}") from None


def both_tokenizers(teacher: str, student: str) -> tuple[Any, Any]:
    """The student's and the teacher's, each of which knows the place of its tokens in the text."""
    _check_path(student)
    if is_config(student):
        raise Usage(
            "--cross-tokenizer: a config.json comes without a tokenizer, so that the student has "
            "the teacher's: leave the option out, or give --student a model"
        )
    found = _tokenizer(student), _tokenizer(teacher)
    for name, tokens in zip((student, teacher), found, strict=True):
        if not getattr(tokens, "is_fast", False):
            raise RunError(
                f"--cross-tokenizer: {name} needs a tokenizer with a tokenizer.json, which knows "
                "the place of each token in the text"
            )
    return found


def _tokenizer(name: str) -> Any:
    """The tokenizer of a model; None where a local folder has none."""
    from transformers import AutoTokenizer

    folder = Path(name)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if os.path.isdir(folder) and not any((folder / file).exists() for file in files):
        return None
    return _load(AutoTokenizer, name, "tokenizer")


def is_config(name: str) -> bool:
    return name.endswith(".json")


def revised(name: str) -> tuple[str, str | None]:
    """A name on the hub and its revision, a branch, a tag or a commit: 'owner/name@v1'."""
    if os.path.exists(name):
        return name, None
    name, _, revision = name.partition("@")
    return name, revision or None


def _check_path(name: str) -> None:
    """Refuses a name that is neither here nor one that the hub could have."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if os.path.exists(name):
        return
    name, _ = revised(name)
    path = name.startswith((".", "/", "~")) or ("/" in name and os.path.isdir(Path(name).parent))
    try:
        validate_repo_id(name)
    except HFValidationError:
        path = True
    if path or is_config(name):
        raise Usage(f"{name}: there is no such folder or file{_near(name)}")


def _check_hub(name: str, what: str) -> None:
    """Refuses a name that the hub does not know, before each file is asked for many times."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import GatedRepoError

    plain, revision = revised(name)
    if isinstance(try_to_load_from_cache(plain, "config.json", revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(plain, "config.json", revision=revision), timeout=5)
    except Exception as error:  # offline, unknown, and what else a network has
        why = "the hub has it for those it let in" if isinstance(error, GatedRepoError) else ""
        raise RunError(
            f"{name} is neither a folder here nor a {what} of the hub that can be reached: "
            f"{why or one_line(error)}{_near(name)}"
        ) from None


def _near(name: str) -> str:
    """A folder or file here that may be meant."""
    parent = Path(name).parent
    names = [path.name for path in parent.iterdir()] if os.path.isdir(parent) else []
    near = difflib.get_close_matches(Path(name).name, names, n=1)
    return f"; did you mean {parent / near[0]}?" if near else ""


def _load(kind: Any, name: str, what: str, **options: Any) -> Any:
    _check_path(name)
    local = os.path.exists(name)
    if not local:
        _check_hub(name, what)
    plain, revision = revised(name)
    options |= {"revision": revision} if revision else {}
    try:
        return kind.from_pretrained(plain, local_files_only=local, **options)
    except Exception as error:  # transformers and safetensors raise many kinds
        if out_of_memory(error):
            raise
        whose = name if local else f"{name} of the hub"
        raise RunError(f"{whose} holds no {what} that can be read: {one_line(error)}") from None


def check_tokenizers(teacher: Any, student: Any) -> None:
    """Refuses two tokenizers that are not one; equal sizes prove nothing."""
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine == theirs and student(PROBE)["input_ids"] == teacher(PROBE)["input_ids"]:
        return
    if mine == theirs:
        finding = "they have the same tokens but split text in different ways"
    else:
        token = min(token for token in {*mine, *theirs} if mine.get(token) != theirs.get(token))
        of_teacher, of_student = theirs.get(token, "absent"), mine.get(token, "absent")
        finding = f"token {token!r} is {of_teacher} in the teacher's, {of_student} in the student's"
    raise RunError(
        f"teacher and student have different tokenizers: {finding}. Distillation compares the "
        "probabilities of the same tokens; take a student of the teacher's family, give a "
        "config.json to --student to train a new one with the teacher's tokenizer, or say "
        "--cross-tokenizer gold"
    )


def vocabulary(tokens: Any, wanted: int) -> int:
    """How many columns of a head are vocabulary; the rest is padding."""
    known = max(tokens.get_vocab().values()) + 1
    size = wanted or known
    if size < known:
        raise Usage(f"vocab_size={size} leaves out tokens: the tokenizer has {known}")
    return size


def check_rank(shape: Any, wanted: str) -> None:
    """Refuses adapters of a higher rank than the weights have, which are no smaller than these."""
    width = getattr(shape.get_text_config(), "hidden_size", None)
    if wanted and isinstance(width, int) and lora(wanted).rank > width:
        raise Usage(f"lora {wanted!r}: the rank is beyond the {width} hidden units of the student")


def check_width(name: str, shape: Any, size: int, wanted: int = 0) -> None:
    """Refuses a vocabulary, or the setting `vocab_size`, beyond the model's outputs."""
    width = getattr(shape.get_text_config(), "vocab_size", None)
    if width is None:
        raise RunError(f"the {name} is no language model: its configuration has no vocab_size")
    if width < wanted:
        raise Usage(f"vocab_size={wanted} is beyond the {width} outputs of the {name}")
    if width < size:
        raise RunError(
            f"the {name} has {width} outputs, and the vocabulary {size} tokens: "
            "model and tokenizer do not belong together"
        )
