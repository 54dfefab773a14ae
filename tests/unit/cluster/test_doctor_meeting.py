"""The doctors' meeting over real sockets: a silent rank, a rank that goes, a stranger at the port, a clock that is wrong."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from ds_recipes.cluster.doctor import meeting
from ds_recipes.cluster.doctor.meeting import Chair, Guest, MeetingLost, candidates, clock_ahead
from ds_recipes.world.resolve import Place
from tests.e2e.launchers import free_port


@pytest.fixture
def place() -> Callable[[int, int], Place]:
    """A rank's place; another port, so other ports of the doctors, in each test."""
    port = int(free_port())
    return lambda rank, size: Place(rank, size, rank, size, "a test", "127.0.0.1", port)


def test_ranks_tell_and_hear(place) -> None:
    chair = Chair(place(0, 3), "job")

    def guest(rank: int) -> tuple[object, object]:
        line = Guest(place(rank, 3), "job")
        line.collect({"own": rank}, 0)
        first = line.tell(None)
        line.collect([rank] * 2, 0)
        return first, line.tell(None)

    with ThreadPoolExecutor() as pool:
        guests = [pool.submit(guest, rank) for rank in (1, 2)]
        assert chair.collect({"own": 0}, 20) == {0: {"own": 0}, 1: {"own": 1}, 2: {"own": 2}}
        chair.tell("first")
        assert chair.collect(None, 20) == {0: None, 1: [1, 1], 2: [2, 2]}
        chair.tell("second")
        assert [one.result(20) for one in guests] == [("first", "second")] * 2


def test_a_rank_that_never_comes_and_one_that_goes_hold_nobody(place) -> None:
    chair = Chair(place(0, 3), "job")
    gone = Guest(place(1, 3), "job")
    gone.collect("here", 0)
    began = time.monotonic()
    assert chair.collect("mine", 0.5) == {0: "mine", 1: "here"}
    assert 0.4 < time.monotonic() - began < 5
    late = Guest(place(2, 3), "job")
    for line in (gone, late):
        line._line._connection.shutdown(socket.SHUT_RDWR)
    began = time.monotonic()
    assert chair.collect("again", 60) == {0: "again"}
    assert time.monotonic() - began < 10 and chair.gone == {1, 2}


def test_rank_zero_that_goes_is_noticed(place) -> None:
    chair = Chair(place(0, 2), "job")
    guest = Guest(place(1, 2), "job")
    chair._lines[1]._connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(MeetingLost):
        guest.tell(None)


def test_no_rank_zero_is_told_within_the_limit(place) -> None:
    began = time.monotonic()
    with pytest.raises(MeetingLost, match="refused"):
        Guest(place(1, 2), "job", limit_seconds=0.5)
    assert time.monotonic() - began < 10


def test_strangers_at_the_first_ports_are_passed_by(place, monkeypatch) -> None:
    """One is silent, and one is the doctor of another job: neither is taken for rank 0."""
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 0.5)
    first, second, *_ = candidates(place(0, 2))
    with socket.create_server(("", first)):
        other = Chair(place(0, 2), "another job")
        chair = Chair(place(0, 2), "job")
        guest = Guest(place(1, 2), "job")
        guest.collect("found", 0)
        assert chair.collect("mine", 20)[1] == "found"
        assert not other.gone and guest._line._connection.getpeername()[1] not in (first, second)


def test_how_far_a_clock_is_ahead_is_measured_over_the_line(place) -> None:
    """No clock of the machine is set: the one that is asked here is 90 s ahead, and the other side's is real."""
    Chair(place(0, 2), "job")
    guest = Guest(place(1, 2), "job")
    assert abs(guest.clock_seconds) < 0.5 and guest.clock_error_seconds < 0.5
    ahead, bound = clock_ahead(guest._ask_clock, clock=lambda: time.time() + 90.0)
    assert abs(ahead - 90.0) < 0.5 and bound < 0.5


def test_a_slow_answer_does_not_move_the_clock() -> None:
    """The quickest answer counts, and the bound holds the error of the slow ones too."""
    pauses = iter([0.2, 0.0, 0.2, 0.2, 0.2])

    def ask() -> float:
        threading.Event().wait(next(pauses))
        return time.time()

    ahead, bound = clock_ahead(ask)
    assert abs(ahead) <= bound + 1e-3 and bound < 0.1
