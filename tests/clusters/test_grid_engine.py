"""launch/abci_sge.sh under a real Grid Engine: told of its limit, queued again, killed, deleted."""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.cluster.job_script import default_job, render
from tests.clusters.grid_engine import MISSING, GridEngine, grid_engine
from tests.e2e.launchers import ROOT
from tests.nano import make_nano
from tests.ranks.training import metrics, until_step

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

FOREVER = ("--max_steps", "100000", "--save_interval_iteration", "50000", "--eval_interval", "0")
STEPS = 24
SHORT = ("--max_steps", str(STEPS), "--save_interval_iteration", "1000", "--eval_interval", "12")
VARIABLES = "DS_ACCELERATOR=cpu,CUDA_VISIBLE_DEVICES=,HF_HUB_OFFLINE=1,OMP_NUM_THREADS=1,TOKENIZERS_PARALLELISM=false"
START_SECONDS = 180
LEFT_SECONDS = 15
"""How long after a kill a process of the job may be left."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[GridEngine]:
    with grid_engine() as running:
        make_nano(running.home)
        work = running.home / "recipes"  # what a user has checked out, in a folder where the user may write
        (work / "logs").mkdir(parents=True)
        for name in ("train.py", "tools", "ds_recipes"):
            (work / name).symlink_to(ROOT / name)
        yield running


@dataclass(frozen=True)
class Submitted:
    """A job of the script, and where it leaves what."""

    cluster: GridEngine
    number: str
    run: Path

    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.run / "run.json").read_text()))

    def launches(self) -> list[dict[str, Any]]:
        """Those that have begun so far."""
        return self.record()["launches"] if (self.run / "run.json").exists() else []

    def attempts(self, timeout: float = 600) -> list[tuple[int, bool]]:
        """After its end: of each attempt the exit status, and whether Grid Engine calls it failed."""
        self.cluster.ended(self.number, timeout)
        records = self.cluster.accounting(self.number)
        return [(int(record["exit_status"].split()[0]), record["failed"].split()[0] != "0") for record in records]

    def ranks(self) -> dict[int, int]:
        """Process ids by rank."""
        running = self.cluster.processes(self.number).items()
        found: dict[int, int] = {}
        for process, (words, env) in sorted(running):  # a rank before what it has started
            if "train.py" in words and "OMPI_COMM_WORLD_RANK" in env:
                found.setdefault(int(env["OMPI_COMM_WORLD_RANK"]), process)
        return found

    def launcher(self) -> int:
        """The process id of mpirun, which calls itself prterun."""
        (found,) = (
            process
            for process, (words, _) in self.cluster.processes(self.number).items()
            if Path(words.split()[0]).name in ("mpirun", "prterun")
        )
        return found

    def signal_all(self, number: signal.Signals) -> None:
        """What execd does at a soft limit (measured: docs/clusters/sge.md): every process of the job gets the signal."""
        for process in self.cluster.processes(self.number):
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def wait_until_left(self) -> float:
        """Seconds until no process of the job is left."""
        start = time.monotonic()
        while left := self.cluster.processes(self.number):
            assert time.monotonic() < start + LEFT_SECONDS, f"still there: {left}\n{self.log()}"
            time.sleep(0.1)
        return time.monotonic() - start

    def log(self) -> str:
        return (self.cluster.home / f"recipes/logs/{self.run.name}.o{self.number}").read_text(errors="replace")


def submit(
    cluster: GridEngine,
    name: str,
    *flags: str,
    edit: tuple[str, str] = ("", ""),
    options: tuple[str, ...] = (),
    nodes: int = 1,
    launcher: str = "mpirun",
    walltime_seconds: int = 1200,
) -> Submitted:
    """Render the script for this machine's Python and two ranks, `edit` it as a user would, and hand it in."""
    run = cluster.home / f"runs/{name}"
    job = dataclasses.replace(
        default_job("abci-sge"),
        name=name,
        nodes=nodes,
        gpus_per_node=2 // nodes,
        launcher=launcher,
        walltime_seconds=walltime_seconds,
        lead_seconds=60,
        config=str(cluster.home / "run.yaml"),
        run_folder=str(run),
        activate=str(Path(sys.prefix) / "bin/activate"),
        arguments=flags,
    )
    text = render(job)
    assert edit[0] in text
    script = cluster.home / f"recipes/{name}.sh"
    script.write_text(text.replace(*edit) if edit[0] else text)
    return Submitted(cluster, cluster.submit(script, "-v", VARIABLES, *options), run)


def losses(job: Submitted) -> dict[int, float]:
    return {step: line["loss"] for step, line in metrics(job.run).items()}


@pytest.fixture(scope="module")
def whole(cluster: GridEngine) -> Submitted:
    """The run that nobody disturbs, on a host asked for as other sites do it: by a parallel environment."""
    return submit(cluster, "whole", *SHORT, edit=("-l rt_F=1", "-pe mpi 2"))


@pytest.mark.slow  # of every day: the same under SLURM (test_slurm.py) and PBS (test_pbs.py), and the rendered script
def test_told_of_its_limit_it_is_queued_again_and_ends_as_if_nothing_had_been(
    cluster: GridEngine, whole: Submitted
) -> None:
    told = submit(cluster, "told", *SHORT)
    until_step(told.run, 2, START_SECONDS)
    told.signal_all(signal.SIGUSR1)
    assert told.attempts() == [(99, True), (0, False)], told.log()
    first, second = told.record()["launches"]
    assert (first["launch"], second["launch"]) == (f"{told.number}.1", f"{told.number}.2")
    assert (first["state"], second["state"]) == ("stopped", "complete")
    assert 2 <= first["last_step"] == second["first_step"] < STEPS
    assert "module load cuda" in told.log()
    assert whole.attempts() == [(0, False)], whole.log()
    assert len(losses(whole)) == STEPS and losses(told) == losses(whole)


@pytest.mark.slow
def test_a_kill_of_a_rank_or_of_mpirun_is_the_jobs_failure_and_leaves_nothing(cluster: GridEngine) -> None:
    rank, launcher = submit(cluster, "rank", *FOREVER), submit(cluster, "launcher", *FOREVER)
    until_step(rank.run, 2, START_SECONDS)
    os.kill(rank.ranks()[1], signal.SIGKILL)
    rank.wait_until_left()
    until_step(launcher.run, 2, START_SECONDS)
    os.kill(launcher.launcher(), signal.SIGKILL)
    launcher.wait_until_left()
    for job in (rank, launcher):
        ((status, _),) = job.attempts()
        assert status not in (0, 99), job.log()
        assert job.record()["state"] == "failed", job.record()


@pytest.mark.slow
def test_two_hosts_joined_by_grid_engine_itself_train_as_one_does(cluster: GridEngine, whole: Submitted) -> None:
    """No sshd runs there: mpirun starts its daemon on the second host by `qrsh -inherit`."""
    joined = submit(cluster, "joined", *SHORT, nodes=2, edit=("#     export PRTE_MCA", "export PRTE_MCA"))
    assert joined.attempts() == [(0, False)], joined.log()
    assert sorted(joined.record()["launches"][0]["hosts"]) == ["node1", "node2"]
    assert "from SGE_JOB_HOSTLIST" in joined.log() and "from PE_HOSTFILE" in whole.log()
    assert whole.attempts() == [(0, False)]
    assert losses(joined) == losses(whole)


@pytest.mark.slow
def test_qdel_saves_first_and_is_obeyed(cluster: GridEngine) -> None:
    job = submit(cluster, "deleted", *FOREVER)
    until_step(job.run, 2, START_SECONDS)
    cluster.command("qdel", job.number)
    ((status, _),) = job.attempts()
    assert status not in (0, 99), job.log()
    (launch,) = job.record()["launches"]
    assert launch["state"] == "stopped"
    assert (job.run / f"iter_{launch['last_step']:07d}/manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_launcher_that_would_die_of_the_signal_does_not_hear_it(cluster: GridEngine, launcher: str) -> None:
    job = submit(cluster, launcher, *SHORT, launcher=launcher)
    until_step(job.run, 2, START_SECONDS)
    job.signal_all(signal.SIGUSR1)
    assert job.attempts() == [(99, True), (0, False)], job.log()
    assert len(losses(job)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["s_rt", "h_rt"])
def test_its_real_limit_queues_it_again_with_every_step_saved(cluster: GridEngine, limit: str) -> None:
    """s_rt: execd's own signal. h_rt: the script knows the limit, and the ranks leave a minute before it."""
    if limit == "s_rt":
        job = submit(cluster, limit, *FOREVER, options=("-l", "s_rt=90"))
    else:
        job = submit(cluster, limit, *FOREVER, walltime_seconds=150)
    deadline = time.monotonic() + 240
    while len(job.launches()) < 2:
        assert time.monotonic() < deadline, job.log()
        time.sleep(0.5)
    cluster.command("qdel", job.number)
    first, *_ = job.attempts()
    assert first == (99, True), job.log()
    stopped = job.launches()[0]
    assert stopped["state"] == "stopped" and stopped["last_step"] > 0
    assert ("SIGUSR1" if limit == "s_rt" else "stop_after") in f"{stopped['reason']}{job.log()}"
