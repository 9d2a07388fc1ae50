"""Writing a teacher's outputs once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.operands import LinearHead

from . import corpus
from .bits import pack, width
from .format import HEAD, MANIFEST, CacheError, Manifest, read_shard, shard_path, to_bytes
from .layouts import Hidden, Layout, Tensors, join
from .reader import TeacherCache

TOKENS_PER_SHARD = 1 << 16


@torch.no_grad()
def write(
    path: str | Path,
    layout: Layout,
    tokens: Tensor | corpus.Rows,
    teacher: Callable[[Tensor, range], Tensor | LinearHead],
    vocab_size: int,
    *,
    batch_size: int = 8,
    rows_per_shard: int | None = None,
    about: dict[str, Any] | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> TeacherCache:
    """Runs a teacher over a corpus and keeps what the layout says.

    Ended at any moment, by Ctrl-C, kill -9 or a full disk, it goes on where it was when it is
    called again with the same arguments: whole shards are kept, and the result is the same to the
    bit (where the teacher's is).

    Args:
        path: a folder that is new, empty, or holds this cache unfinished.
        layout: Best(k), Draws(samples), Hidden() or Full().
        tokens: the corpus, [N, T]: a tensor, or what takes lists of rows, as a data set's column.
        teacher: from tokens [n, T] and their rows to logits [n, T, V]; for Hidden(), to a
            LinearHead.
        vocab_size: columns from here on are padding; no token lies above.
        batch_size: sequences that the teacher sees at once.
        rows_per_shard: None: as many as have 65,536 tokens.
        about: goes into the manifest; of another teacher it must differ.
        progress: called with the number of rows that are done.

    Raises:
        ValueError: a layout, tokens or logits that do not fit the vocabulary or each other.
        CacheError: the folder holds another cache; the message says in what it differs.
        fastkd.distill.errors.RunError: the folder cannot be written, or another run is using it.
    """
    from fastkd.distill import storage  # a folder of one run, and files that are whole or not there

    if len(tokens) == 0 or len(tokens[0]) == 0:
        raise ValueError("tokens must be [N, T] with N, T >= 1, got none")
    positions = len(tokens[0])
    manifest = Manifest(
        layout,
        vocab_size,
        len(tokens),
        positions,
        rows_per_shard or max(1, TOKENS_PER_SHARD // positions),
        corpus.fingerprint(corpus.checked(corpus.parts(tokens), vocab_size)),
        about or {},
    )
    folder = Path(path)
    with storage.new_folder(str(folder), ours=MANIFEST):
        if (folder / MANIFEST).exists():
            _check_same(Manifest.read(folder), manifest)
        else:
            storage.write(folder / MANIFEST, manifest.text())
        if isinstance(layout, Hidden) and not _whole(folder, manifest, HEAD):
            data = _head(manifest, teacher, corpus.rows(tokens, range(1)))
            storage.write(shard_path(folder, HEAD), data)
        for shard in range(manifest.shards):
            rows = manifest.shard_rows(shard)
            if not _whole(folder, manifest, shard):
                parts = []
                for first in range(rows.start, rows.stop, batch_size):
                    batch = range(first, min(first + batch_size, rows.stop))
                    parts.append(_observe(manifest, teacher, corpus.rows(tokens, batch), batch))
                    progress(batch.stop)
                stored = layout.encode(join(parts), vocab_size)
                ids = pack(corpus.rows(tokens, rows).flatten(), width(vocab_size))
                data = to_bytes({**stored, "tokens": ids}, manifest, shard)
                storage.write(shard_path(folder, shard), data)
            progress(rows.stop)
    return TeacherCache(folder)


def _check_same(old: Manifest, new: Manifest) -> None:
    was, now = ({**each.values(), **each.about} for each in (old, new))
    differing = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    for name in [name for name in differing if name != "about"]:
        raise CacheError(
            f"the folder holds another cache, whose {name} is {was.get(name)!r} and not "
            f"{now.get(name)!r}: choose another folder"
        )


def _whole(folder: Path, manifest: Manifest, shard: int | str) -> bool:
    try:
        read_shard(folder, manifest, shard)
    except CacheError:
        return False
    return True


def _head(manifest: Manifest, teacher: Any, tokens: Tensor) -> bytes:
    head = teacher(tokens, range(1))
    if not isinstance(head, LinearHead):
        raise TypeError(f"a cache of hidden states needs LinearHeads, got {type(head).__name__}")
    tensors = {"weight": head.weight[: manifest.vocab_size]}
    if head.bias is not None:
        tensors["bias"] = head.bias[: manifest.vocab_size]
    for name in ("logit_scale", "logit_softcap"):
        if getattr(head, name) is not None:
            tensors[name] = torch.tensor(getattr(head, name), dtype=torch.float64, device="cpu")
    return to_bytes(tensors, manifest, HEAD)


def _observe(manifest: Manifest, teacher: Any, tokens: Tensor, rows: range) -> Tensors:
    said = teacher(tokens, rows)
    if isinstance(said, LinearHead):
        said = said.hidden
    elif said.shape[:-1] != tokens.shape or said.size(-1) < manifest.vocab_size:
        raise ValueError(
            f"the teacher must give logits {(*tokens.shape, manifest.vocab_size)}, or wider, for "
            f"tokens {tuple(tokens.shape)}, got {tuple(said.shape)}"
        )
    else:
        said = said[..., : manifest.vocab_size]
    kept = manifest.layout.observe(said, list(rows))
    return {name: tensor.cpu() for name, tensor in kept.items()}
