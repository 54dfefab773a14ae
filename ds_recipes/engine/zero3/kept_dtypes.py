"""Parameters that stay in float32 beside those of lower precision: routers, `A_log`, sinks of some models.

DeepSpeed 0.19.8 casts every parameter below stage 3, and at stage 3 wants all in one dtype: its `defragment` fails with a
bare AssertionError. The rest of it goes by the dtype of each parameter or of each group, so it is enough to give these
parameters groups of their own (`engine/optimizer.py`) and to do both of these in another way.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3
from torch import nn

from ds_recipes.config.engine_settings import EngineSettings
from ds_recipes.errors import ConfigError

Stage3 = stage3.DeepSpeedZeroOptimizer_Stage3


def check_kept(kept: Collection[str], settings: EngineSettings, ds_json: Mapping[str, Any]) -> None:
    """Refuse what cannot be combined with parameters in two dtypes.

    Raises:
        ConfigError: master weights or communication in lower precision, parameters on NVMe, or quantised communication.
    """
    if not kept:
        return
    zero = ds_json.get("zero_optimization", {})
    quantised = [key for key, value in zero.items() if key.startswith("zero_quantized_") and value]
    problem = (
        "master weights in lower precision (bf16_master_weights_and_grads, fp16_master_weights_and_grads)"
        if settings.precision.master != "float32"
        else f"communication_data_type {settings.precision.reduction}"
        if settings.precision.reduction != "float32"
        else "offload_param to nvme"
        if settings.sharding.parameters_on == "nvme"
        else quantised[0]
        if quantised
        else None
    )
    if problem:
        raise ConfigError(
            [
                f"{min(kept)} and {len(kept) - 1} more parameters of this model stay in float32 in a model of "
                f"{settings.precision.parameters}, as transformers keeps them, and DeepSpeed cannot combine that with {problem}. "
                "Leave it out, or train with --precision fp32."
            ]
        )


@contextmanager
def in_float32(model: nn.Module, kept: Collection[str]) -> Iterator[None]:
    """While DeepSpeed is started: it leaves these parameters in float32."""
    if not kept:
        yield
        return
    cast, memory = DeepSpeedEngine._cast_module_mixed_precision, Stage3._create_param_groups_fp16_flat_cpu_memory
    defragment, set_flat = stage3.defragment, Stage3._set_fp16_partitioned_groups_flat
    parameters = dict(model.named_parameters())
    flat: dict[torch.dtype, torch.Tensor] = {}

    def cast_others(self: Any, *args: Any, **kwargs: Any) -> None:
        cast(self, *args, **kwargs)
        for name in kept:
            if not hasattr(parameters[name], "ds_id"):
                parameters[name].data = parameters[name].data.float()

    def defragment_each(tensors: list[torch.Tensor]) -> torch.Tensor:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        for tensor in tensors:
            by_dtype[tensor.dtype].append(tensor)
        flat.update({dtype: defragment(mine) for dtype, mine in by_dtype.items()})
        return flat[tensors[0].dtype]

    def set_flat_each(self: Any) -> None:
        done: dict[torch.dtype, int] = defaultdict(int)
        for sub_group in self.fp16_groups:
            numel, dtype = sum(parameter.partition_numel() for parameter in sub_group), sub_group[0].ds_tensor.dtype
            self.fp16_partitioned_groups_flat.append(flat[dtype].narrow(0, done[dtype], numel))
            done[dtype] += numel

    def memory_each(self: Any) -> None:
        memory(self)
        for number, group in enumerate(self.trainable_param_groups):
            own = self.param_groups_fp16_flat_cpu_memory[number]
            dtype = group["params"][0].ds_tensor.dtype
            if own.dtype != dtype:
                self.param_groups_fp16_flat_cpu_memory[number] = torch.empty(
                    own.numel(), dtype=dtype, pin_memory=own.is_pinned()
                )

    DeepSpeedEngine._cast_module_mixed_precision = cast_others
    stage3.defragment = defragment_each
    Stage3._set_fp16_partitioned_groups_flat = set_flat_each
    Stage3._create_param_groups_fp16_flat_cpu_memory = memory_each
    try:
        yield
    finally:
        DeepSpeedEngine._cast_module_mixed_precision = cast
        stage3.defragment = defragment
        Stage3._set_fp16_partitioned_groups_flat = set_flat
        Stage3._create_param_groups_fp16_flat_cpu_memory = memory
