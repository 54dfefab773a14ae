"""The one place where a run's `engine` setting becomes an engine, and the world that it needs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType

import torch

from ds_recipes.config.ds.effective import effective_ds_config
from ds_recipes.config.engine_settings import engine_settings
from ds_recipes.config.hang_settings import collective_seconds
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config
from ds_recipes.engine.base import Engine
from ds_recipes.errors import ConfigError
from ds_recipes.models.attention import choose_attention
from ds_recipes.models.load import ModelSource
from ds_recipes.world.alike import Facts
from ds_recipes.world.group import World, start
from ds_recipes.world.hang.nccl import prepare_nccl
from ds_recipes.world.intended import check_all_hosts_used, check_intended
from ds_recipes.world.resolve import Place

QUANTISED_KEYS = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
"""Parts of ZeRO++ (arXiv 2306.10209) whose kernels exist for GPUs only."""


def start_world(
    place: Place,
    *configs: Config,
    wish: Callable[[], str | None] = lambda: None,
    note: Callable[[str, int], None] | None = None,
    facts: Facts = MappingProxyType({}),
) -> World:
    """Let the ranks meet, with what the engines of these settings need to communicate. `wish`, `note`, `facts`: see
    `world.group.start`.

    Raises:
        StartError, StoppedEarly: as `world.group.start`.
        WorldError: the same; or not all hosts of the job are used, see `world/intended.py`.
    """
    with_deepspeed = any(config.run.engine == "deepspeed" for config in configs)
    timeout_seconds, expected = configs[0].run.start_timeout_seconds, configs[0].run.expected_world_size
    check_intended(place, os.environ, expected)
    collective_timeout_seconds = collective_seconds(configs[0].hang)
    if torch.cuda.is_available():
        folder = Path(configs[0].checkpoint.save_checkpoint_path or ".").resolve() / "hang"
        prepare_nccl(os.environ, folder, collective_timeout_seconds)
    world = start(place, timeout_seconds, collective_timeout_seconds, with_deepspeed, wish=wish, note=note, facts=facts)
    num_hosts = len(set(world.hosts))
    world.check("hosts", lambda: check_all_hosts_used(world.size, num_hosts, os.environ, expected))
    return world


def check_device(config: Config, device: torch.device) -> None:
    """Refuse what this kind of device cannot compute, before anything is read.

    Raises:
        ConfigError: fp16, or a quantised part of ZeRO++, on a CPU.
    """
    problems = list(_not_on_a_cpu(config)) if device.type == "cpu" else []
    if problems:
        raise ConfigError(problems)


def _not_on_a_cpu(config: Config) -> Iterator[str]:
    if config.run.precision == "fp16":
        yield (
            f"precision is fp16 ({config.origins.get('precision', 'default')}), which needs a GPU, and there is none that "
            "torch can use here. Use --precision bf16, or fp32."
        )
    if config.ds is None:
        return
    section = config.ds.tree.get("zero_optimization") or {}
    for key in QUANTISED_KEYS:
        if section.get(key) is True:
            yield (
                f"{config.ds.path}: {key} needs a GPU, and there is none that torch can use here. Leave it out, or set it "
                "to false."
            )


def create_engine(config: Config, plan: Plan, source: ModelSource, world: World) -> Engine:
    """Build the sharded model and its optimizer; the weights have no values until `load_shards`. Every rank must call it.

    The skeleton has the dtypes of forward, for both engines.

    Raises:
        InputError: the model cannot be built.
    """
    settings = engine_settings(config)
    dtype = getattr(torch, settings.precision.parameters)
    attention = world.check("attention", lambda: choose_attention(config, world.device, source))
    skeleton = world.check("model", lambda: source.skeleton(dtype, attention, world.device))
    if config.run.engine == "fsdp":
        from ds_recipes.engine.fsdp2.step import Fsdp2Engine

        return Fsdp2Engine(skeleton, world, plan, config.optimizer, settings)
    from ds_recipes.engine.zero3.step import ZeroEngine

    return ZeroEngine(skeleton, world, plan, effective_ds_config(config, plan), config.optimizer, settings)
