"""Job scripts as a user runs them: rendered for a test, started with bash, and what became of them."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_recipes.cluster.job_script import default_job, render
from ds_recipes.cluster.leftovers import find_ranks
from tests.e2e.launchers import begin
from tests.ranks.training import until_step

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
LEAVE_SECONDS = 240.0
"""A machine that other tests keep busy takes minutes for what it does in seconds alone."""


@dataclass(frozen=True)
class Ended:
    """The script's status and output, and what run.json says of each launch."""

    status: int
    output: str
    launches: list[dict[str, Any]]
    logs: list[Path]

    @property
    def states(self) -> list[str]:
        return [launch["state"] for launch in self.launches]


def write_script(cluster: str, nano: Path, folder: Path, *flags: str, **fields: Any) -> Path:
    """A script for a run of nano's into `folder`. `flags` are train.py's, `fields` those of the Job that differ from launch/'s."""
    usual = {"nodes": 1, "gpus_per_node": 2, "config": str(nano), "run_folder": str(folder), "activate": ""}
    job = dataclasses.replace(default_job(cluster), **usual | fields, arguments=("--lr_warmup", "0", *flags))
    script = folder.with_suffix(".sh")
    script.write_text(render(job))
    return script


class Running:
    """A job script that has been started, with its launches' ranks."""

    def __init__(self, script: Path, folder: Path, env: Mapping[str, str]):
        self.folder = folder
        self.process = begin(["bash", str(script)], AS_ROOT | dict(env))

    def until_step(self, step: int) -> None:
        """Wait until a step is logged; after the time limit nothing of the job goes on."""
        try:
            until_step(self.folder, step, timeout=LEAVE_SECONDS)
        except BaseException:
            self.end()
            raise

    def ranks(self) -> list[int]:
        """The processes of the newest launch that train, by rank."""
        found = rank_processes(self.folder)
        return [found[rank][0] for rank in sorted(found)]

    def launcher(self) -> int:
        """The process that the script waits for: its child that is no shell and no tail."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        names = {int(pid): Path(f"/proc/{pid}/comm").read_text().strip() for pid in children}
        return next(pid for pid, name in names.items() if name not in ("bash", "tail"))

    def ended(self) -> Ended:
        """Wait for its end; then no process of its launches is left."""
        try:
            output, _ = self.process.communicate(timeout=LEAVE_SECONDS)
        finally:
            self.end()
        launches = json.loads((self.folder / "run.json").read_text())["launches"]
        assert not [pid for launch in launches for pid in find_ranks(launch["launch"])]
        logs = sorted(self.folder.glob("jobs/*/logs-*/**/*.log"))
        return Ended(self.process.returncode, output, launches, logs)

    def end(self) -> None:
        """End whatever is left of it."""
        self.process.kill()
        folders = [
            path.parent.name + "." + path.name.removeprefix("logs-") for path in self.folder.glob("jobs/*/logs-*")
        ]
        for launch in folders:
            for pid in find_ranks(launch):
                _kill(pid)


def rank_processes(folder: Path) -> dict[int, tuple[int, dict[str, str]]]:
    """The processes of the newest launch that train, with their environment, by rank."""
    launch = json.loads((folder / "run.json").read_text())["launches"][-1]["launch"]
    found = {}
    for pid in find_ranks(launch):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # ended meanwhile
            continue
        environ = {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
        rank = environ.get("OMPI_COMM_WORLD_RANK") or environ.get("RANK")
        if "train.py" in words[1:3] and "python" in words[0] and rank is not None:
            found[int(rank)] = (pid, environ)
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return
