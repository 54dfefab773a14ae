"""What several ranks hold alike, and digests that tell whether they really do, taken where the tensors lie."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

ALL_RANKS = "all ranks"
CHUNK_ELEMENTS = 1 << 22
"""Digested at a time: it bounds the memory that a digest takes, to some 64 MB."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
ODD_STRIDE = 0x1E3779B97F4A7C14


@dataclass(frozen=True)
class Replica:
    """This rank's copy of a tensor. Ranks that give the same `holders` must have equal ones, bit for bit."""

    name: str
    tensor: torch.Tensor
    holders: str = ALL_RANKS


def digests(tensors: Iterable[torch.Tensor], device: torch.device) -> list[int]:
    """64-bit digests of the bits of tensors, with one wait for `device`. Any change of one element changes a digest."""
    found = [_digest(tensor).to(device) for tensor in tensors]
    values: list[int] = torch.stack(found).tolist() if found else []
    return values


@torch.no_grad()
def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """A sum modulo 2**64 of the elements' bits as integers, each times an odd number of its place: order-independent."""
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view(INTEGERS.get(flat.element_size(), torch.int64))
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), CHUNK_ELEMENTS):
        chunk = bits[start : start + CHUNK_ELEMENTS].to(torch.int64)
        places = torch.arange(start, start + chunk.numel(), dtype=torch.int64, device=tensor.device)
        total += (chunk * (places * ODD_STRIDE + 1)).sum()
    return total
