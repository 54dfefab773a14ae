"""What DeepSpeed's *_model_states.pt say: names, shapes, what is shared, and the values that no optimizer holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ds_recipes.checkpoint.native.pickles import load_pickle
from ds_recipes.checkpoint.native.pieces import Piece, check_cover, flat_range
from ds_recipes.errors import InputError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelStates:
    """`trained` has the optimizer's parameters by group, in the order in which they lie there.

    `others` are the pieces of parameters without an optimizer, `shapes` the shapes of those. At stage 3 `others` come in
    slices of the ranks, below it each is whole.
    """

    path: Path
    ranks: int
    is_zero: bool
    trained: tuple[dict[str, Shape], ...]
    shapes: dict[str, Shape]
    others: dict[str, list[Piece]]
    tied: dict[str, str]
    buffers: dict[str, torch.Tensor]
    trained_in: str | None
    step: int | None
    applied_steps: int


def read_model_states(paths: Sequence[Path], trust: bool) -> ModelStates:
    """Read the first rank's, which says what the ranks have in common, and the others' where parameters are frozen.

    Raises:
        InputError: one cannot be read or is not DeepSpeed's, or the model has experts of DeepSpeed's own MoE layers.
    """
    path = paths[0]
    state = load_pickle(path, trust)
    if not isinstance(state, dict) or not isinstance(state.get("module"), dict):
        raise InputError(f"{path}: not a file of model states as DeepSpeed writes them (it has no `module`)")
    layers = state.get("ds_autoep_layers") or state.get("autoep_layers")
    if layers:
        raise InputError(
            f"{path}: the experts of {layers[0].get('module_path')} are split over ranks (AutoEP), which this reader does not put "
            "together. Convert the folder with DeepSpeed's ds_to_universal.py first."
        )
    names = set(state.get("buffer_names") or ())
    module = state["module"]
    step = state.get("global_steps")
    trained = tuple(
        {name: tuple(shape) for name, shape in group.items()} for group in _groups(state.get("param_shapes"))
    )
    shapes, others = _others(paths, state, {name for group in trained for name in group} | names, trust)
    return ModelStates(
        path=path,
        ranks=int(state.get("dp_world_size") or len(paths)),
        is_zero=state.get("param_shapes") is not None,
        trained=trained,
        shapes=shapes,
        others=others,
        tied=_tied(state.get("shared_params") or {}, {*shapes, *(name for group in trained for name in group)}),
        buffers={name: module[name] for name in sorted(names) if name in module},
        trained_in=dtype_of(module, names),
        step=None if step is None else int(step),
        applied_steps=int(step or 0) - int(state.get("skipped_steps") or 0),
    )


def dtype_of(tensors: Mapping[str, Any], besides: set[str]) -> str | None:
    """The dtype of the first parameter, as torch names it; None if there is none in floating point."""
    kept = (tensor for name, tensor in tensors.items() if name not in besides and isinstance(tensor, torch.Tensor))
    floating = next((tensor.dtype for tensor in kept if tensor.is_floating_point()), None)
    return None if floating is None else str(floating).removeprefix("torch.")


def _groups(param_shapes: Any) -> list[Mapping[str, Any]]:
    """One mapping a group; DeepSpeed before 0.4 wrote a single one."""
    if param_shapes is None:
        return []
    return [param_shapes] if isinstance(param_shapes, dict) else list(param_shapes)


def _others(
    paths: Sequence[Path], first: Mapping[str, Any], known: set[str], trust: bool
) -> tuple[dict[str, Shape], dict[str, list[Piece]]]:
    """The parameters that no optimizer holds: at stage 3 in fragments, below it whole. `known` are all other names."""
    if paths[0].name.startswith("zero_pp_rank_"):
        shapes = {name: tuple(shape) for name, shape in (first.get("frozen_param_shapes") or {}).items()}
        ranks = [_frozen_fragments(path, trust) for path in paths] if shapes else []
        return shapes, {name: _fragments(name, shape, ranks, paths) for name, shape in shapes.items()}
    shared = set(first.get("shared_params") or {})
    whole = {
        name: tensor
        for name, tensor in {**first["module"], **(first.get("frozen_param_fragments") or {})}.items()
        if name not in known | shared
    }
    pieces = {name: [_whole(tensor)] if tensor.numel() else [] for name, tensor in whole.items()}
    return {name: tuple(tensor.shape) for name, tensor in whole.items()}, pieces


def _frozen_fragments(path: Path, trust: bool) -> Mapping[str, torch.Tensor]:
    state = load_pickle(path, trust)
    found = state.get("frozen_param_fragments") if isinstance(state, dict) else None
    return found if isinstance(found, dict) else {}


def _whole(tensor: torch.Tensor) -> Piece:
    return Piece(0, tensor.numel(), {"fp32": flat_range(tensor, 0, tensor.numel())}, 0)


def _fragments(
    name: str, shape: Shape, ranks: Sequence[Mapping[str, torch.Tensor]], paths: Sequence[Path]
) -> list[Piece]:
    """Rank r of W holds the r-th of W equal slices, the last one padded."""
    numel = prod(shape)
    length = -(-numel // len(ranks))
    pieces = []
    for rank, (fragments, path) in enumerate(zip(ranks, paths, strict=True)):
        if name not in fragments:
            raise InputError(f"{path}: has no part of {name}, which is frozen")
        count = min(length, numel - rank * length)
        if count > 0:
            pieces.append(Piece(rank * length, count, {"fp32": fragments[name].reshape(-1)}, 0))
    check_cover(name, shape, pieces, str(paths[0].parent))
    return pieces


def _tied(shared: Mapping[str, str], own: set[str]) -> dict[str, str]:
    """Further names of shared parameters, each with the name that has the values."""
    pairs = ((other, name) if name in own else (name, other) for other, name in shared.items())
    return {other: name for other, name in pairs if name in own and other not in own}
