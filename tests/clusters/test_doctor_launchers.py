"""The doctor under each launcher, on one machine, on two hosts and in a job of SLURM: one report, the links, and a right step."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.clusters.doctor import DOCTOR, LIMIT_SECONDS, examine, named, of, only
from tests.clusters.hosts import Host, needs_two_hosts, two_hosts
from tests.clusters.slurm import SKIP_REASON, can_start, start_slurm
from tests.e2e.launchers import ROOT, command, environment, free_port
from tests.nano import make_nano


def test_two_healthy_ranks_measure_their_link_and_take_a_step(tmp_path: Path) -> None:
    """The whole of it, with torch, under mpirun: nothing is wrong, the sums are right, and so is the step's loss."""
    run_file = make_nano(tmp_path / "nano")
    words = command("mpirun", 2, DOCTOR, "--config", str(run_file), "--save_checkpoint_path", str(tmp_path / "run"))
    words[1:1] = ["--bind-to", "none"]
    status, report, shown = examine(words, None, tmp_path)
    assert status == 0 and not named(report, "error"), shown
    step = only(report, "step", "fine")["data"]
    assert step["right"] and step["loss_after"] < step["loss_before"]
    assert abs(step["loss_before"] - step["expected_before"]) < 1e-5
    rows = only(report, "bandwidth", "fine")["data"]["rows"]
    assert {row["collective"] for row in rows} == {"all-reduce", "all-gather"} and all(row["right"] for row in rows)
    for row in rows:  # two ranks: 2 (n - 1) / n is 1, and (n - 1) / n is a half
        factor = 1.0 if row["collective"] == "all-reduce" else 0.5
        assert row["bus_gb_per_second"] == pytest.approx(factor * row["num_bytes"] / row["seconds"] / 1e9)
    assert "all-reduce ms" in shown
    assert only(report, "settings", "fine") and not of(report, "hub", "error")
    assert only(report, "ranks.code", "fine") and only(report, "torch", "fine")
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".doctor-*"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_it_runs_under_the_other_launchers(launcher: str, tmp_path: Path) -> None:
    status, report, shown = examine(command(launcher, 2, DOCTOR), None, tmp_path)
    assert status == 0 and only(report, "step", "fine")["data"]["right"], shown
    status, report, shown = examine(
        command(launcher, 2, DOCTOR, "--quick", "--expected_world_size", "3"), None, tmp_path
    )
    assert status == (1 if launcher == "torchrun" else 2), "torchrun turns every status into 1"
    assert only(report, "world.size", "error")


@pytest.mark.slow
def test_a_rank_that_never_answers_is_named(tmp_path: Path) -> None:
    """A rank whose doctor was never started: the others report without it, and do not try to meet it."""
    words = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "1", sys.executable, str(DOCTOR), "--quick"]
    words += ["--json", str(tmp_path / "found.json"), ":", "-np", "1", "sleep", "200"]
    done = subprocess.run(words, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    report = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode != 0 and only(report, "ranks.silent", "error")["text"].startswith("rank 1 did not report")


def on_host(host: Host, words: Sequence[str], folder: Path) -> tuple[int, dict, str]:
    """Run the doctor on one of two hosts, as a user who is logged in there."""
    target, output = folder / f"found-{free_port()}.json", folder / f"output-{free_port()}"
    process = host.begin([*words, "--json", str(target)], ROOT, output)
    status = process.wait(LIMIT_SECONDS)
    assert target.exists(), output.read_text()
    return status, json.loads(target.read_text()), output.read_text()


@pytest.mark.slow
@needs_two_hosts
def test_two_hosts(tmp_path: Path) -> None:
    """Through ssh from one of them, and with a rank on each; then a run folder that the other host has not mounted."""
    hostfile, run, only_here = tmp_path / "hostfile", tmp_path / "run", tmp_path / "local"
    hostfile.write_text("alpha slots=1\nbeta slots=1\n")
    only_here.mkdir()
    with two_hosts(tmp_path) as (alpha, _):
        words = [sys.executable, str(DOCTOR), "--quick", "--hostfile", str(hostfile), "--run_folder", str(run)]
        status, report, shown = on_host(alpha, words, tmp_path)
        assert status == 0, shown
        assert only(report, "hosts", "fine")["text"].startswith("2 of 2 hosts")
        assert {host for one in of(report, "name.own") for host in one["hosts"]} == {"alpha", "beta"}
        hostfile.write_text("alpha slots=1\nbeta slots=1\ngamma slots=1\n")
        status, report, _ = on_host(alpha, words, tmp_path)
        assert status == 2 and only(report, "hostfile.unknown_host", "error")["hosts"] == ["gamma"]

        hostfile.write_text("alpha slots=1\nbeta slots=1\n")
        mpirun = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "-hostfile", str(hostfile), "-np", "2"]
        status, report, shown = on_host(
            alpha, [*mpirun, sys.executable, str(DOCTOR), "--run_folder", str(run)], tmp_path
        )
        assert status == 0 and report["hosts"] == ["alpha", "beta"], shown
        assert only(report, "step", "fine")["data"]["right"] and only(report, "folder.shared", "fine")
        assert only(report, "clock", "fine")

        apart = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {only_here} && exec "$@"', "sh"]
        doctor = [sys.executable, str(DOCTOR), "--quick", "--run_folder", str(only_here)]
        status, report, _ = on_host(alpha, [*mpirun, *apart, *doctor], tmp_path)
        found = only(report, "folder.not_shared", "error")
        assert status == 2 and found["data"]["hosts"] == ["beta"]

        lo = ["env", "GLOO_SOCKET_IFNAME=lo", *mpirun, "-x", "GLOO_SOCKET_IFNAME", *doctor]
        status, report, _ = on_host(alpha, lo, tmp_path)
        assert status == 2 and only(report, "interface.loopback", "error")["ranks"] == [0, 1]


@pytest.mark.slow
@pytest.mark.skipif(not can_start(), reason=SKIP_REASON)
def test_a_step_of_srun(tmp_path: Path) -> None:
    """Ranks that srun starts on two nodes find rank 0 and each other; the interface that they are told of is the wrong one."""
    with start_slurm() as slurm:
        slurm.env["GLOO_SOCKET_IFNAME"] = "lo"
        target, doctor = (
            tmp_path / "found.json",
            [sys.executable, str(DOCTOR), "--quick", "--json", str(tmp_path / "found.json")],
        )
        done = subprocess.run(
            ["srun", "-N", "2", "-n", "2", *doctor],
            env=slurm.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        assert target.exists(), done.stdout + done.stderr + slurm.logs()
    report = json.loads(target.read_text())
    assert done.returncode == 2 and report["hosts"] == ["node1", "node2"] and report["source"] == "SLURM"
    assert only(report, "interface.loopback", "error")["hosts"] == ["node1", "node2"]
    assert (
        only(report, "job.hosts_used", "fine") and only(report, "ranks.code", "fine") and only(report, "clock", "fine")
    )
