"""The scripts for hosts of a hostfile, over two hosts with two ranks each: variables, signal, resume; copies on each host."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.clusters.hosts import INTERFACE, Host, needs_two_hosts
from tests.clusters.jobs import AS_ROOT, LEAVE_SECONDS, rank_processes, write_script
from tests.e2e.launchers import ROOT
from tests.ranks.training import until_step

pytestmark = [pytest.mark.slow, needs_two_hosts]

ODD = "two  words, \"quotes\" and 'these', $HOME `id` \\ %h = ;"


def script(cluster: str, nano: Path, folder: Path) -> Path:
    hostfile = folder.with_suffix(".hosts")
    hostfile.write_text("alpha slots=2\nbeta slots=2\n")
    return write_script(
        cluster, nano, folder, "--max_steps", "60", nodes=2, hostfile=str(hostfile), exports=("ODD",)
    )  # fmt: skip


def begin(host: Host, path: Path, **env: str) -> "subprocess.Popen[bytes]":
    variables = AS_ROOT | {"GLOO_SOCKET_IFNAME": INTERFACE, "ODD": ODD} | env
    return host.begin(["bash", str(path)], ROOT, path.with_suffix(f".{host.name}"), variables)


def ended(folder: Path) -> tuple[list[str], str]:
    """The states of the launches, and all that was printed."""
    launches = json.loads((folder / "run.json").read_text())["launches"]
    printed = "".join(path.read_text(errors="replace") for path in folder.parent.glob("*.[ab]*a"))
    return [launch["state"] for launch in launches], printed


@pytest.mark.parametrize("cluster", ["mpirun", "deepspeed-hostfile", "torchrun"])
def test_signal_and_resume_with_the_first_hosts_variables(
    cluster: str, nano: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = begin(hosts[0], script(cluster, nano, folder), RESUBMIT="1")
    until_step(folder, 3, timeout=LEAVE_SECONDS)
    ranks = rank_processes(folder)
    assert len(ranks) == 4
    assert {environ["ODD"] for _, environ in ranks.values()} == {ODD}
    process.send_signal(signal.SIGUSR1)
    status = process.wait(timeout=2 * LEAVE_SECONDS)
    states, printed = ended(folder)
    assert (status, states) == (0, ["stopped", "complete"]), printed
    assert not rank_processes(folder)
    assert "step 60/60" in printed


def test_a_copy_of_torchruns_script_on_each_host(nano: Path, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = script("torchrun", nano, folder)
    processes = [begin(host, path, LAUNCH_ID="first") for host in hosts]
    statuses = [process.wait(timeout=2 * LEAVE_SECONDS) for process in processes]
    states, printed = ended(folder)
    assert (statuses, states) == ([0, 0], ["complete"]), printed
