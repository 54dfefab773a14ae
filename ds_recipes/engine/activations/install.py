"""Put activation checkpointing into a model that is not sharded yet."""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ds_recipes.config.engine_settings import Checkpointing
from ds_recipes.engine.activations.blocks import checkpointable_blocks, segment_numbers
from ds_recipes.engine.activations.record import ActivationRecord
from ds_recipes.engine.activations.sharded import Block


def install_checkpointing(
    model: PreTrainedModel, settings: Checkpointing, device: torch.device | str
) -> ActivationRecord:
    """Make every forward with gradients keep few block inputs and compute the blocks again in backward.

    Call it before the model is sharded: the engine's hooks must come around its own.

    Args:
        model: a skeleton or a whole model; names of modules and parameters stay as they are.
        settings: what to keep and where.
        device: the one that the model will run on.

    Raises:
        InputError: the model has no blocks that could be computed again.
    """
    modules = checkpointable_blocks(model)
    record = ActivationRecord(
        segment_numbers(len(modules), settings.number_checkpoints), settings, torch.device(device)
    )
    classes = {plain: _checkpointed(plain) for plain in {type(module) for module in modules}}
    for place, module in enumerate(modules):
        block = Block(module, MethodType(type(module).__call__, module))
        module.register_forward_pre_hook(
            lambda _, args, kwargs: record.before_forward((args, kwargs)), with_kwargs=True
        )
        module.register_forward_hook(lambda _, __, outputs, block=block: record.after_forward(block, outputs))
        module.__dict__["_checkpointed_call"] = partial(record.run, place, block)
        module.__class__ = classes[type(module)]
    return record


def _checkpointed(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the same name whose call goes through the record."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._checkpointed_call(args, kwargs)

    names = {"__call__": call, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (plain,), names)
