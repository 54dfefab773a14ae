"""How often parameters travel: a forward alone, such as an evaluation, must not make later steps gather more."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import DsConfig
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World
from tests.contract.engines import Case, settings, train_steps
from tests.contract.oracle import VOCABULARY, global_batch, joined, llama
from tests.ranks.launch import run_ranks

CASE = Case(rows_per_rank=6, lrs=(0.01,))
SHARD_EVERYTHING = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def gathers_a_step(world: World, when: str, tmp: str) -> list[int]:
    """Number of parameters gathered in each of six steps, with an evaluation and logits before the named step."""
    import deepspeed

    config = replace(settings(CASE, Path(tmp)), ds=DsConfig("here", SHARD_EVERYTHING))
    source = ModelSource(llama(tied=False), None, 7, False)
    engine = create_engine(config, make_plan(config, world.size), source, world)
    engine.load_shards(source.initial_weights(world.device))
    plain, count = deepspeed.comm.allgather_fn, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return plain(*args, **kwargs)

    deepspeed.comm.allgather_fn = counted
    counts = []
    for step in range(6):
        if when == f"before step {step}":
            engine.evaluate(joined(global_batch(99, 2)))
            engine.logits(torch.arange(16)[None] % VOCABULARY)
        count = 0
        train_steps(engine, world, CASE, [step])
        counts.append(count)
    engine.close()
    return counts


@pytest.mark.parametrize("when", ["before step 0", "before step 1", "before step 3"])
def test_a_forward_alone_does_not_make_later_steps_gather_more(when, tmp_path):
    undisturbed, disturbed = (run_ranks(gathers_a_step, 2, moment, str(tmp_path))[0] for moment in ("never", when))
    assert 0 < undisturbed[-1] < undisturbed[0], "the first step is not traced yet: the test shows less than it says"
    assert disturbed[-1] == undisturbed[-1]
