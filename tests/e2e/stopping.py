"""A launch under a real launcher that is asked to stop, and what became of it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.launchers import ROOT, begin, command
from tests.ranks.training import metrics, until_step

LEAVE_SECONDS = 60.0
"""How long the launcher may take to end."""

ORPHAN_SECONDS = 15.0
"""How long ranks may be there without a launcher."""


@dataclass(frozen=True)
class Asked:
    """The launcher's status, what the run folder says, and whether ranks went on without a launcher."""

    status: int
    output: str
    record: dict[str, Any]
    checkpoints: list[int]
    steps: int  # the last one that was logged
    orphans: int  # ranks that were still there when the launcher had been gone for some time

    @property
    def saved(self) -> bool:
        """True if every step that was taken is in a checkpoint."""
        return bool(self.checkpoints) and self.checkpoints[-1] == self.steps


def ask(launcher: str, nano: Path, folder: Path, what: str, *flags: str, env: Mapping[str, str] | None = None) -> Asked:
    """Start a long run on two ranks, ask it to stop at its third step (a signal to the launcher alone, or the STOP file)."""
    argv = ["--config", str(nano), "--save_checkpoint_path", str(folder), "--max_steps", "100000", "--lr_warmup", "0"]
    process = begin(command(launcher, 2, ROOT / "train.py", *argv, *flags), env)
    try:
        until_step(folder, 3, timeout=120)
        if what == "STOP":
            (folder / "STOP").touch()
        else:
            process.send_signal(signal.Signals[what])
        status = _left(process)
        orphans = _orphans(folder)
    finally:
        for rank in _ranks(folder):
            os.kill(rank, signal.SIGKILL)
        process.kill()
    output, _ = process.communicate(timeout=30)
    return Asked(
        status,
        output,
        json.loads((folder / "run.json").read_text()),
        sorted(int(path.parent.name.removeprefix("iter_")) for path in folder.glob("iter_*/manifest.json")),
        max(metrics(folder)),
        orphans,
    )


def _left(process: "subprocess.Popen[str]") -> int:
    """Wait for the launcher's end, not for that of its output, which its ranks hold open."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise AssertionError(f"{process.args} did not leave within {LEAVE_SECONDS} s of being asked to")
        time.sleep(0.05)
    return process.returncode


def _orphans(folder: Path) -> int:
    """How many ranks do not leave after their launcher."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while _ranks(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    return len(_ranks(folder))


def _ranks(folder: Path) -> list[int]:
    """The processes that train into this folder, launchers aside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # gone meanwhile
            continue
        if str(folder) in words and str(ROOT / "train.py") in words[1:3] and "python" in words[0]:
            found.append(int(entry.name))
    return found
