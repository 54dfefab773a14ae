"""One round: a run that meets faults, drawn by a seed, and the run after it. `python -m tests.faults` makes many.

A seed draws where the run begins, what happens (kind of fault), at which rank, and where (which call, or when). Calls are
drawn as a share of those that the run without faults makes, so a seed means about the same after a change of the code.
"""

import collections
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.faults.nano_runs import (
    BEGIN,
    KEEPING,
    SAVES,
    LoggedCall,
    References,
    armed,
    check_faulted,
    check_whole,
)

READS = ("open", "stat", "list")
FATAL = ("kill", "kill", "tear", "tear", "fail:ENOSPC", "fail:EDQUOT", "fail:EIO", "fail:ESTALE")
SIGNALS = ("TERM", "INT", "USR1", "USR2")
SLOW = ("delay:0.02@1x200 within=saving path=*iter_*", "delay:0.1@1x60 within=saving path=*iter_*")
LATEST_SHARE = 1.1
FILES = ("rank-00000", "state", "manifest", "config")

PLACES: dict[str, tuple[tuple[str, ...], str]] = {
    "save": (("create", "write", "fsync", "mkdir", "rename", "fsync_folder"), "*iter_*"),
    "publish": (("rename", "fsync_folder", "replace"), "*"),
    "deletion": (("unlink", "rmdir", "rename"), "*iter_*"),
    "record": (("append", "create", "write", "fsync", "replace", "unlink"), "*.json*"),
    "lock": ((), "*run.lock*"),
    "load": (READS, "*iter_*"),
    "any": ((), "*"),
}
"""Where a fault at a call may be: the kinds of call, all if none is named, and the paths."""


@dataclass(frozen=True)
class Round:
    """What happens in a round.

    Attributes:
        begin: the run folder holds the checkpoints up to this step; 0: there is none.
        tokenises: what was made from the data is not there.
        damaged: a part of a file's name: that file of the newest of them has one byte flipped.
        faults: what the environment arms in the first launch.
        signal: sent to `targets` after this share (`at_share`) of the time that a launch without faults takes.
    """

    engine: str
    ranks: int
    begin: int = 0
    tokenises: bool = False
    damaged: str = ""
    faults: str = ""
    signal: str = ""
    targets: tuple[int, ...] = ()
    at_share: float = 0.0


def draw(seed: int, references: References) -> Round:
    """The round of a seed."""
    chosen = random.Random(seed)
    engine, ranks = chosen.choices([("fsdp", 2), ("deepspeed", 2), ("fsdp", 1)], weights=(5, 3, 2))[0]
    reference = references.get(engine, ranks)
    begin = chosen.choice((0, BEGIN))
    tokenises = not begin and chosen.random() < 0.3
    calls = reference.later_calls if begin else reference.first_calls if tokenises else reference.calls
    what = chosen.choice(("call", "call", "call", "call", "signal at a call", "kill all", "kill one", "signal"))
    rank = chosen.randrange(ranks)
    faults = [chosen.choice(SLOW)] if chosen.random() < 0.3 else []
    if what == "call":
        faults.append(_at_a_call(chosen, calls[rank], rank, chosen.choice(FATAL), chosen.choice(list(PLACES))))
    elif what == "signal at a call":
        faults.append(_at_a_call(chosen, calls[rank], rank, f"signal:{chosen.choice(SIGNALS)}", "any"))
    is_sent = "call" not in what
    sent = ("KILL" if what.startswith("kill") else chosen.choice(SIGNALS)) if is_sent else ""
    to_all = what == "kill all" or (what == "signal" and chosen.random() < 0.5)
    return Round(
        engine,
        ranks,
        begin,
        tokenises,
        damaged=chosen.choice(FILES) if begin and chosen.random() < 0.3 else "",
        faults="; ".join(faults),
        signal=sent,
        targets=(tuple(range(ranks)) if to_all else (rank,)) if is_sent else (),
        at_share=round(chosen.uniform(0, LATEST_SHARE), 3) if is_sent else 0.0,
    )


def _at_a_call(chosen: random.Random, calls: Sequence[LoggedCall], rank: int, action: str, place: str) -> str:
    """A fault at one of the calls that the run without faults makes in such a place; at any call if there is none."""
    kinds, pattern = PLACES[place]
    share = chosen.random()
    counts = collections.Counter(call.kind for call in calls if call.matches(kinds, pattern))
    if not counts:
        return f"{action}@{1 + int(share * len(calls))} rank={rank}"
    number = int(share * counts.total())
    for kind, count in sorted(counts.items()):
        if number < count:
            return f"{action}@{number + 1} rank={rank} kind={kind} path={pattern}"
        number -= count
    raise AssertionError("a share below 1 falls on one of them")


def run(planned: Round, references: References, folder: Path) -> tuple[int | None, ...]:
    """Let it happen in `folder`, which must not exist; return the ranks' statuses in the launch with the fault.

    Raises:
        AssertionError: the invariant does not hold.
    """
    reference = references.get(planned.engine, planned.ranks)
    before, damaged = planned.begin, 0
    if planned.begin:
        reference.put_checkpoints(folder, planned.begin)
    if planned.damaged:
        damaged, before = planned.begin, max(step for step in SAVES if step < planned.begin)
        _flip_a_byte(folder / f"iter_{damaged:07d}", planned.damaged)
    if planned.tokenises:
        reference.remove_caches()
    faulted = reference.launch(
        folder, *KEEPING, env=armed(planned.faults), meanwhile=_sender(planned, reference.seconds)
    )
    output = faulted.text
    try:
        check_faulted(folder, faulted, before, damaged)
        after = reference.launch(folder, *KEEPING)
        output += f"---- started again: {after.statuses}\n{after.text}"
        assert after.statuses == (0,) * planned.ranks, f"started again, it ended with {after.statuses}"
        check_whole(reference, folder, before)
    except Exception as error:
        raise AssertionError(f"{error}\n---- with the fault: {faulted.statuses}\n{output[-8000:]}") from error
    return faulted.statuses


def _sender(planned: Round, seconds: float) -> Callable[[list[ForkServerProcess]], None] | None:
    if not planned.signal:
        return None

    def send(processes: list[ForkServerProcess]) -> None:
        time.sleep(planned.at_share * seconds)
        for rank in planned.targets:
            process = processes[rank]
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, getattr(signal, f"SIG{planned.signal}"))

    return send


def _flip_a_byte(checkpoint: Path, name: str) -> None:
    path = next(path for path in sorted(checkpoint.iterdir()) if path.name.startswith(name))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)
