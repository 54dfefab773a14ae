"""What a checkpoint holds besides the ranks' ranges, caught at one moment between two steps."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ds_recipes.checkpoint.rng import capture_rng
from ds_recipes.engine.base import Engine


@dataclass(frozen=True)
class Contents:
    """Everything that a save needs and that training changes meanwhile, as copies.

    Equal on all ranks but for `files`, which rank 0's counts of, and `generators`, which are this rank's own (`None`: the
    checkpoint keeps none). `probe` is token ids [1, tokens] and the model's float32 logits for them, [1, tokens,
    vocabulary]; `engine` what the engine says of its precision and sharding.
    """

    step: int
    optimizer_step: int
    missed_steps: Mapping[str, int]
    engine: Mapping[str, Any]
    state: Mapping[str, Any]  # JSON-able
    generators: Mapping[str, Any] | None
    files: Mapping[str, bytes]  # model config, tokenizer
    probe: tuple[torch.Tensor, torch.Tensor]
    tied: Mapping[str, str]
    buffers: Mapping[str, torch.Tensor]  # the model's saved ones, in host memory


def capture(
    engine: Engine,
    step: int,
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
    probe: tuple[torch.Tensor, torch.Tensor],
    tied: Mapping[str, str],
) -> Contents:
    """The contents of a checkpoint after `step`, with this rank's random generators. Every rank must call it.

    Raises:
        TrainingError: the ranks have different buffers.
    """
    return Contents(
        step=step,
        optimizer_step=engine.optimizer_step,
        missed_steps=dict(engine.usage.missed),
        engine=copy.deepcopy(engine.describe()),
        state=copy.deepcopy(dict(state)),
        generators=capture_rng(),
        files=files,
        probe=(probe[0].cpu(), probe[1].cpu()),
        tied=tied,
        buffers=engine.saved_buffers(),
    )
