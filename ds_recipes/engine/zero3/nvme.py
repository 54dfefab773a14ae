"""NVMe offload while it runs: what DeepSpeed 0.19.8 has to be kept from doing. Its folders are `nvme_folders.py`."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from ds_recipes.errors import TrainingError


def keep_gradients_in_memory(zero: Any) -> None:
    """Give the optimizer its gradients from host memory, where stage 3 accumulates all of them anyway.

    DeepSpeed writes each parameter's to a file besides, and reads it back to wherever the parameter lies in its
    sub-group. Direct I/O refuses an address that is not a multiple of 512 bytes, which nothing checks: the optimizer
    then stepped with what was in the buffer before (tests/contract/test_nvme.py).
    """
    if not zero.swap_optimizer:
        return
    ends = [0]
    for numel in zero.fp16_partitioned_groups_flat_numel:
        ends.append(ends[-1] + int(numel))
    gradients = {
        master.ds_id: zero.grad_partitions_flat_buffer[start:end]
        for master, (start, end) in zip(zero.fp32_partitioned_groups_flat, pairwise(ends), strict=True)
    }
    swapper = zero.optimizer_swapper

    def keep(parameter: Any, gradient_offsets: Any, gradient_tensors: Any) -> None:
        swapper.swap_params_info[parameter.ds_id].unswapped_gradients[0] = gradients[parameter.ds_id]

    swapper.swap_out_gradients = keep


def read_ahead_once(zero: Any) -> None:
    """Let a parameter that comes up twice soon, in a forward's end and a backward's beginning, be read ahead once.

    DeepSpeed's read-ahead lists it twice, and its swapper then asserts that it has no buffer yet.
    """
    if not zero.params_in_nvme_and_cpu:
        return
    swapper = next(p.nvme_swapper for p in zero.module.parameters() if p.nvme_swapper is not None)
    swap_in = swapper.swap_in

    def swap_in_each_once(params: list[Any], *args: Any, **kwargs: Any) -> None:
        swap_in(list({parameter.ds_id: parameter for parameter in params}.values()), *args, **kwargs)

    swapper.swap_in = swap_in_each_once


def settle(zero: Any) -> None:
    """Under NVMe offload of parameters, bring all back to their shards, and give up what was read ahead for later use.

    A forward alone reads ahead for a backward that never comes, and the buffers run out. What has been read ahead as the
    optimizer steps would be overwritten in memory and not in its file.
    """
    if not getattr(zero, "params_in_nvme_and_cpu", False):
        return
    zero._partition_all_parameters()
    parameters = [parameter for parameter in zero.module.parameters() if parameter.nvme_swapper is not None]
    swapper = parameters[0].nvme_swapper
    swapper.synchronize_reads()
    swapper.remove_partition_and_release_buffers(
        [
            parameter
            for parameter in parameters
            if parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme
            and parameter.ds_tensor.status == PartitionedParamStatus.AVAILABLE
            and parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
        ]
    )


def check_written(zero: Any) -> None:
    """See that the optimizer's files have their full size: nothing else notices a write that failed.

    Raises:
        TrainingError: one is short.
    """
    if not zero.swap_optimizer:
        return
    swapper = zero.optimizer_swapper
    for info in swapper.swap_params_info.values():
        wanted = swapper._io_aligned_numel(info.numel()) * swapper.swap_element_size
        for path in map(Path, info.get_swap_paths()):
            if path.stat().st_size != wanted:
                raise TrainingError(
                    f"{path} has {path.stat().st_size:,} bytes instead of {wanted:,}: writing to nvme_path failed. "
                    "Look at the space on that disk, and at the kernel's log for I/O errors."
                )
