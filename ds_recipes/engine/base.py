"""The one interface behind which ZeRO-3 (and later FSDP2) lies.

The cut lies where DeepSpeed's own lies: `update` is clip, optimizer step and zero-grad in one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ds_recipes.data.batch import MicroBatch
from ds_recipes.ranges import RangeReader


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    `grad_norm` is the global L2 norm before clipping. `applied` is False when the gradient was not finite and the
    step was skipped; every rank gets the same verdict.
    """

    grad_norm: float
    applied: bool


@dataclass(frozen=True)
class Shard:
    """This rank's flat range of one parameter: elements [start, start + length) of the flattened full tensor.

    `fp32`, `exp_avg` and `exp_avg_sq` are 1-D float32 views of `length` elements, where they live, valid until the next
    shard is asked for. The moments are None for a parameter without them. A length may be zero.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    fp32: torch.Tensor
    exp_avg: torch.Tensor | None
    exp_avg_sq: torch.Tensor | None


class Engine(ABC):
    """A sharded model with its optimizer. No engine owns a schedule, a loss convention or a loop."""

    optimizer_step: int
    """Number of optimizer steps applied, Adam's own count."""

    @abstractmethod
    def backward(self, batch: MicroBatch, scale: float) -> torch.Tensor:
        """Add the gradient of `scale` x (sum of token losses); return that sum, a scalar still on the device."""

    @abstractmethod
    def update(self, lr: float) -> StepResult:
        """Clip, step with the given learning rate and clear the gradients."""

    @abstractmethod
    def evaluate(self, batch: MicroBatch) -> tuple[torch.Tensor, int]:
        """Sum of token losses (a scalar on the device) and number of target tokens of one micro-batch, without gradients."""

    @abstractmethod
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, context, vocabulary] of the model's own forward. Every rank must call it."""

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """This rank's flat ranges in storage order, one at a time. No communication."""

    @abstractmethod
    def load_shards(self, reader: RangeReader) -> None:
        """Fill this rank's ranges from any saved set of ranges, optimizer state too where the reader has it."""

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full float32 master tensors one by one, on every rank. Every rank must exhaust it."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Precision of parameters, master, moments and reduction; sharding; the optimizer; all JSON-able."""

    @abstractmethod
    def close(self) -> None:
        """Release the engine's hold on the model. The process group ends with the world, not here."""
