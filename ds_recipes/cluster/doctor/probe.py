"""The probes that need torch, run in a process of their own: whatever they do, the doctor lives to tell of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHASE_SECONDS = {"import": 180.0, "start": 180.0, "bandwidth": 90.0, "step": 120.0, "end": 90.0}
"""How long a probe may stay in a phase. A cold import of torch from a shared disk takes minutes; the meeting has its own limit."""

KEPT_LINES = 30
STACK_SECONDS = 1.0


@dataclass
class Result:
    """What a probe process told, and how it ended."""

    phase: str = "import"
    told: dict[str, Any] = field(default_factory=dict)
    """By event: torch, bandwidth, step, failed."""

    status: int | None = None  # None: killed, for it hung
    tail: list[str] = field(default_factory=list)
    """The last lines that it printed."""

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return {"phase": self.phase, "told": self.told, "status": self.status, "tail": self.tail}


def run_probe(env: Mapping[str, str], root: Path, limits: Mapping[str, float] = PHASE_SECONDS) -> Result:
    """Start the probes in this rank's place and wait for their end; one that hangs in a phase is killed, with its stack."""
    read, write = os.pipe()
    path = os.pathsep.join([str(root), *filter(None, [env.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ds_recipes.cluster.probes", "--report_to", str(write)],
        env={**env, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=(write,),
    )
    os.close(write)
    result = Result()
    changed = [time.monotonic()]
    readers = [
        threading.Thread(target=_read_events, args=(read, result, changed), daemon=True),
        threading.Thread(target=_read_output, args=(process, result), daemon=True),
    ]
    for reader in readers:
        reader.start()
    while process.poll() is None:
        if time.monotonic() - changed[0] > limits[result.phase]:
            process.send_signal(signal.SIGUSR1)  # the probe prints where each of its threads is
            time.sleep(STACK_SECONDS)
            process.kill()
            process.wait()
            break
        time.sleep(0.02)
    else:
        result.status = process.returncode
    for reader in readers:
        reader.join(2)
    return result


def _read_events(read: int, result: Result, changed: list[float]) -> None:
    with os.fdopen(read, encoding="utf-8") as lines:
        for line in lines:
            event = json.loads(line)
            if event["event"] == "phase":
                result.phase = event["value"]
                changed[0] = time.monotonic()
            else:
                result.told[event["event"]] = event["value"]


def _read_output(process: "subprocess.Popen[str]", result: Result) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        result.tail = [*result.tail, line.rstrip()][-KEPT_LINES:]
