"""Which tensors the exported files have, and which elements of which parameter each of them is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ds_recipes.errors import CheckpointError

SHORTEST_RUN = 4096
"""Elements. A tensor that lies in shorter stretches is made by transformers from the whole parameter instead."""

Run = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """One tensor of the exported files, and the parameter that it is made from.

    `runs` are the (start, length) of the flattened parameter that hold its elements, in order; None if transformers must
    make it out of the whole parameter. `dtype` is None where it is the export's. The source may be a saved buffer too.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    runs: tuple[Run, ...] | None
    dtype: torch.dtype | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


def plan_pieces(
    skeleton: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> list[Piece]:
    """The tensors of the exported files in the order of `shapes`, which has parameters and saved buffers.

    Found without reading any weight. `dtypes` are those of `shapes` that are not to have the export's dtype.

    transformers fuses some models' tensors on loading (experts of a mixture, for one); the files get them apart again,
    under the names that the hub knows.

    Raises:
        CheckpointError: transformers needs several parameters at once for one tensor of the files.
    """
    own = dtypes or {}
    pieces = [
        replace(piece, dtype=own.get(source))
        for source, shape in shapes.items()
        for piece in _pieces_of(skeleton, source, shape)
    ]
    whole = taken_apart(skeleton, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    if {piece.name: piece.shape for piece in pieces} != {name: tuple(tensor.shape) for name, tensor in whole.items()}:
        raise CheckpointError(
            f"models of type {skeleton.config.model_type} mix several parameters into one tensor of their files, which an "
            "export tensor by tensor cannot do"
        )
    return pieces


def taken_apart(skeleton: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as transformers would save them."""
    made: dict[str, torch.Tensor] = revert_weight_conversion(skeleton, dict(tensors))
    return made


def _pieces_of(skeleton: PreTrainedModel, source: str, shape: tuple[int, ...]) -> list[Piece]:
    """Sorted by where they begin, so that a parameter is read from its first element to its last."""
    whole = torch.empty(shape, device="meta")
    try:
        with _KeepViews():
            apart = taken_apart(skeleton, {source: whole})
    except RuntimeError:  # something needs its contiguous copy
        apart = taken_apart(skeleton, {source: whole})
    found = [Piece(name, tuple(view.shape), source, _runs(view, whole)) for name, view in apart.items()]
    if any(piece.runs is None for piece in found):
        return [Piece(piece.name, piece.shape, source, None) for piece in found]
    return sorted(found, key=lambda piece: piece.runs or ())


class _KeepViews(TorchFunctionMode):
    """Lets `contiguous` give back the view itself, so that its strides tell where in the parameter it lies."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def _runs(view: torch.Tensor, whole: torch.Tensor) -> tuple[Run, ...] | None:
    """The contiguous stretches that a view of `whole` consists of; None if it is no view, or they are too short."""
    if view.untyped_storage()._cdata != whole.untyped_storage()._cdata or view.numel() == 0:
        return None
    length, dimension = 1, view.dim()
    while dimension and (view.stride(dimension - 1) == length or view.shape[dimension - 1] == 1):
        dimension -= 1
        length *= view.shape[dimension]
    starts = [int(view.storage_offset())]
    for size, stride in zip(view.shape[:dimension], view.stride()[:dimension], strict=True):
        if len(starts) * size * min(SHORTEST_RUN, view.numel()) > view.numel():
            return None
        starts = [start + index * stride for start in starts for index in range(size)]
    return tuple((start, length) for start in starts)
