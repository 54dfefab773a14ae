"""A rank's memory at each moment of an optimizer step where it may be largest, by part. All numbers are bytes.

The moments and what lives in them were found by counting the tensors of real runs; tests/ranks/test_planner.py repeats that.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import prod

from ds_recipes.planner.activations import (
    Batch,
    HeadBytes,
    backward_bytes,
    block_bytes,
    boundary_bytes,
    head_bytes,
    last_norm_bytes,
    shared_bytes,
)
from ds_recipes.planner.architecture import Architecture, Block, Parameter
from ds_recipes.planner.situation import Situation

BETWEEN_STEPS = "between two steps"
"""The moment when only what lies there all the time is there."""


@dataclass(frozen=True)
class Parts:
    """Bytes on the device, by what they are for."""

    parameters: float = 0.0  # in the dtype of forward: shards, whole copies, and what is gathered for a while
    gradients: float = 0.0
    optimizer: float = 0.0  # master weights and moments
    activations: float = 0.0
    logits: float = 0.0  # the loss head's, with the gradient of its matrix
    buffers: float = 0.0  # communication

    @property
    def total(self) -> float:
        return float(sum(getattr(self, item.name) for item in fields(self)))

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


@dataclass(frozen=True)
class Moment:
    """One moment of a step."""

    name: str
    parts: Parts


class Activations:
    """Activations of one micro-step: what is kept when the head runs, and while each block's backward does."""

    def __init__(self, model: Architecture, situation: Situation) -> None:
        batch, checkpointing = situation.batch, situation.settings.checkpointing
        self.batch: Batch = batch
        self.head: HeadBytes = head_bytes(model, batch, batch.tokens)
        self._shared = shared_bytes(model, batch)
        self._last_norm = last_norm_bytes(model, batch)
        segments = situation.segments(model)
        whole = [block_bytes(model, block, batch) for block in model.blocks]
        boundary = boundary_bytes(model, batch)
        on_host = checkpointing is not None and checkpointing.on_cpu and batch.device == "cuda"
        self.on_host = float(boundary * len(set(segments))) if on_host and segments else 0.0
        if segments is None:
            kept = whole
        else:
            firsts = [block == 0 or segments[block] != segments[block - 1] for block in range(len(segments))]
            kept = [0.0 if on_host or not first else float(boundary) for first in firsts]
        self.at_head = self._shared + sum(kept) + self._last_norm
        self.during = tuple(self._during(model, segments, whole, kept))
        self.after = tuple(self._shared + boundary + sum(kept[:number]) for number in range(len(kept)))
        self.at_embedding = self._shared + boundary

    def _during(
        self, model: Architecture, segments: tuple[int, ...] | None, whole: list[float], kept: list[float]
    ) -> Iterator[float]:
        earlier = 0.0
        for number, block in enumerate(model.blocks):
            own = whole[number]
            if segments is not None:
                first = segments.index(segments[number])
                own = sum(whole[first : number + 1]) + (kept[first] if number > first else 0.0)
            yield self._shared + earlier + own + backward_bytes(model, block, self.batch)
            earlier += kept[number]


def shard(parameter: Parameter, ranks: int) -> int:
    """Elements of a rank's even slice of a flattened parameter, padded (ZeRO)."""
    return -(-parameter.numel // ranks)


def rows_shard(parameter: Parameter, ranks: int) -> int:
    """Elements of a rank's leading rows, padded (FSDP2)."""
    return -(-parameter.shape[0] // ranks) * prod(parameter.shape[1:])


def bucket_bytes(block: Block, bucket: int, size: int, reduced: int) -> float:
    """What a block's gradients hold at the worst moment before they are reduced, the bucket itself left out.

    In backward's order each gradient is copied into the bucket. One that is larger than it waits for the next one and is then
    converted by itself; a full bucket is laid out anew for the reduction.
    """
    waiting, filled, worst_bytes = 0, 0, 0.0
    for parameter in reversed(list(block.parameters)):
        own = parameter.numel * size
        here = own + waiting * size
        if filled + waiting + parameter.numel > bucket and filled + waiting:
            converted = waiting * reduced if waiting and size != reduced else 0
            here += converted + filled * reduced
            waiting = filled = 0
        if parameter.numel > bucket:
            waiting = parameter.numel
        else:
            filled += parameter.numel
        worst_bytes = max(worst_bytes, here)
    return worst_bytes


def scaled(parts: Parts, **added: float) -> Parts:
    """The parts with more of some."""
    return replace(parts, **{name: getattr(parts, name) + value for name, value in added.items()})
