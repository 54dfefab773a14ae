"""What a rank does in the contract tests: build an engine, train it on its share of each global batch, report."""

import contextlib
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config
from ds_recipes.data.batch import MicroBatch
from ds_recipes.engine.base import Engine
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import ModelSource
from ds_recipes.ranges import NONE_MISSED, RangeReader
from ds_recipes.world.group import World
from tests.contract.oracle import CONTEXT, freeze, global_batch, joined, llama, skewed_batch

ENGINES = ("deepspeed", "fsdp")

ROWS = 12
"""Rows of a global batch: divisible over 1, 2, 3 and 4 ranks."""

HUGE_LR = 2.0**20
"""One SGD step this long leaves weights that are the gradient, to float32's last digits."""

SEED = 7


@dataclass(frozen=True)
class Case:
    """One way to train: the model, the optimizer, and how a global batch is split."""

    tied: bool = False
    optimizer: str = "sgd"
    precision: str = "fp32"
    rows: int = ROWS
    rows_per_rank: int = 1
    weight_decay: float = 0.0
    clip: float = 0.0
    checkpointing: bool = False
    engine: str = "deepspeed"
    ds: str | None = None  # a DeepSpeed JSON's text, or the name of a file of ds_configs/
    lrs: tuple[float, ...] = (0.01,)
    folder: str | None = None
    frozen: str | None = None  # a pattern of names of parameters that are not trained
    skewed: bool = False  # batches that can be learned
    poison: tuple[tuple[int, int], ...] = ()  # (step, rank whose loss becomes infinite)
    infinite: tuple[tuple[int, int], ...] = ()  # (step, rank where one gradient becomes infinite and none NaN)


@dataclass(frozen=True)
class Source(ModelSource):
    """A model of which some parameters are frozen."""

    frozen: str | None = None

    def skeleton(self, dtype: torch.dtype, attn_implementation: str, device: torch.device) -> PreTrainedModel:
        model = super().skeleton(dtype, attn_implementation, device)
        freeze(model, self.frozen)
        return model


def settings(case: Case, tmp: Path) -> Config:
    flags = [
        *("--engine", case.engine, "--save_checkpoint_path", str(tmp / "run"), "--train_data", "unused.jsonl"),
        *("--model_config", "unused.json", "--tokenizer_name", "unused"),
        *("--context_size", str(CONTEXT), "--max_steps", "1000", "--precision", case.precision),
        *("--batch_size_training", str(case.rows_per_rank), "--global_batch_size", str(case.rows)),
        *("--optimizer_type", case.optimizer, "--weight_decay", str(case.weight_decay)),
        *("--max_grad_norm", str(case.clip)),
    ]
    if case.checkpointing:
        flags.append("--activation_checkpointing")
    if case.ds is not None:
        flags += ["--ds_config", str(_json_file(case.ds, tmp))]
    return load_config(flags)


def _json_file(ds: str, tmp: Path) -> Path:
    if not ds.startswith("{"):
        return Path(__file__).parents[2] / "ds_configs" / ds
    path = tmp / f"ds-{os.getpid()}.json"
    path.write_text(ds)
    return path


def source_of(case: Case) -> Source:
    return Source(llama(case.tied), None if case.folder is None else Path(case.folder), SEED, False, frozen=case.frozen)


def build(world: World, case: Case, tmp: Path) -> Engine:
    config = settings(case, tmp)
    source = source_of(case)
    engine = create_engine(config, make_plan(config, world.size), source, world)
    engine.load_shards(source.initial_weights(world.device))
    return engine


def rows_of(case: Case, step: int) -> list[MicroBatch]:
    """The global batch of a step."""
    return skewed_batch(step, case.rows) if case.skewed else global_batch(step, case.rows)


def train_steps(engine: Engine, world: World, case: Case, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Train global steps `steps`; each returns the loss a target token, the norm, and whether it was applied."""
    results = []
    for step in steps:
        rows = rows_of(case, step)
        target_tokens = sum(row.num_target_tokens for row in rows)
        micro_steps = case.rows // (case.rows_per_rank * world.size)
        total = torch.zeros(())
        for micro in range(micro_steps):
            first = (micro * world.size + world.rank) * case.rows_per_rank
            scale = 1 / target_tokens
            if (step, world.rank) in case.poison and micro == 0:
                scale = float("inf")
            is_infinite = (step, world.rank) in case.infinite and micro == 0
            with one_infinite_gradient(engine) if is_infinite else contextlib.nullcontext():
                loss = engine.backward(joined(rows[first : first + case.rows_per_rank]), scale)
            total = total + loss.cpu()
        result = engine.update(case.lrs[step % len(case.lrs)])
        (loss,) = world.sum([float(total)])
        results.append({"loss": loss / target_tokens, "norm": result.grad_norm, "applied": result.applied})
    return results


@contextlib.contextmanager
def one_infinite_gradient(engine: Engine) -> Iterator[None]:
    """One number of what reaches the embedding's output in the backward pass is infinite: a norm of infinity, no NaN."""

    def put(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = float("inf")
        return gradient

    embedding = next(module for module in engine.model.modules() if isinstance(module, torch.nn.Embedding))
    handle = embedding.register_forward_hook(lambda module, inputs, output: output.register_hook(put) and None)
    try:
        yield
    finally:
        handle.remove()


def train_and_report(world: World, case: Case, steps: int, tmp: str) -> dict[str, Any]:
    """Losses and norms of `steps` steps, and the weights before and after (rank 0 alone returns these)."""
    engine = build(world, case, Path(tmp))
    before = copied_weights(engine)
    results = train_steps(engine, world, case, range(steps))
    after = copied_weights(engine)
    evaluated = engine.evaluate(joined(global_batch(99, 2)))
    report = {
        "steps": results,
        "evaluated": float(evaluated[0]) / evaluated[1],
        "buffers": {name: str(buffer.dtype) for name, buffer in engine.model.named_buffers()},
        "description": engine.describe(),
        "optimizer_step": engine.optimizer_step,
        "with_moments": sorted({shard.name for shard in engine.shards() if shard.exp_avg is not None}),
    }
    engine.close()
    return report | ({"before": before, "after": after} if world.rank == 0 else {})


def copied_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Full float32 tensors by name, on every rank. Every rank must call it."""
    return {name: tensor.clone().cpu() for name, tensor in engine.weights()}


class GivenWeights:
    """A range reader over full tensors in memory."""

    optimizer_step = 0
    missed_steps = NONE_MISSED

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights

    @property
    def names(self) -> list[str]:
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def has(self, kind: str) -> bool:
        return kind == "fp32"

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self._weights[name].reshape(-1)[start : start + out.numel()])


def initial_weights(case: Case) -> dict[str, torch.Tensor]:
    """What every engine begins with, as full tensors."""
    reader: RangeReader = source_of(case).initial_weights(torch.device("cpu"))
    weights = {}
    for name in reader.names:
        weights[name] = torch.empty(reader.shape(name))
        reader.read_into("fp32", name, 0, weights[name].view(-1))
    return weights


def traced(function: Any, *args: Any) -> dict[str, Any]:
    """What the function returns, or its traceback under "error": one case must not hide the others."""
    try:
        result: dict[str, Any] = function(*args)
        return result
    except Exception:
        return {"error": traceback.format_exc()}
