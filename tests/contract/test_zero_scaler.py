"""DeepSpeed's loss scaler goes on where its state was taken, and so does the other engine's from it."""

import pytest
import torch

from ds_recipes.config.engine_settings import LossScaling
from ds_recipes.engine.loss_scale import LossScaler
from ds_recipes.errors import TrainingError
from ds_recipes.world.group import World
from tests.ranks.launch import run_ranks

TAKEN_AFTER = (0, 1, 2, 5, 17, 40, 73)


def scales_after(_: World, consecutive: bool) -> list[list[tuple[float, float, float]]]:
    """The next 50 scales of DeepSpeed's own, of one that took its state, and of FSDP2's that took it."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.fp16.loss_scaler import LossScaler as FixedLossScaler

    from ds_recipes.engine.zero3 import scaler

    found = []
    for steps in TAKEN_AFTER:
        generator = torch.Generator().manual_seed(steps)
        verdicts = (torch.rand(steps + 50, generator=generator) < 0.25).tolist()
        straight, again = (DynamicLossScaler(2.0**16, 3, 2.0**-40, 2, consecutive) for _ in range(2))
        for verdict in verdicts[:steps]:
            straight.update_scale(verdict)
        scaler.hold(again)
        before = scaler.to_state(again)
        scaler.from_state(again, {})
        assert scaler.to_state(again) == before
        scaler.from_state(again, scaler.to_state(straight))
        of_fsdp = LossScaler(LossScaling(None, 16, 3, 2, consecutive, 2.0**-40))
        of_fsdp.load(scaler.to_state(straight))
        scales = []
        for verdict in verdicts[steps:]:
            assert scaler.to_state(again) == scaler.to_state(straight) == of_fsdp.state()
            scales.append((straight.cur_scale, again.cur_scale, of_fsdp.scale))
            straight.update_scale(verdict)
            scaler.update(again, verdict)
            of_fsdp.update(verdict)
        found.append(scales)
    assert scaler.to_state(FixedLossScaler(128.0)) == {}
    return found


@pytest.mark.parametrize("consecutive", [True, False])
def test_the_next_fifty_scales_are_the_same_in_both_engines(consecutive):
    for scales in run_ranks(scales_after, 1, consecutive)[0]:
        assert all(len(set(three)) == 1 for three in scales)
        assert len(set(scales)) > 3, "the scale hardly moved: the test shows less than it says"


def overflows_until_refused(_: World) -> tuple[int, int, str]:
    """How many overflows DeepSpeed's own scaler takes at its least scale, and how many ours does; and our message."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from ds_recipes.engine.zero3 import scaler

    own, held = (DynamicLossScaler(4.0, 100, 1, 2, False) for _ in range(2))
    scaler.hold(held)
    counts, message = [0, 0], ""
    try:
        for counts[0] in range(20):
            own.update_scale(True)
    except Exception as error:
        assert "already at minimum" in str(error)
    try:
        for counts[1] in range(20):
            scaler.update(held, True)
    except TrainingError as error:
        message = str(error)
    return counts[0], counts[1], message


def test_an_overflow_at_the_least_scale_is_an_error_for_users():
    own, held, message = run_ranks(overflows_until_refused, 1)[0]
    assert own == held < 19
    assert "fp16.min_loss_scale" in message and "bf16" in message
