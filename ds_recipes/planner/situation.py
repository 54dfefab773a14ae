"""What decides about a rank's memory: the run's settings and its JSON, read for a number of ranks."""

from dataclasses import dataclass, replace
from typing import Any

from ds_recipes.config.ds.effective import effective_ds_config
from ds_recipes.config.engine_settings import EngineSettings, engine_settings
from ds_recipes.config.plan import Plan, make_plan
from ds_recipes.config.schema import Config
from ds_recipes.planner.activations import Batch
from ds_recipes.planner.architecture import Architecture
from ds_recipes.planner.gathering import Limits

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Buckets:
    """DeepSpeed's buffers, in elements."""

    reduce: int
    sub_group: int
    overlapped: bool


@dataclass(frozen=True)
class Situation:
    """One rank of a run."""

    engine: str
    settings: EngineSettings
    world_size: int
    ranks_per_host: int
    micro_steps: int
    batch: Batch
    moments: int  # tensors that the optimizer keeps beside the master weights
    limits: Limits
    buckets: Buckets

    @property
    def stage(self) -> int:
        return self.settings.sharding.stage

    @property
    def parameter_bytes(self) -> int:
        return ITEMSIZE[self.settings.precision.parameters]

    @property
    def master_bytes(self) -> int:
        return ITEMSIZE[self.settings.precision.master]

    @property
    def moment_bytes(self) -> int:
        """Of all moments together."""
        return self.moments * ITEMSIZE[self.settings.precision.moments]

    @property
    def gradient_bytes(self) -> int:
        return ITEMSIZE[self.settings.precision.gradient_accumulation]

    @property
    def reduction_bytes(self) -> int:
        return ITEMSIZE[self.settings.precision.reduction]

    @property
    def group_size(self) -> int:
        """Ranks that hold one copy of the parameters together."""
        return min(self.settings.sharding.group_size or self.world_size, self.world_size)

    def segments(self, model: Architecture) -> tuple[int, ...] | None:
        """A segment's number for each block, as `engine/activations/blocks.py` cuts them; None without checkpointing."""
        wanted = self.settings.checkpointing
        if wanted is None:
            return None
        blocks = len(model.blocks)
        number = blocks if wanted.number_checkpoints is None else min(wanted.number_checkpoints, blocks)
        length, longer = divmod(blocks, number)
        return tuple(segment for segment in range(number) for _ in range(length + (segment < longer)))


def situation_of(config: Config, nodes: int, gpus_per_node: int, device: str = "cuda") -> tuple[Situation, Plan]:
    """Read it from settings that were checked; no file but the config's is read.

    Raises:
        ConfigError: batch sizes or groups do not divide by this number of ranks.
    """
    world_size = nodes * gpus_per_node
    plan = make_plan(config, world_size)
    settings = engine_settings(config)
    zero = effective_ds_config(config, plan)["zero_optimization"]
    batch = Batch(
        rows=plan.rows_per_rank,
        context_size=plan.context_size,
        itemsize=ITEMSIZE[settings.precision.autocast or settings.precision.parameters],
        attention=_attention(config),
        device=device,
    )
    situation = Situation(
        engine=config.run.engine,
        settings=settings,
        world_size=world_size,
        ranks_per_host=gpus_per_node,
        micro_steps=plan.micro_steps,
        batch=batch,
        moments=2 if config.optimizer.optimizer_type == "adamw" else int(config.optimizer.sgd_momentum > 0),
        limits=_limits(zero),
        buckets=Buckets(
            reduce=_number(zero, "reduce_bucket_size", 500_000_000),
            sub_group=_number(zero, "sub_group_size", 1_000_000_000),
            overlapped=bool(zero.get("overlap_comm", False)),
        ),
    )
    return situation, plan


def with_batch(situation: Situation, **changes: Any) -> Situation:
    """The same run with another batch."""
    return replace(situation, batch=replace(situation.batch, **changes))


def _attention(config: Config) -> str:
    """`use_fast_kernels` takes FlashAttention 2 where it is installed; on a GPU that is what it is for."""
    fast = config.model.use_fast_kernels and config.run.precision != "fp32"
    return "flash_attention_2" if fast else config.model.attn_implementation


def _limits(zero: dict[str, Any]) -> Limits:
    given = Limits()
    return Limits(
        max_live_parameters=_number(zero, "stage3_max_live_parameters", given.max_live_parameters),
        max_reuse_distance=_number(zero, "stage3_max_reuse_distance", given.max_reuse_distance),
        prefetch_bucket_size=_number(zero, "stage3_prefetch_bucket_size", given.prefetch_bucket_size),
        param_persistence_threshold=_number(
            zero, "stage3_param_persistence_threshold", given.param_persistence_threshold
        ),
    )


def _number(section: dict[str, Any], name: str, default: int) -> int:
    value = section.get(name)
    return default if value in (None, "auto") else int(float(value))
