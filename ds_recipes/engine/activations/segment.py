"""One segment of consecutive blocks in one forward: its input is kept, the rest is computed again in backward.

Every tensor that autograd would save inside the blocks is replaced by an empty slot. When backward asks for the first,
the blocks' calls are repeated and the tensors saved then, which come in the same order, fill the slots: what
`torch.utils.checkpoint` does for one function, here for several calls. The first graph stays the one that is walked.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from ds_recipes.engine.activations.call import Call, random_state, set_random_state
from ds_recipes.engine.activations.sharded import Block, ParameterView
from ds_recipes.engine.activations.store import Kept
from ds_recipes.engine.activations.tree import tensors


class _Slot:
    """The place of one saved tensor, alive as long as the graph needs it."""

    __slots__ = ("__weakref__", "dtype", "shape", "value")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.value: torch.Tensor | ParameterView | None = None


class _AllSaved(Exception):
    """Ends a recomputation: what comes after the last saved tensor is not needed."""


class _Filler:
    """Puts what a recomputation saves into the slots, in order."""

    def __init__(self, slots: list[weakref.ref[_Slot]]) -> None:
        self._slots = slots
        self._next = 0
        self._differs = False
        self._block: Block | None = None
        self._may_stop = False

    def begin(self, block: Block, is_last: bool) -> None:
        """A block's turn. Under ZeRO-3 it runs to its end: a hook that does not run leaves parameters gathered."""
        self._block = block
        self._may_stop = is_last and not block.zero3_parameters

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | ParameterView:
        """Fill the next slot, if the graph still needs it."""
        assert self._block is not None
        value = self._block.saved(tensor)
        slot = self._slots[self._next]() if self._next < len(self._slots) else None
        self._next += 1
        if slot is not None:
            self._differs |= slot.shape != tensor.shape or slot.dtype != tensor.dtype
            slot.value = value
        if self._may_stop and self._next == len(self._slots):
            raise _AllSaved
        return value

    def check(self) -> None:
        """See that the recomputation saved what the forward had saved.

        Raises:
            RuntimeError: it did not.
        """
        if self._differs or self._next != len(self._slots):
            raise RuntimeError(
                f"a block saved other tensors when it was computed again ({self._next} for {len(self._slots)}, or of other "
                "shapes): it is not deterministic; run without --activation_checkpointing"
            )


def _value(saved: torch.Tensor | ParameterView) -> torch.Tensor:
    return saved.tensor() if isinstance(saved, ParameterView) else saved


class Segment:
    """Calls of consecutive blocks, their kept input and the slots of what they saved."""

    def __init__(
        self,
        number: int,
        earlier: "Segment | None",
        keep: Callable[["Segment", torch.Tensor], Kept],
        around: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`keep` keeps an input, `around` is entered for the recomputation; `earlier` is the segment before it."""
        self.number = number
        self.is_spent = False
        self._earlier = None if earlier is None else weakref.ref(earlier)
        self._keep, self._around = keep, around
        self._calls: list[Call] = []
        self._slots: list[weakref.ref[_Slot]] = []

    def run(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block, recorded and without saving anything."""
        before = self._calls[-1] if self._calls else None
        call = Call(block, (args, kwargs), before, lambda tensor: self._keep(self, tensor))
        self._calls.append(call)
        with saved_tensors_hooks(self._pack, self._unpack):
            outputs = block.call(*args, **kwargs)
        call.returned(outputs)
        return outputs

    def arguments_seen(self, arguments: Any) -> None:
        """Note the dtypes that the running block really gets: FSDP2 casts them in a hook."""
        self._calls[-1].dtypes = [tensor.dtype for tensor in tensors(arguments)]

    def recompute_before(self, outputs: Any) -> None:
        """Compute again as soon as a gradient reaches any of these tensors."""
        reference = weakref.ref(self)  # the graph may outlive what was saved in it

        def recompute(_: torch.Tensor) -> None:
            segment = reference()
            if segment is not None and not segment.is_spent:
                segment.recompute()

        for tensor in tensors(outputs):
            if tensor.requires_grad:
                tensor.register_hook(recompute)

    def fetch(self) -> None:
        """Begin to bring the kept input back to the device."""
        for call in self._calls[:1]:
            call.fetch()

    def recompute(self) -> None:
        """Repeat the calls and fill the slots; the kept input is let go.

        Raises:
            RuntimeError: the blocks saved other tensors than the first time.
        """
        self.is_spent = True
        calls, self._calls = self._calls, []
        filler = _Filler(self._slots)
        device = calls[0].device
        random = random_state(device)
        try:
            with self._around(), torch.enable_grad(), saved_tensors_hooks(filler.pack, _value):
                self._repeat(calls, filler)
        except _AllSaved:
            pass
        finally:
            set_random_state(device, random)
        filler.check()

    def _repeat(self, calls: list[Call], filler: "_Filler") -> None:
        earlier = None if self._earlier is None else self._earlier()
        outputs: Any = None
        last = len(calls) - 1
        for index, call in enumerate(calls):
            filler.begin(call.block, is_last=index == last)
            outputs = call.repeat(outputs, let_go=index < last - 1)  # these two are the next in backward
            if index == 0 and earlier is not None:
                earlier.fetch()

    def _pack(self, tensor: torch.Tensor) -> _Slot:
        slot = _Slot(tensor)
        self._slots.append(weakref.ref(slot))
        return slot

    def _unpack(self, slot: _Slot) -> torch.Tensor:
        if slot.value is None and not self.is_spent:
            self.recompute()
        assert slot.value is not None, "a slot that the recomputation did not fill"
        return _value(slot.value)
