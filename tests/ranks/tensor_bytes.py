"""The bytes of all tensors of a process, counted as they are made and freed: what `torch.cuda.max_memory_allocated` is on a GPU.

Every operator's results are seen by a dispatch mode; a tensor's storage counts once, however many views it has, until it
is freed or resized. Memory that an operator takes and gives back within itself is not seen.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts while it is entered. `now` and `peak` are in bytes; `reset_peak` starts another maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "TensorBytes":
        mode, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            mode._see(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            leaf = getattr(leaf, "_local_tensor", leaf)  # a DTensor only names its shard
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._see(leaf.untyped_storage())
        return result

    def reset_peak(self) -> None:
        self.peak = self.now

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        before = self._known.get(key, 0)
        if key not in self._known:
            if size == 0:
                return
            weakref.finalize(storage, self._forget, key)
        self._known[key] = size
        self.now += size - before
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)
