"""Read a model's whole state out of one file, such as model.pt or pytorch_model.bin."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from ds_recipes.checkpoint.native.model_states import dtype_of
from ds_recipes.checkpoint.native.pickles import load_pickle
from ds_recipes.checkpoint.native.pieces import copy_flat, flat_range
from ds_recipes.errors import InputError
from ds_recipes.ranges import COPY_BYTES, NONE_MISSED

WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Where programs put the state within a dictionary of other things, in the order in which they are looked for."""

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.")
"""What wrappers of a model (data parallel, torch.compile, FSDP, Lightning) put before all of its names."""


def open_full_state(path: Path, trust_pickle: bool = False) -> "FullStateReader":
    """Open a file that `torch.save` made of a state_dict, as such or within a dictionary; nothing is read but names.

    Raises:
        InputError: damaged, without a state_dict in it, or in need of code while `trust_pickle` is False.
    """
    state = _find_state(load_pickle(path, trust_pickle), path)
    strangers = [
        name for name, value in state.items() if not isinstance(value, torch.Tensor) or value.layout != torch.strided
    ]
    if strangers:
        raise InputError(f"{path}: {strangers[0]} is a {type(state[strangers[0]]).__name__}, not a plain tensor")
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if state and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return FullStateReader(path, state)


def _find_state(content: Any, path: Path) -> Mapping[str, Any]:
    if isinstance(content, dict):
        if any(isinstance(value, torch.Tensor) for value in content.values()):
            return content
        for key in WRAPPERS:
            inner = content.get(key)
            if isinstance(inner, dict) and any(isinstance(value, torch.Tensor) for value in inner.values()):
                return inner
    keys = (
        f"a dictionary of {', '.join(map(str, list(content)[:5]))}"
        if isinstance(content, dict)
        else type(content).__name__
    )
    raise InputError(
        f"{path}: holds {keys or 'nothing'}, and no state_dict, neither as such nor as {', '.join(WRAPPERS)}"
    )


class FullStateReader:
    """A range reader over a state_dict of mapped tensors; it has the weights only.

    Names that share one tensor come once; `tied` maps the further ones to the first, and both can be read.
    """

    optimizer_step = 0
    missed_steps = NONE_MISSED
    step: int | None = None

    def __init__(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        self.folder = path.parent
        self.tied: dict[str, str] = {}
        self.trained_in = dtype_of(state, set())
        first: dict[Any, str] = {}
        for name, tensor in state.items():
            place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if tensor.numel() and place in first:
                self.tied[name] = first[place]
            else:
                first[place] = name
        self._tensors = {name: tensor.detach() for name, tensor in state.items() if name not in self.tied}

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[self.tied.get(name, name)].shape)

    def has(self, kind: str) -> bool:
        return kind == "fp32"

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """None that are known as such: a state_dict does not tell them from parameters."""
        return {}

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened tensor into `out`, converting its dtype."""
        assert kind == "fp32", "a state_dict has no moments"
        tensor = self._tensors[self.tied.get(name, name)]
        if start < 0 or start + out.numel() > prod(tensor.shape):
            raise IndexError(f"{name} has {tensor.numel()} elements, not [{start}, +{out.numel()})")
        step = COPY_BYTES // tensor.element_size()
        for low in range(0, out.numel(), step):
            count = min(step, out.numel() - low)
            copy_flat(flat_range(tensor, start + low, count), out[low : low + count])
