"""Validation: the loss a target token over a whole data set, the same for any number of ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ds_recipes.data.stream import EvalStream
from ds_recipes.engine.base import Engine
from ds_recipes.world.group import World

AGREE_EVERY = 4
"""Micro-batches after which the ranks agree on whether to go on: often enough for a signal, seldom enough to cost nothing."""


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation: its metrics, or why it was abandoned, the same on all ranks."""

    metrics: dict[str, float] | None
    stop_reason: str | None


def evaluate(
    engine: Engine, stream: EvalStream, world: World, wish: Callable[[], str | None] = lambda: None
) -> Evaluation:
    """Return `eval_loss` (nats a target token), `eval_perplexity` and `eval_target_tokens`, equal on all ranks.

    Every rank gets the same number of micro-batches; blank rows fill up, so uneven data cannot hang. It is abandoned if
    `wish` gives a reason on any rank.
    """
    loss_sum, target_tokens = 0.0, 0
    for number, batch in enumerate(stream):
        if number % AGREE_EVERY == 0:
            reason = next((found for found in world.gather(wish()) if found is not None), None)
            if reason is not None:
                return Evaluation(None, reason)
        loss, targets = world.progressed(engine.evaluate(batch))
        loss_sum += float(loss)
        target_tokens += targets
    loss_sum, total = world.sum([loss_sum, target_tokens])
    mean = loss_sum / total
    return Evaluation({"eval_loss": mean, "eval_perplexity": perplexity(mean), "eval_target_tokens": total}, None)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf
