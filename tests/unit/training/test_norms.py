"""Norms over ranges spread over ranks equal those of the whole tensors."""

import math
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from ds_recipes.engine.base import Engine, Shard
from ds_recipes.training import norms
from ds_recipes.training.norms import state_norms
from ds_recipes.world.group import World


class Shards:
    """The part of an engine that the norms read."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards

    def shards(self) -> Iterator[Shard]:
        return iter(self._shards)


class OneOfTwo:
    """A world whose other rank has said its values already."""

    def __init__(self, sums: list[float], maxima: list[float]) -> None:
        self.others = sums, maxima
        self.own: tuple[list[float], list[float]] = [], []

    def sum(self, values: list[float]) -> list[float]:
        self.own[0].extend(values)
        return [a + b for a, b in zip(values, self.others[0] or [0.0] * len(values), strict=True)]

    def max(self, values: list[float]) -> list[float]:
        self.own[1].extend(values)
        return [max(a, b) for a, b in zip(values, self.others[1] or values, strict=True)]


def norms_of(ranks: list[list[Shard]]) -> dict[str, float]:
    """Norms as the last rank sees them."""
    world = OneOfTwo([], [])
    for shards in ranks:
        world = OneOfTwo(*world.own)
        result = state_norms(cast(Engine, Shards(shards)), cast(World, world))
    return result


def shard(values: dict[str, torch.Tensor], start: int, stop: int, moments: bool = True) -> Shard:
    picked = {name: value[start:stop] for name, value in values.items()}
    first, second = (picked["exp_avg"], picked["exp_avg_sq"]) if moments else (None, None)
    return Shard("weight", (len(values["fp32"]),), start, stop - start, picked["fp32"], first, second)


def values_of(length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    weight, first = torch.randn(2, length, generator=generator)
    return {"fp32": weight, "exp_avg": -first, "exp_avg_sq": torch.rand(length, generator=generator)}


@pytest.mark.parametrize("split", [0, 1, 400, 999, 1000])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_norms_do_not_depend_on_where_the_ranges_lie(split: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(norms.CHUNK_ELEMENTS, "cpu", chunk)
    values = values_of(1000)
    found = norms_of([[shard(values, 0, split)], [shard(values, split, 1000)]])
    tensors = {
        "weight": values["fp32"],
        "momentum": values["exp_avg"],
        "variance": values["exp_avg_sq"],
        "variance_sqrt": values["exp_avg_sq"].sqrt(),
    }
    expected: dict[str, Any] = {}
    for name, tensor in tensors.items():
        expected |= {
            f"{name}_l2": tensor.norm(),
            f"{name}_l1": tensor.abs().sum(),
            f"{name}_abs_max": tensor.abs().max(),
        }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def test_an_optimizer_without_moments_has_norms_of_weights_only() -> None:
    values = values_of(10)
    found = norms_of([[shard(values, 0, 10, moments=False)], []])
    assert set(found) == {"weight_l2", "weight_l1", "weight_abs_max"}


def test_many_small_shards_do_not_lose_precision() -> None:
    values = {"fp32": torch.ones(1000), "exp_avg": torch.ones(1000), "exp_avg_sq": torch.full((1000,), 1e-16)}
    found = norms_of([[shard(values, at, at + 1) for at in range(1000)], []])
    assert found["weight_l2"] == pytest.approx(math.sqrt(1000), rel=1e-12)
    assert found["variance_sqrt_l2"] == pytest.approx(math.sqrt(1000 * 1e-16), rel=1e-6)
