"""A block of the model, and what the engines' sharding asks of it when it is computed again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

COMPUTED_AGAIN = -1
"""Noted in a parameter beside the ids of the modules that are using it; DeepSpeed's begin at 0."""


class Block:
    """A block with its own call, hooks included. What shards it is found out at its first use, after sharding."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module = module
        self.call = call

    @cached_property
    def zero3_parameters(self) -> tuple[nn.Parameter, ...]:
        """Its parameters if ZeRO-3's hooks gather them, module by module; empty otherwise."""
        parameters = tuple(self.module.parameters())
        return parameters if any(hasattr(parameter, "ds_id") for parameter in parameters) else ()

    def compute_again(self, args: tuple[Any, ...], kwargs: dict[str, Any], let_go: bool) -> Any:
        """Run it in backward with its parameters whole.

        ZeRO-3 gathers by the hooks of the modules, so they run again. FSDP2's hooks leave what they gather in backward to
        the block's own backward, so the whole segment would stay gathered; and torch before 2.13 does not cast arguments
        in them then. So it is gathered here, without its hooks, and with `let_go` sharded again afterwards.
        """
        module = self.module
        if self.zero3_parameters:
            with self._gathered_for_backward():
                return self.call(*args, **kwargs)
        if not isinstance(module, FSDPModule):
            return module.forward(*args, **kwargs)
        was_sharded = isinstance(next(module.parameters(), None), DTensor)
        module.unshard()
        outputs = module.forward(*args, **kwargs)
        if was_sharded and let_go:
            module.reshard()
        return outputs

    @contextmanager
    def _gathered_for_backward(self) -> Iterator[None]:
        """Keep what ZeRO-3 has gathered for this block's own backward, which the hooks after a forward would release.

        Those are the parameters that the block uses without the forward of a module of their own: its direct ones, those of
        modules of which it calls other methods (DeepSpeed's external parameters; Gemma 3n's AltUp), all of a leaf. A parameter is
        released once no module is noted in its `ds_active_sub_modules`.
        """
        own: Any = getattr(self.module, "ds_id", None)
        external = getattr(self.module, "_external_params", {}).values()
        noted: list[Any] = [getattr(p, "ds_active_sub_modules", set()) for p in (*self.zero3_parameters, *external)]
        kept = [active for active in noted if own in active]
        for active in kept:
            active.add(COMPUTED_AGAIN)
        try:
            yield
        finally:
            for active in kept:
                active.discard(COMPUTED_AGAIN)
                active.add(own)

    def saved(self, tensor: torch.Tensor) -> "torch.Tensor | ParameterView":
        """What to hold of a tensor that autograd saves in it."""
        place = tensor.data_ptr()
        for parameter in self.zero3_parameters:
            start = parameter.data_ptr()
            if start <= place < start + parameter.nbytes and parameter.dtype == tensor.dtype:
                return ParameterView(parameter, tensor)
        return tensor.detach()


class ParameterView:
    """A parameter, or a view of it, that is read when it is wanted: until then ZeRO-3 may release it.

    To hold the tensor itself would hold the gathered values, those of a whole segment at once.
    """

    def __init__(self, parameter: nn.Parameter, view: torch.Tensor) -> None:
        self._parameter = parameter
        self._size, self._stride = view.size(), view.stride()
        self._offset = (view.data_ptr() - parameter.data_ptr()) // view.element_size()
        self._numel = parameter.numel()

    def tensor(self) -> torch.Tensor:
        """The values, which must be gathered.

        Raises:
            RuntimeError: they are not.
        """
        if self._parameter.numel() != self._numel:
            raise RuntimeError("ZeRO-3 has released a parameter that the backward of its block still needs")
        whole = self._parameter.detach()
        return whole.as_strided(self._size, self._stride, whole.storage_offset() + self._offset)
