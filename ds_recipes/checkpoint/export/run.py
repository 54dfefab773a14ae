"""All checkpoints of a run, each exported by a process of its own: what ends one leaves the others alone."""

import multiprocessing
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.errors import DsRecipesError, InputError
from ds_recipes.fsops.faults import arm_from_environment

NAME = re.compile(r"(?:iter_|global_step|checkpoint-)(\d+)")
"""How our, DeepSpeed's and the Hugging Face Trainer's checkpoints are called."""


@dataclass(frozen=True)
class Row:
    """What became of one checkpoint: `error` is None if it was exported."""

    checkpoint: Path
    out: Path
    seconds: float
    error: str | None
    exported: Any = None


def choose(run: Path, start: int | None, end: int | None, increment: int | None) -> list[Path]:
    """The run's checkpoints from step `start` to `end`, both included, every `increment` steps; all of them by default.

    Raises:
        InputError: there are none, or one that was asked for is missing.
    """
    if not run.is_dir():
        raise InputError(f"--run {run}: there is no such folder")
    found = {int(match[1]): path for path in run.iterdir() if (match := NAME.fullmatch(path.name)) and path.is_dir()}
    steps = sorted(found)
    if not steps:
        raise InputError(f"--run {run}: holds no checkpoints (iter_0000100, global_step100 or checkpoint-100)")
    first, last = steps[0] if start is None else start, steps[-1] if end is None else end
    if increment is not None:
        missing = [step for step in range(first, last + 1, increment) if step not in found]
        if missing:
            there = ", ".join(map(str, steps))
            raise InputError(f"--run {run}: has no checkpoint of step {missing[0]}; there are {there}")
        steps = list(range(first, last + 1, increment))
    chosen = [found[step] for step in steps if first <= step <= last]
    if not chosen:
        raise InputError(
            f"--run {run}: none of its checkpoints ({', '.join(map(str, steps))}) lies in {first} to {last}"
        )
    return chosen


def export_all(
    checkpoints: Sequence[Path], out: Path, wanted: Wanted, jobs: int, done: Callable[[Row], None]
) -> list[Row]:
    """Export each checkpoint to the folder of its name in `out`, `jobs` at a time; `done` hears of each as it ends.

    Raises:
        InputError: one of these folders exists already; nothing was exported.
    """
    taken = next((out / path.name for path in checkpoints if (out / path.name).exists()), None)
    if taken is not None:
        raise InputError(
            f"--out: {taken} exists already, and an export never writes over anything. Nothing was exported."
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ds_recipes.checkpoint.export.whole"])
    waiting = list(checkpoints)
    running: list[_Job] = []
    rows: list[Row] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                checkpoint = waiting.pop(0)
                running.append(_Job(context, checkpoint, out / checkpoint.name, wanted))
            wait([job.process.sentinel for job in running])
            for job in [job for job in running if not job.process.is_alive()]:
                running.remove(job)
                rows.append(job.row())
                done(rows[-1])
    finally:
        for job in running:
            job.process.terminate()
    return rows


class _Job:
    """One export in a process of its own."""

    def __init__(self, context: Any, checkpoint: Path, out: Path, wanted: Wanted) -> None:
        self._checkpoint, self._out = checkpoint, out
        self._started = time.monotonic()
        self._answers, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_export_here, args=(theirs, checkpoint, out, wanted))
        self.process.start()
        theirs.close()

    def row(self) -> Row:
        """What became of it, once the process has ended."""
        self.process.join()
        seconds = time.monotonic() - self._started
        try:
            error, exported = self._answers.recv()
        except EOFError:
            code = self.process.exitcode
            error = (
                f"its process was killed by signal {-code} (9: too little memory?)" if code < 0 else f"status {code}"
            )
            exported = None
        return Row(self._checkpoint, self._out, seconds, error, exported)


def _export_here(answers: Connection, checkpoint: Path, out: Path, wanted: Wanted) -> None:
    from ds_recipes.checkpoint.export.whole import export

    arm_from_environment()
    try:
        answers.send((None, export(checkpoint, out, wanted)))
    except DsRecipesError as error:
        answers.send((str(error), None))
    answers.close()
