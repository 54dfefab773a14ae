"""Do two engines agree? Which bound holds depends on precision and learning rate (DESIGN section 4)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ds_recipes.training.compare.measure import Measured, Moved, Step

GENTLE_LR = 1e-4
"""Up to this learning rate free-running losses stay together; above it rounding errors grow as in any other chaos."""

LOSS_BOUND = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}
"""Largest distance of losses in nats a target token at a gentle rate; bf16's from tests/contract/test_curves.py, with room."""

NORM_BOUND = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-3}
"""Largest relative distance of the first step's gradient norm: there the weights are the same bit for bit."""

WEIGHT_BOUND = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
"""Largest distance of all weights after the last step, relative to the way that they have gone.

Twenty steps of the nano model end 5e-7 apart in fp32 and 3e-4 in bf16; there is room, since Adam makes a step of full length of
a gradient that is nearly zero. An engine that steps what the other does not is found parameter by parameter."""

ROOM = 3.0
"""At higher rates: how much further apart the engines may be than one of them from itself, begun with a rounding error."""


@dataclass(frozen=True)
class Verdict:
    """The comparison in numbers. `reasons` says why they do not agree, one line each; empty where they do."""

    loss_difference: float
    loss_step: int  # where it is largest, from 1
    loss_bound: float
    bound_from: str
    first_norm_difference: float  # relative
    first_norm_bound: float
    largest_norm_difference: float  # relative, over all steps
    weight_difference: float  # of all weights after the last step, relative to the way that they have gone
    weight_bound: float
    farthest: str | None  # the parameter that is farthest apart, relative to its own way
    reasons: tuple[str, ...]

    @property
    def agree(self) -> bool:
        return not self.reasons


def needs_own_distance(lr: float) -> bool:
    """True where the bound comes from how far an engine is from itself, which takes a run of its own."""
    return lr > GENTLE_LR


def compare(
    one: Measured,
    other: Measured,
    precision: str,
    lr: float,
    weights: Mapping[str, Moved],
    again: Measured | None = None,
    own_weights: Mapping[str, Moved] | None = None,
) -> Verdict:
    """Judge two runs of the same steps. `again` is `one` begun with a rounding error, where `needs_own_distance`.

    `weights` are the ways of the parameters with both, `own_weights` those of `one` and `again`.
    """
    distances = [abs(mine.loss - theirs.loss) for mine, theirs in zip(one.steps, other.steps, strict=True)]
    worst = max(range(len(distances)), key=lambda step: _nan_is_most(distances[step]))
    bound, bound_from = LOSS_BOUND[precision], f"{precision} at a learning rate of {lr:g}"
    if again is not None:
        own = max(abs(mine.loss - theirs.loss) for mine, theirs in zip(one.steps, again.steps, strict=True))
        if ROOM * own > bound:
            bound = ROOM * own
            bound_from += f": {ROOM:g} x {own:.1e}, {one.engine}'s distance from itself begun with a rounding error"
    norms = [_relative(mine.grad_norm, theirs.grad_norm) for mine, theirs in zip(one.steps, other.steps, strict=True)]
    norm_bound = NORM_BOUND[precision]
    reasons = [*_not_finite(one), *_not_finite(other), *_other_skips(one, other)]
    if not norms[0] <= norm_bound:
        reasons.append(
            f"the gradient norm of step 1, from the same weights, is {one.steps[0].grad_norm:.8g} with {one.engine} and "
            f"{other.steps[0].grad_norm:.8g} with {other.engine}: {norms[0]:.1e} apart, where {norm_bound:.0e} is allowed"
        )
    if not distances[worst] <= bound:
        reasons.append(
            f"the losses of step {worst + 1} are {distances[worst]:.1e} apart, where {bound:.1e} is allowed ({bound_from})"
        )
    reasons += _moved_by_one_alone(one, other, weights)
    weight_difference = _apart(weights)
    weight_bound = max(WEIGHT_BOUND[precision], ROOM * _apart(own_weights or {}))
    if not weight_difference <= weight_bound:
        reasons.append(
            f"the weights are {weight_difference:.1e} of their way apart after the last step, where {weight_bound:.1e} is allowed"
        )
    return Verdict(
        loss_difference=distances[worst],
        loss_step=worst + 1,
        loss_bound=bound,
        bound_from=bound_from,
        first_norm_difference=norms[0],
        first_norm_bound=norm_bound,
        largest_norm_difference=max(norms, key=_nan_is_most),
        weight_difference=weight_difference,
        weight_bound=weight_bound,
        farthest=max(weights, key=lambda name: _apart({name: weights[name]}), default=None),
        reasons=tuple(reasons),
    )


def _apart(weights: Mapping[str, Moved]) -> float:
    """The distance of these parameters, relative to the longer way."""
    one, other, apart = (math.sqrt(sum(getattr(way, name) ** 2 for way in weights.values())) for name in WAYS)
    return 0.0 if apart == 0 else apart / max(one, other)


WAYS = ("one", "other", "apart")


def _moved_by_one_alone(one: Measured, other: Measured, weights: Mapping[str, Moved]) -> list[str]:
    """A parameter that one engine has left alone in every bit, as what has no gradient must be, and the other has not."""
    lines = []
    for mover, left, names in (
        (one, other, [name for name, way in weights.items() if way.other == 0 < way.one]),
        (other, one, [name for name, way in weights.items() if way.one == 0 < way.other]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{mover.engine} has changed {names[0]}{more}, which {left.engine} has left alone")
    return lines


def _nan_is_most(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _relative(one: float, other: float) -> float:
    return 0.0 if one == other else abs(one - other) / max(abs(one), abs(other))


def _not_finite(one: Measured) -> list[str]:
    """A loss that is not finite, or steps that were skipped although nothing scales the loss."""
    lines = []
    for number, step in enumerate(one.steps, 1):
        if not math.isfinite(step.loss):
            return [f"{one.engine}: the loss of step {number} is {step.loss}"]
        if not step.applied and step.loss_scale is None:
            lines.append(f"{one.engine}: step {number} was skipped, its gradient is not finite")
    return lines[:1]


def _other_skips(one: Measured, other: Measured) -> list[str]:
    return [
        f"step {number} was {_done(mine)} by {one.engine} and {_done(theirs)} by {other.engine}"
        for number, (mine, theirs) in enumerate(zip(one.steps, other.steps, strict=True), 1)
        if mine.applied != theirs.applied
    ][:1]


def _done(step: Step) -> str:
    return "taken" if step.applied else "skipped"
