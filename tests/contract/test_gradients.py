"""The contract of DESIGN section 4, each engine against the oracle: gradients, norms, and what must not matter."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.world.group import World
from tests.contract.differences import note
from tests.contract.engines import (
    ENGINES,
    HUGE_LR,
    ROWS,
    Case,
    GivenWeights,
    build,
    copied_weights,
    initial_weights,
    rows_of,
    train_and_report,
    train_steps,
)
from tests.contract.oracle import Oracle, global_batch, joined, llama, norm_of
from tests.contract.shared import planned, report
from tests.ranks.launch import run_ranks

Tensors = dict[str, torch.Tensor]

GRADIENT = Case(lrs=(HUGE_LR,))
CLIPPED = 0.1
CLIPPED_BY = 1e-6
"""DeepSpeed adds this to the norm that it clips by, as torch's clip_grad_norm_ does."""

FIRST_STEPS = [
    planned(ranks, train_and_report, case, 1)
    for ranks, case in (
        (1, GRADIENT),
        (2, GRADIENT),
        (2, replace(GRADIENT, rows_per_rank=3)),
        (2, replace(GRADIENT, rows_per_rank=6)),  # no accumulation
        (2, replace(GRADIENT, rows=16)),  # accumulation over 8
        (3, replace(GRADIENT, tied=True)),
        (4, replace(GRADIENT, rows_per_rank=3)),
        (2, replace(GRADIENT, tied=True, checkpointing=True)),
        (2, replace(GRADIENT, ds="zero3_offload.json")),
        (2, replace(GRADIENT, clip=CLIPPED)),
        (2, replace(GRADIENT, tied=True, clip=CLIPPED)),
        (2, replace(GRADIENT, frozen="embed|layers.0.mlp", clip=CLIPPED)),
    )
]
WITHOUT_CLIPPING = planned(2, train_and_report, GRADIENT, 1)
ADAMW = planned(
    2, train_and_report, Case(optimizer="adamw", weight_decay=0.1, rows_per_rank=6, lrs=(1e-3, 5e-4, 0.0)), 6
)
FROZEN = planned(
    2,
    train_and_report,
    Case(optimizer="adamw", weight_decay=0.1, rows_per_rank=6, lrs=(1e-3,), frozen="embed|layers.0.mlp"),
    3,
)


def relative(mine: torch.Tensor, reference: torch.Tensor) -> float:
    return float((mine.double() - reference.double()).norm() / reference.double().norm())


def name_of(one: Any) -> str:
    case = one.case
    marks = [word for word in ("tied", "checkpointing", "frozen", "clip") if getattr(case, word)]
    split = f"{one.ranks}ranks-{case.rows // (one.ranks * case.rows_per_rank)}x{case.rows_per_rank}rows"
    return "-".join([split, *marks, *([] if case.ds is None else [case.ds])])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("one", FIRST_STEPS, ids=name_of)
def test_the_first_gradient_equals_the_oracles_however_the_batch_is_split(one, engine):
    seen, case = report(one, engine), one.case
    oracle = Oracle(llama(case.tied), seen["before"], "sgd", weight_decay=0.0, frozen=case.frozen)
    loss, gradients = oracle.gradients(global_batch(0, case.rows))
    norm = norm_of(gradients)
    assert note("first loss, relative", engine, abs(seen["steps"][0]["loss"] / loss - 1)) < 1e-6
    assert note("gradient norm, relative", engine, abs(seen["steps"][0]["norm"] / norm - 1)) < 1e-6
    factor = min(1.0, case.clip / norm) if case.clip else 1.0
    assert (factor < 1) == bool(case.clip), "nothing was clipped: the test shows less than it says"
    for name, before in seen["before"].items():
        moved = (before.double() - seen["after"][name].double()) / HUGE_LR
        if name in gradients:
            difference = relative(moved, gradients[name] * factor)
            bound = 1e-6 if factor == 1 else 1e-6 + CLIPPED_BY / norm
            assert note("gradient of one parameter, relative", engine, difference) < bound, name
        else:
            assert case.frozen and not moved.any(), name


def test_both_engines_move_the_weights_by_the_same_gradient():
    one, other = (report(WITHOUT_CLIPPING, engine) for engine in ENGINES)
    assert all(torch.equal(one["before"][name], other["before"][name]) for name in one["before"])
    for name, before in one["before"].items():
        moved = [before.double() - seen["after"][name].double() for seen in (one, other)]
        assert note("gradient of one parameter, relative", "between them", relative(*moved)) < 1e-6, name


def gradients_at(world: World, case: Case, folder: str, steps: tuple[int, ...], tmp: str) -> dict[str, Any]:
    """The weights before and after one huge step of SGD, from each file of weights, in one engine."""
    engine = build(world, case, Path(tmp))
    seen = []
    for step in steps:
        engine.load_shards(GivenWeights(torch.load(f"{folder}/{step}.pt", weights_only=True)))
        (result,) = train_steps(engine, world, case, [step])
        seen.append(result | {"after": copied_weights(engine)})
    engine.close()
    return {"steps": seen}


POINTS = (0, 40, 80, 119)
ALONG = replace(GRADIENT, rows_per_rank=3, skewed=True)


@cache
def along_a_run() -> dict[int, tuple[Tensors, float, Tensors, Tensors]]:
    """The oracle's weights at points of a run of its own, with loss and gradient, and the gradient in float64."""
    oracle = Oracle(llama(False), initial_weights(ALONG), "adamw", weight_decay=0.1, clip=1.0)
    points = {}
    for step in range(POINTS[-1] + 1):
        rows = rows_of(ALONG, step)
        if step in POINTS:
            exact = Oracle(llama(False), oracle.weights(), "sgd")
            exact.model.double()
            points[step] = (oracle.weights(), *oracle.gradients(rows), exact.gradients(rows)[1])
        oracle.step(rows, 1e-3)
    assert points[POINTS[-1]][1] < 0.9 * points[0][1], "nothing was learned: all points are the same"
    return points


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_from_the_same_weights_at_points_along_a_run(engine, tmp_path):
    """The whole gradient is the oracle's. One parameter's may be small beside what cancelled in it: the worst of them is
    about as near to float64 as the oracle's worst."""
    for step, (weights, *_) in along_a_run().items():
        torch.save(weights, tmp_path / f"{step}.pt")
    case = replace(ALONG, engine=engine)
    seen = run_ranks(gradients_at, 2, case, str(tmp_path), POINTS, str(tmp_path), timeout=200)[0]
    for mine, (weights, loss, gradients, exact) in zip(seen["steps"], along_a_run().values(), strict=True):
        assert mine["loss"] == pytest.approx(loss, rel=1e-6)
        assert mine["norm"] == pytest.approx(norm_of(gradients), rel=1e-6)
        moved = {name: (weights[name].double() - mine["after"][name].double()) / HUGE_LR for name in gradients}
        whole = relative(flat(moved), flat(gradients))
        assert note("whole gradient along a run, relative", engine, whole) < 1e-6
        worst = max(relative(moved[name], truth) for name, truth in exact.items())
        assert worst < 2 * max(relative(gradients[name], truth) for name, truth in exact.items())


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("one", [ADAMW, FROZEN], ids=["all", "frozen"])
def test_adamw_follows_the_oracle_with_its_learning_rate_and_decay_as_given(one, engine):
    seen, case = report(one, engine), one.case
    oracle = Oracle(llama(False), seen["before"], "adamw", weight_decay=0.1, frozen=case.frozen)
    for step, result in enumerate(seen["steps"]):
        loss, norm = oracle.step(global_batch(step, ROWS), case.lrs[step % len(case.lrs)])
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        assert result["norm"] == pytest.approx(norm, rel=1e-5)
    for name, weight in oracle.weights().items():
        assert relative(seen["after"][name], weight) < 1e-4, name
    trained = [name for name, parameter in oracle.model.named_parameters() if parameter.requires_grad]
    assert seen["with_moments"] == sorted(trained)
    frozen = set(seen["before"]) - set(trained)
    assert bool(frozen) == bool(case.frozen)
    assert all(torch.equal(seen["before"][name], seen["after"][name]) for name in frozen)


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_is_the_oracles_loss(engine):
    seen = report(WITHOUT_CLIPPING, engine)
    oracle = Oracle(llama(False), seen["after"], "sgd")
    batch = joined(global_batch(99, 2))
    with torch.no_grad():
        expected = float(oracle.loss_sum(batch)) / batch.num_target_tokens
    assert note("evaluation, relative", engine, abs(seen["evaluated"] / expected - 1)) < 2e-6


SKIPPING = Case(optimizer="adamw", lrs=(1e-3,), rows_per_rank=3, clip=1.0)
POISONED = {
    name: planned(2, train_and_report, case, 3)
    for name, case in {
        "fp32": replace(SKIPPING, poison=((1, 1),)),
        "bf16": replace(SKIPPING, precision="bf16", poison=((1, 1),)),
        "fp32, infinite and not NaN": replace(SKIPPING, infinite=((1, 1),)),
    }.items()
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", POISONED)
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(name, engine):
    seen = report(POISONED[name], engine)
    assert [result["applied"] for result in seen["steps"]] == [True, False, True]
    assert seen["optimizer_step"] == 2
    assert not any(tensor.isnan().any() for tensor in seen["after"].values())
