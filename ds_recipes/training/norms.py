"""Norms of the weights and of the optimizer's state, over all ranks: the ancestor's panels."""

import math
from collections.abc import Iterator

import torch

from ds_recipes.engine.base import Engine, Shard
from ds_recipes.world.group import World

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements looked at together: a CPU's cache, and on a GPU 256 MB for the square roots."""

SUMS = (
    "weight_square",
    "weight_l1",
    "momentum_square",
    "momentum_l1",
    "variance_square",
    "variance_l1",
    "variance_sqrt_l1",
)
MAXIMA = ("weight_abs_max", "momentum_abs_max", "variance_abs_max")


@torch.no_grad()
def state_norms(engine: Engine, world: World) -> dict[str, float]:
    """L2, L1 and largest absolute value of weights, first moments, second moments and their square roots.

    Names: weight_l2, momentum_l2, variance_l2, variance_sqrt_l2, and the same with _l1 and _abs_max; an optimizer
    without moments has only the weights'. Taken over the float32 master values of all ranks together; every rank must
    call it.
    """
    rows = [row for shard in engine.shards() for row in _measured(shard)]
    local = torch.stack(rows).double() if rows else torch.zeros(1, len(SUMS) + len(MAXIMA), dtype=torch.float64)
    has_moments = any(shard.exp_avg is not None for shard in engine.shards())
    sums = world.sum([*local[:, : len(SUMS)].sum(dim=0).tolist(), float(has_moments)])
    maxima = world.max(local[:, len(SUMS) :].amax(dim=0).tolist())
    total = dict(zip(SUMS, sums, strict=False)) | dict(zip(MAXIMA, maxima, strict=True))
    norms = {"weight_l2": math.sqrt(total["weight_square"])} | _picked(total, "weight_l1", "weight_abs_max")
    if not sums[-1]:
        return norms
    return norms | {
        "momentum_l2": math.sqrt(total["momentum_square"]),
        "variance_l2": math.sqrt(total["variance_square"]),
        "variance_sqrt_l2": math.sqrt(total["variance_l1"]),  # second moments are not negative: their sum is the square
        "variance_sqrt_abs_max": math.sqrt(total["variance_abs_max"]),
        **_picked(total, "momentum_l1", "momentum_abs_max", "variance_l1", "variance_abs_max", "variance_sqrt_l1"),
    }


def _picked(total: dict[str, float], *names: str) -> dict[str, float]:
    return {name: total[name] for name in names}


def _measured(shard: Shard) -> Iterator[torch.Tensor]:
    """One row of sums and maxima, in the order of `SUMS` and `MAXIMA`, for each piece of a shard; on its device."""
    chunk = CHUNK_ELEMENTS[shard.fp32.device.type]
    for start in range(0, shard.length, chunk):
        piece = slice(start, start + chunk)
        weight = shard.fp32[piece]
        zero = weight.new_zeros(1)
        momentum = zero if shard.exp_avg is None else shard.exp_avg[piece]
        variance = zero if shard.exp_avg_sq is None else shard.exp_avg_sq[piece]
        yield torch.stack(
            [
                weight.dot(weight),
                weight.abs().sum(),
                momentum.dot(momentum),
                momentum.abs().sum(),
                variance.dot(variance),
                variance.sum(),
                variance.sqrt().sum(),
                weight.abs().max(),
                momentum.abs().max(),
                variance.max(),
            ]
        )
