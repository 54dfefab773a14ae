"""What four ranks do in the tests of FSDP2 alone, one function a question."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ds_recipes.checkpoint.load import CheckpointReader
from ds_recipes.checkpoint.manifest import read_manifest
from ds_recipes.checkpoint.store import save_checkpoint
from ds_recipes.engine.fsdp2.step import Fsdp2Engine
from ds_recipes.errors import DsRecipesError
from ds_recipes.ranges import NONE_MISSED
from ds_recipes.world.group import World
from tests.contract.fsdp2_engines import HUGE_LR, How, engine_of, source, step, weights_of
from tests.contract.oracle import VOCABULARY, global_batch, joined


def gradient(world: World, how: How) -> dict[str, Any]:
    """The first gradient as an SGD step shows it, and what was seen on the way."""
    engine = engine_of(world, how)
    buffers = {name: (str(value.dtype), value.float().sum().item()) for name, value in engine.model.named_buffers()}
    before = weights_of(engine)
    evaluated = engine.evaluate(joined(global_batch(99, 2)))
    loss, result = step(engine, world, how, 0, HUGE_LR)
    after = weights_of(engine)
    report = {
        "loss": loss,
        "evaluated": float(evaluated[0]),
        "result": result,
        "description": engine.describe(),
        "buffers": buffers,
        "left_over": sum(parameter.grad is not None for parameter in engine.model.parameters()),
        "elements": sum(shard.length for shard in engine.shards()),
        "moments": {shard.name: shard.exp_avg is not None for shard in engine.shards()},
    }
    engine.close()
    changed = {name: (before[name].double() - after[name].double()) / HUGE_LR for name in before}
    return report | ({"before": before, "gradient": changed} if world.rank == 0 else {})


def gradients(world: World, hows: Sequence[How]) -> list[dict[str, Any]]:
    return [gradient(world, how) for how in hows]


def save(engine: Fsdp2Engine, world: World, folder: Path, number: int) -> None:
    probe = (torch.zeros((1, 2), dtype=torch.int64), torch.zeros((1, 2, 3)))
    save_checkpoint(
        folder, number, engine, state={"step": number}, files={}, probe=probe, tied={}, world=world,
        save_optimizer=True, keep_last=None,
    )  # fmt: skip


def train_and_save(world: World, how: How, folder: str, steps: int) -> list[float]:
    """Losses of twice `steps` steps, with a checkpoint after the first half."""
    engine = engine_of(world, how)
    losses = []
    for number in range(2 * steps):
        if number == steps:
            save(engine, world, Path(folder), number)
        losses.append(step(engine, world, how, number, 3e-3)[0])
    engine.close()
    return losses


def resume(world: World, how: How, folder: str, steps: int) -> list[float]:
    """Losses of the second half, from the checkpoint."""
    path = Path(folder) / f"iter_{steps:07d}"
    engine = engine_of(world, how, loaded=False)
    engine.load_shards(CheckpointReader(path, read_manifest(path)))
    assert engine.optimizer_step == steps
    losses = [step(engine, world, how, number, 3e-3)[0] for number in range(steps, 2 * steps)]
    engine.close()
    return losses


COLLECTIVES = {
    "gather": "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor",
    "scatter": "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor",
    "reduce": "all_reduce",
}
"""What FSDP2 calls, in torch 2.13 and before."""


class Counted:
    """Calls of a function of torch.distributed while it is entered, with their tensors' dtypes and sizes."""

    def __init__(self, name: str) -> None:
        self.name, self.plain = name, getattr(dist, name)
        self.calls: list[tuple[str, int]] = []

    def __enter__(self) -> "Counted":
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = next(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor))
            self.calls.append((str(tensor.dtype), tensor.numel()))
            return self.plain(*args, **kwargs)

        setattr(dist, self.name, counted)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(dist, self.name, self.plain)


def counts(world: World, how: How) -> dict[str, list[tuple[str, int]]]:
    """Collectives of the second step, by kind; sums of counts and of the norm, in float64, are left out."""
    engine = engine_of(world, how)
    step(engine, world, how, 0, 0.01)
    with contextlib.ExitStack() as stack:
        counted = {kind: stack.enter_context(Counted(name)) for kind, name in COLLECTIVES.items()}
        step(engine, world, how, 1, 0.01)
    engine.close()
    return {name: [call for call in one.calls if call[0] != "torch.float64"] for name, one in counted.items()}


def gathered_blocks(world: World, how: How) -> list[list[int]]:
    """Which blocks are whole in each block's forward, block after block."""
    engine = engine_of(world, how)
    blocks = list(engine.model.model.layers)
    seen: list[list[int]] = []

    def look(*_: object) -> None:
        is_whole = [not any(isinstance(one, DTensor) for one in block.parameters()) for block in blocks]
        seen.append([number for number, whole in enumerate(is_whole) if whole])

    step(engine, world, how, 0, 0.01)  # before the first loss the model runs once more
    for block in blocks:
        block.mlp.register_forward_hook(look)
    step(engine, world, how, 1, 0.01)
    engine.close()
    return seen


def disturbed(world: World, how: How) -> dict[str, bool]:
    """Whether forwards alone between steps, and a load after one, leave no trace."""
    batch, ids = joined(global_batch(99, 2)), torch.arange(16)[None] % VOCABULARY
    plain, other = engine_of(world, how), engine_of(world, how)
    first = float(other.evaluate(batch)[0])
    for number in range(3):
        other.logits(ids)
        step(plain, world, how, number, 3e-3)
        other.evaluate(batch)
        step(other, world, how, number, 3e-3, before_update=lambda: other.evaluate(batch))
    ours, theirs = weights_of(plain), weights_of(other)
    same = all(torch.equal(ours[name], theirs[name]) for name in ours)
    after_steps = float(plain.evaluate(batch)[0])
    plain.load_shards(source(how).initial_weights(world.device))
    return {"steps": same, "load": float(plain.evaluate(batch)[0]) == first != after_steps}


def overflows(world: World, how: How, steps: int) -> dict[str, Any]:
    """Results of fp16 steps, and whether those that were not applied left the weights alone."""
    engine = engine_of(world, how)
    results, untouched = [], []
    for _ in range(steps):
        before = weights_of(engine)
        results.append(step(engine, world, how, 0, 1.0)[1])
        after = weights_of(engine)
        same = all(torch.equal(before[name], after[name]) for name in before)
        untouched.append(same)
        if results[-1].applied:
            gradient = {name: before[name].double() - after[name].double() for name in before}
            break
    state = engine.scaler_state()
    engine.close()
    return {
        "results": results,
        "untouched": untouched,
        "state": state,
        **({"before": before, "gradient": gradient} if world.rank == 0 else {}),
    }


class Constant:
    """Weights that take no memory of their own."""

    optimizer_step = 0
    missed_steps = NONE_MISSED
    names: Sequence[str] = ()

    def has(self, kind: str) -> bool:
        return kind == "fp32"

    def shape(self, name: str) -> tuple[int, ...]:
        return ()

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        out.fill_(0.01)


def memory(world: World, how: How) -> tuple[int, int]:
    """Bytes of the whole model in float32, and by how much this process grew at most while its share was built and filled."""
    shapes = [parameter.shape for parameter in source(how).skeleton(torch.float32, "sdpa", world.device).parameters()]
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    engine = engine_of(world, how, loaded=False)
    engine.load_shards(Constant())
    grown = _status("VmHWM") - before
    engine.close()
    return 4 * sum(shape.numel() for shape in shapes), grown


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def refusals(world: World) -> list[str]:
    """The messages of what cannot be sharded."""
    messages = []
    for how in (
        How(group_size=3),
        How(model="scalar"),
        How(parameters="bfloat16", master="bfloat16", moments="float32"),
    ):
        try:
            engine_of(world, how)
        except DsRecipesError as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages
