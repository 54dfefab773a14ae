"""Frozen parameters under ZeRO-3: no optimizer holds them, so their own shards are all that there is of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from torch import nn

from ds_recipes.engine.base import Shard
from ds_recipes.ranges import RangeReader


class FrozenShards:
    """This rank's slices of the parameters that need no gradient, in memory or on NVMe."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        self._rank = rank
        self._parameters: dict[str, Any] = {
            name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad
        }

    def shards(self) -> Iterator[Shard]:
        """The slices, in float32; no communication."""
        for name, parameter in self._parameters.items():
            start, length = self._range(parameter)
            with _shard_in_memory(parameter) as held:
                yield Shard(name, tuple(parameter.ds_shape), start, length, held[:length].float(), None, None)

    def load(self, reader: RangeReader) -> None:
        """Fill the slices of parameters that are partitioned at the moment, as all are between steps."""
        for name, parameter in self._parameters.items():
            start, length = self._range(parameter)
            with _shard_in_memory(parameter, changed=True) as held:
                reader.read_into("fp32", name, start, held[:length])
                held[length:].zero_()

    def _range(self, parameter: Any) -> tuple[int, int]:
        padded = parameter.partition_numel()
        start = min(self._rank * padded, parameter.ds_numel)
        return start, min(padded, parameter.ds_numel - start)


@contextmanager
def _shard_in_memory(parameter: Any, changed: bool = False) -> Iterator[torch.Tensor]:
    """A parameter's own shard, padded; one that lies on NVMe is read, and written back if it was changed."""
    if parameter.ds_tensor.status != PartitionedParamStatus.NOT_AVAILABLE:
        yield parameter.ds_tensor.data
        return
    swapper = parameter.nvme_swapper
    swapper.swap_in([parameter], async_op=False)
    try:
        yield parameter.ds_tensor.data
        if changed:
            swapper.swap_out_and_release([parameter])
    finally:
        if parameter.ds_tensor.status != PartitionedParamStatus.NOT_AVAILABLE:
            swapper.remove_partition_and_release_buffers([parameter])
