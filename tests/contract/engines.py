"""What a rank does in the contract tests: build an engine, train it on its share of each global batch, report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config
from ds_recipes.engine.base import Engine
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World
from tests.contract.oracle import CONTEXT, global_batch, joined, llama

ROWS = 12
"""Rows of a global batch: divisible over 1, 2, 3 and 4 ranks."""


@dataclass(frozen=True)
class Case:
    """One way to train: the model, the optimizer, and how a global batch is split."""

    tied: bool = False
    optimizer: str = "sgd"
    precision: str = "fp32"
    rows_per_rank: int = 1
    weight_decay: float = 0.0
    clip: float = 0.0
    checkpointing: bool = False
    offload: bool = False
    lrs: tuple[float, ...] = (0.01,)
    folder: str | None = None
    poison: tuple[tuple[int, int], ...] = ()  # (step, rank whose loss becomes infinite)


def settings(case: Case, tmp: Path, engine: str = "deepspeed") -> Config:
    flags = [
        *("--engine", engine, "--save_checkpoint_path", str(tmp / "run"), "--train_data", "unused.jsonl"),
        *("--model_config", "unused.json", "--tokenizer_name", "unused"),
        *("--context_size", str(CONTEXT), "--max_steps", "1000", "--precision", case.precision),
        *("--batch_size_training", str(case.rows_per_rank), "--global_batch_size", str(ROWS)),
        *("--optimizer_type", case.optimizer, "--weight_decay", str(case.weight_decay)),
        *("--max_grad_norm", str(case.clip)),
    ]
    if case.checkpointing:
        flags.append("--activation_checkpointing")
    if case.offload:
        flags += ["--ds_config", str(Path(__file__).parents[2] / "ds_configs" / "zero3_offload.json")]
    return load_config(flags)


def build(world: World, case: Case, tmp: Path) -> Engine:
    config = settings(case, tmp)
    source = ModelSource(llama(case.tied), None if case.folder is None else Path(case.folder), 7, False)
    engine = create_engine(config, make_plan(config, world.size), source, world)
    engine.load_shards(source.initial_weights(world.device))
    return engine


def train_steps(engine: Engine, world: World, case: Case, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Train global steps `steps`; each returns the loss a target token, the norm, and whether it was applied."""
    results = []
    for step in steps:
        rows = global_batch(step, ROWS)
        target_tokens = sum(row.num_target_tokens for row in rows)
        micro_steps = ROWS // (case.rows_per_rank * world.size)
        total = torch.zeros(())
        for micro in range(micro_steps):
            first = (micro * world.size + world.rank) * case.rows_per_rank
            scale = 1 / target_tokens
            if (step, world.rank) in case.poison and micro == 0:
                scale = float("inf")
            total = total + engine.backward(joined(rows[first : first + case.rows_per_rank]), scale)
        result = engine.update(case.lrs[step % len(case.lrs)])
        (loss,) = world.sum([float(total)])
        results.append({"loss": loss / target_tokens, "norm": result.grad_norm, "applied": result.applied})
    return results


def train_and_report(world: World, case: Case, steps: int, tmp: str) -> dict[str, Any]:
    """Losses and norms of `steps` steps, and the weights before and after (rank 0 alone returns these)."""
    engine = build(world, case, Path(tmp))
    before = {name: tensor.clone() for name, tensor in engine.weights()}
    results = train_steps(engine, world, case, range(steps))
    after = {name: tensor.clone() for name, tensor in engine.weights()}
    evaluated = engine.evaluate(joined(global_batch(99, 2)))
    report = {
        "steps": results,
        "evaluated": float(evaluated[0]) / evaluated[1],
        "buffers": {name: str(buffer.dtype) for name, buffer in engine.model.named_buffers()},
        "description": engine.describe(),
        "optimizer_step": engine.optimizer_step,
    }
    engine.close()
    return report | ({"before": before, "after": after} if world.rank == 0 else {})
