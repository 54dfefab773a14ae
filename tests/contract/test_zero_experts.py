"""Mixtures of experts at stages 1 and 2: an expert that no token of one rank goes to changes neither gradient nor norm."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.config.plan import make_plan
from ds_recipes.engine.create import create_engine
from ds_recipes.world.group import World
from tests.contract.engines import Case, settings, train_steps
from tests.contract.experts import ChosenExperts, ExpertsOracle, ExpertsSource
from tests.contract.oracle import global_batch, llama
from tests.contract.zero_states import HUGE_LR, OFFLOAD, relative, zero
from tests.ranks.launch import run_ranks

ROWS = 2  # a row a rank: 32 tokens for 8 experts
STEP = 15
"""A batch in which experts 2 and 5 of the last layer have targets' tokens on one rank alone, and each rank uses as many
experts as the other: nothing but the gradient would tell that DeepSpeed has added those of different experts."""

ALONE = [f"model.layers.1.mlp.experts.{expert}.0.weight" for expert in (2, 5)]
PLAIN = Case(rows=ROWS, lrs=(HUGE_LR,), ds=zero(2))
CASES = {
    "1": replace(PLAIN, ds=zero(1)),
    "2": PLAIN,
    "2, checkpointed": replace(PLAIN, checkpointing=True),
    "2, offloaded": replace(PLAIN, ds=zero(2, **OFFLOAD)),
    "1, bf16": replace(PLAIN, ds=zero(1), precision="bf16"),
    "2, bf16": replace(PLAIN, precision="bf16"),
}


def trained(world: World, tmp: str) -> dict[str, dict[str, Any]]:
    """Of each case: the weights before and after a step, the norm, and the experts used in each forward."""
    found = {}
    for name, case in CASES.items():
        config = settings(case, Path(tmp))
        source = ExpertsSource(llama(tied=False), None, 7, False)
        engine = create_engine(config, make_plan(config, world.size), source, world)
        engine.load_shards(source.initial_weights(world.device))
        before = {key: tensor.clone() for key, tensor in engine.weights()}
        (step,) = train_steps(engine, world, case, [STEP])
        after = {key: tensor.clone() for key, tensor in engine.weights()}
        used = [block.used for block in engine.model.modules() if isinstance(block, ChosenExperts)]
        found[name] = {"before": before, "after": after, "norm": step["norm"], "used": used}
        engine.close()
    return found


def oracle_gradients(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The oracle's, with zeros for experts that no token went to."""
    oracle = ExpertsOracle(llama(tied=False), weights)
    rows = global_batch(STEP, ROWS)
    tokens = sum(row.num_target_tokens for row in rows)
    for row in rows:
        (oracle.loss_sum(row) / tokens).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in oracle.model.named_parameters()
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(trained, 2, str(tmp_path_factory.mktemp("experts")), timeout=120)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_oracles(seen, name):
    report, other = (rank[name] for rank in seen)
    one, theirs = (
        report["used"][1][-1],
        other["used"][1][-1],
    )  # the engine looks at its head first, with a forward of its own
    gradients = oracle_gradients(report["before"])
    if CASES[name].precision == "fp32":  # rounding sends tokens elsewhere
        assert one ^ theirs == {2, 5} and len(one) == len(theirs), "the test shows less than it says"
        assert all(gradients[key].any() for key in ALONE), "the test shows less than it says"
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).double().norm().item()
    assert report["norm"] == other["norm"]
    exact = CASES[name].precision == "fp32"
    assert report["norm"] == pytest.approx(norm, rel=1e-6 if exact else 5e-2)
    mine = {key: (report["before"][key].double() - report["after"][key].double()) / HUGE_LR for key in gradients}
    for key, gradient in gradients.items():
        if exact and gradient.any():
            assert relative(mine[key], gradient) < 1e-6, key
        elif exact:
            assert not mine[key].any(), key
    together = [torch.cat([tensors[key].flatten() for key in gradients]) for tensors in (mine, gradients)]
    assert relative(*together) < (1e-6 if exact else 0.1)
