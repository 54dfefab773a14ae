"""The run on the screen: a progress bar on a terminal, else one plain line a logged step.

A closed standard output (the reader of a pipe went away) silences this tracker and nothing else.
"""

import atexit
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ds_recipes.training.trackers.base import Tracker

FORMATS = {
    "loss": ("loss", "{:.6f}"),
    "lr": ("lr", "{:.3e}"),
    "grad_norm": ("grad norm", "{:.6f}"),
    "tokens_per_sec": ("tokens/s", "{:,.0f}"),
    "mfu": ("mfu", "{:.1%}"),
}

MPIRUN = "OMPI_COMM_WORLD_SIZE"
"""Set below Open MPI's mpirun, which gives rank 0 a pseudo-terminal even where its own output goes to a file."""


def is_terminal(stream: TextIO) -> bool:
    """True where someone looks at the stream as it comes, so that bars and tables may be drawn."""
    return stream.isatty() and MPIRUN not in os.environ


class Console(Tracker):
    """Shows steps, evaluations and events of a run of `total_steps` steps that begins after `first_step` of them."""

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps, self._first_step = total_steps, first_step
        self._stream, self._clock = stream, clock
        self._started = clock()
        self._silent = False
        self._bar: Progress | None = None
        if is_terminal(stream):
            numbers = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
            columns = (MofNCompleteColumn(), BarColumn(bar_width=12), TimeRemainingColumn(), numbers)
            self._bar = Progress(*columns, console=RichConsole(file=stream), refresh_per_second=2, expand=True)
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)
            self._guarded(self._bar.start)
            atexit.register(self.close)  # a failing run too must give the cursor back

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a step: its numbers, and the time left at the pace since the start."""
        numbers = "  ".join(_shown(metrics))
        if self._bar is not None:
            bar = self._bar
            self._guarded(lambda: bar.update(self._task, completed=step, description=numbers))
        else:
            self.say(
                f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  {numbers}  eta {self._left(step)}"
            )

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show an evaluation's results on a line of their own."""
        self.say(f"evaluation after step {step}: " + "  ".join(_plain(metrics)))

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Show an event: its message if it has one, else its fields. A failure is shown by the rank that met it."""
        if kind == "failed":
            return
        self.say(f"{kind.replace('_', ' ')}: " + (fields.get("message") or "  ".join(_plain(fields))))

    def rewind(self, step: int, total_steps: int) -> None:
        """Count the steps, and the time that is left, from `step` on."""
        self._total_steps, self._first_step, self._started = total_steps, step, self._clock()
        if self._bar is not None:
            bar = self._bar
            self._guarded(lambda: bar.reset(self._task, total=total_steps, completed=step))

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._guarded(self._bar.stop)

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        bar = self._bar
        if bar is not None:
            self._guarded(lambda: bar.console.print(line, markup=False, highlight=False, soft_wrap=True))
        else:
            self._guarded(lambda: print(line, file=self._stream, flush=True))

    def _left(self, step: int) -> str:
        if step <= self._first_step:
            return "-"
        pace = (self._clock() - self._started) / (step - self._first_step)
        return str(timedelta(seconds=round(pace * (self._total_steps - step))))

    def _guarded(self, show: Callable[[], Any]) -> None:
        if self._silent:
            return
        try:
            show()
        except (OSError, ValueError):  # ValueError: the file object is closed
            self._silent = True
            _point_at_nothing(self._stream)


def _point_at_nothing(stream: TextIO) -> None:
    """Send what the stream's buffer holds nowhere, or Python's own flush at exit fails: exit status 120."""
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
    except (OSError, ValueError):
        return


def _shown(metrics: Mapping[str, Any]) -> list[str]:
    return [
        f"{label} {form.format(metrics[name])}"
        for name, (label, form) in FORMATS.items()
        if metrics.get(name) is not None
    ]


def _plain(fields: Mapping[str, Any]) -> list[str]:
    return [f"{name} {value:.6f}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items()]
