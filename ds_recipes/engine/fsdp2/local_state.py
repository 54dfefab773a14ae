"""What one rank holds under FSDP2: whole leading rows of each parameter, which is one flat range of it.

Rank r of W in a group holds rows [r * c, (r + 1) * c), c = ceil(rows / W); the last ranks may hold none. Where groups are
replicas of each other each of them gives an equal piece of its range, so that together they cover it once.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ds_recipes.engine.base import Shard
from ds_recipes.engine.fsdp2.build import REPLICAS, SHARDS
from ds_recipes.engine.optimizer import MOMENTS, create_state, moment_of, moments_dtype, moments_in
from ds_recipes.engine.replicas import Replica
from ds_recipes.ranges import RangeReader


@dataclass(frozen=True)
class _Place:
    """One parameter's place: its range of the full tensor, and this replica's piece [first, first + length) of it."""

    name: str
    shape: tuple[int, ...]
    start: int
    first: int
    length: int


class LocalState:
    """This rank's shards as plain tensors, which an optimizer steps without DTensor's dispatch."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        names = mesh.mesh_dim_names or ()
        self._shard = (mesh.get_local_rank(SHARDS), mesh[SHARDS].size())
        self._replica = (mesh.get_local_rank(REPLICAS), mesh[REPLICAS].size()) if REPLICAS in names else (0, 1)
        self._sharded: dict[str, DTensor] = {}
        self._local: dict[str, nn.Parameter] = {}
        self._places: list[_Place] = []
        self._optimizer: torch.optim.Optimizer | None = None
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor)
                self._sharded[name] = parameter
                self._local[name] = nn.Parameter(parameter.to_local(), requires_grad=parameter.requires_grad)
                self._places.append(self._place(name, parameter))

    def _place(self, name: str, parameter: DTensor) -> _Place:
        shape = tuple(parameter.shape)
        rank, size = self._shard
        start = min(rank * -(-shape[0] // size), shape[0]) * prod(shape[1:])
        held = parameter.to_local().numel()
        replica, replicas = self._replica
        piece = -(-held // replicas)
        first = min(replica * piece, held)
        return _Place(name, shape, start, first, min(piece, held - first))

    @property
    def device(self) -> torch.device:
        """Where masters and moments lie."""
        return next(iter(self._local.values())).device

    @property
    def master_dtype(self) -> torch.dtype:
        """Of what the optimizer steps; FSDP2 adds up the reduced gradients in it too."""
        return next(iter(self._trained().values())).dtype

    @property
    def moments_dtype(self) -> torch.dtype:
        """The master's where there are none."""
        return self.master_dtype if self._optimizer is None else moments_dtype(self._optimizer, self.master_dtype)

    @property
    def replicas(self) -> int:
        """Number of ranks that hold the same range."""
        return self._replica[1]

    @property
    def rank_in_parameter(self) -> tuple[int, int]:
        """Sorting ranks by this puts their pieces of a parameter in order."""
        return self._shard[0], self._replica[0]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's shards by canonical name, for an optimizer."""
        yield from self._local.items()

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the moments now: torch makes them at the first step, and a resumed run is filled before it."""
        self._optimizer = optimizer
        for parameter in self._trained().values():
            create_state(optimizer, parameter)

    def take_gradients(self, unused: Collection[str]) -> list[torch.Tensor]:
        """Hand the sharded gradients to the optimizer's parameters, and return them; those of `unused` ones are no gradients."""
        gradients = []
        for name, parameter in self._trained().items():
            gradient = self._sharded[name].grad
            if gradient is not None and name not in unused:
                assert isinstance(gradient, DTensor)
                parameter.grad = gradient.to_local()
                gradients.append(parameter.grad)
        return gradients

    def clear_gradients(self) -> None:
        """Free them."""
        for name, parameter in self._local.items():
            parameter.grad = self._sharded[name].grad = None

    def _trained(self) -> Mapping[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._local.items() if parameter.requires_grad}

    def shards(self) -> Iterator[Shard]:
        """The ranges in storage order: views of float32 tensors, float32 copies of others."""
        for place in self._places:
            piece = slice(place.first, place.first + place.length)
            moments = {kind: self._moment(kind, place.name) for kind in MOMENTS}
            yield Shard(
                name=place.name,
                shape=place.shape,
                start=place.start + place.first,
                length=place.length,
                fp32=self._local[place.name].detach().view(-1)[piece].float(),
                exp_avg=None if moments["exp_avg"] is None else moments["exp_avg"].view(-1)[piece].float(),
                exp_avg_sq=None if moments["exp_avg_sq"] is None else moments["exp_avg_sq"].view(-1)[piece].float(),
            )

    def replicated(self) -> list[Replica]:
        """Each parameter's step count, on all ranks; where there are replicas, the shard's values on those that share it."""
        found = []
        for name, parameter in self._local.items():
            state = {} if self._optimizer is None else self._optimizer.state.get(parameter, {})
            if "step" in state:
                found.append(Replica(f"the optimizer's step of {name}", state["step"]))
            if self.replicas > 1:
                holders = f"the replicas of shard {self._shard[0]}"
                found.append(Replica(name, parameter, holders))
                moments = {kind: moment_of(state, kind) for kind in MOMENTS}
                found += [
                    Replica(f"{kind} of {name}", one, holders) for kind, one in moments.items() if one is not None
                ]
        return found

    def load(self, reader: RangeReader, missed: Mapping[str, int]) -> None:
        """Fill the whole shard from `reader`, on every replica. `missed`: steps that a parameter's own count is behind."""
        assert self._optimizer is not None
        kinds = moments_in(reader, self._optimizer)
        with torch.no_grad():
            for place in self._places:
                reader.read_into("fp32", place.name, place.start, self._local[place.name].view(-1))
                for kind in kinds:
                    moment = self._moment(kind, place.name)
                    if moment is not None:
                        reader.read_into(kind, place.name, place.start, moment.view(-1))
        if kinds:
            for name, parameter in self._trained().items():
                state = self._optimizer.state.get(parameter, {})
                if "step" in state:
                    state["step"].fill_(reader.optimizer_step - missed.get(name, 0))

    def _moment(self, kind: str, name: str) -> torch.Tensor | None:
        if self._optimizer is None:
            return None
        return moment_of(self._optimizer.state.get(self._local[name], {}), kind)
