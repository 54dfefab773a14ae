"""The least that can be saved: tensors by name, this rank's even share of each, Adam's moments made up from them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_recipes.checkpoint.contents import Contents, capture
from ds_recipes.checkpoint.rank_file import Streamed, own_ranges
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.checkpoint.store import Published, Store, save_checkpoint
from ds_recipes.engine.base import Shard
from ds_recipes.engine.unused import Usage
from ds_recipes.world.group import World, solo

PROBE = (torch.zeros((1, 2), dtype=torch.int64), torch.zeros((1, 2, 3)))


class FlatEngine:
    """Only what `save_checkpoint` asks of an engine."""

    optimizer_step = 7

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        with_moments: bool = True,
        frozen: Sequence[str] = (),
        buffers: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.tensors = dict(tensors)
        self.buffers = dict(buffers or {})
        self.usage = Usage(list(tensors))
        self.with_moments = with_moments
        self.frozen = frozen

    def shards(self) -> Iterator[Shard]:
        for name, tensor in self.tensors.items():
            flat = tensor.reshape(-1).float()
            moments = (flat * 0.1, flat.square()) if self.with_moments and name not in self.frozen else (None, None)
            yield Shard(name, tuple(tensor.shape), 0, flat.numel(), flat, *moments)

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        return {name: buffer.clone() for name, buffer in self.buffers.items()}

    def describe(self) -> dict[str, Any]:
        return {"parameters": "float32"}


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (11, 4), "layer.weight": (3, 5), "norm.weight": (7,), "scale": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(folder: Path, step: int, engine: Any = None, world: World | None = None, **changed: Any) -> Path:
    """`save_checkpoint` with everything that a test does not care about filled in."""
    given: dict[str, Any] = {
        "state": {"step": step, "identity": {}},
        "files": {"config.json": b"{}"},
        "probe": PROBE,
        "tied": {},
        "save_optimizer": True,
        "keep_last": None,
    }
    engine = engine or FlatEngine(some_tensors(step))
    return save_checkpoint(folder, step, engine, world=world or solo(), **(given | changed))


def contents(engine: Any, step: int, state: Mapping[str, Any] | None = None) -> Contents:
    """What is saved beside the engine's ranges, all of it made up."""
    return capture(engine, step, {"step": step, "identity": {}, **(state or {})}, {"config.json": b"{}"}, PROBE, {})


def publish(
    folder: Path,
    step: int,
    keep: Keep,
    engine: Any = None,
    world: World | None = None,
    state: Mapping[str, Any] | None = None,
    fence: Callable[[], None] = lambda: None,
) -> Published:
    """Save through the `Store` itself, with its answer."""
    return publish_into(store_of(folder, keep, world, fence), step, engine, world, state)


def store_of(folder: Path, keep: Keep, world: World | None = None, fence: Callable[[], None] = lambda: None) -> Store:
    return Store(folder, world or solo(), "test-1", keep, fence)


def publish_into(
    store: Store, step: int, engine: Any = None, world: World | None = None, state: Mapping[str, Any] | None = None
) -> Published:
    engine, world = engine or FlatEngine(some_tensors(step)), world or solo()
    part = Streamed(engine, own_ranges(engine.shards(), world, save_optimizer=True))
    return store.publish(contents(engine, step, state), part)
