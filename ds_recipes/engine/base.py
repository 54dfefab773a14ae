"""The one interface behind which DeepSpeed's ZeRO and PyTorch's FSDP2 lie.

The cut lies where DeepSpeed's own lies: `update` is clip, optimizer step and zero-grad in one.
"""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from transformers import PreTrainedModel

from ds_recipes.data.batch import MicroBatch
from ds_recipes.engine.activations import ActivationRecord
from ds_recipes.engine.inputs import PROBE_IDS
from ds_recipes.engine.replicas import Replica
from ds_recipes.engine.unused import Usage
from ds_recipes.errors import ConfigError
from ds_recipes.models.loss_head import learn_transform
from ds_recipes.ranges import RangeReader
from ds_recipes.world.device_errors import naming_device_errors

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    `grad_norm` is the global L2 norm before clipping. `applied` is False when a loss or the gradient was not finite and the
    step was skipped; every rank gets the same verdict. `loss_scale` is the one that the step was taken with, None
    without loss scaling. `unused` names the trained parameters that no rank had a gradient for; the step left them alone.
    """

    grad_norm: float
    applied: bool
    loss_scale: float | None = None
    unused: frozenset[str] = frozenset()

    @property
    def overflowed(self) -> bool:
        """True for a step that was skipped under loss scaling, whose scale may just have been too large."""
        return not self.applied and self.loss_scale is not None


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


def weighted(loss: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale` x `loss`, for backward; a loss that is not finite makes the whole gradient NaN, without a wait for the device.

    A target whose logit is -inf has an infinite loss and a finite gradient. So no such step is applied on any rank: `update`
    skips it, since the gradient's norm over all ranks is not finite.
    """
    return loss * (scale + 0.0 * loss.detach())


class Sink(Protocol):
    """A new file that is open for writing, as `torch.save` wants it. It never raises; whoever made it is told of a failure."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def write(self, data: bytes) -> int: ...

    def flush(self) -> None: ...


class Engine(ABC):
    """A sharded model with its optimizer. No engine owns a schedule, a loss convention or a loop.

    What torch raises of a GPU comes out of each of its calls as a `DeviceError` that names the call.
    """

    model: PreTrainedModel

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in calls_of_engines():
            if name in vars(cls) or getattr(cls, name) is getattr(Engine, name):
                setattr(cls, name, _naming_itself(getattr(cls, name)))

    @property
    def attention(self) -> str:
        """The attention implementation that runs."""
        return str(self.model.config._attn_implementation)

    optimizer_step: int
    """Number of optimizer steps applied: Adam's own count for each parameter that has missed none."""

    usage: Usage
    """Which parameters this step has used, and which have missed steps."""

    activations: ActivationRecord | None = None
    """How activations are kept and computed again; None: autograd keeps them."""

    @abstractmethod
    def backward(self, batch: MicroBatch, scale: float) -> torch.Tensor:
        """Add the gradient of `scale` x (sum of token losses); return that sum, a scalar still on the device."""

    @abstractmethod
    def update(self, lr: float) -> StepResult:
        """Clip, step with the given learning rate and clear the gradients."""

    @abstractmethod
    def loss_and_input_gradients(self, batch: MicroBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The sum of a batch's token losses, and its derivatives by what the embedding gave, [..., hidden] each.

        Without dropout. Collective, and only between two steps; parameters and their gradients stay as they are.
        """

    def input_gradient(self, batch: MicroBatch) -> torch.Tensor:
        """How much the sum of a batch's token losses depends on the input at each position, [rows * context], float32.

        The largest absolute derivative by an element of the position's embedding; exactly 0 where nothing depends on it.
        Without dropout. Collective, and only between two steps; parameters and their gradients stay as they are.
        """
        _, gradients = self.loss_and_input_gradients(batch)
        return torch.stack([one.float().abs().flatten(0, -2).amax(-1) for one in gradients]).amax(0)

    def replicas_between_steps(self) -> list[Replica]:
        """The buffers that other ranks hold too: a step may change them on each rank by itself. Collective."""
        return []

    @abstractmethod
    def replicas_before_update(self) -> list[Replica]:
        """The parameters and optimizer state that other ranks hold too, after a step's last backward. No communication.

        `update` may write some of them anew from the shards, and so hide that one was wrong.
        """

    @abstractmethod
    def evaluate(self, batch: MicroBatch) -> tuple[torch.Tensor, int]:
        """Sum of token losses (a scalar on the device) and number of target tokens of one micro-batch, without gradients."""

    @abstractmethod
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, context, vocabulary] of the model's own forward. Every rank must call it."""

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """This rank's flat ranges in storage order, one at a time. No communication.

        Over all ranks each element comes once; replicas share what they hold among themselves. A length may be 0.
        """

    @abstractmethod
    def load_shards(self, reader: RangeReader) -> None:
        """Fill this rank's ranges, and the saved buffers, from any saved set of ranges; optimizer state where the reader has it."""

    def saved_buffers(self) -> Mapping[str, torch.Tensor]:
        """Copies in host memory of the buffers that belong to the model's state, by name, equal on all ranks.

        Every rank must call it.

        Raises:
            TrainingError: the ranks have different ones.
        """
        return {}

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full float32 master tensors one by one, on every rank. Every rank must exhaust it."""

    def _learn_transform(self) -> None:
        """To be called before each loss: the first time it finds out what the model does to its logits. Collective."""
        learn_transform(self.model, lambda: self.logits(PROBE_IDS))

    def measured(self) -> dict[str, float]:
        """What a profile of this rank's activations measured since the last call, by names with units; else empty."""
        return {} if self.activations is None else self.activations.take()

    @abstractmethod
    def scaler_state(self) -> dict[str, float]:
        """Where dynamic loss scaling stands, equal on all ranks: scale, good_steps, hysteresis_left. Empty without it."""

    @abstractmethod
    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Go on where `scaler_state` was taken, by either engine; an empty one changes nothing."""

    def write_native(self, folder: Path, tag: str, step: int, create: Callable[[Path], Sink]) -> None:
        """Write the library's own checkpoint into `folder`/`tag`, which exists. Every rank must call it.

        Raises:
            ConfigError: it has none. (`config/rules.py` says so before anything is started.)
        """
        raise ConfigError([f"checkpoint_format: {type(self).__name__} has no checkpoints of its own; leave it out"])

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Precision of parameters, master, moments and reduction; sharding; the optimizer; all JSON-able."""

    @abstractmethod
    def close(self) -> None:
        """Release the engine's hold on the model. The process group ends with the world, not here."""


def calls_of_engines() -> list[str]:
    """The names of the calls that make up the interface."""
    return [name for name, member in vars(Engine).items() if inspect.isfunction(member) and not name.startswith("_")]


def _naming_itself(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of an engine, with its own name in what torch raises of a GPU; of an iterator, at each step too."""

    @functools.wraps(method)
    def call(engine: Engine, *arguments: Any, **named: Any) -> Any:
        name = f"{type(engine).__name__}.{method.__name__}"
        with naming_device_errors(name):
            result = method(engine, *arguments, **named)
        return _each(result, name) if isinstance(result, Iterator) else result

    return call


def _each(items: Iterator[T], name: str) -> Iterator[T]:
    while True:
        with naming_device_errors(name):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
