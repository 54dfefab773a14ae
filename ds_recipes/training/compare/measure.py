"""Train the first steps of a run with one engine, from the initial weights, and note what can be compared."""

import gc
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ds_recipes.checkpoint.rng import derive_rng
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config
from ds_recipes.data.stream import Stream
from ds_recipes.engine.base import Engine
from ds_recipes.engine.checks import check_loss_head
from ds_recipes.engine.create import create_engine
from ds_recipes.errors import TrainingError
from ds_recipes.ranges import RangeReader, ReaderOver
from ds_recipes.training.inputs import Inputs
from ds_recipes.training.meter import peak_memory_gib
from ds_recipes.training.schedule import lr_at
from ds_recipes.world.group import World

WARMUP_STEPS = 2
"""First steps left out of the speed: libraries compile, record and allocate in them."""

PERTURBATION = 1e-7
"""Relative size of the change of each initial weight, in a run that shows how far rounding alone leads: float32's own."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, the same on all ranks."""

    loss: float  # nats a target token
    grad_norm: float  # before clipping
    applied: bool
    loss_scale: float | None
    lr: float


@dataclass(frozen=True)
class Measured:
    """One engine's steps, and what they cost."""

    engine: str
    description: dict[str, object]
    steps: tuple[Step, ...]
    tokens_per_sec: float | None  # all ranks, without padding; None for a run that is all warm-up
    memory_gib: float  # the most of all ranks: a GPU's as torch allocated it, else the process's resident memory
    updates: Mapping[str, torch.Tensor] = field(
        default_factory=dict
    )  # this rank's slice of all steps' change of each parameter


def measure(config: Config, plan: Plan, inputs: Inputs, world: World, steps: int, perturbed: bool = False) -> Measured:
    """Build the engine that `config` names, train `steps` steps and release it. Every rank must call it.

    Raises:
        InputError: the model cannot be built, or its loss is not the model's own.
        TrainingError: a step has no target token.
    """
    derive_rng(config.run.seed, 0, world.rank)
    forget_peak_memory(world.device)
    start: RangeReader = world.check("initial weights", lambda: inputs.source.initial_weights(world.device))
    engine = create_engine(config, plan, inputs.source, world)
    try:
        engine.load_shards(Perturbed(start) if perturbed else start)
        check_loss_head(engine, inputs.source, config.run.precision)
        taken, rate = _train(engine, Stream(inputs.data.corpus, plan, world.rank), plan, world, steps)
        (memory,) = world.max([peak_memory_gib(world.device)])
        updates = _updates(engine, start, world)
        return Measured(config.run.engine, engine.describe(), tuple(taken), rate, memory, updates)
    finally:
        engine.close()
        del engine
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def _train(engine: Engine, stream: Stream, plan: Plan, world: World, steps: int) -> tuple[list[Step], float | None]:
    """The loop of a run without its duties; the second is tokens a second after the warm-up."""
    taken: list[Step] = []
    overflows, tokens, started = 0, 0, time.monotonic()
    for number in range(steps):
        if number == WARMUP_STEPS:
            tokens, started = 0, time.monotonic()
        group = stream.take()
        targets, step_tokens = world.sum([_total(group, "num_target_tokens"), _total(group, "num_tokens")])
        if targets == 0:
            raise TrainingError(f"step {number + 1} has no target token; raise the global batch size")
        losses = [engine.backward(batch, scale=1 / targets) for batch in group]
        lr = lr_at(number - overflows, plan)
        result = engine.update(lr)
        (loss_sum,) = world.sum([float(torch.stack([loss.double() for loss in losses]).sum())])
        overflows += result.overflowed
        tokens += step_tokens
        taken.append(Step(loss_sum / targets, result.grad_norm, result.applied, result.loss_scale, lr))
    return taken, tokens / (time.monotonic() - started) if steps > WARMUP_STEPS else None


@torch.no_grad()
def _updates(engine: Engine, start: RangeReader, world: World) -> dict[str, torch.Tensor]:
    """What the steps have changed, in float32 on the host: of each parameter the same slice on this rank with any engine."""
    updates = {}
    for name, weight in engine.weights():
        length = -(-weight.numel() // world.size)
        first = min(world.rank * length, weight.numel())
        own = weight.reshape(-1)[first : first + length].to("cpu", torch.float32)
        before = torch.empty_like(own)
        start.read_into("fp32", name, first, before)
        updates[name] = own - before
    return updates


@dataclass(frozen=True)
class Moved:
    """L2 norms over all ranks of one parameter's changes: by one engine, by the other, and of their difference."""

    one: float
    other: float
    apart: float


def moved(one: Measured, other: Measured, world: World) -> dict[str, Moved]:
    """How far each parameter has gone with two engines, by name. Collective."""
    squares = []
    for name, mine in one.updates.items():
        theirs = other.updates[name]
        squares += [float(each.double().square().sum()) for each in (mine, theirs, mine - theirs)]
    norms = [math.sqrt(square) for square in world.sum(squares)]
    return {name: Moved(*norms[3 * number : 3 * number + 3]) for number, name in enumerate(one.updates)}


def _total(group: Sequence[object], name: str) -> int:
    return sum(getattr(batch, name) for batch in group)


def forget_peak_memory(device: torch.device) -> None:
    """Let the peak begin anew: of the GPU's memory, or of this process's (Linux' proc(5), clear_refs)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak is then the whole process's


class Perturbed(ReaderOver):
    """Weights with an error of about `PERTURBATION` on each, the same for any element whichever rank reads it."""

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened parameter into `out`, changed."""
        exact = torch.empty(out.numel(), dtype=torch.float32)
        self._reader.read_into(kind, name, start, exact)
        index = torch.arange(start, start + out.numel())
        mixed = (index * 2654435761 + zlib.crc32(name.encode())) & 0xFFFFFFFF  # Knuth's multiplicative hash
        noise = (mixed.double() / 2**31 - 1) * 3**0.5  # uniform, with a standard deviation of 1
        out.copy_(exact.double() * (1 + PERTURBATION * noise))
