"""train.py on one rank whose engine, evaluation or log raises an error at a chosen moment: for tests of what the others do.

The environment says when: `FAILS` is a JSON object with

    rank     the rank that fails; the others run as they are
    error    a name of `ERRORS`
    folder   where the file `failed` tells the `time.monotonic()` of the failure
    method   a call of the engine's interface, which raises; or
    place    "module:Class.method", which raises
    trained  count only calls after the engine has taken a step in this launch
    call     which call it is that raises (from 1, the default)
"""

import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from tests.ranks.training import train_py

ENGINES = {
    "fsdp": ("ds_recipes.engine.fsdp2.step", "Fsdp2Engine"),
    "deepspeed": ("ds_recipes.engine.zero3.step", "ZeroEngine"),
}
ITERATORS = ("shards", "weights")
ERRORS: dict[str, Callable[[], Exception]] = {
    "memory": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB"
    ),
    "device": lambda: torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ..."),
    "disk": lambda: OSError(5, "Input/output error", "/data/validation.bin"),
}


def fails(rank: int, error: str, folder: Path, **more: Any) -> dict[str, str]:
    """The environment of ranks that run `failing`."""
    return {"FAILS": json.dumps({"rank": rank, "error": error, "folder": str(folder), **more})}


def failing(argv: Sequence[str]) -> int:
    """What one rank does."""
    plan = json.loads(os.environ["FAILS"])
    if int(os.environ["RANK"]) == plan["rank"]:
        if "place" in plan:
            _fail_at(plan["place"], plan)
        else:
            engine = argv[list(argv).index("--engine") + 1]
            module = importlib.import_module(ENGINES[engine][0])
            setattr(
                module, ENGINES[engine][1], failing_engine(getattr(module, ENGINES[engine][1]), plan["method"], plan)
            )
    return train_py(argv)


def failing_engine(whole: Any, method: str, plan: dict[str, Any]) -> Any:
    """An engine whose `method` raises; iterators do so at their second item."""
    inner, calls = getattr(whole, method), 0

    def call(engine: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += not plan.get("trained") or engine.optimizer_step > engine.began_at
        if calls != plan.get("call", 1):
            return inner(engine, *arguments, **named)
        return _broken(inner(engine, *arguments, **named), plan) if method in ITERATORS else _fail(plan)

    def load_shards(engine: Any, reader: Any) -> None:
        whole.load_shards(engine, reader)
        engine.began_at = engine.optimizer_step

    call.__name__ = method
    return type(whole.__name__, (whole,), {"load_shards": load_shards, method: call})


def _broken(items: Iterator[Any], plan: dict[str, Any]) -> Iterator[Any]:
    yield next(items)
    _fail(plan)


def _fail_at(place: str, plan: dict[str, Any]) -> None:
    module, _, path = place.partition(":")
    holder, _, name = path.rpartition(".")
    setattr(getattr(importlib.import_module(module), holder), name, lambda *_, **__: _fail(plan))


def _fail(plan: dict[str, Any]) -> NoReturn:
    Path(plan["folder"], "failed").write_text(str(time.monotonic()))
    raise ERRORS[plan["error"]]()
