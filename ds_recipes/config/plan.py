"""Every number that follows from the settings, the number of ranks and the length of the data. Pure arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from ds_recipes.config.engine_settings import engine_settings
from ds_recipes.config.schema import SETTINGS, Config, values_of
from ds_recipes.config.values import describe
from ds_recipes.errors import ConfigError

ROUNDING = 1e-9  # 0.1 x 30 is 3.0000000000000004 in binary; that is 3 steps, not 4


@dataclass(frozen=True)
class Plan:
    """How a run is laid out over ranks, micro-steps and optimizer steps.

    One optimizer step trains `global_rows` rows: `world_size` ranks x `micro_steps` x `rows_per_rank`. The last step
    of the last epoch is filled with blank rows (no targets); no row is dropped or seen twice. The numbers of steps are
    None only while the length of an epoch is unknown and nothing else ends the run.
    """

    world_size: int
    rows_per_rank: int  # in one micro-step
    micro_steps: int  # micro-steps an optimizer step
    global_rows: int  # rows an optimizer step, all ranks
    context_size: int  # tokens a row
    tokens_per_step: int  # all ranks, padding included
    rows_per_epoch: int | None
    total_rows: int | None  # positions of all epochs; rows after them are blank. None: epochs do not limit the run
    total_steps: int | None
    lr: float
    lr_min: float
    lr_decay_style: str
    warmup_steps: int | None
    decay_steps: int | None  # cosine, linear: step where lr_min is reached; wsd: length of the last phase; else None
    lr_warmup_style: str = "linear"
    lr_warmup_start: float = 0.0


def make_plan(
    config: Config, world_size: int, rows_per_epoch: int | None = None, skipped: Sequence[tuple[int, int]] = ()
) -> Plan:
    """Lay out the run for `world_size` ranks and an epoch of `rows_per_epoch` packed rows (None: not known yet).

    `skipped` are positions [start, stop) of the run's order that are left out; they do not overlap.

    Raises:
        ConfigError: batch sizes or the ranks' groups do not divide, or the learning rate's phases do not fit into the run.
    """
    assert world_size >= 1 and (rows_per_epoch is None or rows_per_epoch >= 1)
    _check_groups(config, world_size)
    micro_steps = _micro_steps(config, world_size)
    global_rows = config.run.batch_size_training * micro_steps * world_size
    tokens_per_step = global_rows * config.data.context_size
    total_rows = _total_rows(config, rows_per_epoch)
    num_skipped = 0 if total_rows is None else sum(max(min(stop, total_rows) - start, 0) for start, stop in skipped)
    trained_rows = None if total_rows is None else max(total_rows - num_skipped, 1)
    total_steps = _total_steps(config, trained_rows, global_rows, tokens_per_step)
    warmup_steps, decay_steps = (None, None) if total_steps is None else _schedule_steps(config, total_steps)
    return Plan(
        world_size=world_size,
        rows_per_rank=config.run.batch_size_training,
        micro_steps=micro_steps,
        global_rows=global_rows,
        context_size=config.data.context_size,
        tokens_per_step=tokens_per_step,
        rows_per_epoch=rows_per_epoch,
        total_rows=total_rows,
        total_steps=total_steps,
        lr=config.optimizer.lr,
        lr_min=config.optimizer.lr_min,
        lr_decay_style=config.optimizer.lr_decay_style,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        lr_warmup_style=config.optimizer.lr_warmup_style,
        lr_warmup_start=config.optimizer.lr_warmup_start,
    )


def _check_groups(config: Config, world_size: int) -> None:
    """A group of ranks larger than the world is the world, as in DeepSpeed."""
    group_size = engine_settings(config).sharding.group_size
    if config.ds is not None and group_size is not None and group_size < world_size and world_size % group_size:
        _refuse(
            f"{config.ds.path}: zero_optimization.zero_hpz_partition_size is {group_size}, but {world_size} ranks do not divide "
            f"into groups of {group_size}. Set it to the number of GPUs of a node, or start a multiple of it in ranks."
        )


def _micro_steps(config: Config, world_size: int) -> int:
    run = config.run
    if run.global_batch_size is None:
        return run.gradient_accumulation_steps or 1
    rows = run.batch_size_training * world_size
    micro_steps, rest = divmod(run.global_batch_size, rows)
    if rest or micro_steps < 1:
        what = "gradient accumulation would be below 1" if micro_steps < 1 else "that is no whole number of micro-steps"
        _refuse(
            f"{_named(config, 'global_batch_size')}, but one micro-step takes {rows} rows "
            f"({_product(config, world_size)}): {what}. {_remedy(config, world_size)}"
        )
    if run.gradient_accumulation_steps not in (None, micro_steps):
        _refuse(
            f"{_named(config, 'global_batch_size')}, but {_named(config, 'gradient_accumulation_steps')}: with "
            f"{_product(config, world_size)} that makes {rows * (run.gradient_accumulation_steps or 1)} rows a step. "
            f"Leave out one of the two, or set gradient_accumulation_steps to {micro_steps}."
        )
    return micro_steps


def _remedy(config: Config, world_size: int) -> str:
    """What to set so that it divides: the nearest global batch sizes, and batch sizes a rank that fit this one."""
    wanted, size = config.run.global_batch_size or 0, config.run.batch_size_training
    multiples = [wanted // (size * world_size) * size * world_size]
    multiples.append(multiples[0] + size * world_size)
    remedy = f"Set global_batch_size to {_either(multiples)}"
    if wanted % world_size == 0:
        share = wanted // world_size
        fitting = [other for other in range(1, share + 1) if share % other == 0]
        below, above = [other for other in fitting if other < size], [other for other in fitting if other > size]
        remedy += f", or batch_size_training to {_either(below[-1:] + above[:1])}"
    return f"{remedy}."


def _either(sizes: list[int]) -> str:
    return " or ".join(str(size) for size in sizes if size)


def _product(config: Config, world_size: int) -> str:
    return (
        f"batch_size_training {config.run.batch_size_training} x {world_size} {'rank' if world_size == 1 else 'ranks'}"
    )


def _total_rows(config: Config, rows_per_epoch: int | None) -> int | None:
    run = config.run
    epochs = run.num_epochs
    if epochs is None and run.max_steps is None and run.max_tokens is None:
        epochs = 1
    return None if epochs is None or rows_per_epoch is None else epochs * rows_per_epoch


def _total_steps(config: Config, trained_rows: int | None, global_rows: int, tokens_per_step: int) -> int | None:
    limits = []
    if trained_rows is not None:
        limits.append(-(-trained_rows // global_rows))
    if config.run.max_steps is not None:
        limits.append(config.run.max_steps)
    if config.run.max_tokens is not None:
        limits.append(-(-config.run.max_tokens // tokens_per_step))
    return min(limits, default=None)


def _schedule_steps(config: Config, total_steps: int) -> tuple[int, int | None]:
    """Warm-up and decay in whole steps. The warm-up is rounded down and the decay up, so rounding makes no conflict."""
    optimizer = config.optimizer
    warmup = optimizer.lr_warmup
    warmup_steps = int(warmup) if warmup > 1 else math.floor(warmup * total_steps + ROUNDING)
    last = (
        total_steps if optimizer.lr_warmup_style == "log" else total_steps - 1
    )  # a linear one reaches lr in the step after it
    if warmup_steps > last:
        _refuse(
            f"{_named(config, 'lr_warmup')}, so {warmup_steps} steps, but the run has {total_steps}: the learning rate "
            "would never reach lr. Set fewer steps, or a fraction of the run such as 0.05."
        )
    if optimizer.lr_decay_style in ("constant", "inverse_sqrt"):
        return warmup_steps, None
    decay = optimizer.lr_decay or (0.1 if optimizer.lr_decay_style == "wsd" else 1.0)
    decay_steps = int(decay) if decay > 1 else math.ceil(decay * total_steps - ROUNDING)
    if optimizer.lr_decay_style == "wsd" and warmup_steps + decay_steps > total_steps:
        _refuse(
            f"the warm-up of {warmup_steps} steps and the decay of {decay_steps} steps at the end do not fit into a run of "
            f"{total_steps} steps. Set lr_warmup or lr_decay to less; fractions of the run must not sum to more than 1."
        )
    if optimizer.lr_decay_style != "wsd" and decay_steps <= warmup_steps:
        _refuse(
            f"lr_decay ends the decay at step {decay_steps}, but lr_warmup ends the warm-up at step {warmup_steps} of "
            f"{total_steps}. Both are counted from the start of the run: set lr_decay above lr_warmup."
        )
    return warmup_steps, decay_steps


def _refuse(problem: str) -> NoReturn:
    raise ConfigError([problem])


def _named(config: Config, name: str) -> str:
    return describe(SETTINGS[name], values_of(config)[name], config.origins.get(name, "default"))
