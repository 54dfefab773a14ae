"""What one rank holds under ZeRO-1 and ZeRO-2: one piece of each parameter's master weights and moments.

DeepSpeed lays the parameters of a group end to end (in an order of its own with `round_robin_gradients`, with gaps with
`parameter_alignment`), and rank r of W owns the r-th of W equal parts of that. So each rank has one contiguous piece of
every parameter, often an empty one, and a lower rank's piece lies before a higher one's. The low-precision parameters
are whole on every rank, views of one flat tensor that DeepSpeed gathers after a step, and here after loading.

Stage 1 in bfloat16 with gradients accumulated in float32 is another class, `BF16_Optimizer`, with the same layout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

from ds_recipes.engine.base import Shard
from ds_recipes.engine.optimizer import MOMENTS, create_state, moment_of, moments_in
from ds_recipes.engine.replicas import Replica
from ds_recipes.engine.zero3.frozen import Frozen
from ds_recipes.engine.zero3.unused import Part
from ds_recipes.ranges import RangeReader
from ds_recipes.world.group import World


@dataclass(frozen=True)
class _Piece:
    """This rank's elements [start, start + length) of a parameter, at `offset` of its part of a group."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    group: int
    offset: int


class LowStageState:
    """This rank's part of a `DeepSpeedZeroOptimizer` or a `BF16_Optimizer`, and of the frozen parameters."""

    def __init__(self, optimizer: Any, model: nn.Module, world: World) -> None:
        self._zero = optimizer
        self._world = world
        self._model = model
        self._masters = masters(optimizer)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._pieces = list(_pieces(optimizer, self._masters, names, world.rank))
        self._frozen = Frozen(model, world)
        for master in self._masters:
            create_state(optimizer.optimizer, master)

    def shards(self) -> Iterator[Shard]:
        """The pieces by group, then the frozen parameters; views where their dtype is float32."""
        for piece in self._pieces:
            fp32, exp_avg, exp_avg_sq = (self._view(kind, piece) for kind in ("fp32", *MOMENTS))
            assert fp32 is not None
            yield Shard(piece.name, piece.shape, piece.start, piece.length, fp32, exp_avg, exp_avg_sq)
        yield from self._frozen.shards()

    def parts(self) -> dict[torch.Tensor, list[Part]]:
        """Which parameters lie in this rank's part of each group."""
        parts: dict[torch.Tensor, list[Part]] = {master: [] for master in self._masters}
        for piece in sorted(self._pieces, key=lambda piece: piece.offset):
            parts[self._masters[piece.group]].append(Part(piece.name, piece.offset, piece.offset + piece.length))
        return parts

    def replicated(self) -> list[Replica]:
        """The low-precision parameters, whole on all ranks."""
        return [Replica(name, parameter) for name, parameter in self._model.named_parameters()]

    @torch.no_grad()
    def load(self, reader: RangeReader) -> None:
        """Fill this rank's pieces from `reader`; the parameters follow from all ranks' pieces, by an all-gather."""
        self._world.check("load weights", lambda: self._read(reader))
        self._zero.update_lp_params()
        self._frozen.gather()

    def _read(self, reader: RangeReader) -> None:
        kinds = ["fp32", *moments_in(reader, self._zero.optimizer)]
        for kind in kinds:
            for group in range(len(self._masters)):
                flat = self._flat(kind, group)
                if flat is not None:
                    flat.zero_()  # what lies between and behind the pieces too
        for piece in self._pieces:
            for kind in kinds:
                flat = self._flat(kind, piece.group)
                if flat is not None:
                    out = flat[piece.offset : piece.offset + piece.length]
                    reader.read_into(kind, piece.name, piece.start, out)
        if MOMENTS[0] in kinds:
            for state in self._zero.optimizer.state.values():
                if "step" in state:
                    state["step"].fill_(reader.optimizer_step)
        self._frozen.read(reader)

    def _flat(self, kind: str, group: int) -> torch.Tensor | None:
        master = self._masters[group]
        if kind == "fp32":
            return master.detach()
        return moment_of(self._zero.optimizer.state.get(master, {}), kind)

    def _view(self, kind: str, piece: _Piece) -> torch.Tensor | None:
        flat = self._flat(kind, piece.group)
        return None if flat is None else flat[piece.offset : piece.offset + piece.length].float()


def forget_gradients(optimizer: Any) -> None:
    """After a skipped step: under CPU offload DeepSpeed 0.19 would add the next gradients to the non-finite ones.

    Its `step` clears the float32 sums of low-precision gradients everywhere but there, and no later step was applied.
    """
    if getattr(optimizer, "cpu_offload", False):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def masters(optimizer: Any) -> Sequence[torch.Tensor]:
    """This rank's flat part of each group's master weights."""
    is_bf16 = isinstance(optimizer, BF16_Optimizer)
    flat: list[torch.Tensor] = (
        optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
    )
    return flat


def _layout(optimizer: Any) -> Iterator[Iterator[tuple[Any, int]]]:
    """For each group its parameters, each with the place of its first element among the group's."""
    if isinstance(optimizer, BF16_Optimizer):
        for parameters in optimizer.bf16_groups:
            yield zip(parameters, accumulate((p.numel() for p in parameters), initial=0), strict=False)
    else:
        for parameters, offsets in zip(
            optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
        ):
            yield zip(parameters, offsets, strict=True)


def _pieces(optimizer: Any, flat: Sequence[torch.Tensor], names: dict[int, str], rank: int) -> Iterator[_Piece]:
    for group, placed in enumerate(_layout(optimizer)):
        first = rank * flat[group].numel()
        for parameter, offset in placed:
            numel = parameter.numel()
            start, end = (min(max(edge - offset, 0), numel) for edge in (first, first + flat[group].numel()))
            place = offset + start - first if end > start else 0
            yield _Piece(names[id(parameter)], tuple(parameter.shape), start, end - start, group, place)
