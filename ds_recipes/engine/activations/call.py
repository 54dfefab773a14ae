"""One call of one block, recorded so that it can be repeated: its arguments, random state and autocast."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ds_recipes.engine.activations.sharded import Block
from ds_recipes.engine.activations.store import Kept, KeptAsIs
from ds_recipes.engine.activations.tree import map_leaves, tensors


@dataclass(frozen=True)
class _Output:
    """An argument that is the nth tensor which the block before returned."""

    index: int


class Call:
    """A block with what it was called with. Tensors that the block before returned are not kept."""

    def __init__(
        self,
        block: Block,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        before: "Call | None",
        keep: Callable[[torch.Tensor], Kept],
    ) -> None:
        self.block = block
        self.dtypes: list[torch.dtype] | None = None
        self._outputs: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._arguments = map_leaves(arguments, _Recorder(before, keep))
        self.device = next(tensors(arguments)).device
        self._random = random_state(self.device)
        self._autocast = [(kind, autocast_state(kind)) for kind in {"cpu", self.device.type}]

    def returned(self, outputs: Any) -> None:
        """Note which tensors it returned, to know them again as arguments of the next block."""
        self._outputs = [(weakref.ref(tensor), tensor._version) for tensor in tensors(outputs)]

    def output_index(self, tensor: torch.Tensor) -> int | None:
        """Which of the returned tensors this is, unchanged since; None if it is none of them."""
        for index, (reference, version) in enumerate(self._outputs):
            if reference() is tensor and tensor._version == version:
                return index
        return None

    def fetch(self) -> None:
        """Begin to bring its arguments back to the device."""
        map_leaves(self._arguments, lambda leaf: leaf.fetch() if isinstance(leaf, Kept) else None)

    def repeat(self, before: Any, let_go: bool) -> Any:
        """Compute it again from what the block before has returned now."""
        outputs = list(tensors(before))
        dtypes = iter(self.dtypes or ())

        def argument(leaf: Any) -> Any:
            if isinstance(leaf, _Output):
                tensor = outputs[leaf.index]
            elif isinstance(leaf, Kept):
                tensor = leaf.tensor()
            else:
                return leaf
            return tensor.to(next(dtypes, tensor.dtype))

        args, kwargs = map_leaves(self._arguments, argument)
        set_random_state(self.device, self._random)
        with _autocast_as(self._autocast):
            return self.block.compute_again(args, kwargs, let_go)


class _Recorder:
    """Turns the tensors among a block's arguments into what is kept of them."""

    def __init__(self, before: Call | None, keep: Callable[[torch.Tensor], Kept]) -> None:
        self._before = before
        self._keep = keep
        self._has_input = False

    def __call__(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        index = None if self._before is None else self._before.output_index(leaf)
        is_input = not self._has_input and leaf.is_floating_point()
        self._has_input |= is_input
        if index is not None:
            return _Output(index)
        return self._keep(leaf) if is_input and self._before is None else KeptAsIs(leaf)


def random_state(device: torch.device) -> list[torch.Tensor]:
    """State of the generators that a block on `device` draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    """Go back to what `random_state` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def autocast_state(kind: str) -> dict[str, Any]:
    """Arguments of `torch.autocast` that say what is in force now for a kind of device."""
    return {
        "enabled": torch.is_autocast_enabled(kind),
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


@contextmanager
def _autocast_as(states: list[tuple[str, dict[str, Any]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, state in states:
            if state["enabled"] or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, **state))
        yield
