"""Shard a skeleton with FSDP2's `fully_shard`: each transformer block by itself, the rest at the root.

Parameters get storage for their shards alone, without values; `load_shards` fills them afterwards. The loss head belongs
to the root's group, whose parameters stay gathered from the start of forward to the end of backward, so its weight is
whole while the head runs, also where it is tied to the embedding.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_recipes.config.engine_settings import EngineSettings, Precision, Sharding
from ds_recipes.engine.unused import Usage
from ds_recipes.errors import ConfigError, InputError
from ds_recipes.models.loss_head import install_loss_head
from ds_recipes.world.group import World

REPLICAS, SHARDS = "replicas", "shards"
"""Names of the mesh's dimensions; the second is the only one where all ranks shard together."""


def make_mesh(world: World, group_size: int | None) -> DeviceMesh:
    """One dimension of all ranks, or [replicas, shards] where groups of `group_size` ranks hold the parameters together.

    Raises:
        ConfigError: the number of ranks is no multiple of the group's size.
    """
    device = world.device.type
    if group_size is None or group_size >= world.size:
        return init_device_mesh(device, (world.size,), mesh_dim_names=(SHARDS,))
    if world.size % group_size:
        raise ConfigError(
            [
                f"zero_hpz_partition_size is {group_size}, but {world.size} ranks do not divide into groups of {group_size}. "
                "Set it to the number of GPUs of a node, or start a multiple of it in ranks."
            ]
        )
    return init_device_mesh(device, (world.size // group_size, group_size), mesh_dim_names=(REPLICAS, SHARDS))


def check_precision(precision: Precision) -> None:
    """Refuse moments of another dtype than the master weights: torch's optimizers keep both in one.

    Raises:
        ConfigError: that is what the JSON asks for.
    """
    if precision.moments != precision.master:
        raise ConfigError(
            [
                f"master weights in {precision.master} with moments in {precision.moments} are not possible with torch's "
                "optimizer: set bf16_master_weights_and_grads and bf16_optimizer_states both, or leave both out"
            ]
        )


def check_kept(kept: Collection[str], precision: Precision) -> None:
    """Refuse parameters that stay in float32 where their master weights would not.

    Raises:
        ConfigError: that is what the JSON asks for.
    """
    if kept and precision.master != "float32":
        raise ConfigError(
            [
                f"{min(kept)} and {len(kept) - 1} more parameters of this model stay in float32, as transformers keeps them, and "
                f"the JSON asks for master weights in {precision.master}: leave bf16_master_weights_and_grads out"
            ]
        )


def shard_model(
    model: PreTrainedModel, mesh: DeviceMesh, device: torch.device, settings: EngineSettings, kept: Collection[str]
) -> None:
    """Put the loss into the head, shard every parameter and give the shards storage, in the master weights' dtype.

    `kept` are the names of the parameters that forward has in float32, whatever the others' dtype.

    Raises:
        InputError: a parameter that FSDP2 cannot shard.
    """
    check_shardable(model)
    homes = {(id(model.get_submodule(path)), key) for path, _, key in (name.rpartition(".") for name in kept)}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, settings.precision.master))
    install_loss_head(model)
    model.train()
    policy = mixed_precision(settings.precision)
    offload = offload_policy(settings.sharding, device)
    units = sharding_units(model)
    for unit in units:
        # The last block's backward comes next: what it frees would be gathered again at once.
        reshard = settings.sharding.stage == 3 and unit is not units[-1]
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # a factor alone takes PREMUL_SUM, which gloo lacks
        reduce_unused(module)
        if homes:
            keep_in_float32(module, homes, policy)
    give_storage(model, torch.device("cpu") if isinstance(offload, CPUOffloadPolicy) else device)


def reduce_unused(module: FSDPModule) -> None:
    """Reduce zeros for parameters without a gradient, such as an expert's that got no token on this rank.

    Without them ranks reduce gradients of different parameters into each other, or wait for ever. torch has a setting for
    it from 2.13 on.
    """
    if hasattr(module, "set_reduce_scatter_unused_params"):
        module.set_reduce_scatter_unused_params(True, recurse=False)
        return
    group: Any = module._get_fsdp_state()._fsdp_param_group
    if group is None:
        return
    reduce = group.post_backward

    def post_backward(*unused: Any) -> None:
        for one in group.fsdp_params:
            whole = getattr(one, "_unsharded_param", None)
            if whole is not None and whole.requires_grad and whole.grad is None:
                whole.grad = torch.zeros_like(whole)
        reduce(*unused)

    group.post_backward = post_backward


def watch_gradients(model: nn.Module, usage: Usage) -> None:
    """Note which parameters autograd has a gradient for, before zeros are reduced for the others."""
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {
        (id(module), name): canonical[id(parameter)]
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    for sharded in sharded_modules(model):
        group: Any = sharded._get_fsdp_state()._fsdp_param_group
        if group is not None:
            _watch_group(group, names, usage)


def _watch_group(group: Any, names: Mapping[tuple[int, str], str], usage: Usage) -> None:
    places = [one._module_info for one in group.fsdp_params]
    named = [names[id(place.module), place.param_name] for place in places]
    reduce = group.post_backward

    def post_backward(*unused: Any) -> None:
        for one, name in zip(group.fsdp_params, named, strict=True):
            whole = getattr(one, "_unsharded_param", None)
            if whole is not None and whole.grad is not None:
                usage.mark(name)
        reduce(*unused)

    group.post_backward = post_backward


def keep_in_float32(module: FSDPModule, homes: Collection[tuple[int, str]], policy: MixedPrecisionPolicy) -> None:
    """Let parameters be gathered in float32 among others of lower precision, by (module's id, own name).

    FSDP2 casts by parameter and gathers mixed dtypes as bytes, but takes one dtype for all from the policy, and wants all
    gradients of a group in one: they are brought to that of the reduction, zeros for parameters without one too.
    """
    group: Any = module._get_fsdp_state()._fsdp_param_group
    if group is None:
        return
    mine = [one for one in group.fsdp_params if (id(one._module_info.module), one._module_info.param_name) in homes]
    if not mine:
        return
    for one in mine:
        one.init_dtype_attrs = partial(_init_in_float32, one, one.init_dtype_attrs)
    reduce, reduced_in = group.post_backward, policy.reduce_dtype or policy.param_dtype

    def post_backward(*unused: Any) -> None:
        for one in group.fsdp_params:
            whole = getattr(one, "_unsharded_param", None)
            if whole is None or not whole.requires_grad or one.unsharded_accumulated_grad is not None:
                continue
            gradient, whole.grad = whole.grad, None
            one.unsharded_accumulated_grad = (
                torch.zeros_like(whole, dtype=reduced_in, requires_grad=False)
                if gradient is None
                else gradient.to(reduced_in)
            )
        reduce(*unused)

    group.post_backward = post_backward


def _init_in_float32(one: Any, init: Callable[[Any], None], policy: Any) -> None:
    init(policy)
    one.param_dtype = None  # as it is sharded


def check_shardable(model: PreTrainedModel) -> None:
    """See that every parameter has a first dimension.

    Raises:
        InputError: it names one that has none.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise InputError(f"{name} is a single number, which FSDP2 cannot shard. Use --engine deepspeed.")


def sharding_units(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks to be sharded each by itself, in the model's order.

    A parameter can belong to one unit only, so a block that shares one with anything outside is left to the root.
    """
    blocks = list(transformer_blocks(model))
    inside = {id(module) for block in blocks for module in block.modules()}
    rest = {
        id(parameter)
        for module in model.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    }
    holders = Counter(rest)
    for block in blocks:
        holders.update({id(parameter) for parameter in block.parameters()})
    return [block for block in blocks if all(holders[id(parameter)] == 1 for parameter in block.parameters())]


def transformer_blocks(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The outermost modules that transformers itself takes as a unit; some models have none."""
    whole = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(child, GradientCheckpointingLayer) or type(child).__name__ in whole:
                yield child
            else:
                yield from walk(child)

    return walk(model)


def mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """What is gathered and what is reduced, from masters of `precision.master`."""
    return MixedPrecisionPolicy(
        param_dtype=getattr(torch, precision.parameters), reduce_dtype=getattr(torch, precision.reduction)
    )


def offload_policy(sharding: Sharding, device: torch.device) -> OffloadPolicy:
    """Shards, gradients and moments in host memory where either is asked for: FSDP2 moves them together."""
    if sharding.optimizer_on == sharding.parameters_on == "device":
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=sharding.pin_memory and device.type != "cpu")


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that `fully_shard` was called on, the root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def give_storage(model: nn.Module, device: torch.device) -> None:
    """Replace shards on the meta device by empty ones. Buffers, which have their values, are left alone.

    `load_state_dict` is what tells FSDP2 of the new tensors; a parameter under two names stays one.
    """
    shards: dict[int, nn.Parameter] = {}
    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in shards:
            empty = torch.empty_like(parameter, device=device, requires_grad=False)
            shards[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        state[name] = shards[id(parameter)]
    model.load_state_dict(state, strict=False, assign=True)
