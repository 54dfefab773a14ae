"""What a checkpoint of another program computes, without the exported files: the architecture filled with its tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ds_recipes.checkpoint.export.fresh_load import logits_of
from ds_recipes.checkpoint.export.sources import open_source
from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.models.skeleton import saved_buffers, tied_names


def reference_logits(path: str, wanted: Mapping[str, Any], input_ids: torch.Tensor) -> torch.Tensor:
    """The float32 logits of the model at `path` for token ids [1, tokens]: [1, tokens, vocabulary].

    Raises:
        CheckpointError: it does not hold exactly the model's parameters.
    """
    source = open_source(Path(path), Wanted.from_json(wanted))
    state = {name: torch.empty(source.reader.shape(name)) for name in source.reader.names}
    for name, tensor in state.items():
        source.reader.read_into("fp32", name, 0, tensor.view(-1))
    state |= {further: state[name] for further, name in tied_names(source.skeleton).items()}
    saved = source.reader.buffers
    state |= {name: saved[name].to(own.dtype) for name, own in saved_buffers(source.skeleton).items()}
    source.skeleton.load_state_dict(state, strict=True, assign=True)
    return logits_of(source.skeleton, input_ids)
