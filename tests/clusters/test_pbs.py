"""launch/abci_pbs.sh, submitted with qsub to the stand-in for PBS, with two ranks on this machine.

What the stand-in can and cannot show stands in tests/clusters/pbs_bin/__init__.py.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.cluster.job_script import default_job, render
from ds_recipes.cluster.leftovers import find_ranks
from ds_recipes.errors import STOPPED_EARLY
from tests.clusters.jobs import AS_ROOT
from tests.clusters.pbs import GROUP, Pbs, pbs_cell
from tests.e2e.launchers import ROOT, begin, command
from tests.ranks.training import metrics, until_step

LAUNCHERS = ("mpirun", "deepspeed", "torchrun")
ORPHAN_SECONDS = 15
EXACT = ("loss", "grad_norm", "lr", "tokens", "data_hash")
SURVIVES_SIGNALS = "trap : USR1 USR2\n"
"""What a user's profile needs for qsig: the login shell that PBS puts above the script is signalled too."""


@pytest.fixture
def pbs(tmp_path: Path) -> Iterator[Pbs]:
    with pbs_cell(tmp_path, variables=AS_ROOT, profile=SURVIVES_SIGNALS) as cell:
        yield cell


class Submitted:
    """A script as a user edits it, submitted from the folder of train.py; and the jobs that it brings about."""

    def __init__(
        self,
        pbs: Pbs,
        nano: Path,
        folder: Path,
        *flags: str,
        edit: tuple[str, str] = ("", ""),
        walltime_seconds: int = 600,
        **fields: Any,
    ) -> None:
        chosen = {"nodes": 1, "gpus_per_node": 2, "group": GROUP, "activate": "", "lead_seconds": 5, **fields}
        job = dataclasses.replace(
            default_job("abci-pbs"),
            **chosen,
            walltime_seconds=walltime_seconds,
            config=str(nano),
            run_folder=str(folder),
            arguments=("--lr_warmup", "0", *flags),
        )
        text = render(job).replace("ompthreads=96", "ompthreads=1").replace(*edit)  # places (1) to (3)
        script = folder.with_name("my job.sh")
        script.write_text(text, encoding="utf-8")
        self.pbs, self.folder = pbs, folder
        self.output = folder.with_name("output")
        self.output.mkdir()
        self.first = pbs.submit(script, ROOT, "-o", str(self.output))

    def until_step(self, step: int) -> None:
        until_step(self.folder, step, timeout=300)

    def until_submitted_again(self, count: int) -> list[int | None]:
        """Wait until so many jobs have ended, and no more are coming; their statuses."""
        deadline = time.monotonic() + 300
        while len(self.pbs.jobs()) < count and time.monotonic() < deadline:
            time.sleep(0.1)
        statuses = [self.pbs.until_finished(job.id).status for job in self.pbs.jobs()]
        assert len(self.pbs.jobs()) == count, self.text()
        return statuses

    def launches(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "run.json").read_text())["launches"]  # type: ignore[no-any-return]

    def text(self) -> str:
        """All that the jobs have printed."""
        return "".join(self.pbs.output(job) for job in self.pbs.jobs()) + self.pbs.log()

    def ranks(self) -> dict[int, int]:
        """The processes of the newest launch that train, by rank."""
        found = {}
        for pid in find_ranks(self.launches()[-1]["launch"]):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if "python" in words[0] and "train.py" in words[1:4]:
                text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
                env = dict(item.partition("=")[::2] for item in text.split("\0"))
                found[int(env.get("OMPI_COMM_WORLD_RANK") or env["RANK"])] = pid
        return found

    def launcher(self) -> int:
        """The process that the newest job's script waits for: its child that is no shell and no tail."""
        session = self.pbs.jobs()[-1].session
        assert session is not None
        [script] = children(session)
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in children(script)}
        return next(pid for pid, name in names.items() if name not in ("bash", "tail"))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone_within(launch: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while find_ranks(launch) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not find_ranks(launch)


def lines_of(folder: Path, steps: int) -> list[list[Any]]:
    logged = metrics(folder)
    return [[logged[step][key] for key in EXACT] for step in range(1, steps + 1)]


def uninterrupted(nano: Path, folder: Path, steps: int, *flags: str) -> list[list[Any]]:
    """What a run that nobody disturbs has logged of its first steps."""
    argv = ["--config", str(nano), "--save_checkpoint_path", str(folder), "--lr_warmup", "0", *flags]
    process = begin(command("mpirun", 2, ROOT / "train.py", *argv))
    try:
        until_step(folder, steps, timeout=300)
        (folder / "STOP").touch()
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == STOPPED_EARLY, output
    return lines_of(folder, steps)


@pytest.mark.slow  # of every day: a real SLURM (test_slurm.py)
def test_stopped_ahead_of_the_limit_queued_again_and_finished(pbs: Pbs, nano: Path, tmp_path: Path) -> None:
    """qsig stands for the limit here, to come at a step of the test's choice; the script gives the walltime to train.py.

    The job names no mpiprocs, so $PBS_NODEFILE has its node once, and mpirun would find a single slot there.
    """
    job = Submitted(pbs, nano, tmp_path / "run", "--max_steps", "40", edit=(":mpiprocs=2", ""))
    job.until_step(3)
    assert pbs.run("qsig", "-s", "USR1", job.first).returncode == 0
    assert job.until_submitted_again(2) == [STOPPED_EARLY, 0], job.text()
    first, second = job.launches()
    assert (first["state"], second["state"]) == ("stopped", "complete")
    assert 0 < first["last_step"] == second["first_step"] < second["last_step"] == 40
    assert [first["launch"], second["launch"]] == ["123456.1", "123457.1"]
    assert "--stop_after" in first["command"] and len(metrics(tmp_path / "run")) == 40
    again = pbs.jobs()[1]
    assert (again.name, again.project, again.walltime_seconds) == ("ds_recipes", GROUP, 600)
    assert (pbs.home / "modules").read_text().splitlines() == [
        f"module load {name}" for name in default_job("abci-pbs").modules
    ] * 2
    assert (tmp_path / "run" / "jobs" / "123456" / "hostfile").read_text().split()[1] == "slots=2"


SPARSE = ("--max_steps", "100000", "--save_interval_iteration", "500", "--eval_interval", "500")


def long_enough_to_start() -> int:
    """A walltime in seconds that leaves some for training, however busy the machine is."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import deepspeed"], check=True, capture_output=True)
    return 30 + int(8 * (time.monotonic() - begun))


def over_the_limit(pbs: Pbs, nano: Path, folder: Path, launcher: str) -> int:
    """Two jobs: one that stops ahead of its walltime, and the next, which a STOP file ends; returns the first one's last step."""
    limit = long_enough_to_start()
    job = Submitted(pbs, nano, folder, *SPARSE, walltime_seconds=limit, lead_seconds=10, launcher=launcher)
    first = pbs.until_finished(job.first)
    assert first.status == STOPPED_EARLY, first.output
    stopped = job.launches()[0]
    assert "stop_after" in stopped["reason"]
    job.until_step(stopped["last_step"] + 3)
    (folder / "STOP").touch()
    assert job.until_submitted_again(2) == [STOPPED_EARLY, STOPPED_EARLY], job.text()
    last = job.launches()[1]
    assert last["first_step"] == stopped["last_step"] < last["last_step"]
    return int(stopped["last_step"])


@pytest.mark.slow
def test_over_the_walltime_with_the_losses_of_an_uninterrupted_run(pbs: Pbs, nano: Path, tmp_path: Path) -> None:
    steps = over_the_limit(pbs, nano, tmp_path / "run", "mpirun") + 3
    assert lines_of(tmp_path / "run", steps) == uninterrupted(nano, tmp_path / "alone", steps, *SPARSE)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_over_the_walltime_with_other_launchers(pbs: Pbs, nano: Path, tmp_path: Path, launcher: str) -> None:
    over_the_limit(pbs, nano, tmp_path / "run", launcher)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_fails_the_job(pbs: Pbs, nano: Path, tmp_path: Path, launcher: str, victim: int) -> None:
    job = Submitted(pbs, nano, tmp_path / "run", "--max_steps", "100000", launcher=launcher)
    job.until_step(3)
    os.kill(job.ranks()[victim], signal.SIGKILL)
    [status] = job.until_submitted_again(1)
    assert status not in (0, STOPPED_EARLY, None), job.text()
    assert gone_within(job.launches()[-1]["launch"], ORPHAN_SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_launcher_fails_the_job_and_leaves_no_rank(
    pbs: Pbs, nano: Path, tmp_path: Path, launcher: str
) -> None:
    job = Submitted(pbs, nano, tmp_path / "run", "--max_steps", "100000", launcher=launcher)
    job.until_step(3)
    ranks = job.ranks()
    os.kill(job.launcher(), signal.SIGKILL)
    deadline = time.monotonic() + ORPHAN_SECONDS
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in ranks.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert time.monotonic() < deadline, job.text()
    [status] = job.until_submitted_again(1)
    assert status not in (0, STOPPED_EARLY, None), job.text()


@pytest.mark.slow
def test_qsig_ends_a_job_whose_login_shell_does_not_expect_it(nano: Path, tmp_path: Path) -> None:
    """As a real PBS does it: the login shell above the script dies of the signal, and what is left is killed."""
    with pbs_cell(tmp_path, variables=AS_ROOT) as pbs:
        job = Submitted(pbs, nano, tmp_path / "run", "--max_steps", "100000")
        job.until_step(3)
        pbs.run("qsig", "-s", "USR1", job.first)
        assert job.until_submitted_again(1) == [256 + signal.SIGUSR1], job.text()
        assert gone_within(job.launches()[-1]["launch"], ORPHAN_SECONDS)


@pytest.mark.slow
def test_a_stop_file_by_hand_is_saved_and_not_queued_again(pbs: Pbs, nano: Path, tmp_path: Path) -> None:
    job = Submitted(pbs, nano, tmp_path / "run", "--max_steps", "100000")
    job.until_step(3)
    (tmp_path / "run" / "STOP").touch()
    assert job.until_submitted_again(1) == [STOPPED_EARLY], job.text()
    assert job.launches()[0]["state"] == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["qdel", "walltime"])
def test_a_sigterm_of_pbs_leaves_no_process_and_is_no_success(pbs: Pbs, nano: Path, tmp_path: Path, how: str) -> None:
    """What was published before is there; the job is not queued again."""
    job = Submitted(pbs, nano, tmp_path / "run", "--max_steps", "100000")
    job.until_step(25)
    if how == "qdel":
        pbs.run("qdel", job.first)
    else:
        pbs.cell.change(pbs.job(job.first).number, walltime_seconds=1)  # as if the lead had been too short
    [status] = job.until_submitted_again(1)
    assert status == (256 + signal.SIGTERM if how == "qdel" else -29), job.text()
    assert gone_within(job.launches()[-1]["launch"], ORPHAN_SECONDS)
    assert list((tmp_path / "run").glob("iter_*/manifest.json"))
