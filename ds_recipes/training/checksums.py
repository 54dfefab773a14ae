"""Silent corruption: now and then what must be equal is compared, between ranks and between two runs of a micro-batch.

Between the last backward of a step and its update ranks hold equal copies of parameters, optimizer state and counters; at its
start of the buffers. A micro-batch that is run twice must give the same loss and the same derivatives by its input. What
only one rank holds, and only one run computes, cannot be seen; see docs/checksums.md.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_recipes.checkpoint.rng import capture_rng, restore_rng
from ds_recipes.data.batch import MicroBatch
from ds_recipes.engine.base import Engine
from ds_recipes.engine.replicas import ALL_RANKS, Replica, digests
from ds_recipes.errors import TrainingError
from ds_recipes.world.group import World

CHECKSUM_STEP = "checksum_step"
"""In a checkpoint's state.json: the last step that passed, None if none was checked."""

_Table = dict[str, dict[str, str]]
"""One rank's: by who must hold the same, what they hold by its name."""


@dataclass(frozen=True)
class _Difference:
    """Something that is not the same on `ranks`, of the ranks that hold it; all of them where none can be told right."""

    name: str
    holders: str
    ranks: tuple[int, ...]
    is_decided: bool


class Checksums:
    """What a run's steps are checked for, and which of them was the last to pass.

    Once something differs, `fence` refuses every checkpoint, one that a thread is writing too.
    """

    def __init__(
        self, engine: Engine, world: World, interval: int, is_saved: Callable[[int], bool], passed_step: int | None
    ) -> None:
        """Steps are checked every `interval` and where `is_saved` says that a save will follow; none if `interval` is 0."""
        self.passed_step = passed_step
        self._engine = engine
        self._world = world
        self._interval = interval
        self._is_saved = is_saved
        self._failure: str | None = None

    def _due(self, step: int) -> bool:
        return self._interval > 0 and (step % self._interval == 0 or self._is_saved(step))

    def begin_step(self, step: int, batch: MicroBatch) -> None:
        """Before the first backward of a step: compare the buffers, and run `batch` twice. Collective.

        Raises:
            TrainingError: something differs; on all ranks.
        """
        if not self._due(step):
            return
        self._compare(step, self._engine.replicas_between_steps(), {})
        self._run_twice(step, batch)

    def before_update(self, step: int, lr: float, data_hash: str) -> None:
        """After the last backward of a step: compare all else that ranks hold alike. Collective.

        Raises:
            TrainingError: something differs; on all ranks.
        """
        if not self._due(step):
            return
        numbers = {"the learning rate": lr, "the data hash": data_hash}
        self._compare(step, self._engine.replicas_before_update(), numbers)
        self.passed_step = step

    def fence(self) -> None:
        """To be called before a checkpoint gets its name.

        Raises:
            TrainingError: a check has failed in this launch.
        """
        if self._failure is not None:
            raise TrainingError(f"no checkpoint is published any more: {self._failure}")

    def before_save(self, step: int, data_hash: str) -> None:
        """Compare what ranks hold alike after a step that was not checked, where steps are checked at all. Collective.

        For a save that was not planned when the step began.

        Raises:
            TrainingError: something differs; on all ranks.
        """
        if self._interval > 0 and self.passed_step != step:
            replicas = [*self._engine.replicas_between_steps(), *self._engine.replicas_before_update()]
            self._compare(step, replicas, {"the data hash": data_hash})

    def _compare(self, step: int, replicas: Sequence[Replica], numbers: Mapping[str, Any]) -> None:
        engine = self._engine
        numbers = {
            **numbers,
            "the optimizer's step": engine.optimizer_step,
            "the steps that parameters have missed": sorted(engine.usage.missed.items()),
            "the loss scale": sorted(engine.scaler_state().items()),
        }
        values = digests((one.tensor for one in replicas), self._world.device)
        table: _Table = {ALL_RANKS: {name: repr(value) for name, value in numbers.items()}}
        for one, value in zip(replicas, values, strict=True):
            table.setdefault(one.holders, {})[one.name] = str(value)
        combined: _Table = {holders: {"": _combined(named)} for holders, named in table.items()}
        if not _differences(self._world.gather(combined)):
            return
        self._failure = (
            f"the checksum of step {step} found a difference between ranks"  # at once: a save may be near its end
        )
        self._fail(step, _differences(self._world.gather(table)))

    def _run_twice(self, step: int, batch: MicroBatch) -> None:
        generators = capture_rng()
        runs = []
        for _ in range(2):
            loss, gradients = self._world.progressed(self._engine.loss_and_input_gradients(batch))
            runs.append(torch.cat([loss.reshape(1).float(), *(one.reshape(-1).float() for one in gradients)]))
            restore_rng(generators)
        wrong = tuple(rank for rank, is_other in enumerate(self._world.gather(self._is_other(*runs))) if is_other)
        if wrong:
            what = "the loss and the input gradient of a micro-batch that was run twice"
            self._fail(step, [_Difference(what, "both runs", wrong, is_decided=True)])

    def _is_other(self, first: torch.Tensor, second: torch.Tensor) -> bool:
        """True where two runs of the same, [1 + elements] each, are further apart than the device may bring about."""
        one, other = digests((first, second), self._world.device)
        if one == other:
            return False
        both = [run.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).double() for run in (first, second)]
        if not torch.equal(first.isfinite(), second.isfinite()):
            return True
        return bool((both[0] - both[1]).norm() > self._bound() * both[0].norm())

    def _bound(self) -> float:
        """Of the relative L2 distance. Nothing where every product is repeatable; else half of the precision's digits."""
        if self._world.device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
            return 0.0
        precision = self._engine.describe()
        dtype = getattr(torch, precision["autocast"] or precision["parameters"])
        return float(torch.finfo(dtype).eps ** 0.5)

    def _fail(self, step: int, found: Sequence[_Difference]) -> None:
        """Collective."""
        devices = self._world.gather(_device_name(self._world.device))
        named = {
            rank: f"rank {rank} ({host}, {device})"
            for rank, (host, device) in enumerate(zip(self._world.hosts, devices, strict=True))
        }
        first = found[0]
        ranks = " and ".join(named[rank] for rank in first.ranks)
        verb = "differs" if first.is_decided and len(first.ranks) == 1 else "differ"
        undecided = "" if first.is_decided else "; which of them is right cannot be told"
        more = f", and in {len(found) - 1} more values" if len(found) > 1 else ""
        passed = "no step before was checked" if self.passed_step is None else f"step {self.passed_step} passed"
        self._failure = (
            f"the checksum of step {step} found that {ranks} {verb} in {first.name} (to be equal "
            f"on {first.holders}){more}{undecided}. "
            f"Bits changed in silence; {passed}. Nothing is saved any more. Start again without that host or device: "
            "the run continues from its newest checkpoint."
        )
        raise TrainingError(self._failure)


def _combined(named: Mapping[str, str]) -> str:
    return hashlib.blake2b(repr(sorted(named.items())).encode(), digest_size=16).hexdigest()


def _differences(tables: Sequence[_Table]) -> list[_Difference]:
    """What is not the same on all the ranks that hold it, by the ranks' tables."""
    found = []
    for holders in sorted({holders for table in tables for holders in table}):
        members = [rank for rank, table in enumerate(tables) if holders in table]
        for name in sorted({name for rank in members for name in tables[rank][holders]}):
            values = {rank: tables[rank][holders].get(name) for rank in members}
            (most, count), *others = Counter(values.values()).most_common()
            if others:
                is_decided = 2 * count > len(members)
                ranks = tuple(rank for rank in members if not is_decided or values[rank] != most)
                found.append(_Difference(name, holders, ranks, is_decided))
    return found


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return f"{device}, GPU {torch.cuda.get_device_properties(device).uuid}"
