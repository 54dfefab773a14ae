"""Checkpoints of tiny models, for tests of the export."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ds_recipes.fsops import calls
from ds_recipes.models.skeleton import saved_buffers
from tests.unit.checkpoint.flat_engine import FlatEngine, save


def checkpoint_of(
    model: PreTrainedModel,
    folder: Path,
    files: dict[str, bytes],
    damage: float = 0.0,
    positions: int = 8,
    **changed: Any,
) -> Path:
    """A checkpoint of a whole model, with the logits that it computes itself."""
    model.config.save_pretrained(folder / "config")
    model.generation_config.save_pretrained(folder / "config")
    small = {path.name: path.read_bytes() for path in (folder / "config").iterdir()}
    small["config.json"] = json.dumps(
        json.loads(small["config.json"]) | {"architectures": [type(model).__name__]}
    ).encode()
    input_ids = (torch.arange(positions) % 50)[None]
    with torch.inference_mode():
        logits = model(input_ids).logits.float() + damage
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    engine = FlatEngine(tensors, buffers=saved_buffers(model))
    return save(folder / "run", 1, engine, files=small | files, probe=(input_ids, logits), **changed)


@contextmanager
def at_first(kind: str, act: Callable[[], None]) -> Iterator[None]:
    """Do something just before the first call of that kind."""
    due = True

    def intercept(call: calls.Call) -> None:
        nonlocal due
        if call.kind == kind and due:
            due = False
            act()

    calls.interceptor = intercept
    try:
        yield
    finally:
        calls.interceptor = None
