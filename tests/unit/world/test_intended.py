"""A world that is smaller than the job, or than the launcher was told, is refused: nothing falls back to one host."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ds_recipes.errors import WorldError
from ds_recipes.world.allocation import expand_hosts, read_allocation
from ds_recipes.world.intended import _hostfile_of, check_all_hosts_used, check_intended
from ds_recipes.world.resolve import resolve

SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[003-004,9],login1", "SLURM_TASKS_PER_NODE": "8(x3),2"}


def pbs(folder: Path, *lines: str) -> dict[str, str]:
    return {"PBS_JOBID": "42.pbs1", "PBS_NODEFILE": write(folder / f"nodes{len(lines)}", lines)}


def grid_engine(folder: Path, variable: str, *lines: str) -> dict[str, str]:
    return {"JOB_ID": "9", variable: write(folder / variable, lines)}


def write(path: Path, lines: Sequence[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_hosts_of_each_scheduler(tmp_path: Path) -> None:
    for env, hosts, slots in (
        (SLURM, ("gpu003", "gpu004", "gpu9", "login1"), (8, 8, 8, 2)),
        (pbs(tmp_path, "hnode1", "hnode1", "hnode2", "hnode2"), ("hnode1", "hnode2"), (2, 2)),
        (pbs(tmp_path, "hnode2", "hnode1"), ("hnode2", "hnode1"), (1, 1)),
        (
            grid_engine(tmp_path, "PE_HOSTFILE", "g1 4 all.q@g1 UNDEFINED", "g2 4 all.q@g2 UNDEFINED"),
            ("g1", "g2"),
            (4, 4),
        ),
        (grid_engine(tmp_path, "SGE_JOB_HOSTLIST", "g0001", "g0002", ""), ("g0001", "g0002"), (1, 1)),
    ):
        allocation = read_allocation(env)
        assert allocation is not None and (allocation.hosts, allocation.slots) == (hosts, slots)
    serial = read_allocation({"JOB_ID": "9", "SGE_TASK_ID": "undefined", "HOSTNAME": "node2"})
    assert serial is not None and (serial.job_id, serial.hosts) == ("9", ("node2",))
    assert read_allocation({"JOB_ID": "9"}) is None and read_allocation({}) is None


@pytest.mark.parametrize("nodelist", ["gpu[1-", "gpu[a-b]", "gpu 1", "gpu[1-2]x]"])
def test_a_list_that_slurm_does_not_write_is_refused(nodelist: str) -> None:
    with pytest.raises(WorldError):
        expand_hosts(nodelist)


def test_lists_with_several_brackets() -> None:
    assert expand_hosts("r[1-2]n[09-10]-ib") == ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]
    assert expand_hosts("gpu[12,007-009],login1") == ["gpu12", "gpu007", "gpu008", "gpu009", "login1"]
    assert expand_hosts("") == []


def test_an_empty_or_missing_file_of_hosts_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="names no host"):
        read_allocation(pbs(tmp_path))
    (tmp_path / "nodes0").unlink()
    with pytest.raises(WorldError, match=r"PBS_NODEFILE=.*cannot be read: No such file"):
        read_allocation({"PBS_JOBID": "1", "PBS_NODEFILE": str(tmp_path / "nodes0")})


@pytest.mark.parametrize("num_hosts, used", [(1, False), (3, False), (4, True), (5, True)])
def test_a_world_on_a_part_of_the_job_must_be_asked_for(num_hosts: int, used: bool) -> None:
    check_all_hosts_used(8, num_hosts, SLURM, expected_world_size=8)
    check_all_hosts_used(8, num_hosts, {}, expected_world_size=None)
    if used:
        check_all_hosts_used(8, num_hosts, SLURM, expected_world_size=None)
        return
    with pytest.raises(WorldError) as caught:
        check_all_hosts_used(8, num_hosts, SLURM, expected_world_size=None)
    for word in ("4 hosts", "gpu003, gpu004, gpu9, login1", "8 ranks", "--expected_world_size 8"):
        assert word in str(caught.value)


def test_plain_python_in_a_job_of_several_hosts_is_refused_before_torch(tmp_path: Path) -> None:
    env = pbs(tmp_path, "hnode1", "hnode2")
    with pytest.raises(WorldError, match=r"PBS job has 2 hosts .* the world is 1 rank on 1 host"):
        check_intended(resolve(env), env, None)
    code = "import sys, ds_recipes.world.intended; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


RANK = """
import os, sys
from ds_recipes.errors import WorldError
from ds_recipes.world.intended import check_intended
from ds_recipes.world.resolve import resolve
try:
    check_intended(resolve(os.environ), os.environ, None)
except WorldError as error:
    print("REFUSED", error, flush=True)
"""


@pytest.mark.parametrize(
    "words, hostfile",
    [
        (["--hostfile", "f"], "f"),
        (["-H", "f", "--num_gpus", "2"], "f"),
        (["--num_gpus", "2", "--hostfile=f"], "f"),
        (["--hostfile", "f", "--hostfile", "g"], "g"),
        ([], None),
    ],
)
def test_the_launchers_words_end_at_the_script(words: list[str], hostfile: str | None) -> None:
    assert _hostfile_of(["python3", "/bin/deepspeed", *words, "train.py", "--hostfile", "of_the_script"]) == hostfile
    assert _hostfile_of(["python3", "-m", "deepspeed.launcher.runner", *words, "train.py"]) == hostfile
    assert _hostfile_of(["mpirun", "-H", "host1", "python3", "train.py"]) is None


@pytest.mark.parametrize("words", [["-H", "no_such"], pytest.param([], marks=pytest.mark.slow)])
def test_deepspeeds_launcher_with_a_missing_hostfile(words: list[str], tmp_path: Path) -> None:
    """The real launcher, which trains on this host all the same."""
    from tests.e2e.launchers import free_port, run

    (tmp_path / "rank.py").write_text(RANK)
    command = ["deepspeed", *words, "--num_gpus", "1", "--master_port", free_port(), str(tmp_path / "rank.py")]
    ended = run([*command, "--hostfile", "of_the_script"], {"HOME": os.fspath(tmp_path)}, cwd=tmp_path, timeout=60)
    assert ended.status == 0
    assert ("REFUSED The hostfile no_such given to deepspeed does not exist" in ended.output) is bool(words), (
        ended.output
    )
