"""The dtypes that DeepSpeed really uses, read from what it built."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

from ds_recipes.config.engine_settings import Precision
from ds_recipes.engine.optimizer import moments_dtype


def real_precision(deepspeed_engine: Any, model: nn.Module) -> Precision:
    """Read them from the built engine."""
    zero = deepspeed_engine.optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_bf16 = isinstance(zero, BF16_Optimizer)
    master = torch.float32 if is_bf16 else zero.master_weights_and_grads_dtype
    return Precision(
        parameters=name(Counter(parameter.dtype for parameter in trained).most_common(1)[0][0]),
        master=name(master),
        moments=name(moments_dtype(zero.optimizer, master)),
        gradient_accumulation=name(zero.grad_acc_dtype if is_bf16 else zero.gradient_accumulation_dtype),
        reduction=name(_reduction(deepspeed_engine)),
        autocast=name(deepspeed_engine.torch_autocast_dtype()) if deepspeed_engine.torch_autocast_enabled() else None,
    )


def _reduction(deepspeed_engine: Any) -> torch.dtype:
    """The dtype of the buckets that are reduced; under autocast parameters may have their own, the narrowest tells most."""
    default: torch.dtype = deepspeed_engine.communication_data_type
    buckets: Iterable[torch.dtype] = getattr(deepspeed_engine.optimizer, "ipg_buckets", (default,))
    return min(buckets, key=lambda dtype: dtype.itemsize)


def name(dtype: torch.dtype) -> str:
    """torch's name without the module."""
    return str(dtype).removeprefix("torch.")
