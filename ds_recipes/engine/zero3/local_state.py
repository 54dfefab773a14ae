"""What one rank holds under ZeRO-3: flat ranges of each parameter's master weights and moments.

DeepSpeed's stage 3 optimizer packs the ranges of a sub-group's parameters into one flat tensor. Rank r of W holds
elements [r * L, (r + 1) * L) of the flattened parameter, L = ceil(n / W), the tail padded (measured, see
docs/checkpoints.md), with hpZ too. Reading the flat tensors directly costs no copy, also under CPU offload. Under NVMe
offload a sub-group is read from its file for as long as its ranges are asked for, and written back if it was changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from ds_recipes.engine.base import Shard
from ds_recipes.engine.optimizer import create_state, moment_of, moments_in
from ds_recipes.engine.replicas import Replica
from ds_recipes.engine.zero3.frozen_shards import FrozenShards
from ds_recipes.engine.zero3.nvme import check_written, keep_gradients_in_memory, read_ahead_once, settle
from ds_recipes.engine.zero3.unused import Part
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
        self._rank = rank
        keep_gradients_in_memory(optimizer)
        read_ahead_once(optimizer)
        self._places = list(_places(optimizer, names, rank))
        self._frozen = FrozenShards(optimizer.module, rank)
        self._open_sub_group: int | None = None
        for sub_group in range(len(optimizer.fp16_groups)):
            if not optimizer._swappable_optimizer_subgroup(sub_group):
                self._create_moments(sub_group)

    def shards(self) -> Iterator[Shard]:
        """The ranges in storage order, as views where they are in float32, then those of frozen parameters."""
        for sub_group, places in groupby(self._places, key=lambda place: place.sub_group):
            with self._in_memory(sub_group):
                for place in places:
                    yield Shard(
                        name=place.name,
                        shape=place.shape,
                        start=place.start,
                        length=place.length,
                        fp32=self._master(place),
                        exp_avg=self._moment("exp_avg", place),
                        exp_avg_sq=self._moment("exp_avg_sq", place),
                    )
        yield from self._frozen.shards()

    def parts(self) -> dict[torch.Tensor, list[Part]]:
        """Which parameters lie in each sub-group's flat tensor."""
        masters = self._zero.fp32_partitioned_groups_flat
        parts: dict[torch.Tensor, list[Part]] = {master: [] for master in masters}
        for place in self._places:
            part = Part(place.name, place.offset, place.offset + place.padded)
            parts[masters[place.sub_group]].append(part)
        return parts

    def replicated(self) -> list[Replica]:
        """The small parameters that stay gathered on all ranks, and hpZ's second copies of the others."""
        names = {id(parameter): name for name, parameter in self._zero.module.named_parameters()}
        found = [
            Replica(names[id(parameter)], parameter.data)
            for parameter in self._zero.persistent_parameters
            if parameter.ds_status is ZeroParamStatus.AVAILABLE
        ]
        for parameter in self._zero.module.parameters():
            second = parameter.ds_secondary_tensor
            if second is not None:
                place = self._rank % parameter.ds_secondary_tensor_group_size
                holders = f"the ranks with part {place} of hpZ's second copy"
                found.append(Replica(f"hpZ's second copy of {names[id(parameter)]}", second, holders))
        return found

    @torch.no_grad()
    def load(self, reader: RangeReader) -> None:
        """Fill every range from `reader`, then the working copies that the next forward gathers."""
        zero = self._zero
        zero._partition_all_parameters()
        settle(zero)
        for sub_group, places in groupby(self._places, key=lambda place: place.sub_group):
            with self._in_memory(sub_group, changed=True):
                self._create_moments(sub_group)
                self._fill(reader, sub_group, list(places))
                zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        self._frozen.load(reader)
        check_written(zero)
        self._renew_copies()

    def _create_moments(self, sub_group: int) -> None:
        master, optimizer = self._zero.fp32_partitioned_groups_flat[sub_group], self._zero.optimizer
        if master not in optimizer.state:
            create_state(optimizer, master)

    def _fill(self, reader: RangeReader, sub_group: int, places: list[_Place]) -> None:
        state, kinds = self._state(sub_group), moments_in(reader, self._zero.optimizer)
        for place in places:
            for kind in ("fp32", *kinds):
                flat = self._flat(kind, sub_group)
                if flat is not None:
                    end = place.offset + place.length
                    reader.read_into(kind, place.name, place.start, flat[place.offset : end])
                    flat[end : place.offset + place.padded].zero_()
        if kinds and "step" in state:
            state["step"].fill_(reader.optimizer_step)

    def _renew_copies(self) -> None:
        """Drop hpZ's secondary copies, which are of other values, and gather again what ZeRO keeps whole.

        A secondary copy is made anew from the next gather over all ranks. Until then, forward would read the old one.
        """
        zero = self._zero
        for parameter in zero.module.parameters():
            parameter.ds_secondary_tensor = None
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @contextmanager
    def _in_memory(self, sub_group: int, changed: bool = False) -> Iterator[None]:
        """Have a sub-group's master weights and moments in memory; a changed one goes back to its file."""
        zero = self._zero
        if not zero._swappable_optimizer_subgroup(sub_group):
            yield
            return
        assert self._open_sub_group is None, "one reader of NVMe shards at a time"
        self._open_sub_group = sub_group
        zero._optimizer_states_and_gradient_swap_in(sub_group)
        is_written = False
        try:
            yield
            if changed:
                zero._optimizer_states_and_gradient_swap_out(sub_group)
                is_written = True
        finally:
            if not is_written:
                zero._release_swap_buffers(sub_group)
            self._open_sub_group = None

    def _state(self, sub_group: int) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self._zero.optimizer.state.get(
            self._zero.fp32_partitioned_groups_flat[sub_group], {}
        )
        return state

    def _flat(self, kind: str, sub_group: int) -> torch.Tensor | None:
        if kind == "fp32":
            master: torch.Tensor = self._zero.fp32_partitioned_groups_flat[sub_group]
            return master.detach()
        return moment_of(self._state(sub_group), kind)

    def _master(self, place: _Place) -> torch.Tensor:
        master: torch.Tensor = self._zero.fp32_partitioned_groups_flat[place.sub_group]
        return master.detach()[place.offset : place.offset + place.length].float()

    def _moment(self, kind: str, place: _Place) -> torch.Tensor | None:
        flat = self._flat(kind, place.sub_group)
        return None if flat is None else flat[place.offset : place.offset + place.length].float()


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
