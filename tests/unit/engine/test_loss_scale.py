"""Loss scaling goes exactly as DeepSpeed's does, and as torch's where the two mean the same."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler

from ds_recipes.config.engine_settings import LossScaling
from ds_recipes.engine.loss_scale import LossScaler
from ds_recipes.errors import TrainingError

DEFAULT = LossScaling(static=None, initial_power=16, window=1000, hysteresis=2, consecutive_hysteresis=False, least=1.0)


def settings_of(draw: random.Random) -> LossScaling:
    return LossScaling(
        static=None,
        initial_power=draw.choice([2, 8, 16, 32]),
        window=draw.choice([1, 2, 3, 7, 20]),
        hysteresis=draw.choice([1, 2, 3, 5]),
        consecutive_hysteresis=draw.random() < 0.5,
        least=draw.choice([0.25, 1.0, 3.0, 128.0]),
    )


def deepspeeds(settings: LossScaling) -> loss_scaler.DynamicLossScaler:
    return loss_scaler.DynamicLossScaler(
        init_scale=2**settings.initial_power,
        scale_window=settings.window,
        min_scale=settings.least,
        delayed_shift=settings.hysteresis,
        consecutive_hysteresis=settings.consecutive_hysteresis,
    )


@pytest.mark.parametrize("seed", range(200))
def test_it_goes_as_deepspeeds_over_any_sequence_of_overflows(seed, monkeypatch):
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # it asks who is to write to the log
    draw = random.Random(seed)
    settings = settings_of(draw)
    ours, theirs = LossScaler(settings), deepspeeds(settings)
    share = draw.choice([0.02, 0.1, 0.3, 0.7])
    for number in range(300):
        overflow = draw.random() < share
        failed = []
        for update in (ours.update, theirs.update_scale):
            try:
                update(overflow)
            except TrainingError as error:
                assert "min_loss_scale" in str(error)
                failed.append("ours")
            except Exception as error:
                assert "already at minimum" in str(error)
                failed.append("theirs")
        assert failed in ([], ["ours", "theirs"])
        if failed:
            return
        assert ours.scale == theirs.cur_scale, (number, settings)
        assert ours.state() == {
            "scale": theirs.cur_scale,
            "good_steps": theirs.cur_iter - theirs.last_overflow_iter - 1,
            "hysteresis_left": theirs.cur_hysteresis,
        }


@pytest.mark.parametrize("seed", range(50))
def test_a_scaler_that_is_loaded_goes_on_as_the_one_that_was_saved(seed):
    draw = random.Random(seed)
    settings = replace(settings_of(draw), least=2.0**-60)
    whole = LossScaler(settings)
    for number in range(120):
        if number == 60:
            loaded = LossScaler(settings)
            loaded.load(whole.state())
        overflow = draw.random() < 0.2
        whole.update(overflow)
        if number >= 60:
            loaded.update(overflow)
            assert loaded.state() == whole.state()


def torchs_scales(good_runs: list[int], power: int, window: int) -> list[list[float]]:
    """torch's scale after each step, for runs of good steps with an overflow after each run."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power, growth_interval=window)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scales = []
    for run in good_runs:
        scales.append([])
        for value in [1.0] * run + [float("inf")]:
            parameter.grad = torch.tensor([value])
            scaler.scale(torch.ones(1))
            scaler.step(optimizer)
            scaler.update()
            scales[-1].append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("seed", range(20))
def test_with_one_hysteresis_it_goes_as_torchs_but_doubles_one_step_later(seed):
    """torch doubles after the last step of a window, DeepSpeed after the first step of the next.

    So they part only where an overflow comes right between; and torch knows no least scale.
    """
    draw = random.Random(seed)
    window = draw.choice([2, 3, 5])
    runs = [draw.choice([run for run in range(1, 4 * window) if run % window]) for _ in range(30)]
    theirs = torchs_scales(runs, 16, window)
    ours = LossScaler(replace(DEFAULT, window=window, hysteresis=1, least=2.0**-60))
    for run, expected in zip(runs, theirs, strict=True):
        mine = []
        for _ in range(run):
            ours.update(overflow=False)
            mine.append(ours.scale)
        ours.update(overflow=True)
        assert mine[1:] == expected[: run - 1]
        assert ours.scale == expected[run], "after the overflow they are the same again"


def test_where_an_overflow_follows_a_whole_window_torchs_is_twice_as_large():
    expected = torchs_scales([4], 16, window=4)[0]
    ours = LossScaler(replace(DEFAULT, window=4, hysteresis=1))
    for overflow in [False] * 4 + [True]:
        ours.update(overflow)
    assert (ours.scale, expected[-1]) == (2.0**15, 2.0**16)


def test_a_fixed_scale_stays_what_it_is():
    scaler = LossScaler(replace(DEFAULT, static=128.0))
    for overflow in (True, False, True, True):
        scaler.update(overflow)
    scaler.load({"scale": 4.0, "good_steps": 1.0, "hysteresis_left": 1.0})
    assert scaler.scale == 128.0 and scaler.state() == {}


def test_an_overflow_at_the_least_scale_ends_the_run_in_one_line():
    scaler = LossScaler(replace(DEFAULT, initial_power=1, hysteresis=1))
    scaler.update(overflow=True)
    with pytest.raises(TrainingError, match=r"at its least, 1 \(fp16.min_loss_scale\)") as raised:
        scaler.update(overflow=True)
    assert "\n" not in str(raised.value)


def test_it_doubles_after_each_window_and_spends_hysteresis_first():
    scaler, scales = LossScaler(replace(DEFAULT, window=2)), []
    for overflow in [True, True, True] + [False] * 6 + [True, True]:
        scaler.update(overflow)
        scales.append(scaler.scale)
    assert [after / before for before, after in pairwise([2.0**16, *scales])] == [1, 0.5, 0.5, 1, 1, 2, 1, 2, 1, 1, 0.5]
