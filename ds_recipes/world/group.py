"""The ranks as one world: its start, what they tell each other, and its end.

Objects and counts travel over a gloo group on every machine; the default group is nccl on GPUs, gloo on CPUs.
"""

import datetime
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from ds_recipes.errors import DeviceError, DsRecipesError, PeerFailure, StartError, StoppedEarly, WorldError
from ds_recipes.world.alike import Facts, check_alike
from ds_recipes.world.channel import Channel, describe, name_ranks
from ds_recipes.world.device_errors import device_error
from ds_recipes.world.hang.activity import here
from ds_recipes.world.hang.watch import HangWatch
from ds_recipes.world.rendezvous import Hello, Patience, check_hosts, connect, greet
from ds_recipes.world.resolve import Place
from ds_recipes.world.shared_error import shared_error

START_SECONDS = 300.0
BARRIER_SECONDS = 600.0
COLLECTIVE_SECONDS = 1800.0

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class World:
    """All ranks of a run, seen from one of them.

    `hosts` are the ranks' host names. Every method without a word on it must be called by all ranks, in the same order.
    """

    def __init__(self, place: Place, device: torch.device, hosts: Sequence[str]) -> None:
        self.rank = place.rank
        self.size = place.size
        self.local_rank = place.local_rank
        self.device = device
        self.hosts = tuple(hosts)
        self.hang: HangWatch | None = None
        """Sees to it that a run which no longer comes further ends; while it is None nobody does."""
        self.meeting = 0
        """Goes up when a launcher starts its ranks again."""
        self._store: Store | None = None
        self._channel: Channel | None = None
        self._cpu_group: dist.ProcessGroup | None = None
        self._barriers = 0
        self._patience = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
        self._phase = "the start"
        self._wish: Callable[[], str | None] | None = None

    def doing(self, what: str, phase: str | None = None, step: int | None = None) -> None:
        """Note what this rank is about to do, for the message if it fails or hangs. Not collective.

        `phase` is one of `hang_settings.PHASES`, of which each has a limit; without it the phase stays the same.
        """
        here().enter(what, phase, step)
        self._phase = what
        if self._channel is not None:
            self._channel.phase = what

    def progressed(self, result: T) -> T:
        """Note that this rank has come further, with `result`, within what it is doing. Not collective."""
        here().progress()
        return result

    def note_failure(self, note: Callable[[str, int], None]) -> None:
        """Call `note` with the reason and the exit status if the run fails, on this rank or another. Not collective."""
        if self._channel is not None:
            self._channel.note = note

    def heed(self, wish: Callable[[], str | None] | None) -> None:
        """From now on each `check` is also a point at which all ranks leave if `wish` gives a reason on one of them.

        None ends that: the first step is near. Not collective, but every rank must do it between the same two checks.
        """
        self._wish = wish

    def heard_stop(self) -> str | None:
        """Why some rank wants to stop, as far as this one has heard, at most a second late. Costs nothing. Not collective."""
        return self._channel.asked if self._channel is not None else None

    def wish_to_stop(self) -> str | None:
        """Why this rank wants to stop, where that is heeded. Not collective."""
        return self._wish() if self._wish is not None else None

    def break_off_if_asked(self) -> None:
        """To be called now and then by long work inside a `check`, which then raises on all ranks. Not collective.

        Raises:
            StoppedEarly: some rank wants to stop, and the first step is not near yet.
        """
        here().progress()
        reason = self.heard_stop() if self._wish is not None else None
        if reason is not None:
            raise StoppedEarly(reason, self._phase)

    def leave_together(self, wish: str | None) -> None:
        """Leave before the first step if any rank gives a reason as its `wish`.

        Raises:
            StoppedEarly: on all ranks.
        """
        self._leave_if_any(self.gather(wish))

    def _leave_if_any(self, wishes: Sequence[str | None]) -> None:
        reason = next((wish for wish in wishes if wish is not None), None)
        if reason is not None:
            raise StoppedEarly(reason, self._phase)

    def sum(self, values: Sequence[Number]) -> list[Number]:
        """Sums over all ranks, position by position, in float64: whole numbers are exact below 2**53."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[Number]) -> list[Number]:
        """Maxima over all ranks, position by position."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: T) -> list[T]:
        """Every rank's small object, by rank, on every rank."""
        if self._cpu_group is None:
            return [value]
        gathered: list[Any] = [None] * self.size
        with here().in_collective("gather"):
            dist.all_gather_object(gathered, value, group=self._cpu_group)
        return gathered

    def gather_array(self, array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """Every rank's array, by rank, on every rank. Shapes may differ; the dtype must not."""
        flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())  # [bytes]
        shapes = self.gather(array.shape)
        pieces = self.gather_tensor(flat)
        return [piece.numpy().view(array.dtype).reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's 1-D tensor, by rank, on every rank. Lengths may differ; dtype and kind of device must not."""
        if self._cpu_group is None:
            return [tensor]
        lengths = self.gather(tensor.numel())
        padded = tensor.new_zeros(max(lengths))  # [longest]
        padded[: tensor.numel()] = tensor
        pieces = [torch.empty_like(padded) for _ in lengths]
        if max(lengths):
            with here().in_collective("gather_tensor"):
                dist.all_gather(pieces, padded, group=self._cpu_group if tensor.device.type == "cpu" else None)
        return [piece[:length] for piece, length in zip(pieces, lengths, strict=True)]

    def broadcast(self, value: T) -> T:
        """Rank 0's small object, on every rank."""
        if self._cpu_group is None:
            return value
        values = [value]
        with here().in_collective("broadcast"):
            dist.broadcast_object_list(values, src=0, group=self._cpu_group)
        return values[0]

    def barrier(self, name: str, timeout_seconds: float = BARRIER_SECONDS) -> None:
        """Wait for all ranks.

        Raises:
            PeerFailure: some did not come in time; it names them.
        """
        if self._cpu_group is None or self._store is None:
            return
        self.doing(name)
        self._barriers += 1
        self._store.set(f"barrier/{self.rank}", str(self._barriers))
        started = time.monotonic()
        work = dist.barrier(group=self._cpu_group, async_op=True)
        try:
            with here().in_collective("barrier"):
                work.wait(datetime.timedelta(seconds=timeout_seconds))
        except RuntimeError as error:
            late = [rank for rank in range(self.size) if int(self._store.get(f"barrier/{rank}")) < self._barriers]
            if not late or time.monotonic() - started < timeout_seconds:  # a broken connection, not a late rank
                raise
            raise PeerFailure(
                f"{name_ranks(late).capitalize()} did not reach '{name}' within {timeout_seconds:.0f} s "
                f"(on {', '.join(sorted({self.hosts[rank] for rank in late}))})."
            ) from error

    def check(self, name: str, fn: Callable[[], T], communicates: bool = False) -> T:
        """Run `fn` on every rank and return this rank's result, if it succeeds on all of them.

        Where `fn` itself communicates, a device or code that fails on one rank alone cannot be told here: the others wait for
        that rank in `fn`. It is raised at once, and ends them through the side channel.

        Raises:
            DsRecipesError: the same error on all ranks, if any had one that is meant for users.
            PeerFailure: on the others, if `fn` raised anything else on some rank, which raises that.
            StoppedEarly: on all ranks, if none of this has happened but one was asked to stop; see `heed`.
        """
        self.doing(name)
        failure: Exception | None = None
        broken_off: str | None = None
        try:
            value = fn()
        except StoppedEarly as error:
            broken_off = error.reason
        except Exception as error:
            failure = device_error(error) or error
            if communicates and (isinstance(failure, DeviceError) or not isinstance(failure, DsRecipesError)):
                raise failure from failure.__cause__
        verdict = None if failure is None else (type(failure), describe(failure))
        answers = self.gather((verdict, broken_off or self.wish_to_stop()))
        failures = {rank: verdict for rank, (verdict, _) in enumerate(answers) if verdict is not None}
        if not failures:
            self._leave_if_any([wish for _, wish in answers])
            return value
        if failure is not None and (self.size == 1 or not isinstance(failure, DsRecipesError)):
            raise failure
        raise shared_error(name, failures, self.size)

    def companion(self) -> "World":
        """The same ranks on a group of their own, for one thread that works beside this one's. It ends with this world.

        It has no line for failures and no phase: what goes wrong in it is for the thread to report.
        """
        other = World(Place(self.rank, self.size, self.local_rank), self.device, self.hosts)
        if self._cpu_group is not None:
            other._cpu_group = dist.new_group(backend="gloo", timeout=self._patience)
        return other

    def close(self) -> None:
        """End the world in order, so that a finished run always exits 0 (FACTS: ranks can abort in gloo threads)."""
        if self._channel is None:
            return
        if self.hang is not None:
            self.hang.let_leave()
        self.barrier("the end")
        if self.hang is not None:
            self.hang.close()
        dist.destroy_process_group()
        self._channel.close()
        self._channel = self._store = self._cpu_group = None

    def _reduce(self, values: Sequence[Number], op: Any) -> list[Number]:
        if self._cpu_group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with here().in_collective("all_reduce"):
            dist.all_reduce(tensor, op=op, group=self._cpu_group)
        return [type(value)(result) for value, result in zip(values, tensor.tolist(), strict=True)]


def solo() -> World:
    """A world of one without a process group, for tools."""
    return World(Place(0, 1, local_size=1), _device(Place(0, 1)), [socket.gethostname()])


def start(
    place: Place,
    timeout_seconds: float = START_SECONDS,
    collective_timeout_seconds: float = COLLECTIVE_SECONDS,
    with_deepspeed: bool = True,
    wish: Callable[[], str | None] = lambda: None,
    note: Callable[[str, int], None] | None = None,
    facts: Facts = MappingProxyType({}),
) -> World:
    """Bring all ranks together, and start DeepSpeed's communication on the same groups.

    `wish` says why this rank wants to stop, if it does; it is asked about for as long as the world lasts. `note` is for an
    end before the ranks have met, see `World.note_failure`. `facts` must be the same on all ranks.

    Raises:
        StartError: ranks are missing, or rank 0 cannot be reached or heard within `timeout_seconds`.
        WorldError: a rank has no GPU of its own, hosts cannot reach each other by name, or ranks have different `facts`.
        StoppedEarly: this rank is to stop, and the others do not come.
    """
    device = _device(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = Patience(wish)
    store, channel = connect(place, timeout_seconds, patience)
    channel.wish, channel.note = wish, note
    store.set(f"barrier/{place.rank}", "0")
    hellos = greet(store, place, _gpu_id(device), facts, timeout_seconds, patience)
    check_alike(store, [hello.host for hello in hellos], [hello.facts for hello in hellos])
    check_hosts(hellos)
    world = World(place, device, [hello.host for hello in hellos])
    world._store, world._channel, world.meeting = store, channel, channel.meeting
    world._patience = datetime.timedelta(seconds=collective_timeout_seconds)
    channel.leave = world.close
    channel.limit(
        timeout_seconds,
        StartError(
            f"All {place.size} ranks came, but could not connect to each other within {timeout_seconds:.0f} s.\n"
            "Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the hosts' network interface; look at their firewalls."
        ),
    )
    world._cpu_group = _start_groups(place, device, store, collective_timeout_seconds)
    channel.no_limit()
    _export(place, device, hellos)
    if with_deepspeed:
        _start_deepspeed(place, device)
    world.doing("set-up")
    return world


def _start_groups(place: Place, device: torch.device, store: Store, timeout_seconds: float) -> dist.ProcessGroup:
    """Make the default group and return the gloo group for objects and counts."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore("group", store),
        rank=place.rank,
        world_size=place.size,
        timeout=timeout,
        device_id=device if on_gpu and place.size > 1 else None,
    )
    group = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else dist.group.WORLD
    assert group is not None
    return group


def _device(place: Place) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else place.local_rank  # some launchers show each rank its own GPU only
    if index >= count:
        raise WorldError(
            f"Local rank {place.local_rank} on {socket.gethostname()} has no GPU: {count} are visible. "
            "Start as many ranks on a host as it has GPUs."
        )
    return torch.device("cuda", index)


def _gpu_id(device: torch.device) -> str | None:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _export(place: Place, device: torch.device, hellos: Sequence[Hello]) -> None:
    """Give libraries (DeepSpeed, wandb) the variables that they look for, whichever launcher it was."""
    local_rank = device.index if device.type == "cuda" else place.local_rank  # DeepSpeed takes it as the GPU's number
    local_size = sum(hello.host == hellos[place.rank].host for hello in hellos)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    os.environ.update(zip(names, map(str, (place.rank, place.size, local_rank, local_size, local_size)), strict=True))
    # DeepSpeed insists that Open MPI's local rank is LOCAL_RANK, which it is not below a launcher of one host.
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)


def _start_deepspeed(place: Place, device: torch.device) -> None:
    """DeepSpeed's communication, without compiling: its shared-memory op is not needed (FACTS)."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or each rank warns that it found no GPU
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING if place.rank == 0 else logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` (is|will be) deprecated", FutureWarning)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
