"""fp16 under ZeRO. DeepSpeed refuses it on a CPU, though torch can compute it there: the tests lift that refusal alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.config.engine_settings import engine_settings
from ds_recipes.engine.loss_scale import LossScaler
from ds_recipes.world.group import World
from tests.contract.engines import ROWS, Case, build, rows_of, settings
from tests.contract.oracle import Oracle, global_batch, joined, llama
from tests.contract.zero_states import HUGE_LR, OFFLOAD, relative, zero
from tests.ranks.launch import run_ranks

OVERFLOWING = {"enabled": "auto", "initial_scale_power": 22, "hysteresis": 2, "loss_scale_window": 2}
GROWING = {"enabled": "auto", "initial_scale_power": 8, "loss_scale_window": 1}
STEPS = 9
STAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "1 offloaded": (1, OFFLOAD),
    "2 offloaded": (2, OFFLOAD),
    "3 offloaded": (3, OFFLOAD),
}


def case_of(name: str, section: dict[str, Any], **changes: Any) -> Case:
    stage, keys = STAGES[name]
    return Case(precision="fp16", rows_per_rank=2, ds=zero(stage, {"fp16": section}, **keys), **changes)


CASES = {
    **{f"overflowing {name}": case_of(name, OVERFLOWING, optimizer="adamw", lrs=(1e-3,)) for name in STAGES},
    **{f"growing {name}": case_of(name, GROWING, lrs=(0.0, HUGE_LR)) for name in STAGES},
}


def in_fp16(world: World, tmp: str) -> dict[str, dict[str, Any]]:
    """Each case's steps with the state of the loss scaling after each, and the weights before and after."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return {name: trained(world, case, STEPS if "overflowing" in name else 2, tmp) for name, case in CASES.items()}


def trained(world: World, case: Case, steps: int, tmp: str) -> dict[str, Any]:
    engine = build(world, case, Path(tmp))
    before = {name: tensor.clone() for name, tensor in engine.weights()}
    results, states = [], [engine.scaler_state()]
    for step in range(steps):
        rows = rows_of(case, step)
        scale = 1 / sum(row.num_target_tokens for row in rows)
        for first in range(2 * world.rank, ROWS, 2 * world.size):
            engine.backward(joined(rows[first : first + 2]), scale)
        results.append(engine.update(case.lrs[step % len(case.lrs)]))
        states.append(engine.scaler_state())
    after = {name: tensor.clone() for name, tensor in engine.weights()}
    description = engine.describe()
    engine.close()
    return {"before": before, "after": after, "results": results, "states": states, "description": description}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(in_fp16, 2, str(tmp_path_factory.mktemp("fp16")), timeout=300)


@pytest.mark.parametrize("name", STAGES)
def test_overflowing_steps_are_skipped_and_the_scale_goes_the_other_engines_way(seen, name, tmp_path):
    report, other = (rank[f"overflowing {name}"] for rank in seen)
    assert report["results"] == other["results"] and report["states"] == other["states"]
    asked = engine_settings(settings(CASES[f"overflowing {name}"], tmp_path))
    for key in ("parameters", "master", "moments", "gradient_accumulation", "reduction"):
        assert report["description"][key] == getattr(asked.precision, key), key
    assert asked.loss_scaling is not None
    reference = LossScaler(asked.loss_scaling)
    oracle = Oracle(llama(tied=False), report["before"], "adamw", weight_decay=0.0)
    for step, result in enumerate(report["results"]):
        assert report["states"][step] == reference.state() and result.loss_scale == reference.scale
        reference.update(overflow=not result.applied)
        if result.applied:
            _, norm = oracle.step(global_batch(step, ROWS), 1e-3)
            assert result.grad_norm == pytest.approx(norm, rel=2e-3)
    assert {result.applied for result in report["results"]} == {True, False}
    for parameter, weight in oracle.weights().items():
        assert relative(report["after"][parameter], weight) < 1e-2, parameter


@pytest.mark.parametrize("name", STAGES)
def test_the_gradient_of_a_step_that_lets_the_scale_grow_is_whole(seen, name):
    report = seen[0][f"growing {name}"]
    assert report["states"][2]["scale"] == 2 * report["states"][1]["scale"]
    gradients = Oracle(llama(tied=False), report["before"], "sgd").gradients(global_batch(1, ROWS))[1]
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).double().norm().item()
    assert report["results"][1].grad_norm == pytest.approx(norm, rel=2e-3)
    for parameter, gradient in gradients.items():
        mine = (report["before"][parameter].double() - report["after"][parameter].double()) / HUGE_LR
        assert relative(mine, gradient) < 1e-2, parameter
