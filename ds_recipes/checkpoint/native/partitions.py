"""How ZeRO's optimizers laid out master weights and moments over their ranks, from their *_optim_states.pt.

Stages 1 and 2 (and `BF16_Optimizer`) lay the parameters of a group end to end and cut that into one part a rank. Stage 3 cuts
every parameter into one slice a rank, ceil(n / ranks) elements, and lays a rank's slices end to end.

The files of stages 1 and 2 also say where each parameter lies (`param_slice_mappings`). That is not used: with
`round_robin_gradients` DeepSpeed 0.19 writes the places of another order there, and its universal form follows them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from ds_recipes.checkpoint.native.folders import check_ranks
from ds_recipes.checkpoint.native.model_states import ModelStates
from ds_recipes.checkpoint.native.pickles import load_pickle
from ds_recipes.checkpoint.native.pieces import Piece, Source, check_cover, consecutive
from ds_recipes.engine.optimizer import MOMENTS, moment_of
from ds_recipes.errors import InputError

LOW_STAGES, STAGE_3 = "single_partition_of_fp32_groups", "fp32_flat_groups"
MASTERS = (LOW_STAGES, STAGE_3)


@dataclass(frozen=True)
class Partitions:
    """Pieces of every trained parameter, and what is known of each: fp32, and the moments that all ranks have."""

    pieces: dict[str, list[Piece]]
    kinds: tuple[str, ...]
    optimizer_step: int


def read_partitions(paths: Sequence[Path], model: ModelStates, trust: bool) -> Partitions:
    """Find every trained parameter in the ranks' optimizer files.

    Raises:
        InputError: a rank's file is missing or damaged, is not of a ZeRO optimizer, or the counts do not agree.
    """
    folder = model.path.parent
    check_ranks(folder, "the *_optim_states.pt", len(paths), len(paths) or model.ranks)
    first = _optimizer_state(paths[0], trust)
    count = first.get("partition_count") or len(paths)
    check_ranks(folder, "the *_optim_states.pt", len(paths), int(max(count) if isinstance(count, list) else count))
    by_rank = [_sources(path, trust, len(_masters(first))) for path in paths]
    groups = list(zip(*by_rank, strict=True))
    if STAGE_3 in first:
        pieces = _stage_3(model, groups)
    else:
        pieces = dict(_low_stages(model, groups, first.get("param_alignment_paddings")))
    for shapes in model.trained:
        for name, shape in shapes.items():
            check_cover(name, shape, pieces.get(name, []), str(folder))
    filled = [source for sources in groups for source in sources if source["fp32"].numel()]
    kinds = ("fp32", *(kind for kind in MOMENTS if filled and all(kind in source for source in filled)))
    return Partitions(pieces, kinds, _step(first) or model.applied_steps)


def _optimizer_state(path: Path, trust: bool) -> dict[str, Any]:
    content = load_pickle(path, trust)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not any(key in state for key in MASTERS):
        raise InputError(
            f"{path}: not the state of a ZeRO optimizer of stage 1, 2 or 3 (it has no {' and no '.join(MASTERS)})"
        )
    return state


def _base(state: Mapping[str, Any]) -> Any:
    """The wrapped optimizer's own state: a state_dict, or a list by group (elastic_checkpoint)."""
    return state.get("base_optimizer_state", state.get("optimizer_state_dict"))


def _masters(state: Mapping[str, Any]) -> Sequence[Any]:
    """The flat float32 weights of each group."""
    found: Sequence[Any] = next(state[key] for key in MASTERS if key in state)
    return found


def _sources(path: Path, trust: bool, groups: int) -> list[Source]:
    """One rank's flat tensors of each group. Nothing else of its file is kept: there can be hundreds of ranks."""
    state = _optimizer_state(path, trust)
    if len(_masters(state)) != groups:
        raise InputError(f"{path}: has {len(_masters(state))} groups of values, rank 0 has {groups}")
    try:
        return [_source(state, group) for group in range(groups)]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its optimizer's state is not laid out as DeepSpeed does it ({error!r})") from error


def _source(state: Mapping[str, Any], group: int) -> Source:
    base = _base(state)
    own = base[group] if isinstance(base, list) else (base or {}).get("state", {}).get(group, {})
    moments = {kind: moment_of(own, kind) for kind in MOMENTS}
    return {"fp32": _masters(state)[group].detach().reshape(-1)} | {
        kind: moment.reshape(-1)
        for kind, moment in moments.items()
        if isinstance(moment, torch.Tensor) and moment.dim()
    }


def _step(state: Mapping[str, Any]) -> int:
    """Adam's own count; torch and DeepSpeed keep it at different places. 0 if it is nowhere."""
    base = _base(state)
    own = base if isinstance(base, list) else list((base or {}).get("state", {}).values())
    groups = [] if isinstance(base, list) else (base or {}).get("param_groups", [])
    found = next(
        (place["step"] for place in (*own, *groups) if "step" in place), state.get("base_optimizer_state_step")
    )
    return int(found or 0)


def _stage_3(model: ModelStates, groups: Sequence[Sequence[Source]]) -> dict[str, list[Piece]]:
    """Each rank's sub-groups end to end hold one slice of each parameter, in the order of the names."""
    ranks = len(groups[0])
    by_rank = [[sources[rank] for sources in groups] for rank in range(ranks)]
    pieces: dict[str, list[Piece]] = {}
    offset = 0
    for name, shape in ((name, shape) for shapes in model.trained for name, shape in shapes.items()):
        length = ceil(prod(shape) / ranks)
        pieces[name] = [
            piece._replace(start=rank * length + piece.start)
            for rank in range(ranks)
            for piece in consecutive(by_rank[rank], offset, min(length, prod(shape) - rank * length))
        ]
        offset += length
    held = sum(source["fp32"].numel() for source in by_rank[0])
    if offset != held:
        raise InputError(
            f"{model.path.parent}: each rank should hold {offset:,} elements of the parameters, rank 0 has {held:,}"
        )
    return pieces


def _low_stages(
    model: ModelStates, groups: Sequence[Sequence[Source]], paddings: Sequence[Sequence[int]] | None
) -> Iterator[tuple[str, list[Piece]]]:
    """The ranks' parts of a group end to end hold its parameters, in the order of the names.

    `paddings` are the elements left empty behind each parameter (parameter_alignment). A group is padded to a multiple of
    twice the ranks, of which the files may have cut off the end.
    """
    where = model.path.parent
    if len(model.trained) != len(groups):
        raise InputError(f"{where}: {len(model.trained)} groups of names, but {len(groups)} groups of values")
    for group, (shapes, sources) in enumerate(zip(model.trained, groups, strict=True)):
        behind = paddings[group] if paddings else [0] * len(shapes)
        if len(behind) != len(shapes):
            raise InputError(f"{where}: a group of {len(shapes)} parameters with {len(behind)} paddings")
        offset = 0
        for (name, shape), padding in zip(shapes.items(), behind, strict=True):
            yield name, list(consecutive(sources, offset, prod(shape)))
            offset += prod(shape) + int(padding)
        held, unit = sum(source["fp32"].numel() for source in sources), 2 * len(sources)
        if ceil(offset / unit) != ceil(held / unit):
            raise InputError(f"{where}: the parameters of a group have {offset:,} elements, its values {held:,}")
