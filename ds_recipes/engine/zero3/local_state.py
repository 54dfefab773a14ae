"""What one rank holds under ZeRO-3: flat ranges of each parameter's master weights and moments.

DeepSpeed's stage 3 optimizer packs the ranges of a sub-group's parameters into one flat tensor. Rank r of W holds
elements [r * L, (r + 1) * L) of the flattened parameter, L = ceil(n / W), the tail padded (measured, see
docs/checkpoints.md). Reading the flat tensors directly costs no copy, also under CPU offload.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ds_recipes.engine.base import Shard
from ds_recipes.ranges import RangeReader


@dataclass(frozen=True)
class _Place:
    """One parameter's place: its range of the full tensor, and where that lies in the sub-group's flat tensor."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    sub_group: int
    offset: int
    padded: int


class LocalState:
    """This rank's part of a `DeepSpeedZeroOptimizer_Stage3`: its places, its values, and how to fill them."""

    def __init__(self, optimizer: Any, names: dict[int, str], rank: int) -> None:
        self._zero = optimizer
        self._places = list(_places(optimizer, names, rank))
        if isinstance(optimizer.optimizer, torch.optim.AdamW):
            self._create_moments()

    def _create_moments(self) -> None:
        """torch makes a moment at the first step; a resumed run needs it before."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            self._zero.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }

    def shards(self) -> Iterator[Shard]:
        """The ranges in storage order, as views."""
        for place in self._places:
            yield Shard(
                name=place.name,
                shape=place.shape,
                start=place.start,
                length=place.length,
                fp32=self._view("fp32", place),
                exp_avg=self._moment("exp_avg", place),
                exp_avg_sq=self._moment("exp_avg_sq", place),
            )

    def load(self, reader: RangeReader) -> None:
        """Fill every range from `reader`, then the working copies that the next forward gathers."""
        with torch.no_grad():
            for place in self._places:
                for kind in ("fp32", "exp_avg", "exp_avg_sq"):
                    if reader.has(kind) and (kind == "fp32" or self._moment(kind, place) is not None):
                        self._fill(reader, kind, place)
            if reader.has("exp_avg"):
                for state in self._zero.optimizer.state.values():
                    if "step" in state:
                        state["step"].fill_(reader.optimizer_step)
        self._refresh_working_copies()

    def _fill(self, reader: RangeReader, kind: str, place: _Place) -> None:
        flat = self._flat(kind, place.sub_group)
        reader.read_into(kind, place.name, place.start, flat[place.offset : place.offset + place.length])
        flat[place.offset + place.length : place.offset + place.padded].zero_()

    def _refresh_working_copies(self) -> None:
        """Copy the masters into the parameters' own shards, and gather again those that ZeRO keeps whole."""
        zero = self._zero
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _flat(self, kind: str, sub_group: int) -> torch.Tensor:
        master: torch.Tensor = self._zero.fp32_partitioned_groups_flat[sub_group]
        if kind == "fp32":
            return master.detach()
        moment: torch.Tensor = self._zero.optimizer.state[master][kind]
        return moment

    def _view(self, kind: str, place: _Place) -> torch.Tensor:
        return self._flat(kind, place.sub_group)[place.offset : place.offset + place.length]

    def _moment(self, kind: str, place: _Place) -> torch.Tensor | None:
        state = self._zero.optimizer.state.get(self._zero.fp32_partitioned_groups_flat[place.sub_group], {})
        return self._view(kind, place) if kind in state else None


def _places(optimizer: Any, names: dict[int, str], rank: int) -> Iterator[_Place]:
    for sub_group, parameters in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in parameters:
            padded = parameter.partition_numel()
            start = min(rank * padded, parameter.ds_numel)
            length = min(padded, parameter.ds_numel - start)
            shape = tuple(parameter.ds_shape)
            yield _Place(names[id(parameter)], shape, start, length, sub_group, offset, padded)
            offset += padded
