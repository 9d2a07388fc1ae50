"""Reading a teacher's outputs in place of running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd import checks
from fastkd.operands import LinearHead, Sampled, TopK
from fastkd.operands.listed import TAILS

from . import corpus
from .bits import unpack, width
from .format import HEAD, CacheError, Manifest, read_shard, shard_path
from .layouts import Hidden, Tensors, join

Decode = Callable[[Tensors, Tensor], Tensors]
Rows = int | slice | Sequence[int] | Tensor


class TeacherCache:
    """What a teacher said about a corpus, as `fastkd cache` or `fastkd.cache.write` wrote it.

    `cache[rows]` is the teacher for the student's logits of `cache.tokens(rows)`, [n, T, V], or
    [T, V] for one row: a TopK, a Sampled, a LinearHead, or log-probabilities in fp16, by what was
    cached. At a position is what the teacher says of the next token, as in the student's logits.

    Files are mapped into memory, and each proves by its checksum, when it is first needed, that it
    is whole.

    Args:
        path: the folder.
        tail: that of the TopKs.
        device: where the tensors go.

    Attributes:
        manifest: what is cached, and of which teacher: see `Manifest`.

    Raises:
        CacheError: no cache, an unfinished one, a broken or foreign file, with what to do.

    Example:
        >>> import tempfile, torch
        >>> from fastkd import cache
        >>> ids, head = torch.randint(100, (6, 8)), torch.randn(100, 100)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kept = cache.write(folder, cache.Best(k=4), ids, lambda ids, rows: head[ids], 100)
        ...     teacher = kept[[5, 0]]
        >>> teacher.shape
        torch.Size([2, 8, 4])
    """

    def __init__(
        self, path: str | Path, tail: str = "bucket", device: torch.device | str = "cpu"
    ) -> None:
        checks.choice("tail", tail, TAILS)
        self.path, self.tail, self.device = Path(path), tail, torch.device(device)
        self.manifest = Manifest.read(self.path)
        self._shards: dict[int | str, Tensors] = {}
        self._head: dict[str, Any] | None = None
        missing = [shard for shard in range(len(self.shards)) if not self.shards[shard].exists()]
        if missing:
            raise CacheError(
                f"{self.path} is unfinished: {len(missing)} of {len(self.shards)} shards are "
                "missing; run again what wrote it, and it goes on there"
            )

    @property
    def shards(self) -> list[Path]:
        return [shard_path(self.path, shard) for shard in range(self.manifest.shards)]

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, rows: Rows) -> TopK | Sampled | LinearHead | Tensor:
        layout, size = self.manifest.layout, self.manifest.vocab_size
        found = self._gather(rows, lambda shard, own: layout.decode(shard, own, size))
        found = {name: tensor.to(self.device) for name, tensor in found.items()}
        if isinstance(layout, Hidden):
            if self._head is None:  # moved once
                stored = self._shard(HEAD)
                self._head = {name: self._setting(tensor) for name, tensor in stored.items()}
            return LinearHead(found["hidden"], **self._head)
        return layout.operand(found, self.tail)

    def tokens(self, rows: Rows) -> Tensor:
        """The tokens that the teacher saw, int64 [n, T], or [T]."""

        def decode(shard: Tensors, own: Tensor) -> Tensors:
            positions = self.manifest.positions
            places = own[:, None] * positions + torch.arange(positions, device="cpu")
            return {"tokens": unpack(shard["tokens"], places, width(self.manifest.vocab_size))}

        return self._gather(rows, decode)["tokens"]

    def check_corpus(self, tokens: Tensor | corpus.Rows) -> None:
        """Raises CacheError where the cache is of other tokens than these, [N, T]."""
        if corpus.fingerprint(corpus.parts(tokens)) != self.manifest.corpus:
            raise CacheError(
                f"{self.path} is of another corpus, or of another tokenizer or settings that make "
                "tokens of it: write a cache of this one"
            )

    def verify(self) -> None:
        """Reads all files and compares their checksums; raises CacheError at the first that is
        broken.
        """
        for shard in range(self.manifest.shards):
            read_shard(self.path, self.manifest, shard)

    def bytes_per_token(self) -> float:
        """Bytes of the shards for each token, the token itself among them."""
        size = sum(path.stat().st_size for path in self.shards)
        return size / (self.manifest.rows * self.manifest.positions)

    def to(self, device: torch.device | str) -> TeacherCache:
        """The same with its tensors on a device."""
        return TeacherCache(self.path, self.tail, device)

    def __reduce__(self) -> tuple[type[TeacherCache], tuple[Path, str, torch.device]]:
        return type(self), (self.path, self.tail, self.device)  # a worker maps the files itself

    def _setting(self, tensor: Tensor) -> Any:
        """A number of the head, or one of its tensors."""
        return tensor.to(self.device) if tensor.dim() else tensor.item()

    def _shard(self, shard: int | str) -> Tensors:
        if shard not in self._shards:
            self._shards[shard] = read_shard(self.path, self.manifest, shard)
        return self._shards[shard]

    def _gather(self, rows: Rows, decode: Decode) -> Tensors:
        """What `decode` finds of the rows, shard by shard, in the order asked for."""
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        one = isinstance(rows, int)
        listed: list[Any] = [rows] if one else list(rows)  # type: ignore[arg-type, list-item]
        wanted = torch.as_tensor(listed, dtype=torch.long, device="cpu")
        wanted = torch.where(wanted < 0, wanted + len(self), wanted)
        if wanted.numel() == 0 or wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"rows must be some of 0 to {len(self) - 1}, got {rows}")
        shard, own = wanted // self.manifest.rows_per_shard, wanted % self.manifest.rows_per_shard
        parts = [
            decode(self._shard(index), own[shard == index]) for index in shard.unique().tolist()
        ]
        found = join(parts)
        order = torch.argsort(torch.argsort(shard, stable=True))
        found = {name: tensor[order] for name, tensor in found.items()}
        return {name: tensor[0] for name, tensor in found.items()} if one else found
