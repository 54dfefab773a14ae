"""DeepSpeed's loss scaling of fp16 in the terms of `Engine.scaler_state`."""

from typing import Any

from ds_recipes.errors import TrainingError


def hold(scaler: Any) -> None:
    """Keep the scale as it is during DeepSpeed's step; `update` changes it afterwards.

    DeepSpeed 0.19 updates it before it unscales the gradients (runtime/zero/stage_1_and_2.py and stage3.py, `step`): in a
    step that lets the scale grow they came out half as long, and at stage 3 so did their norm.
    """
    scaler.update_scale = lambda overflow: None


def update(scaler: Any, overflow: bool) -> None:
    """Note how a step went.

    Raises:
        TrainingError: an overflow at the least scale.
    """
    if overflow and scaler.dynamic and is_spent(scaler):
        raise TrainingError(
            f"the gradient overflowed with the loss scale at its least, {scaler.cur_scale:g} (fp16.min_loss_scale). Lower "
            "the learning rate, look at the data from there on, or train in bf16."
        )
    type(scaler).update_scale(scaler, overflow)


def is_spent(scaler: Any) -> bool:
    """True where the next overflow would have to lower a scale that is at its least already."""
    return scaler.cur_scale == scaler.min_scale and 1 in (scaler.delayed_shift, scaler.cur_hysteresis)


def to_state(scaler: Any) -> dict[str, float]:
    """Where a `DynamicLossScaler` stands; nothing for a fixed scale.

    `good_steps` counts the steps since the last overflow, also beyond the window in which the scale grows.
    """
    if not scaler.dynamic:
        return {}
    return {
        "scale": float(scaler.cur_scale),
        "good_steps": float(scaler.cur_iter - scaler.last_overflow_iter - 1),
        "hysteresis_left": float(scaler.cur_hysteresis),
    }


def from_state(scaler: Any, state: dict[str, float]) -> None:
    """Let a `DynamicLossScaler` go on from there. DeepSpeed tells good steps by the number of the last bad one."""
    if not scaler.dynamic or not state:
        return
    scaler.cur_scale = state["scale"]
    scaler.last_overflow_iter = -1
    scaler.cur_iter = int(state["good_steps"])
    scaler.cur_hysteresis = int(state["hysteresis_left"])
