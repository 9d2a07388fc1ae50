"""Numbers in as few bits as they need, one after the other, least significant bit first."""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 8  # bytes after the last number, so that a reader may always take whole bytes


def width(count: int) -> int:
    """Bits of the numbers 0 ... count - 1, at least one.

    >>> [width(count) for count in (1, 2, 3, 65536, 65537, 128256)]
    [1, 1, 2, 16, 17, 17]
    """
    return max(1, (count - 1).bit_length())


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Non-negative integers [n] below 2^bits as bytes.

    >>> pack(torch.tensor([5, 2, 7]), 3)[:2].tolist()  # 101 010 111, read from the right
    [213, 1]
    """
    parts = []
    places = torch.arange(bits, device="cpu")
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device="cpu")
    for some in numbers.split(1 << 16):  # a multiple of 8 numbers is a whole number of bytes
        digits = (some.long()[:, None] >> places & 1).to(torch.uint8).flatten()
        digits = torch.cat([digits, digits.new_zeros(-len(digits) % 8)])
        parts.append((digits.view(-1, 8) * powers).sum(-1, dtype=torch.uint8))
    return torch.cat([*parts, torch.zeros(SPARE, dtype=torch.uint8, device="cpu")])


def unpack(data: Tensor, places: Tensor, bits: int) -> Tensor:
    """The numbers at these places, int64 of the places' shape.

    >>> unpack(pack(torch.tensor([5, 2, 7]), 3), torch.tensor([[2, 0]]), 3)
    tensor([[7, 5]])
    """
    first = places.long() * bits
    found = torch.zeros_like(first)
    for byte in range((bits + 14) // 8):  # it may begin at any bit of its first byte
        found |= data[(first >> 3) + byte].long() << 8 * byte
    return (found >> (first & 7)) & ((1 << bits) - 1)
