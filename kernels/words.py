"""Numbers that programs of one launch exchange: words that are a number and a flag.

A word is the bits of an fp32 number and, above them, the turn of its row, which counts the rows
that a group of programs has worked off, from 1. It is read and written whole, so that a number is
there as soon as its flag is: no other order of events is needed, no lock, and no clearing between
rows.
NVIDIA's targets read and write 64 bits at once, past L1; AMD's atomics work in L2, and a volatile
load goes past what lies before it.

A mailbox [groups, RING, FIELDS, PIECES] begins as 0, which is no row's flag. Nobody posts a word of
a turn before all have posted one of the turn before, hence have read all of the turn before that:
two turns are under way at most. `tests/test_words.py` goes through every order of events.
"""

from __future__ import annotations

import triton
import triton.language as tl

RING = tl.constexpr(2)


@triton.jit
def box_of(words, turn, FIELDS: tl.constexpr, PIECES: tl.constexpr):
    """Where the words of a group's row lie, [FIELDS, PIECES]."""
    slot = tl.program_id(0) // PIECES * RING + (turn % RING).to(tl.int32)
    return words + slot * (FIELDS * PIECES)


@triton.jit
def post(words, piece, turn, fields, FIELDS: tl.constexpr, PIECES: tl.constexpr):
    box = box_of(words, turn, FIELDS, PIECES) + piece
    for i in tl.static_range(FIELDS):
        bits = tl.cast(fields[i], tl.float32).to(tl.uint32, bitcast=True).to(tl.int64)
        tl.atomic_xchg(box + i * PIECES, (turn << 32) | bits, sem="relaxed")


@triton.jit
def look(box, FIELDS: tl.constexpr, PIECES: tl.constexpr, PADDED: tl.constexpr):
    """The words of all pieces, whether they have arrived or not."""
    piece = tl.arange(0, PADDED)
    found = ()
    for i in tl.static_range(FIELDS):
        x = tl.load(box + i * PIECES + piece, mask=piece < PIECES, other=0, volatile=True)
        found = found + (x,)  # type: ignore[assignment]  # one more
    return found


@triton.jit
def missing(found, turn, FIELDS: tl.constexpr, PIECES: tl.constexpr):
    """Whether a word has not arrived, of a warp's own copy: it holds all pieces."""
    differ = tl.zeros(found[0].shape, tl.int32)
    for i in tl.static_range(FIELDS):
        differ |= ((found[i] >> 32) != turn).to(tl.int32)
    piece = tl.arange(0, found[0].shape[0])
    return tl.max(tl.where(piece < PIECES, differ, 0)) != 0


@triton.jit
def take(words, turn, FIELDS: tl.constexpr, PIECES: tl.constexpr, PADDED: tl.constexpr):
    """The words of a row, once all have arrived."""
    box = box_of(words, turn, FIELDS, PIECES)
    found = look(box, FIELDS, PIECES, PADDED)
    while missing(found, turn, FIELDS, PIECES):
        found = look(box, FIELDS, PIECES, PADDED)
    return found


@triton.jit
def number(word, other, PIECES: tl.constexpr):
    """[pieces, 1], and `other` beyond the last one."""
    piece = tl.arange(0, word.shape[0])[:, None]
    found = word.to(tl.int32).to(tl.float32, bitcast=True)[:, None]
    return tl.where(piece < PIECES, found, other)
