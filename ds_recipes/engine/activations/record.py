"""The checkpointing of one model: its segments as a forward goes through them, and what was measured."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ds_recipes.config.engine_settings import Checkpointing
from ds_recipes.engine.activations.measure import Stopwatch
from ds_recipes.engine.activations.segment import Segment
from ds_recipes.engine.activations.sharded import Block
from ds_recipes.engine.activations.store import Kept, Store

GIB = 1 << 30


class ActivationRecord:
    """Runs the blocks of a model with checkpointing. A forward without gradients passes by it."""

    def __init__(self, segment_numbers: list[int], settings: Checkpointing, device: torch.device) -> None:
        """`segment_numbers` has the number of each block's segment, from 0 up."""
        self._numbers = segment_numbers
        self._num_segments = segment_numbers[-1] + 1
        self._settings = settings
        self._device = device
        self.store = Store(self._num_segments, device, settings.on_cpu, settings.contiguous)
        self._stopwatch = Stopwatch(device) if settings.profile else None
        self._kept_bytes, self._most_kept_bytes = 0, 0
        self._place = -1  # of the last block that was called
        self._open: weakref.ref[Segment] | None = None  # held by the graph alone, so that it dies with it
        self._running: Segment | None = None
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile autograd keeps activations itself."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def run(self, place: int, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block at `place` in the model's order."""
        if self._is_paused or not torch.is_grad_enabled():
            return block.call(*args, **kwargs)
        self._running = self._segment(place)
        try:
            with self._measure("forward"):
                return self._running.run(block, args, kwargs)
        finally:
            self._running = None

    def before_forward(self, arguments: Any) -> None:
        """A hook of every block, called inside of the engine's own hooks."""
        if self._running is not None:
            self._running.arguments_seen(arguments)

    def after_forward(self, block: Block, outputs: Any) -> None:
        """A hook of every block, called inside of the engine's own hooks.

        Under ZeRO-3 a segment must be computed again after the hook that gathers the block's parameters for backward
        and before those of the modules inside, which gather what the recomputation would release.
        """
        if self._running is not None and block.zero3_parameters:
            self._running.recompute_before(outputs)

    def take(self) -> dict[str, float]:
        """Seconds of the blocks in forward and in recomputation, and the most GiB of inputs kept, since the last call.

        Empty unless `profile` is on. Waits for the device.
        """
        if self._stopwatch is None:
            return {}
        seconds = self._stopwatch.take()
        kept, self._most_kept_bytes = self._most_kept_bytes, 0
        return {
            "blocks_forward_seconds": seconds.get("forward", 0.0),
            "blocks_recompute_seconds": seconds.get("recompute", 0.0),
            "checkpoints_gib": kept / GIB,
        }

    def __str__(self) -> str:
        """One line for a table: what is kept, and where."""
        where = ", in host memory" if self._settings.on_cpu else ""
        buffer = ", in one buffer" if self._settings.contiguous else ""
        return f"inputs of {self._num_segments} of {len(self._numbers)} blocks kept{where}{buffer}"

    def _segment(self, place: int) -> Segment:
        """The segment that this block belongs to: the open one if the forward goes on in it, else a new one."""
        number = self._numbers[place]
        last = None if self._open is None else self._open()
        follows = place == self._place + 1
        self._place = place
        if last is not None and follows and last.number == number and not last.is_spent:
            return last
        earlier = last if last is not None and follows and not last.is_spent else None
        segment = Segment(number, earlier, self._keep, self._around_recompute)
        self._open = weakref.ref(segment)
        return segment

    def _keep(self, segment: Segment, tensor: torch.Tensor) -> Kept:
        self._synchronize()
        self._kept_bytes = tensor.nbytes + (self._kept_bytes if segment.number else 0)
        self._most_kept_bytes = max(self._most_kept_bytes, self._kept_bytes)
        return self.store.keep(segment.number, tensor, segment)

    @contextmanager
    def _around_recompute(self) -> Iterator[None]:
        self._synchronize()
        with self._measure("recompute"):
            yield

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        if self._stopwatch is None:
            yield
        else:
            with self._stopwatch.measure(name):
                yield

    def _synchronize(self) -> None:
        if self._settings.synchronize:
            wait_for(self._device)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what was asked of it. A CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
