"""A real engine's memory beside the planner's: what a rank does, and the cases."""

import gc
import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config
from ds_recipes.data.batch import MicroBatch
from ds_recipes.engine.base import Engine
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World
from tests.ranks.tensor_bytes import TensorBytes

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
WIDE = {**LLAMA, "vocab_size": 8192, "num_hidden_layers": 6}

ZERO: dict[str, Any] = {
    "stage": 3,
    "reduce_bucket_size": 300_000,
    "stage3_prefetch_bucket_size": 200_000,
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_live_parameters": 1_000_000,
    "stage3_max_reuse_distance": 400_000,
}
"""Limits so small that they matter for a model of some millions of parameters."""

STEPS = 3  # DeepSpeed records the order of modules in the first, and prefetches from the second on


@dataclass(frozen=True)
class Case:
    """One run: flags of train.py, the model's config and the zero_optimization section."""

    flags: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=lambda: LLAMA)
    zero: dict[str, Any] = field(default_factory=dict)

    def config(self, folder: Path) -> Config:
        model, ds = folder / "config.json", folder / "ds.json"
        model.write_text(json.dumps(self.model))
        ds.write_text(json.dumps({"zero_optimization": {**ZERO, **self.zero}}))
        needed = ("--tokenizer_name", "unused", "--train_data", "unused", "--save_checkpoint_path", "unused")
        names = ("--model_config", str(model), "--ds_config", str(ds), "--max_steps", "10")
        return load_config([*needed, *names, *self.flags])


@dataclass(frozen=True)
class Measured:
    """Bytes of tensors of one rank: between two steps, of those its weights and moments, and at the worst moment of a step."""

    between: int
    state: int
    peak: int


def measure_all(world: World, cases: list[Case]) -> list[Measured]:
    """Train each case for some steps; the last step counts."""
    return [measure(world, case) for case in cases]


def measure(world: World, case: Case) -> Measured:
    with tempfile.TemporaryDirectory() as name:
        config = case.config(Path(name))
    plan = make_plan(config, world.size)
    values = dict(case.model)
    source = ModelSource(AutoConfig.for_model(values.pop("model_type"), **values), None, 7, False)
    batch = two_documents_a_row(plan.rows_per_rank, plan.context_size, case.model["vocab_size"])
    gc.collect()
    with TensorBytes() as counted:
        engine = create_engine(config, plan, source, world)
        engine.load_shards(source.initial_weights(world.device))
        for _ in range(STEPS):
            gc.collect()
            counted.reset_peak()
            for _ in range(plan.micro_steps):
                engine.backward(batch, 1 / (plan.micro_steps * world.size * batch.num_target_tokens))
            engine.update(1e-4)
        between = counted.now
    measured = Measured(between, state_bytes(engine), counted.peak)
    engine.close()
    return measured


def state_bytes(engine: Engine) -> int:
    """Of the master weights and moments in the engine's own tensors."""
    total = 0
    for shard in engine.shards():
        total += sum(one.nbytes for one in (shard.fp32, shard.exp_avg, shard.exp_avg_sq) if one is not None)
    return total


def two_documents_a_row(rows: int, context: int, vocabulary: int, device: str = "cpu") -> MicroBatch:
    """Every position is a target."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, vocabulary, (rows, context), generator=generator)
    half = torch.arange(context // 2)
    positions = torch.cat([half, torch.arange(context - context // 2)]).repeat(rows, 1)
    every = torch.arange(rows * context)
    batch = MicroBatch(input_ids, positions, every, input_ids.flatten(), rows * context, 2 * rows, (0,))
    if device == "cpu":
        return batch
    tensors = ("input_ids", "position_ids", "target_index", "target_ids")
    return replace(batch, **{name: getattr(batch, name).to(device) for name in tensors})
