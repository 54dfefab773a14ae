"""The ranks' line to rank 0 while nothing else may work: plain TCP, lines of JSON, a time limit on everything. No torch.

Rank 0 listens at the first free port of a short list that every rank derives from the job's own address and port; so a port
that is in use, one of the things to be found, is in nobody's way. Others recognise it by a word that it answers with.
"""

import json
import socket
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

from ds_recipes.world.resolve import PORTS, Place

CANDIDATES = 16
CONNECT_SECONDS = 3.0
JOIN_SECONDS = 60.0
"""How long a rank looks for rank 0: launchers start the hosts some seconds apart."""

LISTEN_SECONDS = 900.0
"""How long a rank waits for rank 0's word: longer than rank 0 waits for any of the others."""

PINGS = 5


class MeetingLost(Exception):
    """Rank 0's doctor cannot be reached, or is gone."""


def candidates(place: Place) -> list[int]:
    """The ports that rank 0 may listen at, the same on all ranks."""
    first = zlib.crc32(f"doctor {place.address}:{place.port}".encode())
    ports = [PORTS[(first + 97 * number) % len(PORTS)] for number in range(CANDIDATES)]
    return [port for port in ports if port != place.port]


def word(place: Place, job: str) -> str:
    """What the doctors of one launch know each other by."""
    return f"ds_recipes doctor {place.port} {place.size} {job}"


class Chair:
    """Rank 0's side."""

    def __init__(self, place: Place, job: str) -> None:
        """Begin to listen, unless this is the only rank.

        Raises:
            MeetingLost: no port of the list is free.
        """
        self._size = place.size
        self._word = word(place, job)
        self._changed = threading.Condition()
        self._round = 0
        self._values: dict[tuple[int, int], Any] = {}  # by round and rank
        self._lines: dict[int, _Line] = {}
        self.gone: set[int] = set()
        """Ranks that came, and whose connection broke."""
        if place.size > 1:
            server = _listen(candidates(place))
            threading.Thread(target=self._accept, args=(server,), name="doctor: meeting", daemon=True).start()

    def collect(self, value: Any, limit_seconds: float) -> dict[int, Any]:
        """Every rank's value of this round, by rank; those that do not come in time are left out."""
        deadline = time.monotonic() + limit_seconds
        with self._changed:
            self._round += 1
            self._values[self._round, 0] = value
            self._changed.wait_for(lambda: self._all_here(), max(deadline - time.monotonic(), 0))
            return {
                rank: self._values[self._round, rank]
                for rank in range(self._size)
                if (self._round, rank) in self._values
            }

    def tell(self, value: Any) -> Any:
        """Say something to every rank that is there."""
        with self._changed:
            lines = dict(self._lines)
        for rank, line in lines.items():
            try:
                line.write({"told": value})
            except OSError:
                self._leave(rank)
        return value

    def _all_here(self) -> bool:
        return all((self._round, rank) in self._values or rank in self.gone for rank in range(self._size))

    def _accept(self, server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=self._serve, args=(connection,), name="doctor: a rank", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        line = _Line(connection)
        rank = -1
        try:
            hello = line.read(CONNECT_SECONDS)
            if hello.get("word") != self._word:
                connection.close()
                return
            rank = int(hello["rank"])
            line.write({"word": self._word})
            with self._changed:
                self._lines[rank] = line
            while True:
                message = line.read(None)
                if "clock" in message:
                    line.write({"now": time.time()})
                    continue
                with self._changed:
                    self._values[int(message["round"]), rank] = message["value"]
                    self._changed.notify_all()
        except (OSError, ValueError, KeyError, MeetingLost):
            self._leave(rank)

    def _leave(self, rank: int) -> None:
        with self._changed:
            if self._lines.pop(rank, None) is not None:
                self.gone.add(rank)
                self._changed.notify_all()


class Guest:
    """The side of any other rank."""

    def __init__(self, place: Place, job: str, limit_seconds: float = JOIN_SECONDS) -> None:
        """Find rank 0.

        Raises:
            MeetingLost: it is not there within the limit.
        """
        self._round = 0
        self._line = _join(place, word(place, job), limit_seconds)
        self.clock_seconds, self.clock_error_seconds = clock_ahead(self._ask_clock)

    def collect(self, value: Any, limit_seconds: float) -> dict[int, Any]:
        """Give rank 0 this rank's value of the round; what the others gave, only rank 0 hears.

        Raises:
            MeetingLost: rank 0 is gone.
        """
        self._round += 1
        try:
            self._line.write({"round": self._round, "value": value})
        except OSError as failure:
            _lost(failure)
        return {}

    def tell(self, value: Any, limit_seconds: float = LISTEN_SECONDS) -> Any:
        """What rank 0 says.

        Raises:
            MeetingLost: rank 0 is gone, or silent for too long.
        """
        try:
            return self._line.read(limit_seconds)["told"]
        except (OSError, ValueError) as failure:
            _lost(failure)

    def _ask_clock(self) -> float:
        self._line.write({"clock": True})
        return float(self._line.read(CONNECT_SECONDS)["now"])


def clock_ahead(ask: Callable[[], float], clock: Callable[[], float] = time.time) -> tuple[float, float]:
    """How far `clock` is ahead of the one that `ask` reads elsewhere, and by how much that may be wrong, in seconds.

    The quickest of a few answers counts, taken as given in the middle of its journey (Cristian, 1989).
    """
    best = (0.0, float("inf"))
    for _ in range(PINGS):
        began, before = time.monotonic(), clock()
        theirs = ask()
        journey = time.monotonic() - began
        if journey / 2 < best[1]:
            best = (before + journey / 2 - theirs, journey / 2)
    return best


class _Line:
    """Lines of JSON over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._file = connection.makefile("rb")

    def write(self, message: dict[str, Any]) -> None:
        self._connection.settimeout(60)
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self, limit_seconds: float | None) -> dict[str, Any]:
        self._connection.settimeout(limit_seconds)
        text = self._file.readline()
        if not text.endswith(b"\n"):
            raise MeetingLost("the connection was closed")
        message = json.loads(text)
        if not isinstance(message, dict):
            raise ValueError("no message")
        return message


def _listen(ports: list[int]) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    for port in ports:
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=1024
            )
        except OSError:
            continue
    raise MeetingLost(f"none of the ports {', '.join(map(str, ports))} is free")


def _join(place: Place, known_by: str, limit_seconds: float) -> _Line:
    deadline = time.monotonic() + limit_seconds
    failure: Exception = MeetingLost("no answer")
    while True:
        for port in candidates(place):
            try:
                connection = socket.create_connection((str(place.address), port), timeout=CONNECT_SECONDS)
                line = _Line(connection)
                line.write({"word": known_by, "rank": place.rank})
                if line.read(CONNECT_SECONDS).get("word") == known_by:
                    return line
                connection.close()
            except (OSError, ValueError, MeetingLost) as refused:
                failure = refused
            if time.monotonic() > deadline:
                _lost(failure)
        time.sleep(0.2)


def _lost(failure: Exception) -> NoReturn:
    raise MeetingLost(str(failure) or type(failure).__name__) from failure
