"""Runs the doctor as a user does, and reads what it has found."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.e2e.launchers import ROOT, environment, free_port

DOCTOR = ROOT / "tools" / "doctor.py"
LIMIT_SECONDS = 400.0
"""For one doctor; on a machine that does nothing else the longest takes 15 s."""


def examine(
    words: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT, **more
) -> tuple[int, dict, str]:
    """Run a command that ends with the doctor and its flags; returns its status, its JSON and what it printed."""
    target = Path(more.pop("target", cwd)) / f"found-{free_port()}.json"
    done = subprocess.run(
        [*words, "--json", str(target)],
        env=environment(env),
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=LIMIT_SECONDS,
        **more,
    )
    shown = done.stdout + done.stderr
    assert target.exists(), shown
    return done.returncode, json.loads(target.read_text()), shown


def of(report: dict, name: str, level: str | None = None) -> list[dict]:
    return [one for one in report["findings"] if one["name"] == name and level in (None, one["level"])]


def only(report: dict, name: str, level: str) -> dict:
    (found,) = of(report, name, level)
    assert level == "fine" or (found["cause"] and found["advice"])
    return found


def named(report: dict, level: str) -> set[str]:
    return {one["name"] for one in report["findings"] if one["level"] == level}
