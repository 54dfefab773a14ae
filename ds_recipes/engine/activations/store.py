"""Where the inputs of checkpointed blocks wait for backward: as they are, in one buffer, or in host memory."""

import weakref
from typing import Any

import torch


class Kept:
    """A tensor that waits: what `Store.keep` gives back."""

    def __init__(self, tensor: torch.Tensor, requires_grad: bool) -> None:
        self._tensor = tensor.detach()
        self.requires_grad = requires_grad

    def fetch(self) -> None:
        """Begin to bring it back to the device. Without effect where it never left."""

    def tensor(self) -> torch.Tensor:
        """A leaf on the device with the values that were kept."""
        return self._tensor.detach().requires_grad_(self.requires_grad)


class KeptAsIs(Kept):
    """The tensor itself, which the model must leave alone."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor, tensor.requires_grad)
        self._version = tensor._version

    def tensor(self) -> torch.Tensor:
        """A leaf with the values that were kept.

        Raises:
            RuntimeError: they were written over since.
        """
        if self._tensor._version != self._version:
            raise RuntimeError(
                "an argument of a checkpointed block was changed in place after the block had read it, so the block "
                "cannot be computed again; run without --activation_checkpointing"
            )
        return super().tensor()


class KeptOnHost(Kept):
    """A tensor that waits in pinned host memory; both copies run on a stream of their own, beside the computation."""

    def __init__(self, tensor: torch.Tensor, host: torch.Tensor, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(stream)
        super().__init__(host, tensor.requires_grad)
        self._device = tensor.device
        self._stream = stream
        self._fetched: torch.Tensor | None = None

    def fetch(self) -> None:
        if self._fetched is None:
            with torch.cuda.stream(self._stream):
                self._fetched = self._tensor.to(self._device, non_blocking=True)

    def tensor(self) -> torch.Tensor:
        self.fetch()
        assert self._fetched is not None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        self._fetched.record_stream(current)
        return self._fetched.requires_grad_(self.requires_grad)


class Store:
    """Keeps one block input a segment, as the JSON's `cpu_checkpointing` and `contiguous_memory_optimization` ask.

    Host memory is another place than the device only where the device is no CPU.
    """

    def __init__(self, segments: int, device: torch.device, on_cpu: bool, contiguous: bool) -> None:
        self._segments = segments
        self._contiguous = contiguous
        self._stream: Any = torch.cuda.Stream(device) if on_cpu and device.type == "cuda" else None
        self._buffer = torch.empty(0)
        self._owners: list[weakref.ref[object] | None] = [None] * segments

    @property
    def buffer(self) -> torch.Tensor:
        """What the inputs of a micro-step lie in, [segments, *shape of one input]; empty until the first."""
        return self._buffer

    def keep(self, segment: int, tensor: torch.Tensor, owner: object) -> Kept:
        """Keep the input of one segment, in its row of the buffer for as long as `owner` lives."""
        if not self._contiguous:
            return self._kept(tensor, None)
        if self._buffer.shape[1:] != tensor.shape or self._buffer.dtype != tensor.dtype:
            self._buffer = self._empty((self._segments, *tensor.shape), tensor)
            self._owners = [None] * self._segments
        before = self._owners[segment]
        if before is not None and before() is not None:  # a second forward before the first one's backward
            return self._kept(tensor, None)
        self._owners[segment] = weakref.ref(owner)
        return self._kept(tensor, self._buffer[segment])

    def _kept(self, tensor: torch.Tensor, row: torch.Tensor | None) -> Kept:
        if self._stream is not None:
            return KeptOnHost(tensor, self._empty(tensor.shape, tensor) if row is None else row, self._stream)
        if row is None:
            return KeptAsIs(tensor)
        return Kept(row.copy_(tensor.detach()), tensor.requires_grad)

    def _empty(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        on_host = self._stream is not None
        return torch.empty(shape, dtype=like.dtype, device="cpu" if on_host else like.device, pin_memory=on_host)
