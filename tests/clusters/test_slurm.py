"""launch/slurm.sh on a real SLURM of two nodes: finished, signalled and queued again, killed; judged by its state and exit code.

The job that is signalled is asked by `scancel --signal=USR1 --batch`, which is what `--signal=B:USR1@300` does by itself ahead of
the time limit; a slow test waits for a real limit.
"""

import contextlib
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

from ds_recipes.cluster.job import DEEPSPEED, SRUN, TORCHRUN
from ds_recipes.cluster.job_script import default_job, render
from tests.clusters.slurm import (
    ENDED_STATES,
    KILL_WAIT_SECONDS,
    SKIP_REASON,
    Slurm,
    can_start,
    remove_leftovers,
    start_slurm,
)
from tests.e2e.launchers import ROOT, run
from tests.ranks.training import metrics, train

pytestmark = pytest.mark.skipif(not can_start(), reason=SKIP_REASON)

STEPS = 20
FOR_EVER = ("--max_steps", "100000", "--lr_warmup", "0")
START_SECONDS = 240.0
"""A start takes 10 s, on a machine that does nothing else."""

GONE_SECONDS = 15.0
"""How long after a kill processes of the job may be left."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with start_slurm() as cluster:
        cluster.env["GLOO_SOCKET_IFNAME"] = "lo"  # the nodes' names lead to addresses of this machine
        yield cluster


@pytest.fixture(scope="module")
def uninterrupted(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What a run on two ranks logs that nobody stops."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    flags = ("--config", str(nano), "--save_checkpoint_path", str(folder / "run"))
    ended = train(2, *flags, outputs=folder / "out", timeout=START_SECONDS)
    assert ended.statuses == (0, 0), ended.text
    return history(folder / "run")


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A job in the cluster, and the folder that it trains in. What its script prints is in `output`."""

    slurm: Slurm
    job: str
    run: Path

    @property
    def output(self) -> str:
        return Path(f"{self.run}.out").read_text()

    @property
    def launches(self) -> list[dict[str, Any]]:
        launches: list[dict[str, Any]] = json.loads((self.run / "run.json").read_text())["launches"]
        return launches

    def reaches(self, step: int) -> None:
        """Wait until a step is logged; fails if the job ends before."""
        deadline = time.monotonic() + START_SECONDS
        while step not in metrics(self.run):
            ended = self.slurm.describe(self.job)["JobState"] in ENDED_STATES
            assert not ended and time.monotonic() < deadline, f"step {step} was not logged\n{self.output}"
            time.sleep(0.2)

    def ends(self, state: str) -> str:
        """Wait until the job is over, in this state and with no process left; its exit code, as `status:signal`."""
        code = self.slurm.wait_for(self.job, state)["ExitCode"]
        self.slurm.wait_until_gone(self.job)
        return code

    def kill(self, word: str) -> None:
        """SIGKILL to those of its processes that have `word` in their command."""
        victims = self.slurm.processes(self.job, word)
        assert victims, f"job {self.job} has no process {word}"
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):  # srun has a helper that goes with it
                os.kill(pid, signal.SIGKILL)


def write_script(nano: Path, run_folder: Path, launcher: str = SRUN, arguments: tuple[str, ...] = ()) -> Path:
    """The script of launch/slurm.sh, for two nodes with a rank each."""
    job = dataclasses.replace(
        default_job("slurm"),
        launcher=launcher,
        nodes=2,
        gpus_per_node=1,
        cpus_per_rank=1,
        activate="",  # sbatch hands the tests' environment on
        config=str(nano),
        run_folder=str(run_folder),
        arguments=arguments,
    )
    script = run_folder.with_suffix(".sh")
    script.write_text(render(job))
    return script


def submit(
    slurm: Slurm,
    nano: Path,
    run_folder: Path,
    *options: str,
    launcher: str = SRUN,
    arguments: tuple[str, ...] = (),
) -> Submitted:
    """Hand it in. `options` are sbatch's."""
    script = write_script(nano, run_folder, launcher, arguments)
    job = slurm.submit(script, f"--chdir={ROOT}", f"--output={run_folder}.out", *options)
    return Submitted(slurm, job, run_folder)


def goes_on(job: Submitted) -> None:
    """Start a job that waits to be started again, and see it take three further steps."""
    saved = job.launches[-1]["last_step"]
    job.slurm.hurry(job.job)
    job.reaches(saved + 3)


def history(run: Path) -> list[tuple[Any, ...]]:
    return [(step, line["loss"], line["data_hash"]) for step, line in metrics(run).items()]


def rank_0(run: Path) -> str:
    """What only rank 0's log has."""
    (log,) = run.glob("jobs/*/logs-*/rank-0.log")
    return log.read_text()


def test_a_signalled_job_is_queued_again_by_itself_and_ends_as_one_that_was_not(
    slurm: Slurm, nano: Path, tmp_path: Path, uninterrupted: list[tuple[Any, ...]]
) -> None:
    job = submit(slurm, nano, tmp_path / "run")
    job.reaches(3)
    slurm.run("scancel", "--signal=USR1", "--batch", job.job)
    slurm.wait_for(job.job, "PENDING")
    assert [launch["state"] for launch in job.launches] == ["stopped"], job.output
    slurm.hurry(job.job)
    assert job.ends("COMPLETED") == "0:0"
    first, second = job.launches
    assert [first["launch"], second["launch"]] == [f"{job.job}.1", f"{job.job}.2"]
    assert 0 < first["last_step"] == second["first_step"] < STEPS
    assert (second["state"], second["last_step"]) == ("complete", STEPS)
    assert second["hosts"] == ["node1", "node2"]
    assert history(job.run) == uninterrupted
    assert job.output.count("\ncomplete: step 20 of 20") == 1  # rank 0's log is shown
    assert sorted(path.name for path in job.run.glob("jobs/*/logs-2/*.log")) == ["rank-0.log", "rank-1.log"]


def test_a_kill_of_a_rank_or_of_srun_fails_the_job_and_leaves_no_process(
    slurm: Slurm, nano: Path, tmp_path: Path
) -> None:
    jobs = {word: submit(slurm, nano, tmp_path / word, arguments=FOR_EVER) for word in ("train.py", "srun")}
    for job in jobs.values():
        job.reaches(3)
    of_rank, of_srun = jobs.values()
    os.kill(slurm.processes(of_rank.job, "-u train.py")[-1], signal.SIGKILL)
    of_srun.kill("srun --nodes")
    killed = time.monotonic()
    for job in jobs.values():
        slurm.wait_until_gone(job.job, "train.py", killed + GONE_SECONDS - time.monotonic())
        assert job.ends("FAILED").partition(":")[0] != "0"
    assert "ranks go on without their launcher" in of_srun.output
    assert "ranks go on without their launcher" not in of_rank.output


LAST_SAVES = ("*.iter_000000[6-9].partial-*", "*.iter_00000[12]*.partial-*")


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["kind=write rank=1", "kind=fsync rank=0", "kind=rename"])
def test_a_job_whose_grace_ends_in_the_last_save_loses_nothing_that_was_published(
    slurm: Slurm, nano: Path, tmp_path: Path, uninterrupted: list[tuple[Any, ...]], slow: str
) -> None:
    """SLURM's own SIGTERM, and SIGKILL to all of the job KillWait seconds later, while the ranks write."""
    saves = [f"delay:120@1x9999 {slow} path={pattern}" for pattern in LAST_SAVES]
    steps = "delay:1@6x9999 kind=append path=*metrics.jsonl"  # so that it is not complete before it is cancelled
    faults = {"FAULT_TEST": "1", "DS_RECIPES_FAULTS": "; ".join([steps, *saves])}
    flags = ("--save_interval_iteration", "5")
    job = submit(dataclasses.replace(slurm, env=slurm.env | faults), nano, tmp_path / "run", arguments=flags)
    job.reaches(6)
    slurm.run("scancel", job.job)
    slurm.wait_until_gone(job.job, "train.py", 2 * KILL_WAIT_SECONDS + GONE_SECONDS)
    assert job.launches[0]["state"] == "running", "rank 0 was killed"
    (unfinished,) = job.run.glob(".iter_*.partial-*")
    assert list(unfinished.iterdir()), "the save was under way"
    assert [path.name for path in job.run.glob("iter_*")] == ["iter_0000005"]
    again = submit(slurm, nano, tmp_path / "run", arguments=flags)
    assert again.ends("COMPLETED") == "0:0"
    assert [launch["state"] for launch in again.launches] == ["failed", "complete"]
    assert again.launches[1]["first_step"] == 5
    assert history(again.run) == uninterrupted and not list(again.run.glob(".iter_*"))


def test_outside_of_a_job_nothing_is_started(nano: Path, tmp_path: Path) -> None:
    """One host would be there, and two are meant."""
    write_script(nano, tmp_path / "run")
    ended = run(["bash", str(tmp_path / "run.sh")])
    assert ended.status == 2 and "no job of SLURM" in ended.output
    assert not (tmp_path / "run").exists()


def test_a_killed_harness_leaves_neither_daemons_nor_files(tmp_path: Path) -> None:
    program = (
        "from tests.clusters.slurm import start_slurm\n"
        "with start_slurm() as slurm: print(slurm.folder, flush=True); input()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    assert (folder / "slurm.conf").is_file()
    left_over = Slurm(folder, {"SLURM_CONF": str(folder / "slurm.conf")})
    assert left_over.all_processes()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5
    while left_over.all_processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left_over.all_processes()
    remove_leftovers()
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [DEEPSPEED, TORCHRUN])
def test_other_launchers_train_to_the_same_end(
    slurm: Slurm, nano: Path, tmp_path: Path, launcher: str, uninterrupted: list[tuple[Any, ...]]
) -> None:
    job = submit(slurm, nano, tmp_path / "run", launcher=launcher)
    assert job.ends("COMPLETED") == "0:0"
    assert history(job.run) == uninterrupted
    assert job.launches[0]["hosts"] == ["node1", "node2"]
    assert "complete: step 20 of 20" in rank_0(job.run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, victim",
    [
        (DEEPSPEED, "-u train.py"),
        (DEEPSPEED, "deepspeed --launcher"),
        (DEEPSPEED, "srun -n"),
        (TORCHRUN, "-u train.py"),
        (TORCHRUN, "torch.distributed.run"),
        (TORCHRUN, "srun --nodes"),
    ],
)
def test_other_launchers_fail_the_job_when_something_is_killed(
    slurm: Slurm, nano: Path, tmp_path: Path, launcher: str, victim: str
) -> None:
    job = submit(slurm, nano, tmp_path / "run", launcher=launcher, arguments=FOR_EVER)
    job.reaches(3)
    job.kill(victim)
    slurm.wait_until_gone(job.job, "train.py", GONE_SECONDS)
    assert job.ends("FAILED").partition(":")[0] != "0"


@pytest.mark.slow
def test_no_step_is_lost_at_the_limit_in_a_requeue_from_outside_or_by_scancel(
    slurm: Slurm, nano: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit(slurm, nano, folder, "--time=2", "--signal=B:USR1@30", arguments=FOR_EVER)
    slurm.wait_for(job.job, "RUNNING")
    slurm.wait_for(job.job, "PENDING")
    assert "SIGUSR1: the ranks are asked" in job.output
    slurm.run("scontrol", "update", f"JobId={job.job}", "TimeLimit=60")
    goes_on(job)
    slurm.run("scontrol", "requeue", job.job)
    slurm.wait_for(job.job, "PENDING")
    goes_on(job)
    slurm.run("scancel", job.job)
    slurm.wait_until_gone(job.job, "train.py", GONE_SECONDS)
    slurm.wait_for(job.job, "CANCELLED")
    again = submit(slurm, nano, folder, arguments=FOR_EVER)
    again.reaches(again.launches[-1]["last_step"] + 3)
    (folder / "STOP").touch()
    assert again.ends("FAILED") == "75:0"  # by hand: saved, but not queued again
    launches = again.launches
    assert [launch["state"] for launch in launches] == ["stopped"] * 4
    assert [launch["first_step"] for launch in launches] == [0, *(launch["last_step"] for launch in launches[:-1])]


@pytest.mark.slow
def test_a_job_that_slurm_refuses_to_queue_again_says_so_and_ends_with_75(
    slurm: Slurm, nano: Path, tmp_path: Path
) -> None:
    job = submit(slurm, nano, tmp_path / "run", "--no-requeue", arguments=FOR_EVER)
    job.reaches(3)
    slurm.run("scancel", "--signal=USR1", "--batch", job.job)
    assert job.ends("FAILED") == "75:0"
    assert f"SLURM refuses to queue job {job.job} again" in job.output
    assert job.launches[0]["state"] == "stopped"
