"""Which modules of a model are its blocks, and how they are cut into segments."""

from collections.abc import Callable, Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_recipes.errors import InputError


def checkpointable_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The outermost modules that transformers itself would checkpoint, or would not split, in the model's order.

    Raises:
        InputError: it has none.
    """
    whole = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    blocks = list(_outermost(model, lambda module: isinstance(module, GradientCheckpointingLayer))) or list(
        _outermost(model, lambda module: type(module).__name__ in whole)
    )
    if not blocks:
        raise InputError(
            f"models of type {model.config.model_type} have no blocks that activation checkpointing could compute again "
            "(transformers names none); leave --activation_checkpointing out"
        )
    return blocks


def _outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    for child in module.children():
        if wanted(child):
            yield child
        else:
            yield from _outermost(child, wanted)


def segment_numbers(num_blocks: int, num_checkpoints: int | None) -> list[int]:
    """For each block the number of its segment: consecutive, their lengths at most one apart, the longer ones first."""
    segments = num_blocks if num_checkpoints is None else min(num_checkpoints, num_blocks)
    length, longer = divmod(num_blocks, segments)
    return [number for number in range(segments) for _ in range(length + (number < longer))]
