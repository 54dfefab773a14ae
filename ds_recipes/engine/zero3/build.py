"""Build the model sharded under ZeRO-3 and hand it to DeepSpeed.

Parameters get their shards without values and without communication; `load_shards` fills them afterwards, from a
Hugging Face folder, from random initialisation or from a checkpoint alike.
"""

import logging
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from ds_recipes.config.schema import OptimizerConfig
from ds_recipes.errors import InputError
from ds_recipes.models.loss_head import install_loss_head


class _Shards(deepspeed.zero.Init):  # type: ignore[misc]
    """ZeRO's parameter partitioning without values: DeepSpeed's own broadcasts each full parameter from rank 0.

    A full-size tensor is still made for a moment, but never written, so it costs address space and no memory.
    """

    def _convert_to_zero_parameters(self, param_list: Any) -> None:
        sharded: dict[int, nn.Parameter] = {}
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or hasattr(parameter, "ds_id"):
                    continue
                if id(parameter) not in sharded:  # a tied parameter stays one
                    sharded[id(parameter)] = self._shard(parameter)
                module._parameters[name] = sharded[id(parameter)]

    def _shard(self, meta: nn.Parameter) -> nn.Parameter:
        full = torch.empty(meta.shape, dtype=meta.dtype, device=self.local_device)
        parameter: Any = nn.Parameter(full, requires_grad=meta.requires_grad)
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()
        sharded: nn.Parameter = parameter
        return sharded


def shard_model(model: PreTrainedModel, ds_json: Mapping[str, Any], activation_checkpointing: bool) -> None:
    """Turn a skeleton's parameters into ZeRO-3 shards, and put the loss into its head."""
    if activation_checkpointing:
        try:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise InputError(
                f"--activation_checkpointing: transformers cannot do that for models of type {model.config.model_type}"
            ) from error
    install_loss_head(model)
    model.train()
    _Shards(module=model, config_dict_or_path=dict(ds_json))


def make_optimizer(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], settings: OptimizerConfig
) -> torch.optim.Optimizer:
    """torch's fused AdamW, or SGD, with weight decay on matrices only (biases and norms have one dimension).

    The same class serves with and without CPU offload: it needs no compiler, and the mathematics stay the same.
    DeepSpeed's own DeepSpeedCPUAdam would have to be compiled at the first start.
    """
    decayed = [parameter for name, parameter in model.named_parameters() if len(shapes[name]) >= 2]
    others = [parameter for name, parameter in model.named_parameters() if len(shapes[name]) < 2]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, settings.weight_decay), (others, 0.0))
        if parameters
    ]
    if settings.optimizer_type == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=settings.sgd_momentum)
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps, fused=True
    )


def start_deepspeed(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ds_json: Mapping[str, Any]) -> Any:
    """`deepspeed.initialize`, with the buffers' dtypes kept: DeepSpeed casts a whole module, rotary frequencies too."""
    buffers = {
        (module, name): buffer for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
    }
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(ds_json), dist_init_required=False)
    for (module, name), buffer in buffers.items():
        module._buffers[name] = buffer.to(engine.device)
    return engine


def share_offloaded_gradients(zero: Any) -> None:
    """Let the optimizer read gradients where DeepSpeed accumulates them: 4 bytes of host memory a parameter less.

    Under CPU offload stage 3 keeps two copies in host memory, each laid out like the master weights: one that micro-steps
    add to, and the optimizer's own, filled from it at the last micro-step.
    """
    accumulated, masters = zero.grad_partitions_flat_buffer, zero.fp32_partitioned_groups_flat
    if not zero.offload_optimizer or zero.swap_optimizer or accumulated.dtype != masters[0].dtype:
        return
    offset = 0
    for master in masters:
        master.grad = accumulated.narrow(0, offset, master.numel())
        offset += master.numel()
    assert offset == accumulated.numel(), "DeepSpeed lays out its gradients in another way than its master weights"
    if accumulated.is_pinned():  # torch keeps freed pinned memory for itself
        release = getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache
        release()
