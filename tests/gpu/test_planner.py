"""The planner's memory against `torch.cuda.max_memory_allocated`, on one GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ds_recipes.config.plan import make_plan
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import ModelSource
from ds_recipes.planner.peak import moments, worst
from ds_recipes.planner.shapes import architecture_of
from ds_recipes.planner.situation import situation_of
from ds_recipes.world.group import World, start
from ds_recipes.world.resolve import Place
from tests.ranks.planned import LLAMA, Case, two_documents_a_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use"),
]

CLOSE = 0.10
MODEL: dict[str, Any] = {
    **LLAMA,
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
LONG = ("--context_size", "2048", "--batch_size_training", "2")
CASES = {
    "zero3": Case(LONG, MODEL),
    "zero3 checkpointed": Case((*LONG, "--activation_checkpointing"), MODEL),
    "zero2 checkpointed": Case((*LONG, "--activation_checkpointing"), MODEL, {"stage": 2}),
    "fsdp checkpointed": Case((*LONG, "--activation_checkpointing", "--engine", "fsdp"), MODEL),
}


@pytest.fixture(scope="module")
def world() -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = Place(0, 1, 0, 1, "a test", "127.0.0.1", server.port, hosted=True)
    started: World = start(place, timeout_seconds=60, with_deepspeed=True)
    yield started
    started.close()


@pytest.mark.parametrize("name", CASES)
def test_the_allocators_peak_is_as_planned(name: str, world: World, tmp_path: Path) -> None:
    case = CASES[name]
    config = case.config(tmp_path)
    plan = make_plan(config, 1)
    values = json.loads(json.dumps(case.model))
    source = ModelSource(AutoConfig.for_model(values.pop("model_type"), **values), None, 7, False)
    before = torch.cuda.memory_allocated()
    engine = create_engine(config, plan, source, world)
    engine.load_shards(source.initial_weights(world.device))
    batch = two_documents_a_row(plan.rows_per_rank, plan.context_size, case.model["vocab_size"], "cuda")
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        engine.backward(batch, 1 / batch.num_target_tokens)
        engine.update(1e-4)
    peak = torch.cuda.max_memory_allocated() - before
    engine.close()
    situation, _ = situation_of(config, 1, 1, "cuda")
    planned = worst(moments(architecture_of(case.model, name), situation)).parts.total
    assert planned == pytest.approx(peak, rel=CLOSE)
