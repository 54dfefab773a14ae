"""Bytes of tensors that are alive, counted by their storages, on any device."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AliveBytes(TorchDispatchMode):
    """Counts storages that operations make while it is entered, until they are freed, also after it was left."""

    def __init__(self, ignored: Iterable[torch.Tensor]) -> None:
        """`ignored` tensors, such as a model's parameters, do not count, nor do views of them."""
        super().__init__()
        self.now, self.most = 0, 0
        self._references: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._references:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size
            del self._references[key]

        self._references[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)
