"""run.json, run.yaml and ds_config.json: what ran, with which settings and versions, and how each launch ended.

run.json says `running` from a launch's first second. A launch that is killed cannot say more, so whoever waits for it
takes anything but its own id with `complete` or `stopped` as a failure. A job script gives the id in the environment
variable DS_RECIPES_LAUNCH; without one an id is made.
"""

import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ds_recipes.config.render import to_yaml
from ds_recipes.config.schema import Config
from ds_recipes.errors import STOPPED_EARLY
from ds_recipes.fsops import calls
from ds_recipes.fsops.durable import replace_file

LAUNCH_VARIABLE = "DS_RECIPES_LAUNCH"
PACKAGES = ("ds-recipes", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "mpi4py", "wandb")
GIT_SECONDS = 5
PRECISION = ("parameters", "master", "moments", "gradient_accumulation", "reduction", "autocast")
"""What `Engine.describe` says of dtypes."""
LOST = {"state": "failed", "reason": "ended without a word (killed, or its host went down)"}


class RunRecord:
    """This launch's entry in run.json. Rank 0 alone has one."""

    def __init__(
        self,
        run_folder: Path,
        config: Config,
        world_size: int,
        hosts: Sequence[str],
        may_write: Callable[[], bool] = lambda: True,
        launch: str | None = None,
    ) -> None:
        """Write `run.yaml`, and `run.json` with this launch as running.

        Once `may_write` says no, run.json is another launch's, and left alone. Without `launch` the id is the environment's.

        Raises:
            OSError: the run folder cannot be written.
        """
        self._folder = run_folder
        self._may_write = may_write
        self._writing = threading.RLock()  # another rank's failure is noted by a thread
        self._started, self._clock_at_start = datetime.now(UTC), time.monotonic()
        self.launch = launch or os.environ.get(LAUNCH_VARIABLE) or uuid.uuid4().hex[:12]
        run_folder.mkdir(parents=True, exist_ok=True)
        earlier = _earlier_launches(run_folder / "run.json")
        self._entry: dict[str, Any] = {
            "launch": self.launch,
            "state": "running",
            "reason": None,
            "started": self._now(),
            "ended": None,
            "first_step": None,
            "last_step": None,
            "command": sys.orig_argv,
            "world_size": world_size,
            "hosts": list(hosts) or [socket.gethostname()],
            "versions": versions(),
            "git": git_state(Path(__file__).parent),
        }
        self._launches = [*earlier, self._entry]
        steps = [launch.get("last_step") for launch in reversed(earlier)]
        self._last_known: int = next((step for step in steps if step is not None), 0)
        replace_file(run_folder / "run.yaml", to_yaml(config).encode())
        self._write()

    def continues_from(self, step: int) -> None:
        """Record the step that this launch begins after."""
        self._entry["first_step"] = step
        self.reached(step)
        self._write()

    def reached(self, step: int) -> None:
        """Note the last step done; it is written when the launch ends."""
        self._entry["last_step"] = step

    def write_precision(self, description: Mapping[str, Any]) -> None:
        """Record the dtypes of what an engine describes, and whether it trains without float32 master weights."""
        self._entry["precision"] = {name: description.get(name) for name in PRECISION}
        self._entry["pure_low_precision"] = is_pure_low_precision(description)
        self._write()

    def write_ds_config(self, effective: Mapping[str, Any]) -> None:
        """Write the effective JSON, nothing left open in it, to `ds_config.json`."""
        replace_file(self._folder / "ds_config.json", (json.dumps(effective, indent=2) + "\n").encode())

    def finish(self, state: str, reason: str) -> None:
        """Record how this launch ended: complete, stopped or failed. The first word counts."""
        assert state in ("complete", "stopped", "failed")
        with self._writing:
            if self._entry["state"] == "running":
                self._entry |= {"state": state, "reason": reason, "ended": self._now()}
                if self._entry["last_step"] is None:  # it never came to know where to begin
                    self._entry |= {"first_step": self._last_known, "last_step": self._last_known}
                self._write()

    def fail(self, reason: str, status: int = 1) -> None:
        """Record that this launch failed, or was stopped before its first step, unless it had already ended well."""
        self.finish("stopped" if status == STOPPED_EARLY else "failed", reason)

    def _now(self) -> str:
        """The time by the clock as it stood at the start: a clock that is set meanwhile makes no negative duration."""
        elapsed = timedelta(seconds=time.monotonic() - self._clock_at_start)
        return (self._started + elapsed).isoformat(timespec="seconds")

    def _write(self) -> None:
        with self._writing:
            latest = {name: self._entry[name] for name in ("launch", "state", "reason")}
            text = json.dumps(latest | {"launches": self._launches}, indent=2) + "\n"
            if self._may_write():
                replace_file(self._folder / "run.json", text.encode())


def is_pure_low_precision(description: Mapping[str, Any]) -> bool:
    """True where the optimizer steps weights of lower precision than float32."""
    return description.get("master") not in (None, "float32")


def mark_failed(run_folder: Path, launch: str, reason: str) -> None:
    """Record from outside that this launch failed, in the place of a rank 0 that no longer can. Any rank may do it.

    Raises:
        OSError, ValueError: run.json cannot be read or written.
    """
    path = run_folder / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    entry = record["launches"][-1]
    if entry["launch"] == launch and entry["state"] == "running":
        entry |= {"state": "failed", "reason": reason, "ended": datetime.now(UTC).isoformat(timespec="seconds")}
        record |= {name: entry[name] for name in ("launch", "state", "reason")}
        replace_file(path, (json.dumps(record, indent=2) + "\n").encode())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide about the result; those that are missing are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and cleanness of the work tree that tracks this code; None if it is installed without one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _earlier_launches(path: Path) -> list[dict[str, Any]]:
    """The launches that run.json holds; a file that cannot be read holds none, and is kept beside the new one.

    One that still says running was killed before it could say otherwise.
    """
    try:
        launches = json.loads(path.read_text(encoding="utf-8"))["launches"]
        return [launch | LOST if launch["state"] == "running" else launch for launch in launches]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        calls.replace(path, path.with_name("run.json.damaged"))
        return []
