"""Two hundred steps beside the oracle, in fp32 and in bf16 with float32 masters (DESIGN section 4)."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from ds_recipes.config.engine_settings import engine_settings
from tests.contract.differences import note
from tests.contract.engines import ENGINES, Case, initial_weights, rows_of, settings, train_and_report
from tests.contract.oracle import Oracle, llama
from tests.contract.shared import Planned, alone, planned, report

STEPS = 200
ROWS = 4
GENTLE, LIVELY = 1e-4, 1e-3
CURVE = Case(optimizer="adamw", weight_decay=0.1, clip=1.0, rows=ROWS, skewed=True)
CURVES = {
    "gentle": planned(2, train_and_report, replace(CURVE, lrs=(GENTLE,)), STEPS),
    "bf16": planned(2, train_and_report, replace(CURVE, lrs=(GENTLE,), rows_per_rank=2, precision="bf16"), STEPS),
}
LIVELY_CURVE = Planned(2, train_and_report, replace(CURVE, lrs=(LIVELY,), rows_per_rank=2), (STEPS,))
GENTLE_BOUND = 1e-5
BF16_BAND = 4e-3
"""Largest distance in nats of a bf16 run from the fp32 oracle over the gentle curve. Measured: 1.1e-3 for both engines."""


@cache
def oracle_losses(lr: float, perturbed: float | None = None) -> list[float]:
    oracle = Oracle(llama(False), initial_weights(CURVE), "adamw", weight_decay=0.1, clip=1.0)
    noise = None if perturbed is None else (perturbed, torch.Generator().manual_seed(5))
    return [oracle.step(rows_of(CURVE, step), lr, noise)[0] for step in range(STEPS)]


def largest_gap(one: list[float], other: list[float]) -> float:
    return max(abs(mine - theirs) for mine, theirs in zip(one, other, strict=True))


def losses(curve: str, engine: str) -> list[float]:
    return [result["loss"] for result in report(CURVES[curve], engine)["steps"]]


@pytest.mark.parametrize("engine", ENGINES)
def test_at_1e4_losses_stay_within_1e5_of_the_oracles_and_fall(engine):
    mine = losses("gentle", engine)
    assert note("losses of 200 steps at lr 1e-4", engine, largest_gap(mine, oracle_losses(GENTLE))) < GENTLE_BOUND
    assert sum(mine[-8:]) < 0.9 * sum(mine[:8]), "nothing was learned: the test shows less than it says"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_at_1e3_losses_stay_as_near_as_rounding_lets_the_oracle_be_to_itself(engine):
    plain, what = oracle_losses(LIVELY), "losses of 200 steps at lr 1e-3"
    own = note(what, "oracle perturbed by 1e-7", largest_gap(oracle_losses(LIVELY, 1e-7), plain))
    mine = [result["loss"] for result in alone(LIVELY_CURVE, engine)["steps"]]
    assert note(what, engine, largest_gap(mine, plain)) < max(3 * own, GENTLE_BOUND)


def test_the_engines_stay_as_near_to_each_other():
    for curve, bound in (("gentle", GENTLE_BOUND), ("bf16", BF16_BAND)):
        gap = largest_gap(*(losses(curve, engine) for engine in ENGINES))
        what = "losses of 200 steps at lr 1e-4" if curve == "gentle" else "losses of 200 steps in bf16 at lr 1e-4"
        assert note(what, "between them", gap) < bound


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_tracks_fp32_with_fp32_masters_and_fp32_rotary_frequencies(engine, tmp_path):
    seen = report(CURVES["bf16"], engine)
    gap = largest_gap(losses("bf16", engine), oracle_losses(GENTLE))
    assert 1e-5 < note("losses of 200 steps in bf16 at lr 1e-4", engine, gap) < BF16_BAND
    assert seen["buffers"]["model.rotary_emb.inv_freq"] == "torch.float32"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("curve", ["gentle", "bf16"])
def test_the_engine_says_of_itself_what_the_settings_ask_for(engine, curve, tmp_path):
    description = report(CURVES[curve], engine)["description"]
    asked = engine_settings(settings(replace(CURVES[curve].case, engine=engine), tmp_path)).precision
    assert description["engine"] == engine
    for key in ("parameters", "master", "moments", "gradient_accumulation", "reduction"):
        assert description[key] == getattr(asked, key), key
