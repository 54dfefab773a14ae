"""The thread that watches this rank, and on two of the ranks all others too.

Rank 0 and the last rank see every rank's beats; the rest watch rank 0, with which the store would go. It looks twenty
times a second where the main thread is, which is what stragglers are found by.
"""

import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_recipes.config.hang_settings import EVALUATE, SAVE, STEP, HangConfig, parse_limits
from ds_recipes.errors import DsRecipesError, HangError
from ds_recipes.world import channel
from ds_recipes.world.hang import activity
from ds_recipes.world.hang.activity import Activity, Clock
from ds_recipes.world.hang.courier import Courier
from ds_recipes.world.hang.ending import Ending
from ds_recipes.world.hang.frames import Where, main_frame, where_is
from ds_recipes.world.hang.judge import LEAST_SILENCE_BEATS, Seen, Verdict, judge
from ds_recipes.world.hang.limits import Limits
from ds_recipes.world.hang.peers import this_process
from ds_recipes.world.hang.stragglers import Straggler, StragglerWatch

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from ds_recipes.world.channel import Channel
    from ds_recipes.world.group import World

TICK_SECONDS = 0.05
LOOK_TICKS = 10
"""Ticks between two looks at what the others have said."""

LEAST_BEAT_SECONDS, MOST_BEAT_SECONDS = 0.5, 5.0
BEATS_A_LIMIT = 10

CONNECT_SECONDS = 60

ENDED_SECONDS = 4.0
"""How long a rank of this host must be gone before this one leaves over it: time for better news, over the failed collective or the
store. A launcher that found it out has sent SIGTERM by then, which is a wish to stop as long as nobody is missed."""


@dataclass(frozen=True)
class SlowRank:
    """A straggler, for a warning."""

    rank: int
    host: str
    part: str
    message: str


class HangWatch:
    """Watches one rank. It is silent until the run hangs; then it ends this process, as it does on every other rank."""

    def __init__(self, world: "World", settings: HangConfig, folder: Path) -> None:
        """`folder` is for what it writes at the end. Every rank must make one, and may then go on."""
        line = channel.current
        assert line is not None, "the ranks have met"
        self._world, self._line = world, line
        limits = Limits(parse_limits(settings.hang_limits), settings.hang_factor)
        self._clock = Clock()
        self._main = Activity(limits, self._clock)
        self._main_thread = threading.main_thread().ident or 0
        self._where = Where("")
        self._samples: Counter[str] = Counter()
        self._slow: list[SlowRank] = []
        self._stragglers = StragglerWatch()
        self._last_finding: Verdict | None = None
        self._round = 0
        self._closed = threading.Event()
        beat_seconds = min(max(limits.shortest_seconds / BEATS_A_LIMIT, LEAST_BEAT_SECONDS), MOST_BEAT_SECONDS)
        self._beat_seconds = beat_seconds
        self._sees_all = world.rank in (0, world.size - 1)
        self._store: Store | None = None
        self._courier: Courier | None = None
        if world.size > 1:
            watched = range(world.size) if self._sees_all else [0]
            self._store = _connect(line)
            self._courier = Courier(self._store, world.rank, watched, beat_seconds, self._clock, self._about)
        self.ending = Ending(
            world.rank, world.gather(this_process()), folder, beat_seconds, self._about, lambda: self._beats()
        )
        peers = enumerate(self.ending.peers)
        self._near = [rank for rank, peer in peers if rank != world.rank and peer.is_here]
        self._missed_since: dict[int, float] = {}
        self._leaving = False
        self._thread = threading.Thread(target=self._run, name="hang-watch", daemon=True)
        if world.device.type == "cuda":
            folder.parent.mkdir(parents=True, exist_ok=True)  # NCCL's own watch writes there
        activity.begin(self._main)
        if self._courier is not None:
            self._main.when_changed = self._courier.hurry
            self._courier.start()
        self._thread.start()

    def let_leave(self) -> None:
        """From now on ranks may end: the run is over once all have come to its end."""
        self._leaving = True

    def close(self) -> None:
        """Stop watching: the run ends in order."""
        self._closed.set()
        self._thread.join()
        if self._courier is not None:
            self._courier.close()
        activity.end()

    def slow_ranks(self) -> list[SlowRank]:
        """Stragglers found since the last call; on rank 0. Cheap, for every step."""
        found, self._slow = self._slow, []
        return found

    def _run(self) -> None:
        last, ticks = time.monotonic(), 0
        while not self._closed.wait(TICK_SECONDS):
            now = time.monotonic()
            self._clock.tick(now - last)
            last, ticks = now, ticks + 1
            self._sample()
            if ticks % LOOK_TICKS == 0:
                self._look()

    def _sample(self) -> None:
        self._where = where_is(main_frame(self._main_thread))
        if self._main.phase in (STEP, EVALUATE, SAVE) and not self._main.is_new:
            self._samples[self._where.part] += 1

    def _about(self) -> dict[str, Any]:
        where, (main, *others) = self._where, activity.all_activities()
        return {
            "activities": [main.to_json(where), *(other.to_json() for other in others)],
            "where": {"part": where.part, "detail": where.detail},
            "samples": dict(self._samples),
        }

    def _beats(self) -> dict[int, dict[str, Any]]:
        return {} if self._courier is None else dict(self._courier.beats)

    def _look(self) -> None:
        missed = self._missed()
        if missed:
            self._end_without(missed)
        courier = self._courier
        if courier is None:
            found = judge([Seen(0, self._about()["activities"], 0.0)], self._world.hosts, self._beat_seconds)
            if found is not None:
                self._end(found)
            return
        if courier.verdict is not None:
            self._end(courier.verdict)
        elif not courier.is_broken and self._has_lost_the_store(courier):
            self._end_alone(courier)
        elif self._sees_all and courier.beats:
            self._judge(courier)

    def _missed(self) -> list[int]:
        """The ranks of this host whose processes have ended for long, though the run has not."""
        for rank in self._near:
            if not self.ending.peers[rank].has_ended:
                self._missed_since.pop(rank, None)
            else:
                self._missed_since.setdefault(rank, self._clock.now)
        if self._leaving:
            return []
        return sorted(rank for rank, since in self._missed_since.items() if self._clock.now - since >= ENDED_SECONDS)

    def _end_without(self, missed: list[int]) -> None:
        """End this process over others that are gone, unless another thread does already."""
        if self._closed.is_set() or not self._line.seize():
            return
        ended = f"{channel.name_ranks(missed)} on {self._world.hosts[self._world.rank]}"
        error = DsRecipesError(f"Lost contact with {ended}: the process has ended. {channel.KILLED}")
        if 0 in missed and not self._line.place.hosted:  # the store went with it
            channel.show_once_a_host(channel.describe(error))
            os._exit(DsRecipesError.exit_status)
        self._line.end(error, num_gone=len(missed))

    def _judge(self, courier: Courier) -> None:
        """Two looks must come to the same end: a rank may just have come further."""
        found = judge(courier.seen(), self._world.hosts, self._beat_seconds, self._state_of)
        before, self._last_finding = self._last_finding, found
        if found is not None and before is not None and _ranks(found) == _ranks(before):
            courier.find(found)
        if self._world.rank == 0 and courier.rounds != self._round:
            self._round = courier.rounds
            straggler = self._stragglers.look([courier.beats[rank]["samples"] for rank in range(self._world.size)])
            if straggler is not None:
                self._slow = [*self._slow, self._describe(straggler)]

    def _state_of(self, rank: int) -> str | None:
        return self.ending.peers[rank].state()

    def _has_lost_the_store(self, courier: Courier) -> bool:
        """True if the store has not answered for longer than rank 0, which serves it, may take.

        Where the launcher serves it, training may well go on without: only a rank that hangs itself has lost it.
        """
        silent_seconds = courier.unanswered_seconds()
        if silent_seconds < LEAST_SILENCE_BEATS * self._beat_seconds:
            return False
        if self._main.idle_seconds > self._main.limit_seconds:
            return True
        return (
            self._world.rank > 0 and not self._line.place.hosted and silent_seconds > self._limit_of_rank_zero(courier)
        )

    def _limit_of_rank_zero(self, courier: Courier) -> float:
        beat = courier.beats.get(0)
        activities = [self._main.to_json()] if beat is None else beat["activities"]
        return min(float(activity["limit_seconds"]) for activity in activities)

    def _end(self, verdict: Verdict, alone: bool = False) -> None:
        """End this process, unless another thread does already."""
        if self._closed.is_set() or not self._line.seize():
            return
        try:
            if alone or (0 in verdict.silent and not self._line.place.hosted):
                self.ending.alone(verdict)  # its end will be the store's
            self.ending.together(verdict, self._line, self._store)
        except Exception as error:  # nobody else ends this process any more
            channel.show(f"{verdict.text}\n{channel.describe(error)}")
            os._exit(HangError.exit_status)

    def _end_alone(self, courier: Courier) -> None:
        """End this process over a store that does not answer."""
        place, seconds = self._line.place, round(courier.unanswered_seconds(), 1)
        own = self._about()["activities"]
        if place.hosted:
            text = f"The launcher's store at {place.address}:{place.port} has not answered for {seconds:.0f} s."
            self._end(Verdict((), (), f"{text} Rank {self._world.rank} does not come further."), alone=True)
            return
        beat = courier.beats.get(0)
        zero = Seen(0, own if beat is None else beat["activities"], seconds)
        found = judge([zero, Seen(self._world.rank, own, 0.0)], self._world.hosts, 0.0, self._state_of)
        if found is not None:
            self._end(replace(found, silent=(0,)), alone=True)

    def _describe(self, straggler: Straggler) -> SlowRank:
        rank, host = straggler.rank, self._world.hosts[straggler.rank]
        return SlowRank(
            rank,
            host,
            straggler.part,
            f"rank {rank} on {host} is slow: the others wait for it. It works {straggler.share:.0%} of the time, they "
            f"{straggler.others_share:.0%}; most of the difference is in: {straggler.part}",
        )


def _connect(line: "Channel") -> "Store":
    """A connection of its own: calls on one may block."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    place = line.place
    assert place.address is not None and place.port is not None
    timeout = timedelta(seconds=CONNECT_SECONDS)
    store = TCPStore(place.address, place.port, is_master=False, wait_for_workers=False, timeout=timeout)
    return PrefixStore(f"ds_recipes/{line.meeting}/hang", store)


def _ranks(verdict: Verdict) -> set[int]:
    return {culprit.rank for culprit in verdict.culprits}
