"""Host memory and disk: for offload, for saving, for what is kept. All numbers are bytes."""

from dataclasses import dataclass

from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config
from ds_recipes.planner.architecture import Architecture
from ds_recipes.planner.machine import PROCESS_BYTES
from ds_recipes.planner.memory import Activations, shard
from ds_recipes.planner.situation import Situation

FLOAT32 = 4
READ_BYTES = 4 << 20  # of a file at a time while weights are read (`ranges.py`)

BYTES_A_TENSOR, BYTES_A_RANK, BLOCK_BYTES = 160, 40_000, 4096
"""Of a checkpoint's headers and manifest, as in `checkpoint/space.py`, which imports torch; a test holds the two equal."""


@dataclass(frozen=True)
class Host:
    """Host memory of one host, by what it is for."""

    processes: float
    offloaded: float  # optimizer, gradients, parameters, block inputs
    reading: float  # while weights are read
    saving: float  # the copy that is written beside training; 0 where saving streams
    nvme: float  # bytes of disk that offload takes on each host

    @property
    def total(self) -> float:
        return self.processes + self.offloaded + max(self.reading, self.saving)


def host_memory(model: Architecture, situation: Situation, config: Config) -> Host:
    """What the ranks of one host take of its memory together."""
    ranks = situation.ranks_per_host
    local = sum(shard(parameter, situation.world_size) for parameter in model.parameters)
    offloaded, nvme = offload_bytes(model, situation)
    streams = not config.checkpoint.async_save or config.checkpoint.checkpoint_format != "ranges" or nvme > 0
    kinds = num_kinds(situation, config)
    return Host(
        processes=PROCESS_BYTES * ranks,
        offloaded=offloaded * ranks,
        reading=float(READ_BYTES * ranks),
        saving=0.0 if streams else float(FLOAT32 * kinds * local * ranks),
        nvme=nvme * ranks,
    )


def offload_bytes(model: Architecture, situation: Situation) -> tuple[float, float]:
    """What one rank keeps in host memory, and on NVMe."""
    sharding = situation.settings.sharding
    local = sum(shard(parameter, situation.world_size) for parameter in model.parameters)
    state = (situation.master_bytes + situation.moment_bytes) * local
    together = situation.engine == "fsdp" and "cpu" in (sharding.optimizer_on, sharding.parameters_on)
    offloaded = nvme = 0.0
    if sharding.optimizer_on == "cpu" or together:
        offloaded += state + FLOAT32 * local
    elif sharding.optimizer_on == "nvme":
        offloaded += FLOAT32 * local  # gradients stay in memory (docs/decisions, page 12)
        nvme += state
    if sharding.parameters_on == "cpu" and not together:
        offloaded += situation.parameter_bytes * local
    elif sharding.parameters_on == "nvme":
        nvme += situation.parameter_bytes * local
    return offloaded + Activations(model, situation).on_host, nvme


def num_kinds(situation: Situation, config: Config) -> int:
    """Tensors that a checkpoint has of each parameter: the weights, and the optimizer's."""
    return (1 if config.checkpoint.save_model else 0) + (situation.moments if config.checkpoint.save_optimizer else 0)


def checkpoint_bytes(numel: int, num_tensors: int, kinds: int, ranks: int) -> int:
    """One checkpoint, without the model's and the tokenizer's files: an upper bound, close where the tensors are not tiny."""
    around = num_tensors * kinds * ranks * BYTES_A_TENSOR + ranks * (BYTES_A_RANK + BLOCK_BYTES) + 8 * BLOCK_BYTES
    return numel * kinds * FLOAT32 + around


def kept_at_once(config: Config, total_steps: int | None) -> int | None:
    """How many checkpoints lie on the disk at most, the one that is being written included. None: not known."""
    checkpoint = config.checkpoint
    if total_steps is None:
        return None if checkpoint.keep_last is None or checkpoint.keep_every else _most_kept(config)
    interval = checkpoint.save_interval_iteration
    saves = 1 if interval == 0 else -(-total_steps // interval)
    if checkpoint.keep_last is None:
        return saves
    every = 0
    if checkpoint.keep_every is not None:
        steps = {*range(interval, total_steps + 1, interval), total_steps} if interval else {total_steps}
        every = sum(step % checkpoint.keep_every == 0 for step in steps)
    return min(saves, _most_kept(config) + every)


def _most_kept(config: Config) -> int:
    return (config.checkpoint.keep_last or 0) + (config.checkpoint.keep_best or 0) + 1


@dataclass(frozen=True)
class Disk:
    """Room in the run folder."""

    checkpoint: int
    kept: int | None

    @property
    def total(self) -> int | None:
        return None if self.kept is None else self.kept * self.checkpoint


def disk(model: Architecture, situation: Situation, config: Config, plan: Plan) -> Disk:
    """What checkpoints take."""
    numel, tensors = model.numel, sum(1 for _ in model.parameters)
    one = checkpoint_bytes(numel, tensors, num_kinds(situation, config), situation.world_size)
    return Disk(one, kept_at_once(config, plan.total_steps))
