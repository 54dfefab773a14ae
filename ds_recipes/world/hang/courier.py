"""What ranks tell each other while all goes well: a beat every few seconds, over a connection of its own to the store.

Calls on the store block for as long as the process that serves it is stopped. So one thread makes them, and nobody waits
for it: who wants to know looks how long its call has been under way.
"""

import json
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ds_recipes.world.hang.activity import Clock
from ds_recipes.world.hang.judge import Seen, Verdict

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


class Courier:
    """One rank's beats, and those of the ranks that it watches."""

    def __init__(
        self,
        store: "Store",
        rank: int,
        watched: Sequence[int],
        beat_seconds: float,
        clock: Clock,
        own: Callable[[], dict[str, Any]],
    ) -> None:
        """Every rank must have made one before any is started. `own` gives what this rank says of itself."""
        self.beats: dict[int, dict[str, Any]] = {}
        """What the watched ranks said last, by rank. Empty until the first round."""
        self.rounds = 0
        """How often that was."""
        self.verdict: Verdict | None = None
        """What some rank has found, once it has."""
        self.is_broken = False
        """True once the store is gone: whoever served it has ended."""
        self._store = store
        self._rank = rank
        self._watched = list(watched)
        self._beat_seconds = beat_seconds
        self._clock = clock
        self._own = own
        self._changed: dict[int, float] = {}
        self._under_way: float | None = None
        self._finding: Verdict | None = None
        self._number = 0
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang-courier", daemon=True)
        store.set(f"beat/{rank}", self._message())

    def start(self) -> None:
        """Begin. All ranks have made theirs."""
        self._thread.start()

    def close(self) -> None:
        """No more beats: this rank leaves in order."""
        self._closed.set()
        self._wake.set()
        self._thread.join(self._beat_seconds + 1)

    def hurry(self) -> None:
        """There is something new to say."""
        self._wake.set()

    def find(self, verdict: Verdict) -> None:
        """Tell all ranks. The first finding counts; `verdict` then holds it, on this rank too."""
        self._finding = verdict
        self._wake.set()

    def seen(self) -> list[Seen]:
        """What the watched ranks said, those that have left in order excepted."""
        now = self._clock.now
        return [
            Seen(rank, beat["activities"], now - self._changed[rank])
            for rank, beat in sorted(dict(self.beats).items())
            if not beat["leaves"]
        ]

    def unanswered_seconds(self) -> float:
        """How long the store has not answered."""
        begun = self._under_way
        return 0.0 if begun is None else self._clock.now - begun

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self._round()
                self._under_way = None
                self._wake.wait(self._beat_seconds)
                self._wake.clear()
            self._store.set(f"beat/{self._rank}", self._message(leaves=True))
        except RuntimeError:  # torch's errors of a store that is gone; the channel for failures sees to it
            self.is_broken = True
        self._under_way = None

    def _round(self) -> None:
        store = self._store
        self._under_way = self._clock.now
        store.set(f"beat/{self._rank}", self._message())
        if self._finding is not None:
            store.compare_set("verdict", "", json.dumps(self._finding.to_json()))
        for rank, text in zip(self._watched, store.multi_get([f"beat/{one}" for one in self._watched]), strict=True):
            beat = json.loads(text)
            if rank not in self.beats or beat["number"] != self.beats[rank]["number"]:
                self._changed[rank] = self._clock.now
            self.beats[rank] = beat
        self.rounds += 1
        if store.check(["verdict"]):
            self.verdict = Verdict.from_json(json.loads(store.get("verdict")))

    def _message(self, leaves: bool = False) -> str:
        self._number += 1
        return json.dumps(self._own() | {"number": self._number, "leaves": leaves})
