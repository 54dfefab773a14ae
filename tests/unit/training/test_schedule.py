"""The learning rate's course: bounds, continuity, direction, and the values at its corners."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from ds_recipes.config.plan import Plan, make_plan
from ds_recipes.config.schema import Config, OptimizerConfig, RunConfig
from ds_recipes.errors import ConfigError
from ds_recipes.training.schedule import lr_at

STYLES = ("cosine", "linear", "constant", "wsd", "inverse_sqrt")
TOTAL = 200


def plan_of(style: str, warmup: float = 20, decay: float | None = None, lr: float = 3e-4, lr_min: float = 3e-5) -> Plan:
    optimizer = OptimizerConfig(lr=lr, lr_min=lr_min, lr_warmup=warmup, lr_decay=decay, lr_decay_style=style)
    return make_plan(Config(run=RunConfig(max_steps=TOTAL), optimizer=optimizer), world_size=1)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("warmup", [0, 0.05, 20, 150])
def test_the_rate_is_positive_bounded_and_at_its_peak_after_the_warm_up(style: str, warmup: float) -> None:
    plan = plan_of(style, warmup)
    assert plan.warmup_steps is not None
    rates = [lr_at(step, plan) for step in range(2 * TOTAL)]
    assert all(0 < rate <= plan.lr for rate in rates)
    assert all(rate >= plan.lr_min for rate in rates[plan.warmup_steps :])
    assert rates[plan.warmup_steps] == plan.lr
    warmup_steps = plan.warmup_steps
    assert all(earlier < later for earlier, later in pairwise(rates[: warmup_steps + 1]))
    assert all(earlier >= later for earlier, later in pairwise(rates[warmup_steps:]))


@pytest.mark.parametrize("style", STYLES)
def test_no_step_jumps(style: str) -> None:
    plan = plan_of(style)
    rates = [lr_at(step, plan) for step in range(TOTAL + 50)]
    steepest = 2 * plan.lr / 20  # the steepest part: a warm-up or a decay of 20 steps
    assert max(abs(later - earlier) for earlier, later in pairwise(rates)) <= steepest


@pytest.mark.parametrize("style", STYLES)
def test_the_first_and_the_last_update_move_the_weights_without_a_lower_bound(style: str) -> None:
    plan = plan_of(style, lr_min=0.0)
    assert lr_at(0, plan) > 0
    assert lr_at(TOTAL - 1, plan) > 0


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_the_decay_ends_at_its_share_of_the_run(style: str) -> None:
    plan = plan_of(style, decay=0.8)
    assert lr_at(159, plan) > plan.lr_min
    assert all(lr_at(step, plan) == plan.lr_min for step in range(160, TOTAL + 1))
    assert lr_at(90, plan) == pytest.approx((plan.lr + plan.lr_min) / 2)  # half way from step 20 to step 160


def test_wsd_holds_the_rate_and_falls_in_a_line_at_the_end() -> None:
    plan = plan_of("wsd", decay=0.25)
    assert all(lr_at(step, plan) == plan.lr for step in range(20, 151))
    assert lr_at(175, plan) == pytest.approx((plan.lr + plan.lr_min) / 2)
    assert lr_at(TOTAL, plan) == plan.lr_min


def test_inverse_sqrt_halves_when_the_steps_are_fourfold() -> None:
    plan = plan_of("inverse_sqrt", lr_min=0.0)
    assert lr_at(80, plan) == pytest.approx(plan.lr / 2)
    assert lr_at(10**9, plan_of("inverse_sqrt")) == 3e-5
    assert lr_at(3, plan_of("inverse_sqrt", warmup=0, lr_min=0.0)) == pytest.approx(3e-4 / 2)


def test_cosine_is_the_cosine_of_the_paper() -> None:
    plan = plan_of("cosine", warmup=0, lr_min=0.0)
    for step in (0, 7, 100, 199):
        assert lr_at(step, plan) == pytest.approx(plan.lr * (1 + math.cos(math.pi * step / TOTAL)) / 2)


@pytest.mark.parametrize("decay_style", ["constant", "inverse_sqrt", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup_style", ["linear", "log"])
def test_every_warm_up_that_is_taken_reaches_lr_within_the_run(decay_style: str, warmup_style: str) -> None:
    for total in (1, 2, 3, 6, 50):
        for warmup in (0.0, 0.02, 0.5, 0.99, 1.0, 2, 3, total - 1, total, total + 1):
            optimizer = OptimizerConfig(
                lr=1e-4, lr_warmup=float(warmup), lr_decay_style=decay_style, lr_warmup_style=warmup_style
            )
            try:
                plan = make_plan(Config(run=RunConfig(max_steps=total), optimizer=optimizer), 1)
            except ConfigError:
                assert warmup >= total - 1 or warmup == 1 or decay_style == "wsd"
                continue
            assert max(lr_at(step, plan) for step in range(total)) == pytest.approx(plan.lr)


@pytest.mark.parametrize("warmup", [1, 2, 7, 150])
@pytest.mark.parametrize("start", [0.0, 1e-4])
def test_a_logarithmic_warm_up_rises_from_its_start_fast_at_first(warmup: int, start: float) -> None:
    """The shape itself is held against DeepSpeed's own in tests/unit/config/test_ds_oracle.py."""
    optimizer = OptimizerConfig(lr=3e-4, lr_warmup=max(warmup, 2), lr_warmup_style="log", lr_warmup_start=start)
    plan = replace(make_plan(Config(run=RunConfig(max_steps=TOTAL), optimizer=optimizer), 1), warmup_steps=warmup)
    rates = [lr_at(step, plan) for step in range(warmup + 1)]
    assert start < rates[0] and rates[warmup - 1] == pytest.approx(plan.lr, rel=1e-12) and rates[warmup] == plan.lr
    steps = [later - earlier for earlier, later in pairwise(rates[:-1])]
    assert all(earlier > later > 0 for earlier, later in pairwise(steps))


def test_a_linear_warm_up_rises_in_a_line_from_its_start() -> None:
    optimizer = OptimizerConfig(lr=5e-4, lr_warmup=4, lr_warmup_start=1e-4, lr_decay_style="constant")
    plan = make_plan(Config(run=RunConfig(max_steps=TOTAL), optimizer=optimizer), 1)
    assert [lr_at(step, plan) for step in range(5)] == pytest.approx([1.8e-4, 2.6e-4, 3.4e-4, 4.2e-4, 5e-4])
