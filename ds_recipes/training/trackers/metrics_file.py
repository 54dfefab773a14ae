"""The run folder's own record: metrics.jsonl, state_norms.jsonl and events.jsonl.

A line is on its way to the file system when the call returns, so a killed run keeps it. A float is written with as
many digits as tell it from every other; a number that is not finite becomes null, which JSON can say.

Starting again from step k, or going back to it, removes the lines of later steps from both files of metrics: those steps
are trained again. The removal is itself an event; events.jsonl only ever grows.
"""

import json
import math
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ds_recipes.errors import TrainingError
from ds_recipes.fsops import calls
from ds_recipes.fsops.durable import replace_file
from ds_recipes.training.trackers.base import METRIC_NAMES, SOURCE_METRICS, Tracker


class JsonLines:
    """A file that grows by one JSON object a line. Several threads may write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._may_be_cut = True  # what a kill or a full disk has left may end in the middle of a line

    def append(self, fields: Mapping[str, Any]) -> None:
        """Write one line and flush it.

        Raises:
            TrainingError: the file cannot be written (disk full, quota, permission).
        """
        finite = {name: None if _is_not_finite(value) else value for name, value in fields.items()}
        line = json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with self._lock:
                start = "\n" if self._may_be_cut and self._is_cut() else ""
                self._may_be_cut = True
                calls.append(self.path, (start + line).encode())
                self._may_be_cut = False
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror}. Free some space there.") from error

    def _is_cut(self) -> bool:
        try:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"  # one byte: a device would give them without end
        except OSError:  # there is none, or nothing in it
            return False

    def drop_after(self, step: int) -> int:
        """Remove the lines of steps after `step`, and a last line that was cut off; return how many. All or nothing."""
        if not self.path.exists():
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _is_step_until(step, line)]
        if len(kept) < len(lines):
            replace_file(self.path, b"".join(kept))
        return len(lines) - len(kept)


class MetricsFiles(Tracker):
    """Writes the three files of the run folder."""

    def __init__(self, run_folder: Path, launch: str, resume_step: int) -> None:
        self._launch = launch
        self._metrics = JsonLines(run_folder / "metrics.jsonl")
        self._norms = JsonLines(run_folder / "state_norms.jsonl")
        self._events = JsonLines(run_folder / "events.jsonl")
        self._drop_after(resume_step)

    def _drop_after(self, step: int) -> None:
        for file in (self._metrics, self._norms):
            if removed := file.drop_after(step):
                self.event("metrics_removed", {"file": file.path.name, "after_step": step, "lines": removed})

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a line of metrics, and one of norms if there are any."""
        of_sources = {name: value for name, value in metrics.items() if name.startswith(SOURCE_METRICS)}
        named = {name: metrics[name] for name in METRIC_NAMES if name in metrics}
        self._metrics.append({"step": step} | named | of_sources)
        norms = {name: value for name, value in metrics.items() if name not in named and name not in of_sources}
        if norms:
            self._norms.append({"step": step} | norms)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a line of metrics that has `step` and the eval_ fields only."""
        self._metrics.append({"step": step} | dict(metrics))

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Write a line of events.jsonl: time (UTC), launch, kind, and the event's own fields."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._events.append({"time": now, "launch": self._launch, "kind": kind} | dict(fields))

    def rewind(self, step: int, total_steps: int) -> None:
        """Remove the lines of steps after `step`."""
        self._drop_after(step)

    def close(self) -> None:
        """Nothing is open between two lines."""


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_step_until(last: int, line: bytes) -> bool:
    try:
        return bool(json.loads(line)["step"] <= last) and line.endswith(b"\n")
    except (ValueError, KeyError, TypeError):
        return False
