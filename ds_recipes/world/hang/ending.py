"""The end of a run that hangs: every rank writes its stacks, what cannot leave is killed, one says why, all leave.

Each part is bounded in time: the disk may be what hangs, and where the process that serves the store is the one that is
stopped, ranks can only agree by files.
"""

import contextlib
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ds_recipes.errors import HangError
from ds_recipes.world import channel
from ds_recipes.world.channel import Channel, show, show_once_a_host, wait_until
from ds_recipes.world.hang.nccl import write_flight_record
from ds_recipes.world.hang.peers import Peer

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from ds_recipes.world.hang.judge import Verdict

DUMP_SECONDS = 4.0
"""How long writing down this rank's stacks may take."""

AGREE_SECONDS = 5.0
"""How long ranks wait for each other's stacks, besides what it takes them to hear of the verdict."""

LATER_SECONDS = 2.0
"""How long those who have nothing to tell stay: a launcher may kill all as soon as one has left."""

SUMMARY = "hang.json"
ADVICE = "What each rank was doing: {folder}. A phase that may take so long needs a longer limit, such as --hang_limits {phase}=1h."


@dataclass
class Ending:
    """What a rank needs to end a run that hangs."""

    rank: int
    peers: Sequence[Peer]
    folder: Path
    beat_seconds: float
    about: Callable[[], dict[str, Any]]
    """What this rank says of itself."""
    others: Callable[[], Mapping[int, dict[str, Any]]]
    """What other ranks have said last, as far as this one knows."""
    note_lost: Callable[[str], None] | None = None
    """Writes down in rank 0's place why the run ended."""

    def together(self, verdict: "Verdict", line: Channel, store: "Store | None") -> NoReturn:
        """End the run over the store, which answers. To be called by the one thread that has seized the line's ending."""
        self._write_stacks(verdict)
        silent = set(verdict.silent)
        answering = [rank for rank in range(len(self.peers)) if rank not in silent]
        if store is not None:
            here = store
            here_too = len(answering)
            agree_seconds = AGREE_SECONDS + 2 * self.beat_seconds
            _bounded(lambda: here.add("reported", 1), AGREE_SECONDS)
            _bounded(lambda: wait_until(lambda: here.add("reported", 0) >= here_too, agree_seconds), agree_seconds + 1)
        if self.rank in (answering[0], answering[-1]):  # the ranks that know of all
            _bounded(lambda: self._write_summary(verdict), DUMP_SECONDS)
        if 0 in silent and self.rank == answering[0]:
            self._note(verdict.text)
        self._kill(silent)
        line.end(self._error(verdict), num_gone=len(silent))

    def alone(self, verdict: "Verdict") -> NoReturn:
        """End this rank without the store: rank 0, which serves it, does not answer. Files tell who speaks."""
        self._write_stacks(verdict)
        time.sleep(2 * self.beat_seconds)  # until all have noticed
        is_first: list[bool] = []
        _bounded(lambda: is_first.append(self._write_summary(verdict)), DUMP_SECONDS)
        text = channel.describe(self._error(verdict))
        if is_first == [True]:
            show(text)
            self._note(verdict.text)
        elif not is_first:  # the disk does not answer
            show_once_a_host(text)
        self._kill(set(verdict.silent))
        if is_first != [True]:
            time.sleep(LATER_SECONDS)
        os._exit(HangError.exit_status)

    def _error(self, verdict: "Verdict") -> HangError:
        phase = verdict.culprits[0].phase if verdict.culprits else self.about()["activities"][0]["phase"]
        error = HangError(verdict.text)
        error.add_note(ADVICE.format(folder=self.folder, phase=phase))
        return error

    def _write_stacks(self, verdict: "Verdict") -> None:
        _bounded(lambda: self._dump(verdict), DUMP_SECONDS)

    def _dump(self, verdict: "Verdict") -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        about, peer = self.about(), self.peers[self.rank]
        with (self.folder / f"rank-{self.rank:05d}.txt").open("w", encoding="utf-8") as file:
            file.write(f"{verdict.text}\n\nrank {self.rank} on {peer.host}, process {peer.pid}\n")
            file.writelines(_told(activity) for activity in about["activities"])
            file.write(f"main thread: {about['where']['part']} {about['where']['detail']}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        write_flight_record(self.folder, self.rank)

    def _write_summary(self, verdict: "Verdict") -> bool:
        """False if another rank has done so."""
        others = {rank: told for rank, told in self.others().items() if rank != self.rank} | {self.rank: self.about()}
        ranks = [
            {"rank": rank, "host": self.peers[rank].host, "pid": self.peers[rank].pid, **told}
            for rank, told in sorted(others.items())
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with (self.folder / SUMMARY).open("x", encoding="utf-8") as file:
                file.write(json.dumps(verdict.to_json() | {"ranks": ranks}, indent=2) + "\n")
        except FileExistsError:
            return False
        return True

    def _note(self, reason: str) -> None:
        note = self.note_lost
        if note is not None:
            _bounded(lambda: note(reason), DUMP_SECONDS)

    def _kill(self, ranks: set[int]) -> None:
        """End those of this host. They do not hear anything else."""
        for rank in ranks - {self.rank}:
            self.peers[rank].kill()


def _told(activity: dict[str, Any]) -> str:
    return (
        f"phase {activity['phase']}, {activity['doing']}, step {activity['step']}: {activity['in_phase_seconds']:.1f} s in it, "
        f"{activity['idle_seconds']:.1f} s without progress (limit {activity['limit_seconds']:.0f} s); waits for "
        f"{activity['waits_for'] or 'nobody'}; {activity['collectives']} collectives of our own, the last "
        f"{activity['collective'] or 'none'}\n"
    )


def _bounded(work: Callable[[], object], seconds: float) -> None:
    """Do `work`, or leave it undone after so long; whatever goes wrong in it must not keep the run from ending."""

    def attempt() -> None:
        try:
            work()
        except Exception as error:
            show(f"at the end of a run that hangs: {type(error).__name__}: {error}")

    thread = threading.Thread(target=attempt, name="hang-ending", daemon=True)
    with contextlib.suppress(RuntimeError):  # a process that is out of memory gets no new thread
        thread.start()
        thread.join(seconds)
