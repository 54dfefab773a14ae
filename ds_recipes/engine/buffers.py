"""The saved buffers of a model in training: every rank has them whole, and they are equal on all ranks after each step.

Most are constants of training: a router's correction bias, a layer's scale. Some a forward changes: running statistics.
Each rank changes them by its own rows, so after a step each gets the mean over the ranks. What changes is found out in the
first step; see docs/decisions/0020-saved-buffers.md.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from ds_recipes.engine.replicas import Replica, digests
from ds_recipes.errors import TrainingError
from ds_recipes.models.skeleton import saved_buffers
from ds_recipes.ranges import RangeReader
from ds_recipes.world.group import World

T = TypeVar("T")


class SavedBuffers:
    """The saved buffers of one engine's model."""

    def __init__(self, model: nn.Module, world: World, computes_again: bool) -> None:
        """`computes_again`: blocks run a second time in backward (activation checkpointing)."""
        self._world = world
        self._computes_again = computes_again
        self._model = model
        self._constants: dict[str, tuple[int, int]] = {}
        self._homes: dict[str, tuple[nn.Module, str]] = {}
        for name in saved_buffers(model):
            path, _, key = name.rpartition(".")
            self._homes[name] = (model.get_submodule(path), key)
        self._changing: frozenset[str] | None = None  # names; None: no step has shown it yet
        self._begin: dict[str, torch.Tensor] = {}
        self._begin_marks: dict[str, tuple[int, int]] = {}
        self._begin_step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The buffers themselves, by name."""
        found = {}
        for name, (module, key) in self._homes.items():
            buffer = module._buffers[key]
            assert buffer is not None
            found[name] = buffer
        return found

    def replicas(self) -> list[Replica]:
        """The buffers that ranks hold alike between two steps, unsaved ones that no rank's forward changes too. Collective."""
        now = self._unsaved_marks()
        changed = [name for name, mark in self._constants.items() if now.get(name) != mark]
        changing = {name for names in self._world.gather(changed) for name in names}
        return [
            Replica(f"the buffer {name}", buffer)
            for name, buffer in self._model.named_buffers()
            if name in self._homes or (name in self._constants and name not in changing)
        ]

    def copies(self) -> dict[str, torch.Tensor]:
        """Their values now, in host memory, for a checkpoint. Every rank must call it.

        Raises:
            TrainingError: a buffer differs between the ranks: something changed it that was not noticed.
        """
        if not self._homes:
            return {}
        mine = {name: buffer.detach().to("cpu", copy=True) for name, buffer in self.tensors().items()}
        sums = dict(zip(mine, digests(mine.values(), torch.device("cpu")), strict=True))
        for rank, theirs in enumerate(self._world.gather(sums)):
            different = [name for name in sums if theirs[name] != sums[name]]
            if different:
                raise TrainingError(
                    f"the buffer {different[0]} differs between ranks {self._world.rank} and {rank}: the model changes it in a "
                    "way that cannot be followed, so no checkpoint can hold it. Nothing was saved."
                )
        return mine

    @torch.no_grad()
    def load(self, reader: RangeReader) -> None:
        """Fill them. No communication."""
        self._constants = self._constants or self._unsaved_marks()  # the library has moved them by now
        if not self._homes:
            return
        saved = reader.buffers
        for name, buffer in self.tensors().items():
            buffer.copy_(saved[name].reshape(buffer.shape))
        self._begin_step()

    def train(self, forward: Callable[[], T], backward: Callable[[T], object]) -> T:
        """Run a micro-step; `backward` is given what `forward` returned.

        Blocks that run again in backward read their buffers as they were before, and change them no second time.
        """
        if not self._homes or not self._computes_again:
            result = forward()
            backward(result)
            return result
        before, marks = self._copied(), self._marks()
        result = forward()
        with self._standing_in(self._changed_from(before, marks)):
            backward(result)
        return result

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Have the same values afterwards: an evaluation is no part of training."""
        before, marks = self._copied(), self._marks()
        try:
            yield
        finally:
            earlier = self._changed_from(before, marks)
            self._put(earlier)
            now = self._marks()
            self._begin_marks |= {name: now[name] for name in earlier if self._begin_marks[name] == marks[name]}

    @torch.no_grad()
    def end_step(self, applied: bool) -> None:
        """Make them equal on all ranks; after a step that was skipped, what they were before it. Every rank must call it.

        Raises:
            TrainingError: a buffer of whole numbers differs between ranks, or one changes that did not in the first step.
        """
        if not self._homes:
            return
        changed = self._changed_since(self._begin_marks)
        if self._changing is None:
            now = self.tensors()
            by_value = {name for name, begin in self._begin.items() if not torch.equal(now[name], begin)}
            everywhere = self._world.gather(sorted(by_value | changed))
            self._changing = frozenset(name for names in everywhere for name in names)
        self._refuse_late(changed - self._changing)
        if not self._changing:
            self._begin, self._begin_marks = {}, self._marks()
            return
        if applied:
            self._agree()
        else:
            self._put({name: self._begin[name] for name in self._changing})
        self._begin_step()

    def _refuse_late(self, names: Collection[str]) -> None:
        if names:
            raise TrainingError(
                f"the model's forward changed the buffer {min(names)}, which it left alone in the first step. Buffers are kept "
                "equal on all ranks only where they change from the beginning on."
            )

    def _agree(self) -> None:
        now = self.tensors()
        numbers = [now[name] for name in sorted(self._changing or ()) if now[name].is_floating_point()]
        whole = [name for name in sorted(self._changing or ()) if not now[name].is_floating_point()]
        if numbers:
            flat = torch.cat([buffer.double().reshape(-1) for buffer in numbers])  # [elements of all]
            mean = torch.stack(self._world.gather_tensor(flat)).mean(0)
            for buffer, piece in zip(numbers, mean.split([buffer.numel() for buffer in numbers]), strict=True):
                buffer.copy_(piece.reshape(buffer.shape))
        for name in whole:
            first, *others = self._world.gather_tensor(now[name].reshape(-1))
            if not all(torch.equal(first, other) for other in others):
                raise TrainingError(
                    f"the model's forward changed the buffer {name} of whole numbers to other values on each rank, and "
                    "whether they should be added up is not known. Train on one rank, or keep it in floating point."
                )

    def _begin_step(self) -> None:
        self._begin, self._begin_marks = self._copied(), self._marks()

    def _copied(self) -> dict[str, torch.Tensor]:
        """Copies of those that a forward may change."""
        may_change = self._homes if self._changing is None else self._changing
        return {name: buffer.detach().clone() for name, buffer in self.tensors().items() if name in may_change}

    def _marks(self) -> dict[str, tuple[int, int]]:
        """What tells without a look at the values whether a buffer was written to or replaced."""
        return {name: (id(buffer), buffer._version) for name, buffer in self.tensors().items()}

    def _unsaved_marks(self) -> dict[str, tuple[int, int]]:
        saved = saved_buffers(self._model)
        return {name: (id(one), one._version) for name, one in self._model.named_buffers() if name not in saved}

    def _changed_since(self, marks: Mapping[str, tuple[int, int]]) -> set[str]:
        return {name for name, mark in self._marks().items() if marks[name] != mark}

    def _changed_from(
        self, before: Mapping[str, torch.Tensor], marks: Mapping[str, tuple[int, int]]
    ) -> dict[str, torch.Tensor]:
        """Those of the copies `before` whose buffers have changed since `marks`."""
        changed = self._changed_since(marks)
        self._refuse_late(changed - before.keys())
        return {name: before[name] for name in changed}

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put other tensors in their places: autograd may hold the ones that are there."""
        for name, value in values.items():
            module, key = self._homes[name]
            module._buffers[key] = value

    @contextmanager
    def _standing_in(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        own = {name: buffer for name, buffer in self.tensors().items() if name in values}
        self._put(values)
        try:
            yield
        finally:
            self._put(own)
