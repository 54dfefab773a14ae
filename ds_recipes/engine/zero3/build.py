"""Give a skeleton's parameters storage, sharded at stage 3 and whole at stages 1 and 2, and hand it to DeepSpeed.

They get no values and nothing is communicated; `load_shards` fills them afterwards, from a Hugging Face folder, from
random initialisation or from a checkpoint alike.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import bf16_optimizer, compiler, torch_autocast
from torch import nn
from transformers import PreTrainedModel

from ds_recipes.config.engine_settings import EngineSettings
from ds_recipes.engine.zero3.kept_dtypes import in_float32
from ds_recipes.models.loss_head import install_loss_head


class _Shards(deepspeed.zero.Init):  # type: ignore[misc]
    """ZeRO's parameter partitioning without values: DeepSpeed's own broadcasts each full parameter from rank 0.

    A full-size tensor is still made for a moment, but never written, so it costs address space and no memory.
    """

    def _convert_to_zero_parameters(self, param_list: Any) -> None:
        _replace_parameters(self.module, self._shard)

    def _shard(self, meta: nn.Parameter) -> nn.Parameter:
        if hasattr(meta, "ds_id"):
            return meta
        parameter: Any = _empty(meta, self.local_device)
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()
        sharded: nn.Parameter = parameter
        return sharded


def _replace_parameters(model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put `make(parameter)` in each parameter's place; a tied parameter stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = make(parameter)
                module._parameters[name] = made[id(parameter)]


def _empty(meta: nn.Parameter, device: torch.device) -> nn.Parameter:
    storage = torch.empty(meta.shape, dtype=meta.dtype, device=device)
    return nn.Parameter(storage, requires_grad=meta.requires_grad)


def place_model(
    model: PreTrainedModel, ds_json: Mapping[str, Any], settings: EngineSettings, device: torch.device
) -> None:
    """Put the loss into a skeleton's head, and turn its parameters into ZeRO-3 shards, or into whole empty tensors."""
    install_loss_head(model)
    model.train()
    if settings.sharding.stage == 3:
        _Shards(module=model, config_dict_or_path=dict(ds_json))
    else:
        _replace_parameters(model, lambda meta: _empty(meta, device))


def start_deepspeed(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, ds_json: Mapping[str, Any], kept: Collection[str]
) -> Any:
    """`deepspeed.initialize`, with the dtypes of buffers and of the parameters `kept`: DeepSpeed casts a whole module."""
    buffers = {
        (module, name): buffer for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
    }
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    bf16_optimizer.see_memory_usage = bf16_optimizer.print_rank_0 = _say_nothing  # it prints pages at each start
    _import_muon()
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # of the process: an engine before this one may have set it
    with in_float32(model, kept):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(ds_json), dist_init_required=False
        )
    for (module, name), buffer in buffers.items():
        module._buffers[name] = buffer.to(engine.device)
    return engine


def _import_muon() -> None:
    """Import DeepSpeed's Muon without torch's compiler.

    DeepSpeed imports it to ask whether an optimizer is one, and its functions are handed to `torch.compile` as they are defined,
    which imports dynamo and inductor: seconds of every start. Here they are compiled when they are first called.
    """
    compile_at_once = compiler.compile
    compiler.compile = lambda: _compiled_when_called
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_at_once


def _compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function))
        return compiled[0](*arguments, **named)

    return call


def _say_nothing(*_: Any, **__: Any) -> None:
    pass


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
