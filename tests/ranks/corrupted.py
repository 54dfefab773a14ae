"""train.py with one rank on which a bit flips, or a product is wrong, at one step; what an environment variable asks for.

CORRUPT="parameter rank=1 step=4"       # or buffer, replica, product
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ds_recipes.data.batch import MicroBatch
from ds_recipes.training.checksums import Checksums
from tests.ranks.training import train_py

VARIABLE = "CORRUPT"


def flip(tensor: torch.Tensor) -> None:
    """The lowest bit of the first element, in its memory: torch does not come to know that it was written to."""
    tensor.detach().view(-1)[:1].numpy().view(np.int32)[0] ^= 1


def corrupted(argv: Sequence[str]) -> int:
    kind, rank, step = os.environ[VARIABLE].split()
    if rank == f"rank={os.environ['RANK']}":
        arm(kind, int(step.removeprefix("step=")))
    return train_py(argv)


def arm(kind: str, at: int) -> None:
    begin_step, before_update = Checksums.begin_step, Checksums.before_update

    def begin(checksums: Checksums, step: int, batch: MicroBatch) -> None:
        engine: Any = checksums._engine
        if step == at and kind == "buffer":
            flip(next(buffer for name, buffer in engine.model.named_buffers() if "inv_freq" in name))
        if step == at and kind == "product":
            right, calls = engine.loss_and_input_gradients, []

            def wrong(batch: MicroBatch) -> Any:
                loss, gradients = right(batch)
                calls.append(batch)
                if len(calls) == 2:
                    flip(gradients[0])
                return loss, gradients

            engine.loss_and_input_gradients = wrong
        begin_step(checksums, step, batch)

    def update(checksums: Checksums, step: int, lr: float, data_hash: str) -> None:
        engine: Any = checksums._engine
        if step == at and kind in ("parameter", "replica"):
            held = [one for one in engine.replicas_before_update() if one.tensor.numel() > 100]
            flip(next(one for one in held if not one.name.startswith("the optimizer")).tensor)
        before_update(checksums, step, lr, data_hash)

    Checksums.begin_step, Checksums.before_update = begin, update  # type: ignore[method-assign]
