"""Checkpoints cross over: any engine or stage continues what any other saved, on any number of ranks, bit for bit."""

import tempfile
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.checkpoint.load import CheckpointReader
from ds_recipes.checkpoint.manifest import read_manifest
from ds_recipes.checkpoint.store import save_checkpoint
from ds_recipes.engine.base import Engine
from ds_recipes.world.group import World
from tests.contract.engines import ROWS, Case, build, train_steps
from tests.ranks.launch import run_ranks

STAGE_2 = '{"zero_optimization": {"stage": 2}}'
HSDP = '{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}'
KINDS = {
    "zero3": Case(optimizer="adamw", lrs=(1e-3,)),
    "zero2": Case(optimizer="adamw", lrs=(1e-3,), ds=STAGE_2),
    "fsdp": Case(optimizer="adamw", lrs=(1e-3,), engine="fsdp"),
    "hsdp": Case(optimizer="adamw", lrs=(1e-3,), engine="fsdp", ds=HSDP),
}
SAVED_ON = {"zero3": (1, 2, 3, 4), "zero2": (1, 2, 3), "fsdp": (1, 2, 3, 4), "hsdp": (4,)}
RESUMED_BY = ("zero3", "zero2", "fsdp")
STEPS = 3

Tensors = dict[str, dict[str, torch.Tensor]]
"""Full flat tensors by kind (fp32, exp_avg, exp_avg_sq) and parameter."""


def case_of(kind: str, ranks: int) -> Case:
    """One micro-step a step, whose global batch is the same on any number of ranks."""
    return replace(KINDS[kind], rows_per_rank=ROWS // ranks)


def gathered(engine: Engine, world: World) -> Tensors:
    """What the ranks hold together, each element once. Every rank must call it."""
    mine = [
        (shard.name, torch.Size(shard.shape).numel(), shard.start, kind, getattr(shard, kind).clone())
        for shard in engine.shards()
        for kind in ("fp32", "exp_avg", "exp_avg_sq")
        if shard.length
    ]
    full: Tensors = {}
    for name, size, start, kind, values in (entry for rank in world.gather(mine) for entry in rank):
        tensor = full.setdefault(kind, {}).setdefault(name, torch.full((size,), float("nan")))
        assert tensor[start : start + len(values)].isnan().all(), f"{kind} of {name} comes twice"
        tensor[start : start + len(values)] = values
    assert not any(tensor.isnan().any() for tensors in full.values() for tensor in tensors.values()), "a hole"
    return full


def save(world: World, folder: str) -> None:
    """Train and save with each engine that is to be saved on so many ranks; then note how it goes on."""
    for kind in KINDS:
        if world.size not in SAVED_ON[kind]:
            continue
        case = case_of(kind, world.size)
        engine = build(world, case, Path(folder))
        train_steps(engine, world, case, range(STEPS))
        probe = (torch.zeros((1, 2), dtype=torch.int64), torch.zeros((1, 2, 3)))
        path = save_checkpoint(
            Path(folder) / f"{kind}-{world.size}",
            STEPS,
            engine,
            state={},
            files={},
            probe=probe,
            tied={},
            world=world,
            save_optimizer=True,
            keep_last=None,
        )
        tensors = gathered(engine, world)
        losses = [result["loss"] for result in train_steps(engine, world, case, range(STEPS, STEPS + 2))]
        if world.rank == 0:
            torch.save({"tensors": tensors, "losses": losses, "path": str(path)}, path.parent / "noted.pt")
        engine.close()


def resume(world: World, folder: str) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Fill one engine of each kind from every checkpoint in turn: what it then holds, and how it goes on."""
    seen = {}
    for kind in RESUMED_BY:
        case = case_of(kind, world.size)
        engine = build(world, case, Path(folder))
        for saved_by, ranks in saved():
            noted = torch.load(Path(folder) / f"{saved_by}-{ranks}" / "noted.pt", weights_only=True)
            path = Path(noted["path"])
            engine.load_shards(CheckpointReader(path, read_manifest(path)))
            held = gathered(engine, world)
            differing = [
                f"{what} of {name}"
                for what, tensors in noted["tensors"].items()
                for name, tensor in tensors.items()
                if not torch.equal(held[what][name], tensor)
            ]
            step = engine.optimizer_step
            results = train_steps(engine, world, case, range(STEPS, STEPS + 2))
            seen[kind, saved_by, ranks] = {
                "differing": differing,
                "step": step,
                "losses": [result["loss"] for result in results],
                "expected": noted["losses"],
            }
        engine.close()
    return seen


def saved() -> list[tuple[str, int]]:
    return [(kind, ranks) for kind, numbers in SAVED_ON.items() for ranks in numbers]


@cache
def crossed() -> dict[int, dict[tuple[str, str, int], dict[str, Any]]]:
    """By the number of ranks that resumed."""
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2, 3, 4):
            run_ranks(save, ranks, folder, timeout=240)
        return {ranks: run_ranks(resume, ranks, folder, timeout=240)[0] for ranks in (1, 2, 3, 4)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("by, saved_by", product(RESUMED_BY, SAVED_ON))
def test_what_is_resumed_is_what_was_saved(by: str, saved_by: str, ranks: int) -> None:
    for saved_on in SAVED_ON[saved_by]:
        seen = crossed()[ranks][by, saved_by, saved_on]
        assert seen["differing"] == [] and seen["step"] == STEPS, f"saved on {saved_on}"
        first, second = seen["losses"]
        assert first == pytest.approx(seen["expected"][0], rel=5e-7), "other weights"
        assert second == pytest.approx(seen["expected"][1], rel=2e-6), "another step was taken: other moments or count"
