"""What the doctor says of names, interfaces, limits, folders, settings and jobs: on this machine, in states that are really so."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ds_recipes.cluster.doctor import folder, hostfile_hosts, network, settings, shared_folder, versions
from ds_recipes.cluster.doctor.checks import Context
from ds_recipes.cluster.doctor.commands import Answer, ask
from ds_recipes.cluster.doctor.findings import Finding
from ds_recipes.config.load import load_config
from ds_recipes.world.ancestors import read_process
from ds_recipes.world.channel import wait_until
from ds_recipes.world.resolve import Place
from tests.e2e.launchers import free_port

ROOT = Path(__file__).resolve().parents[3]
ON_TWO_HOSTS = Place(0, 2, 0, 1, "Open MPI", "127.0.0.1", None)
LIMITS = """
import sys
from pathlib import Path
from ds_recipes.cluster.doctor.checks import Context
from ds_recipes.cluster.doctor.limits import limits
from ds_recipes.world.resolve import Place
context = Context({}, Place(0, 1, local_size=1), "here", Path())
print(*sorted(finding.name for finding in limits(context)))
"""


def context(**changes) -> Context:
    given = {"env": {}, "place": Place(0, 1, local_size=1), "host": socket.gethostname(), "root": ROOT}
    return Context(**{**given, **changes})


def level_of(found, name: str) -> str | None:
    return next((one.level for one in found if one.name == name), None)


@pytest.mark.parametrize(
    ("host", "place", "env", "name", "level"),
    [
        ("localhost", ON_TWO_HOSTS, {}, "name.loopback", "error"),
        ("localhost", ON_TWO_HOSTS, {"GLOO_SOCKET_IFNAME": "eth0"}, "name.own", "fine"),
        ("localhost", Place(0, 1, local_size=1), {}, "name.own", "fine"),
        ("nosuch-host.invalid", ON_TWO_HOSTS, {}, "name.own", "error"),
        ("nosuch-host.invalid", Place(0, 1, local_size=1), {}, "name.own", "warning"),
        ("192.0.2.1", ON_TWO_HOSTS, {}, "name.foreign", "error"),
        ("192.0.2.1", Place(0, 1, local_size=1), {}, "name.foreign", "warning"),
    ],
)
def test_where_the_own_name_leads(host: str, place: Place, env: dict[str, str], name: str, level: str) -> None:
    assert level_of(network.own_name(context(host=host, place=place, env=env)), name) == level


@pytest.mark.parametrize(
    ("variable", "value", "meant"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", ["eth0"]),
        ("GLOO_SOCKET_IFNAME", "eth", []),
        ("GLOO_SOCKET_IFNAME", "eth0,nosuch0", []),
        ("NCCL_SOCKET_IFNAME", "eth", ["eth0", "eth1"]),
        ("NCCL_SOCKET_IFNAME", "=eth", []),
        ("NCCL_SOCKET_IFNAME", "=eth1", ["eth1"]),
        ("NCCL_SOCKET_IFNAME", "^eth", ["ib0"]),
        ("NCCL_SOCKET_IFNAME", "^eth,ib", []),
    ],
)
def test_which_interfaces_a_variable_means(variable: str, value: str, meant: list[str]) -> None:
    """gloo takes whole names; NCCL prefixes, unless told otherwise (its documentation of NCCL_SOCKET_IFNAME)."""
    assert network._wanted(variable, value, ["lo", "eth0", "eth1", "ib0"]) == meant


def test_rank_zero_on_another_host_than_its_address() -> None:
    place = Place(0, 2, 0, 1, "Open MPI", "192.0.2.1", int(free_port()))
    assert level_of(network.rank_zero(context(place=place)), "master.address") == "error"
    assert level_of(network.rank_zero(context(env={"MASTER_PORT": "x"})), "port.wrong") == "error"


def test_limits_of_a_shell() -> None:
    set_all = 'ulimit -s 512; ulimit -f 1000; ulimit -v 8000000; exec "$0" -S -c "$1"'
    done = subprocess.run(
        ["bash", "-c", set_all, sys.executable, LIMITS], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    names = set(done.stdout.split())
    assert {"limits.stack", "limits.file_size", "limits.address_space"} <= names, done.stderr


def test_a_run_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "new"
    found = list(folder.run_folder(context(run_folder=wanted)))
    assert level_of(found, "folder.speed") == "fine" or level_of(found, "folder.slow") == "warning"
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").write_text("")
    assert level_of(folder.run_folder(context(run_folder=wanted)), "folder.unusable") == "error"
    assert not list(folder.run_folder(context()))


def test_the_mount_below_a_path() -> None:
    assert folder.mount_of(Path("/proc/self")).kind == "proc"
    assert folder.mount_of(Path("/dev/shm/nothing/here")).point == Path("/dev/shm")


def test_a_folder_that_another_host_does_not_see(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shared_folder, "LOOK_SECONDS", 0.3)
    hosts = {0: "a", 1: "b", 2: "c"}
    path = shared_folder.begin(tmp_path)
    assert path is not None
    said = {1: shared_folder.answer(path, 1), 2: shared_folder.answer(str(tmp_path / "elsewhere"), 2)}
    (apart,) = shared_folder.verdict(path, said, hosts)
    assert apart.name == "folder.not_shared" and apart.data["hosts"] == ["c"]
    path = shared_folder.begin(tmp_path)
    assert path is not None
    (same,) = shared_folder.verdict(path, {1: shared_folder.answer(path, 1)}, hosts)
    assert same.level == "fine" and not list(tmp_path.iterdir())


def test_a_model_of_the_hub_without_a_hub() -> None:
    words = ["--model_name", "nobody/nothing", "--train_data", "x", "--save_checkpoint_path", "y", "--max_steps", "1"]
    found = list(settings.hub(context(config=load_config(words), env={"HF_HUB_OFFLINE": "1"})))
    assert level_of(found, "hub.unreachable") == "error" and "nobody/nothing" in found[0].text


def test_a_job_that_the_doctor_sees_a_part_of(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "3", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert level_of(settings.batch_job(context(env=job)), "job.alone") == "warning"
    missing = {"PBS_JOBID": "3", "PBS_NODEFILE": str(tmp_path / "none")}
    assert level_of(network.other_names(context(env=missing)), "job.hosts") == "error"


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("mpirun (Open MPI) 5.0.11", "Open MPI v5.0.8, package: x", True),
        ("mpirun (Open MPI) 5.0.11", "Open MPI v4.1.4, package: x", False),
        ("HYDRA build details: Version: 4.1.2", "MPICH Version: 4.0", True),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9", "MPICH Version: 4.0", False),
    ],
)
def test_whether_two_mpis_are_the_same(ours: str, theirs: str, same: bool) -> None:
    assert (versions._family(ours) == versions._family(theirs)) is same


@pytest.mark.parametrize(
    ("requirement", "name"),
    [("pytest>=1", None), ("pytest>=999", "package.version"), ("no-such-thing>=1", "package.missing")],
)
def test_bounds_of_the_project(tmp_path: Path, requirement: str, name: str | None) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = [{json.dumps(requirement)}]\n")
    found = list(versions._bounds(tmp_path, versions.packages()))
    assert [one.name for one in found] == ([] if name is None else [name])


@pytest.mark.parametrize(
    ("answer", "name", "says"),
    [
        (Answer(255, "", "Host key verification failed."), "ssh.refused", "known_hosts"),
        (Answer(255, "", "u@h: Permission denied (publickey)."), "ssh.refused", "without a password"),
        (Answer(None, "", "ssh did not answer within 60 s"), "ssh.refused", "firewall"),
        (Answer(hostfile_hosts.NO_PYTHON, "", ""), "host.python", "environment"),
        (Answer(hostfile_hosts.NO_FOLDER, "", ""), "host.repository", "repository"),
        (Answer(1, "", "SyntaxError: invalid syntax"), "host.doctor", "damaged"),
        (Answer(2, "{}", ""), None, ""),
    ],
)
def test_what_a_host_answers(answer: Answer, name: str | None, says: str) -> None:
    found: Finding | None = hostfile_hosts._refusal("h", answer, context())
    assert (found.name if found else None) == name
    assert found is None or says in found.cause


def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    answer = ask(["sh", "-c", f"sleep 300 & echo $! > {pid}; wait"], limit_seconds=0.5)
    assert answer.status is None and "did not answer within" in answer.reason
    child = read_process(int(pid.read_text()))
    assert child is None or wait_until(lambda: not child.is_running(), 10)
    assert ask(["no-such-program"]).status is None
