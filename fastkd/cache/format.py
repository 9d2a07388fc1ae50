"""The files of a teacher cache.

    cache.json              what it is: written first, never changed
    00000.safetensors ...   shards of `rows_per_shard` rows each, the last may have fewer
    head.safetensors        the teacher's output head, of a cache of hidden states

Rows are sequences of `positions` tokens; what is kept at a position is what the teacher says of
the next token. A shard is written whole under another name and then renamed. It holds the tokens,
packed, and the tensors of its layout, and in its metadata its place, the SHA-256 of both and that
of cache.json: a shard without them, or with others, is none of the cache's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layouts import LAYOUTS, Layout

FORMAT, VERSION = "fastkd teacher cache", 1
MANIFEST = "cache.json"
HEAD = "head"


class CacheError(RuntimeError):
    """A cache that cannot be used, and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What is in cache.json.

    Attributes:
        layout: what is kept of the teacher.
        vocab_size: the teacher's tokens; ids lie below it.
        rows, positions: how many sequences of how many tokens.
        corpus: SHA-256 of all tokens, as int32.
        about: what else is known, of any kind that JSON has: the teacher's name, its tokenizer.
    """

    layout: Layout
    vocab_size: int
    rows: int
    positions: int
    rows_per_shard: int
    corpus: str
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "rows", "positions", "rows_per_shard"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(self.about, dict):
            raise ValueError(f"about must be a dict, got {self.about!r}")
        self.layout.check(self.vocab_size)

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def values(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "layout"}
        layout = {"kind": self.layout.kind, **dataclasses.asdict(self.layout)}
        return {"format": FORMAT, "version": VERSION, "layout": layout, **own}

    def text(self) -> str:
        return json.dumps(self.values(), indent=1, sort_keys=True) + "\n"

    def key(self) -> str:
        """The checksum by which a shard knows its cache."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CacheError(f"{folder} holds no teacher cache: there is no {MANIFEST}") from None
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} cannot be read: {error}") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise CacheError(f"{path} is none of a teacher cache")
        version = values.pop("version", None)
        if version != VERSION:
            raise CacheError(
                f"{path} is of version {version}, and this fastkd reads {VERSION}: "
                "write the cache again, or use the fastkd that wrote it"
            )
        try:
            layout = values.pop("layout")
            return cls(layout=LAYOUTS[layout.pop("kind")](**layout), **values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CacheError(f"{path} is broken: {error!r}") from None


def shard_path(folder: Path, shard: int | str) -> Path:
    return folder / (
        f"{shard:05d}.safetensors" if isinstance(shard, int) else f"{shard}.safetensors"
    )


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def to_bytes(tensors: dict[str, Tensor], manifest: Manifest, shard: int | str) -> bytes:
    """A shard's file."""
    from safetensors.torch import save

    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    # One string: safetensors writes several in any order, and equal caches are to have equal files.
    about = {"cache": manifest.key(), "shard": shard, "sha256": checksum(tensors)}
    data: bytes = save(tensors, {"fastkd": json.dumps(about)})
    return data


def read_shard(folder: Path, manifest: Manifest, shard: int | str) -> dict[str, Tensor]:
    """A shard's tensors, mapped from the file, once they have proved to be what was written."""
    from safetensors import SafetensorError, safe_open

    path = shard_path(folder, shard)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("fastkd", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: {_AGAIN}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CacheError(f"{path} is broken ({error}): delete it, and {_AGAIN}") from None
    if about.get("cache") != manifest.key():
        raise CacheError(f"{path} belongs to another cache: delete it, and {_AGAIN}")
    if about.get("shard") != shard:
        raise CacheError(f"{path} is a copy of another file of the cache: delete it, and {_AGAIN}")
    if about.get("sha256") != checksum(tensors):
        raise CacheError(f"{path} is broken (its checksum is another): delete it, and {_AGAIN}")
    return tensors


_AGAIN = "run again what wrote the cache: it writes what is not there"
