"""What one ZeRO stage saves, itself and every other stage takes up; frozen parameters at every stage."""

import tempfile
from functools import cache
from typing import Any

import pytest
import torch

from tests.contract.engines import ROWS
from tests.contract.oracle import Oracle, global_batch, llama
from tests.contract.zero_states import (
    LOW,
    OFFLOAD,
    UNEVEN,
    adam,
    frozen,
    loaded_and_continued,
    resumed,
    saved_after,
    zero,
)
from tests.ranks.launch import run_ranks

RESUMED = {
    "1": adam(zero(1)),
    "2 in another order": adam(zero(2, **UNEVEN), tied=True),
    "2 offloaded": adam(zero(2, **OFFLOAD)),
    "1 bf16": adam(zero(1), precision="bf16"),
    "2 bf16": adam(zero(2), precision="bf16"),
    "2 bf16 masters": adam(zero(2, {"bf16": LOW}), precision="bf16"),
    "3 bf16 masters": adam(zero(3, {"bf16": LOW}), precision="bf16"),
}


@cache
def resumes() -> list[list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as tmp:
        return run_ranks(resumed, 2, list(RESUMED.values()), tmp, timeout=300)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name):
    reads = 0
    for rank in resumes():
        found = rank[list(RESUMED).index(name)]
        expected, again = found["steps"]
        assert again == expected
        assert found["loaded"] and found["end"]
        reads += found["read"]
    assert reads == found["whole"], "ranks read more than their own ranges"


@pytest.mark.parametrize("before, after", [((2, 2), (3, 3)), ((3, 3), (2, 2)), ((1, 3), (2, 1))])
def test_every_stage_goes_on_from_what_another_one_saved_on_other_ranks(before, after, tmp_path):
    (stage, ranks), (next_stage, next_ranks) = before, after
    state, *others = run_ranks(saved_after, ranks, adam(zero(stage)), 4, str(tmp_path))
    assert all(
        torch.equal(state.tensors["exp_avg"][n], other.tensors["exp_avg"][n]) for other in others for n in state.names
    )
    cases = [adam(zero(next_stage)), adam(zero(next_stage), precision="bf16")]
    ((is_same, steps), (is_same_bf16, _)) = run_ranks(loaded_and_continued, next_ranks, cases, state, str(tmp_path))[0]
    assert is_same and is_same_bf16 and state.optimizer_step == 4
    oracle = oracle_from(state)
    for step, result in enumerate(steps, start=4):
        loss, norm = oracle.step(global_batch(step, ROWS), cases[0].lrs[step % 2])
        assert result["loss"] == pytest.approx(loss, rel=1e-6) and result["norm"] == pytest.approx(norm, rel=1e-5)


def oracle_from(state: Any) -> Oracle:
    """The oracle with a saved run's weights and moments."""
    oracle = Oracle(llama(tied=False), state.tensors["fp32"], "adamw", weight_decay=0.1, clip=0.5)
    for name, parameter in oracle.model.named_parameters():
        oracle._optimizer.state[parameter] = {
            "step": torch.tensor(float(state.optimizer_step)),
            "exp_avg": state.tensors["exp_avg"][name].clone(),
            "exp_avg_sq": state.tensors["exp_avg_sq"][name].clone(),
        }
    return oracle


TRAINED = ("layers.1.mlp", "layers.0.input_layernorm")
FROZEN = {
    f"{stage} {precision}": adam(zero(stage, stage3_param_persistence_threshold=2000), precision=precision)
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
}


@cache
def frozen_ones(ranks: int) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as tmp:
        found = run_ranks(frozen, ranks, list(FROZEN.values()), TRAINED, tmp, timeout=300)[0]
    return dict(zip(FROZEN, found, strict=True))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_stay_are_saved_and_loaded_and_have_no_moments(name, ranks):
    case, found = FROZEN[name], frozen_ones(ranks)[name]
    oracle = Oracle(llama(tied=False), found["before"], "adamw", weight_decay=0.1)
    loss, gradients = oracle.gradients(global_batch(0, ROWS))
    trained = {parameter for parameter in gradients if any(part in parameter for part in TRAINED)}
    assert set(found["before"]) == set(found["after"]) == set(gradients)
    for parameter, before in found["before"].items():
        assert torch.equal(before, found["after"][parameter]) == (parameter not in trained), parameter
    norm = torch.cat([gradients[parameter].flatten() for parameter in trained]).double().norm().item()
    exact = case.precision == "fp32"
    assert found["result"]["loss"] == pytest.approx(loss, rel=1e-6 if exact else 2e-3)
    assert found["result"]["norm"] == pytest.approx(norm, rel=1e-6 if exact else 3e-2)
    assert found["moments"] == trained and not found["gradients"]
    assert found["same"]
    after = Oracle(llama(tied=False), found["after"], "sgd")
    assert found["next_loss"] == pytest.approx(after.gradients(global_batch(0, ROWS))[0], rel=1e-6 if exact else 2e-3)
