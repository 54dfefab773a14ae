"""Walk through what a block is called with and what it returns."""

from collections.abc import Callable, Iterator
from typing import Any

import torch


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with every leaf of its tuples, lists and dicts replaced by `change(leaf)`. Other objects are leaves."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(item, change) for item in value))
    if type(value) in (tuple, list):
        return type(value)([map_leaves(item, change) for item in value])
    if type(value) is dict:
        return {key: map_leaves(item, change) for key, item in value.items()}
    return change(value)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in it, in the order in which `map_leaves` meets them."""
    found: list[torch.Tensor] = []
    map_leaves(value, lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None)
    return iter(found)
