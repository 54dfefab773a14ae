"""How a check is run: with a time limit of its own, and so that neither a hang nor a crash of it ends the doctor."""

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_recipes.cluster.doctor.findings import Finding, error
from ds_recipes.world.resolve import Place

LIMIT_SECONDS = 15.0
ALL_SECONDS = 60.0
"""For all checks of one rank together: the other ranks wait for its report no longer than a little above this."""


@dataclass(frozen=True)
class Context:
    """What the checks of one rank look at.

    `alone` says that no launcher started this process. `run_folder` and `hostfile` are as given; `settings` are words of
    train.py's command line, empty if none were given.
    """

    env: Mapping[str, str]
    place: Place
    host: str
    root: Path
    run_folder: Path | None = None
    hostfile: Path | None = None
    settings: tuple[str, ...] = ()
    expected_world_size: int | None = None
    config: Any = None
    """The settings as `ds_recipes.config.load` read them, None without any or where they are wrong."""

    @property
    def alone(self) -> bool:
        return self.place.source == "a single process"

    @property
    def first_on_host(self) -> bool:
        return self.place.local_rank == 0

    @property
    def one_host(self) -> bool:
        """True if the launcher says that all ranks are on this host."""
        return self.place.local_size == self.place.size


@dataclass(frozen=True)
class Check:
    """One group of findings. A check of the `host` is done by the first rank of each host, one of the `job` by rank 0."""

    name: str
    run: Callable[[Context], Iterable[Finding]]
    whose: str = "rank"  # or "host", "job"
    limit_seconds: float = LIMIT_SECONDS

    def applies(self, context: Context) -> bool:
        if self.whose == "job":
            return context.place.rank == 0
        return self.whose == "rank" or context.first_on_host


def run_checks(checks: Sequence[Check], context: Context) -> list[Finding]:
    """All findings, in the order of the checks. A check that hangs is left behind in its thread."""
    findings: list[Finding] = []
    deadline = time.monotonic() + ALL_SECONDS
    for check in checks:
        if check.applies(context):
            findings += run_one(check, context, min(check.limit_seconds, max(deadline - time.monotonic(), 0.1)))
    return findings


def run_one(check: Check, context: Context, limit_seconds: float) -> list[Finding]:
    """The findings of one check; a hang or a crash is a finding too."""
    found: list[Finding] = []
    ended = threading.Event()

    def work() -> None:
        try:
            found.extend(check.run(context))
        except Exception as failure:
            found.append(_crashed(check, failure))
        ended.set()

    thread = threading.Thread(target=work, name=f"doctor: {check.name}", daemon=True)
    thread.start()
    if ended.wait(limit_seconds):
        return found
    return [
        *list(found),
        error(
            "doctor.hangs",
            f"the check '{check.name}' did not end within {limit_seconds:.0f} s",
            "what it asked does not answer: a file server that is down, a name server, a driver",
            f"Look at what the check needs (docs/doctor.md, {check.name}); a run would most likely hang there as well.",
            check=check.name,
        ),
    ]


def _crashed(check: Check, failure: Exception) -> Finding:
    where = traceback.extract_tb(failure.__traceback__)[-1]
    return error(
        "doctor.failed",
        f"the check '{check.name}' itself failed: {type(failure).__name__}: {failure} ({Path(where.filename).name}:{where.lineno})",
        "this machine is unlike any that the check was written for, or the check is wrong",
        "Read the message: it may name the cause. The other checks do not depend on it.",
        check=check.name,
    )
