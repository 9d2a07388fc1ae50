"""Loading the user's models, and refusing pairs whose tokens do not mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .errors import RunError, Usage, one_line

# What two tokenizers must split alike: words, numbers, code, accents, other scripts, white space.
PROBE = "The quick brown fox, it's 1234.56 km!\n\tdef f(x):  return x**2  # naïve café 你好 🙂"


def load(name: str, dtype: torch.dtype) -> Any:
    """A causal language model from a folder, or from the hub where it is no local path."""
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, "model", dtype=dtype)


def student(name: str, seed: int) -> Any:
    """A model in fp32; from a config.json, one with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not is_config(name):
        return load(name, torch.float32)
    shape = _load(AutoConfig, name, "model configuration")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(shape)


def common_tokenizer(teacher: str, student: str) -> Any:
    """The one tokenizer of two models, of which either may come without."""
    _check_path(student)
    of_teacher = _tokenizer(teacher)
    of_student = None if is_config(student) else _tokenizer(student)
    if of_teacher is not None and of_student is not None:
        check_tokenizers(of_teacher, of_student)
    tokens = of_teacher or of_student
    if tokens is None:
        raise RunError(f"neither {teacher} nor {student} holds a tokenizer")
    return tokens


def _tokenizer(name: str) -> Any:
    """The tokenizer of a model; None where a local folder has none."""
    from transformers import AutoTokenizer

    folder = Path(name)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if folder.is_dir() and not any((folder / file).exists() for file in files):
        return None
    return _load(AutoTokenizer, name, "tokenizer")


def is_config(name: str) -> bool:
    return name.endswith(".json")


def _check_path(name: str) -> None:
    """Refuses a path that is not there; a hub name has one slash, and no folder here before it."""
    path = name.startswith((".", "/", "~")) or ("/" in name and Path(name).parent.is_dir())
    if not Path(name).exists() and (path or is_config(name)):
        raise Usage(f"{name}: there is no such folder or file")


def _load(kind: Any, name: str, what: str, **options: Any) -> Any:
    _check_path(name)
    local = Path(name).exists()
    try:
        return kind.from_pretrained(name, local_files_only=local, **options)
    except Exception as error:  # transformers and safetensors raise many kinds
        if local:
            raise RunError(f"{name} holds no {what} that can be read: {one_line(error)}") from None
        raise RunError(
            f"{name} is neither a folder here nor a {what} of the hub that can be reached: "
            f"{one_line(error)}"
        ) from None


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
        "probabilities of the same tokens; take a student of the teacher's family, or give a "
        "config.json to --student to train a new one with the teacher's tokenizer"
    )


def vocabulary(tokens: Any, wanted: int, teacher: Any) -> int:
    """How many columns of a head are vocabulary; the rest is padding."""
    known = max(tokens.get_vocab().values()) + 1
    size = wanted or known
    if size < known:
        raise Usage(f"vocab_size={size} leaves out tokens: the tokenizer has {known}")
    check_width("teacher", teacher, size)
    return size


def check_width(name: str, model: Any, size: int) -> None:
    width = model.config.get_text_config().vocab_size
    if width < size:
        raise RunError(
            f"the {name} has {width} outputs, and the vocabulary {size} tokens: "
            "model and tokenizer do not belong together"
        )
