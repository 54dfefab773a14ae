"""Let DeepSpeed write its own checkpoint, into files that the caller makes: hashed and durable like all others.

DeepSpeed names the files and fills them; its recovery script and its pointer `latest` are the caller's, since it writes those
past the checkpoint engine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from ds_recipes.engine.base import Sink
from ds_recipes.engine.zero3 import scaler


class _IntoSinks(CheckpointEngine):  # type: ignore[misc]
    """Writes each file into what `create` makes of its path."""

    def __init__(self, create: Callable[[Path], Sink]) -> None:
        self.name = "ds_recipes"
        self._create = create

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The caller has made the folders."""

    def save(self, state_dict: Any, path: str) -> None:
        with self._create(Path(path)) as sink:
            torch.save(state_dict, sink)  # type: ignore[arg-type]  # it calls only write and flush

    def load(self, path: str, map_location: Any = None) -> Any:
        raise AssertionError("this engine only writes")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


def save_native(deepspeed_engine: Any, folder: Path, tag: str, step: int, create: Callable[[Path], Sink]) -> None:
    """DeepSpeed's `save_checkpoint` into `folder`/`tag`, which exists. Every rank must call it; it has barriers in it.

    `create` must not raise, and neither must what it returns: another rank would wait for this one for ever.
    """
    kept = deepspeed_engine.checkpoint_engine
    loss_scaler = getattr(deepspeed_engine.optimizer, "loss_scaler", None)
    is_held = "update_scale" in vars(loss_scaler or object)
    deepspeed_engine.checkpoint_engine = _IntoSinks(create)
    deepspeed_engine._copy_recovery_script = lambda save_path: None
    deepspeed_engine.global_steps = step
    if loss_scaler is not None and is_held:
        del loss_scaler.update_scale  # a function of ours, which no pickle can hold
    try:
        deepspeed_engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    finally:
        deepspeed_engine.checkpoint_engine = kept
        del deepspeed_engine._copy_recovery_script
        if is_held:
            scaler.hold(loss_scaler)
