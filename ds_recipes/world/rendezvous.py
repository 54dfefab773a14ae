"""The meeting of the ranks: one store at rank 0, reached within a time limit, and who is there."""

import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ds_recipes.errors import StartError, StoppedEarly, WorldError
from ds_recipes.world import restarts
from ds_recipes.world.alike import Facts, offer
from ds_recipes.world.channel import Channel, describe, exit_status, name_ranks, show, show_once_a_host, wait_until
from ds_recipes.world.resolve import Place
from ds_recipes.world.socket_owner import describe_owner, find_owner

SPEAKS_FIRST_SECONDS = 15.0
"""How much longer than rank 0, which can name those that are missing, the others wait for its word."""

LAST_WAIT_SECONDS = 5.0
"""How long a rank that is asked to stop still waits for the others, to leave together with them."""


class Patience:
    """Waiting for the others comes to an end soon once this rank is asked to stop."""

    def __init__(self, wish: Callable[[], str | None] = lambda: None) -> None:
        self._wish = wish
        self._until: float | None = None

    def check(self) -> None:
        """To be called while it waits.

        Raises:
            StoppedEarly: it has waited long enough since it was asked.
        """
        reason = self._wish()
        if reason is None:
            return
        if self._until is None:
            self._until = time.monotonic() + LAST_WAIT_SECONDS
        elif time.monotonic() > self._until:
            raise StoppedEarly(reason, "the wait for the other ranks")

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """As `channel.wait_until`, but with an end. Raises: see `check`."""

        def met() -> bool:
            self.check()
            return condition()

        return wait_until(met, seconds)


@dataclass(frozen=True)
class Hello:
    """What a rank tells the others about itself. `gpu` is a GPU's own id, None on the CPU; `facts` a digest, see `alike.py`."""

    host: str
    gpu: str | None
    host_name_is_loopback: bool
    facts: str


def connect(place: Place, timeout_seconds: float, patience: Patience) -> tuple[Store, Channel]:
    """Reach the store at rank 0 (rank 0 serves it), and open the channel for failures.

    Raises:
        StartError: rank 0 cannot be reached in time, or cannot listen at its port.
        WorldError: ranks are on several hosts and nothing says where rank 0 is.
        StoppedEarly: see `Patience`.
    """
    if place.address is None:
        place = agree_on_address(place)
    assert place.address is not None
    timeout = datetime.timedelta(seconds=timeout_seconds)
    serves = place.rank == 0 and not place.hosted
    if not serves:
        _wait_for_listener(place, timeout_seconds, patience)
    port = place.port or 0
    try:
        with _answered(place, timeout_seconds):
            tcp = TCPStore(place.address, port, is_master=serves, wait_for_workers=False, timeout=timeout)
            second = TCPStore(place.address, tcp.port, is_master=False, wait_for_workers=False, timeout=timeout)
    except DistError as error:
        raise StartError(_refusal(place, serves, error)) from error
    again = place.hosted and restarts.are_possible(os.environ)
    meeting = next_meeting(PrefixStore("ds_recipes", tcp), place.rank) if again else 0
    prefix = f"ds_recipes/{meeting}"
    channel = Channel(PrefixStore(f"{prefix}/failure", second), replace(place, port=tcp.port), meeting)
    return PrefixStore(prefix, tcp), channel


def next_meeting(store: Store, rank: int) -> int:
    """The number, from 0, of the meeting that the ranks which were started together with this one hold in a store of many.

    A meeting is over for a rank that finds a failure there, or its own seat taken: by the process that it follows.
    """
    while True:
        number = int(store.add("meeting", 0))
        if not store.check([f"{number}/failure/failure"]) and store.add(f"{number}/seat/{rank}", 1) == 1:
            return number
        store.compare_set("meeting", str(number), str(number + 1))


def greet(
    store: Store, place: Place, gpu: str | None, facts: Facts, timeout_seconds: float, patience: Patience
) -> list[Hello]:
    """Wait until every rank has come, and return what each says about itself, by rank.

    Raises:
        StartError: some ranks did not come in time. Rank 0 names them; the others hear of it through the channel.
        StoppedEarly: see `Patience`.
    """
    host = socket.gethostname()
    mine = Hello(host, gpu, _is_loopback(host), offer(store, facts))
    store.set(f"hello/{place.rank}", json.dumps(asdict(mine)))
    keys = [f"hello/{rank}" for rank in range(place.size)]
    if place.rank == 0:
        if not patience.wait_until(lambda: store.check(keys), timeout_seconds):
            absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
            hosts = sorted({json.loads(store.get(key))["host"] for key in keys if store.check([key])})
            raise StartError(
                f"After {timeout_seconds:.0f} s {len(absent)} of {place.size} ranks are missing: {name_ranks(absent)}. "
                f"Those who came are on {', '.join(hosts)}.\n"
                f"Look for their own messages, and whether their hosts reach {place.address}:{place.port} of {host}."
            )
        store.set("all_here", json.dumps([json.loads(store.get(key)) for key in keys]))
    else:
        with _answered(place, timeout_seconds):
            all_came = patience.wait_until(lambda: store.check(["all_here"]), timeout_seconds + SPEAKS_FIRST_SECONDS)
        if not all_came:
            raise StartError(f"Rank 0 did not report within {timeout_seconds:.0f} s that all {place.size} ranks came.")
    return [_hello(one) for one in json.loads(store.get("all_here"))]


def _hello(said: Mapping[str, Any]) -> Hello:
    """Other code than this may say less, or more."""
    return Hello(said["host"], said["gpu"], said["host_name_is_loopback"], said.get("facts", ""))


@contextmanager
def _answered(place: Place, timeout_seconds: float) -> Iterator[None]:
    """Around calls on the store, which block for as long as the process that serves it is stopped: not for ever."""
    error = StartError(
        f"Rank {place.rank} on {socket.gethostname()} has reached {place.address}:{place.port}, but nobody answers there: the "
        "process that listens, rank 0 or the launcher, is stopped or hangs."
    )
    timer = threading.Timer(timeout_seconds + SPEAKS_FIRST_SECONDS + 1, _leave, (error,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(error: StartError) -> None:
    show_once_a_host(describe(error))
    os._exit(exit_status(error))


def check_hosts(hellos: Sequence[Hello]) -> None:
    """Refuse what would hang or fail later without saying why. The same verdict on every rank.

    Raises:
        WorldError: two ranks use one GPU; or ranks are on several hosts, and one's own name means itself, where gloo
            would listen (FACTS: it hangs) unless GLOO_SOCKET_IFNAME names a network interface.
    """
    owners: dict[tuple[str, str], int] = {}
    for rank, hello in enumerate(hellos):
        if hello.gpu is not None and (first := owners.setdefault((hello.host, hello.gpu), rank)) != rank:
            raise WorldError(
                f"Ranks {first} and {rank} both use GPU {hello.gpu} of {hello.host}. "
                "Start as many ranks on a host as it has GPUs, or check CUDA_VISIBLE_DEVICES."
            )
    if len({hello.host for hello in hellos}) > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        for rank, hello in enumerate(hellos):
            if hello.host_name_is_loopback:
                raise WorldError(
                    f"On {hello.host} (rank {rank}) the host's own name leads to a loopback address, where other hosts "
                    "could not reach it.\nSet GLOO_SOCKET_IFNAME to the network interface (see `ip -br address`) on "
                    "all hosts: with mpirun -x, srun --export, or .deepspeed_env."
                )


def agree_on_address(place: Place) -> Place:
    """Share rank 0's address and a free port over MPI, where no variable tells them.

    Raises:
        WorldError: mpi4py is missing, or belongs to another MPI than the launcher.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
        raise WorldError(
            f"The {place.size} ranks ({place.source}) are on several hosts, and nothing says where rank 0 is.\n"
            f"Set MASTER_ADDR to its host (mpirun -x MASTER_ADDR=...), or pip install mpi4py ({error})."
        ) from error
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (place.rank, place.size):
        raise WorldError(
            f"mpi4py sees rank {world.rank} of {world.size}, but {place.source} started rank {place.rank} of "
            f"{place.size}: it was built for another MPI.\n"
            "Rebuild it with this one's mpicc, or set MASTER_ADDR to rank 0's host."
        )
    offered = world.bcast(_attempt_offer(place.port) if world.rank == 0 else None)
    MPI.Finalize()  # nothing else uses MPI, and a failing end without it would make mpirun complain
    if isinstance(offered, str):
        raise WorldError(
            f"Rank 0 finds no address that others could reach it at: {offered}.\nSet MASTER_ADDR to its host."
        )
    address, port = offered
    return replace(place, address=address, port=port)


def _attempt_offer(port: int | None) -> tuple[str, int] | str:
    try:
        return offer_address(port)
    except OSError as error:  # all ranks wait for the answer
        return str(error)


def offer_address(wanted: int | None) -> tuple[str, int]:
    """An address of this host that others can reach, and a port: the one that is wanted, or another where that is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted or 0))
        except OSError:
            probe.bind(("", 0))
            other = probe.getsockname()[1]
            owner = describe_owner(wanted or 0)
            show(f"Port {wanted} of {socket.gethostname()} is in use by {owner}: the ranks meet at port {other}.")
        return _outward_address(), int(probe.getsockname()[1])


def _outward_address() -> str:
    """An address of this host that others can reach: its name's, unless that is a loopback address."""
    host = socket.gethostname()
    if not _is_loopback(host):
        return socket.gethostbyname(host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # TEST-NET-1: nothing is sent, the kernel only picks the route
        return str(probe.getsockname()[0])


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return True


def _wait_for_listener(place: Place, timeout_seconds: float, patience: Patience) -> None:
    """Try until someone listens: torch's own store would print a warning for every attempt."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        patience.check()
        try:
            socket.create_connection((str(place.address), place.port or 0), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise StartError(
                    f"Rank {place.rank} on {socket.gethostname()} cannot reach rank 0 at {place.address}:{place.port} "
                    f"within {timeout_seconds:.0f} s: {error}.\n"
                    "Has rank 0 failed, is the address right (MASTER_ADDR), does a firewall block the port?"
                ) from error
        time.sleep(0.2)


def _refusal(place: Place, serves: bool, error: Exception) -> str:
    reason = str(error).splitlines()[0]
    if serves:
        owner = find_owner(place.port or 0)
        return (
            f"Rank 0 cannot listen at port {place.port} of {socket.gethostname()}: "
            f"{reason if owner is None else f'it is in use by {owner}.'}\n"
            "Set MASTER_PORT (deepspeed --master_port, torchrun --master_port) to a free one, or end what uses it: another "
            "job, or ranks that are left of one that was killed."
        )
    return f"Rank {place.rank} cannot join the store at {place.address}:{place.port}: {reason}"
