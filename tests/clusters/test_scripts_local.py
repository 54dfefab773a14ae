"""The scripts without a scheduler, really run on this machine with two ranks: to the end, with a killed rank, with a signal."""

import os
import signal
from pathlib import Path

import pytest

from ds_recipes.errors import STOPPED_EARLY
from tests.clusters.jobs import Running, write_script

SCRIPTS = ("mpirun", "deepspeed-hostfile", "torchrun")


def start(cluster: str, nano: Path, folder: Path, *flags: str, resubmit: str = "0") -> Running:
    hostfile = folder.with_suffix(".hosts")
    hostfile.write_text("# this machine\n\nlocalhost slots=2\n")
    fields = {} if cluster == "mpirun" else {"hostfile": str(hostfile)}
    return Running(write_script(cluster, nano, folder, *flags, **fields), folder, {"RESUBMIT": resubmit})


@pytest.mark.slow  # a scheduler starts the same text over mpirun every day
def test_mpirun_at_the_time_limit_is_started_again_and_completes(nano: Path, tmp_path: Path) -> None:
    job = start("mpirun", nano, tmp_path / "run 1", "--max_steps", "40", resubmit="1")
    job.until_step(3)
    job.process.send_signal(signal.SIGUSR1)
    ended = job.ended()
    assert ended.status == 0, ended.output
    assert ended.states == ["stopped", "complete"]
    first, second = ended.launches
    assert "the file STOP" in first["reason"]
    assert 0 < first["last_step"] == second["first_step"] < second["last_step"] == 40
    assert not (tmp_path / "run 1" / "STOP").exists()
    assert [log.name for log in ended.logs] == ["rank-0.log", "rank-1.log"] * 2
    assert "step 40/40" in ended.output  # rank 0's log is shown


@pytest.mark.slow  # of every day: a killed rank under SLURM's script (test_slurm.py), under deepspeed (test_launcher_kills.py)
def test_deepspeed_with_a_killed_rank_fails(nano: Path, tmp_path: Path) -> None:
    job = start("deepspeed-hostfile", nano, tmp_path / "run", "--max_steps", "100000", resubmit="1")
    job.until_step(3)
    os.kill(job.ranks()[1], signal.SIGKILL)
    ended = job.ended()
    assert ended.status not in (0, STOPPED_EARLY), ended.output
    assert ended.states == ["failed"]
    assert [log.name.split("_")[-1] for log in ended.logs] == ["rank0.log", "rank1.log"]


@pytest.mark.slow  # of every day: SLURM's script, tools/launch.py
def test_torchrun_hides_75_and_the_script_does_not(nano: Path, tmp_path: Path) -> None:
    job = start("torchrun", nano, tmp_path / "run", "--max_steps", "100000", resubmit="1")
    job.until_step(3)
    job.process.send_signal(signal.SIGTERM)  # from who wants it to end, so it is not started again
    ended = job.ended()
    assert ended.status == STOPPED_EARLY, ended.output
    assert ended.states == ["stopped"]
    assert "launcher" not in ended.output.splitlines()[-1]
    assert [log.parent.name for log in ended.logs] == ["0", "0", "1", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", SCRIPTS)
def test_to_the_end(cluster: str, nano: Path, tmp_path: Path) -> None:
    ended = start(cluster, nano, tmp_path / "run", "--max_steps", "4").ended()
    assert ended.status == 0, ended.output
    assert ended.states == ["complete"]
    assert "step 4/4" in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("cluster", SCRIPTS)
def test_a_killed_rank(cluster: str, rank: int, nano: Path, tmp_path: Path) -> None:
    job = start(cluster, nano, tmp_path / "run", "--max_steps", "100000", resubmit="1")
    job.until_step(3)
    os.kill(job.ranks()[rank], signal.SIGKILL)
    ended = job.ended()
    assert ended.status not in (0, STOPPED_EARLY), ended.output
    assert ended.states == ["failed" if rank else "running"]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", SCRIPTS)
def test_signal_before_the_limit_then_a_resume(cluster: str, nano: Path, tmp_path: Path) -> None:
    job = start(cluster, nano, tmp_path / "run", "--max_steps", "60", resubmit="1")
    job.until_step(3)
    job.process.send_signal(signal.SIGUSR1)
    ended = job.ended()
    assert ended.status == 0, ended.output
    assert ended.states == ["stopped", "complete"]
    assert ended.launches[0]["last_step"] == ended.launches[1]["first_step"]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", SCRIPTS)
def test_a_killed_launcher(cluster: str, nano: Path, tmp_path: Path) -> None:
    """Nothing of the launch is left when the script ends, and its status says that it failed."""
    job = start(cluster, nano, tmp_path / "run", "--max_steps", "100000", resubmit="1")
    job.until_step(3)
    os.kill(job.launcher(), signal.SIGKILL)
    ended = job.ended()
    assert ended.status not in (0, STOPPED_EARLY), ended.output


@pytest.mark.slow
def test_deepspeeds_launcher_says_0_when_its_child_is_killed_and_the_script_does_not(
    nano: Path, tmp_path: Path
) -> None:
    job = start("deepspeed-hostfile", nano, tmp_path / "run", "--max_steps", "100000")
    job.until_step(3)
    launcher = job.launcher()
    (child,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    ended = job.ended()
    assert ended.status == 1, ended.output
    assert "the launcher ended with status 0" in ended.output


@pytest.mark.slow
def test_a_stop_file_by_hand_ends_the_chain(nano: Path, tmp_path: Path) -> None:
    job = start("mpirun", nano, tmp_path / "run", "--max_steps", "100000", resubmit="1")
    job.until_step(3)
    (tmp_path / "run" / "STOP").touch()
    ended = job.ended()
    assert ended.status == STOPPED_EARLY, ended.output
    assert ended.states == ["stopped"]
