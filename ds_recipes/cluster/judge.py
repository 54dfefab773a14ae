"""What a launch has come to, by the record in its run folder: no launcher's own word is believed.

DeepSpeed's launcher ends with 0 after its child was killed by a signal, torchrun turns every status into 1 (FAULTS L1).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_recipes.errors import STOPPED_EARLY

LIMIT_SIGNALS = ("USR1", "SIGUSR1")
"""What batch systems are asked to send ahead of the time limit. Others (TERM, INT) come from who wants the job to end."""


@dataclass(frozen=True)
class Verdict:
    """The status that the job deserves, whether it is to be queued again, and why, for its log."""

    status: int
    again: bool
    why: str


def judge(run_folder: Path, launch: str, launcher_status: int, signal: str = "") -> Verdict:
    """Judge the launch `launch`. `signal` is the name of a signal that the job script answered with the STOP file.

    complete: 0 if no rank ended otherwise. Stopped, and some step taken: 75. Anything else is a failure: the launcher's status,
    or 1 where that is 0 or 75. Again only after 75, and only if the time limit was the reason: who writes a STOP file or
    cancels a job means it.
    """
    entry = launches_of(run_folder).get(launch, {})
    state = entry.get("state")
    if state == "complete":
        why = f"complete: {entry.get('reason')}"
        if launcher_status == 0:
            return Verdict(0, False, why)
        status = launcher_status if launcher_status != STOPPED_EARLY else 1
        return Verdict(
            status, False, f"{why}; but the launcher ended with status {launcher_status}: look at the ranks' logs"
        )
    first, last, reason = entry.get("first_step"), entry.get("last_step"), str(entry.get("reason"))
    if state == "stopped" and isinstance(first, int) and isinstance(last, int) and last > first:
        limit = (
            signal in LIMIT_SIGNALS
            or "stop_after" in reason
            or any(f"signal {name}" in reason for name in LIMIT_SIGNALS)
        )
        return Verdict(STOPPED_EARLY, limit, f"stopped after step {last} ({reason}); this launch began at step {first}")
    status = launcher_status if launcher_status not in (0, STOPPED_EARLY) else 1
    return Verdict(status, False, _failure(state, reason, launch, run_folder, launcher_status))


def launches_of(run_folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of a run folder's run.json by launch, oldest first; none if there is no such file.

    A launch whose ranks were started again has several: it ended as the last one did, and began where the first one did.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        entries = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))["launches"]
        for entry in entries:
            first_step = found.get(entry["launch"], {}).get("first_step")
            found[entry["launch"]] = entry if first_step is None else entry | {"first_step": first_step}
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _failure(state: Any, reason: str, launch: str, run_folder: Path, launcher_status: int) -> str:
    said = f"the launcher ended with status {launcher_status}"
    if state == "stopped":
        return f"stopped without a single step ({reason}), so it is not queued again: {said}"
    if state == "failed":
        return f"failed: {reason}; {said}"
    if state == "running":
        return f"rank 0 was ended before it could say how it went (killed, or out of memory); {said}"
    return f"{run_folder / 'run.json'} holds no word of launch {launch}, so no rank began to train; {said}"
