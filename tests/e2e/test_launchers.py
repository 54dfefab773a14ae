"""Under every launcher: the same losses to the last digit, status 0 at the end, and each error shown exactly once."""

import getpass
import os
import socket
from pathlib import Path

import pytest

from tests.e2e.launchers import LAUNCHERS, ROOT, command, free_port, run
from tests.nano import make_nano
from tests.ranks.launch import fork_rank, wait_for
from tests.ranks.training import metrics

GUARDED = ROOT / "tests" / "ranks" / "guarded.py"
EXACT = ("loss", "grad_norm", "lr", "tokens", "data_hash")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


@pytest.mark.slow  # of every day over two hosts: tests/clusters/test_two_hosts.py
def test_the_same_losses_to_the_last_digit_under_every_launcher(nano: Path, tmp_path: Path) -> None:
    lines = {}
    for launcher in LAUNCHERS:
        folder = tmp_path / launcher
        flags = ["--config", str(nano), "--save_checkpoint_path", str(folder)]
        ended = run(command(launcher, 2, ROOT / "train.py", *flags, *(["--use_mpi"] if launcher == "mpirun" else [])))
        assert ended.status == 0, ended.output
        lines[launcher] = [[line[key] for key in EXACT] for _, line in sorted(metrics(folder).items())]
    assert len(lines["torchrun"]) == 20
    assert lines["torchrun"] == lines["deepspeed"] == lines["mpirun"]


def test_plain_python_is_a_world_of_one(nano: Path, tmp_path: Path) -> None:
    flags = ["--config", str(nano), "--save_checkpoint_path", str(tmp_path / "run"), "--max_steps", "2"]
    ended = run(command("python", 1, ROOT / "train.py", *flags))
    assert ended.status == 0, ended.output
    assert (tmp_path / "run" / "iter_0000002" / "rank-00000-of-00001.safetensors").exists()
    noise = [word for word in ("Warning", "WARNING", "Traceback") if word in ended.output]
    assert not noise, ended.output


def test_use_mpi_refuses_another_launcher(nano: Path, tmp_path: Path) -> None:
    flags = ["--config", str(nano), "--save_checkpoint_path", str(tmp_path / "run"), "--use_mpi"]
    ended = run(command("torchrun", 2, ROOT / "train.py", *flags))
    assert ended.status != 0
    assert ended.output.count("--use_mpi asks for ranks from MPI") == 1, ended.output


@pytest.mark.parametrize(
    "launcher", [pytest.param(one, marks=pytest.mark.slow if one == "deepspeed" else ()) for one in LAUNCHERS]
)
def test_an_error_on_rank_one_ends_all_and_is_shown_once(launcher: str) -> None:
    ended = run(command(launcher, 3, GUARDED, "after", "1"), timeout=60)
    assert ended.status == (1 if launcher == "torchrun" else 2), ended.output
    assert ended.output.count("the record is wrong") == 1, ended.output


def test_an_error_that_all_ranks_have_is_shown_once() -> None:
    ended = run(command("mpirun", 3, GUARDED, "before"), timeout=60)
    assert ended.status == 2 and ended.output.count("the flag is wrong") == 1, ended.output


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("mpirun", marks=pytest.mark.slow)])
def test_stopped_early_reaches_the_job_script(launcher: str) -> None:
    assert run(command(launcher, 2, GUARDED, "stop"), timeout=60).status == 75


SCENARIOS = {
    # scenario and culprit: (text shown exactly once, statuses that all ranks must have)
    ("before", 1): ("the flag is wrong", {2}),
    ("bug_before", 1): ("ValueError: a bug in the checks", {1}),
    ("after", 0): ("the record is wrong", {2}),
    ("after", 2): ("the record is wrong", {2}),
    ("bug_after", 1): ("ValueError: a bug in a rank", {1}),
    ("stuck", 1): ("ValueError: a bug in a rank", {1}),
    ("check", 1): ("the file is missing", {2}),
    ("check", -1): ("the file is missing", {2}),
    ("check_bug", 2): ("OSError: the disk stumbled", {1}),
    ("kill", 1): ("Was it killed?", {1, -9}),
    ("kill", 0): ("Was it killed?", {1, -9}),
    ("leave", 1): ("7", {1, 7}),
    ("late", 2): ("did not reach 'the meeting point'", {1, -9}),
}


@pytest.mark.parametrize(("scenario", "culprit"), SCENARIOS)
def test_whichever_rank_fails_first_all_leave_soon_and_one_speaks(scenario: str, culprit: int, tmp_path: Path) -> None:
    """Three ranks without a launcher, so that nothing but the program itself ends them."""
    text, statuses = SCENARIOS[scenario, culprit]
    port = free_port()
    processes = [
        fork_rank(
            _guarded,
            ((scenario, str(culprit)),),
            tmp_path / f"rank{rank}.txt",
            {
                "RANK": str(rank),
                "WORLD_SIZE": "3",
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(3)
    ]
    in_time = wait_for(processes, 45, grace=20)
    output = "".join((tmp_path / f"rank{rank}.txt").read_text() for rank in range(3))
    assert in_time or scenario == "late", output
    seen = {process.exitcode for process in processes}
    assert seen <= statuses and 0 not in seen, (seen, output)
    assert output.count(text) == 1, output


def test_a_taken_port_is_refused_with_its_owner(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        rank = fork_rank(_guarded, (("after", "1"),), tmp_path / "output", place)
        assert wait_for([rank], 45) and rank.exitcode == 1
    lines = (tmp_path / "output").read_text().splitlines()
    assert lines[0].startswith(
        f"Rank 0 cannot listen at port {port} of {socket.gethostname()}: it is in use by process {os.getpid()} ("
    ), lines
    assert lines[0].endswith(f" of user {getpass.getuser()}.") and lines[1].startswith("Set MASTER_PORT ")


def _guarded(arguments: tuple[str, ...]) -> int:
    from ds_recipes.world.failure import run_guarded
    from tests.ranks.guarded import main

    return run_guarded(main, arguments)
