"""The side channel for bad news: the store through which the ranks met, since no collective works after a failure.

A rank's wish to stop travels on it too, under the key "stop", to ranks that are busy with something else.

The first rank to claim the key "failure" shows its error. The others learn of it from a thread that looks every half
second, so a rank that is stuck in a collective leaves too. Everyone answers a roll call, which is how a rank that was
killed is noticed and named.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from ds_recipes.errors import DeviceError, DsRecipesError, LauncherGone, PeerFailure, StoppedEarly
from ds_recipes.world import launcher_watch, restarts
from ds_recipes.world.resolve import Place

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

POLL_SECONDS = 0.5
ROLL_CALL_SECONDS = 3.0
LEAVE_SECONDS = 5.0
"""How long the process that serves the store stays for the others to leave first."""

PEER_SECONDS = 2.0
"""How long a rank that only suffers from another's failure lets that one speak first."""

SHOW_SECONDS = 6.0
"""How long ranks wait until the first one has shown its error, before one of them shows it in its place."""

LAST_RESORT_SECONDS = 20.0
"""A failing process is gone after this long, come what may (a store that does not answer)."""

INTERRUPTED = 130
KILLED = "Was it killed? Out of memory is the usual cause: see the kernel's log of its host (dmesg)."

current: "Channel | None" = None
"""This process's channel, from the meeting of the ranks to the end of the world."""


class Channel:
    """One rank's line to the others, over a connection of its own to the store."""

    def __init__(self, store: "Store", place: Place, meeting: int) -> None:
        """`meeting` is counted from 0 in the store, and goes up when a launcher starts its ranks again."""
        global current
        self.meeting = meeting
        self.phase = "the start"
        """What this rank is doing, for messages."""
        self.leave: Callable[[], None] | None = None
        """Ends the world in order; set once there is one."""
        self.note: Callable[[str, int], None] | None = None
        """Writes down why the run ended, whichever rank it was, and with which exit status; set on the rank that keeps the
        run's record."""
        self.wish: Callable[[], str | None] | None = None
        """Why this rank wants to stop; asked about twice a second, and passed on to all."""
        self.asked: str | None = None
        """Why some rank wants to stop, as far as this one has heard. Once it is set it stays."""
        self._store = store
        self._place = place
        self._ending = threading.Lock()
        self._closed = threading.Event()
        self._told = False
        self._limit: threading.Timer | None = None
        self._watcher = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
        self._watcher.start()
        current = self

    @property
    def place(self) -> Place:
        """Where this rank stands; with the port that the store has."""
        return self._place

    def limit(self, seconds: float, error: DsRecipesError) -> None:
        """End all ranks with `error` unless `no_limit` is called within `seconds`. A store that does not answer delays nothing."""
        self._limit = threading.Timer(seconds, self.fail, (error,))
        self._limit.daemon = True
        self._limit.start()

    def no_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()

    def close(self) -> None:
        """Stop watching, in agreement: the process that serves the store stays until all have closed."""
        global current
        self._closed.set()
        self._watcher.join()
        self._store.add("closed", 1)
        if self._serves_the_store:
            wait_until(lambda: self._store.add("closed", 0) >= self._place.size, LEAVE_SECONDS)
        current = None

    def fail(self, error: BaseException) -> NoReturn:
        """Let the others know, see to it that one rank shows the error, and end this process."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):  # launchers send these as soon as one rank is gone
                signal.signal(number, signal.SIG_IGN)
        if not self.seize():
            while True:  # another thread of this process is ending it
                time.sleep(1)
        self.end(error)

    def seize(self) -> bool:
        """From now on only the caller ends this process; False if another thread does already."""
        return self._ending.acquire(blocking=False)

    def end(self, error: BaseException, num_gone: int = 0) -> NoReturn:
        """What `fail` does, for who has seized the ending. So many ranks are known to be gone, and are not waited for."""
        status = exit_status(error)
        timer = threading.Timer(LAST_RESORT_SECONDS, self._leave_untold, (error, status))
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # a process that is out of memory gets no new thread
            timer.start()
        try:
            status = self._end_together(error, status, num_gone)
        except RuntimeError:  # torch's errors of a store that is gone, and with it rank 0
            lost = self._lost_store()
            self._note(lost if isinstance(error, PeerFailure) else _reason(error), status)
            own = "" if isinstance(error, (LauncherGone, PeerFailure)) else f"\n{describe(error)}"
            show_once_a_host(lost + own + self._whereabouts(error))
        restarts.forbid(status, show)
        _flush()
        os._exit(status)

    def _end_together(self, error: BaseException, status: int, num_gone: int) -> int:
        """Claim the failure or accept another's; return the exit status that all ranks end with."""
        store, place = self._store, self._place
        if isinstance(error, PeerFailure):
            wait_until(lambda: store.check(["failure"]), PEER_SECONDS)
        text = _traceback(error) + describe(error) + self._whereabouts(error)
        claim = json.dumps({"rank": place.rank, "status": status, "text": text, "reason": _reason(error)})
        first = json.loads(store.compare_set("failure", "", claim))
        self._note(str(first["reason"]), int(first["status"]))
        store.set(f"here/{place.rank}", "")
        store.add("here", 1)
        size = place.size - num_gone
        if first["rank"] == place.rank:
            lost = [] if _explains_itself(error) else self._roll_call()
            self._show(text + (f"\nLost contact with {name_ranks(lost)}. {KILLED}" if lost else ""))
            size -= len(lost)
        elif not self._is_shown():
            self._show(str(first["text"]))
        self._told = True
        store.add("left", 1)
        if self._serves_the_store:
            wait_until(lambda: store.add("left", 0) >= size, LEAVE_SECONDS)
        return int(first["status"])

    def _leave_untold(self, error: BaseException, status: int) -> None:
        """The store, or a disk, does not answer."""
        if not self._told:
            show_once_a_host(f"{self._unanswered()}{describe(error)}{self._whereabouts(error)}")
        os._exit(status)

    def _unanswered(self) -> str:
        place = self._place
        return "" if self._serves_the_store else f"No answer from the store at {place.address}:{place.port}.\n"

    def _note(self, reason: str, status: int) -> None:
        if self.note is not None:
            with contextlib.suppress(OSError, DsRecipesError):  # a full disk must not keep the error from being shown
                self.note(reason, status)

    def _show(self, text: str) -> None:
        me = str(self._place.rank)
        if self._store.compare_set("teller", "", me).decode() == me and not show(text):
            self._store.set("teller", "")
            self._store.set("unheard", "")
            return
        self._store.set("shown", "")

    def _is_shown(self) -> bool:
        """Wait for the one who is to show the error; False if it is late, or nobody reads what it prints."""
        store = self._store
        wait_until(lambda: bool(store.check(["shown"]) or store.check(["unheard"])), SHOW_SECONDS)
        return bool(store.check(["shown"]))

    def _roll_call(self) -> list[int]:
        """The ranks that do not answer."""
        size = self._place.size
        if wait_until(lambda: self._store.add("here", 0) >= size, ROLL_CALL_SECONDS):
            return []
        return [rank for rank in range(size) if not self._store.check([f"here/{rank}"])]

    def _whereabouts(self, error: BaseException) -> str:
        """Which rank speaks, and what it was doing. An error of all ranks says so itself, in a note."""
        if self._place.size == 1 or hasattr(error, "__notes__") or isinstance(error, StoppedEarly):
            return ""
        return f"\n(rank {self._place.rank} of {self._place.size} on {socket.gethostname()}, during {self.phase})"

    @property
    def _serves_the_store(self) -> bool:
        return self._place.rank == 0 and not self._place.hosted

    def _lost_store(self) -> str:
        gone, place = launcher_watch.gone(), self._place
        if gone is not None:
            return str(gone)
        whom = "the launcher's store" if place.hosted else "rank 0"
        return f"Lost contact with {whom} at {place.address}:{place.port}. {KILLED}"

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            try:
                failed = self._store.check(["failure"])
                self._pass_wishes_on()
            except RuntimeError:
                failed = True
            if failed:
                self.fail(PeerFailure("Another rank failed."))

    def _pass_wishes_on(self) -> None:
        if self.asked is None and self.wish is not None and (own := self.wish()) is not None:
            self._store.compare_set("stop", "", own)
        if self.asked is None and self._store.check(["stop"]):
            self.asked = self._store.get("stop").decode()


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def exit_status(error: BaseException) -> int:
    """The status that a process ends with because of `error`."""
    if isinstance(error, DsRecipesError):
        return error.exit_status
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 1


def describe(error: BaseException) -> str:
    """What to show of `error`: the message of one meant for users, else the traceback."""
    if isinstance(error, DsRecipesError):
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    if isinstance(error, SystemExit):
        return f"The program left with {error.code!r}."
    return "".join(traceback.format_exception(error)).rstrip()


def _traceback(error: BaseException) -> str:
    """Where torch raised what a device's error was made of; nothing for any other error."""
    if not isinstance(error, DeviceError) or error.__cause__ is None:
        return ""
    return "".join(traceback.format_exception(error.__cause__)) + "\n"


def name_ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 1, 4-7`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


def show(text: str) -> bool:
    """Print an error, whole, after everything that was printed before. False if nobody is there to read it."""
    try:
        _flush()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        return False
    return True


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the launcher's end of the pipe may be gone
            stream.flush()


def show_once_a_host(text: str) -> None:
    """Show `text` unless another rank of this launch on this host is doing so, where no store can tell."""
    guard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        guard.bind(f"\0ds_recipes-{os.getuid()}-{os.getpgid(os.getppid())}")
    except OSError:
        return
    show(text)
    time.sleep(4 * POLL_SECONDS)  # the name is free again when this process ends


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Ask every tenth of a second at most; False if the time is over."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return True


def _explains_itself(error: BaseException) -> bool:
    """Errors for users have a cause that we know; any other may come from a peer that was killed."""
    return isinstance(error, (DsRecipesError, KeyboardInterrupt, SystemExit)) and not isinstance(error, PeerFailure)
