"""Where the elements of flattened parameters lie: in which mapped tensor, from which element on."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch

from ds_recipes.errors import InputError
from ds_recipes.ranges import COPY_BYTES

Source = Mapping[str, torch.Tensor]
"""Flat tensors of one rank by kind (fp32, exp_avg, exp_avg_sq), in which an element has the same place."""


class Piece(NamedTuple):
    """Elements [start, start + length) of a flattened parameter: they lie in `source` from element `offset` on."""

    start: int
    length: int
    source: Source
    offset: int


def check_cover(name: str, shape: Sequence[int], pieces: Sequence[Piece], where: str) -> None:
    """See that the pieces, in order, hold each element once, and lie within their tensors.

    Raises:
        InputError: they do not.
    """
    position = 0
    for piece in pieces:
        if piece.start != position or piece.length <= 0:
            raise InputError(f"{where}: {name}: a range begins at element {piece.start}, {position} is due")
        for kind, flat in piece.source.items():
            if piece.offset + piece.length > flat.numel():
                raise InputError(
                    f"{where}: {name}: {kind} should end at element {piece.offset + piece.length:,} of a tensor of {flat.numel():,}"
                )
        position += piece.length
    if position != prod(shape):
        raise InputError(f"{where}: {name} has {prod(shape):,} elements, {position:,} of them were found")


def read_pieces(pieces: Sequence[Piece], kind: str, start: int, out: torch.Tensor) -> None:
    """Copy elements [start, start + out.numel()) into `out`, converting its dtype. Nothing else is held in memory."""
    end = start + out.numel()
    first = max(0, bisect_right(pieces, start, key=lambda piece: piece.start) - 1)
    for piece in pieces[first:]:
        if piece.start >= end:
            break
        low, high = max(start, piece.start), min(end, piece.start + piece.length)
        begin = piece.offset + low - piece.start
        copy_flat(piece.source[kind][begin : begin + high - low], out[low - start : high - start])


def copy_flat(values: torch.Tensor, out: torch.Tensor) -> None:
    """Copy flat values in steps, so that a conversion's temporary stays small."""
    step = COPY_BYTES // values.element_size()
    for low in range(0, out.numel(), step):
        out[low : low + step].copy_(values[low : low + step])


def flat_range(tensor: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """Elements [start, start + length) of a flattened tensor: a view, or a copy of the rows that hold them."""
    if tensor.is_contiguous() or tensor.dim() == 0:
        return tensor.reshape(-1)[start : start + length]
    row = max(1, tensor[0].numel())
    first, last = start // row, -(-(start + length) // row)
    return tensor[first:last].reshape(-1)[start - first * row :][:length]


def consecutive(sources: Sequence[Source], offset: int, length: int) -> Iterator[Piece]:
    """The pieces of `length` elements that begin at `offset` of the sources' tensors laid end to end."""
    position = done = 0
    for source in sources:
        size = source["fp32"].numel()
        low, high = max(offset, position), min(offset + length, position + size)
        if high > low:
            yield Piece(done, high - low, source, low - position)
            done += high - low
        position += size
