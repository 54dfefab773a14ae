"""Validation: the loss a target token over a whole data set, the same for any number of ranks."""

import math

from ds_recipes.data.stream import EvalStream
from ds_recipes.engine.base import Engine
from ds_recipes.world.group import World


def evaluate(engine: Engine, stream: EvalStream, world: World) -> dict[str, float]:
    """Return `eval_loss` (nats a target token), `eval_perplexity` and `eval_target_tokens`, equal on all ranks.

    Every rank gets the same number of micro-batches; blank rows fill up, so uneven data cannot hang.
    """
    loss_sum, target_tokens = 0.0, 0
    for batch in stream:
        loss, targets = engine.evaluate(batch)
        loss_sum += float(loss)
        target_tokens += targets
    loss_sum, total = world.sum([loss_sum, target_tokens])
    mean = loss_sum / total
    return {"eval_loss": mean, "eval_perplexity": perplexity(mean), "eval_target_tokens": total}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf
