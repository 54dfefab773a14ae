"""What becomes of a run when its launcher is asked to stop: the table in docs/stopping.md, with the real launchers."""

import json
from pathlib import Path

import pytest

from tests.e2e.launchers import ROOT, command, run
from tests.e2e.stopping import Asked, ask
from tests.nano import make_nano
from tests.ranks.training import metrics


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


SAVES = [
    # launcher, what it is sent, its exit status
    pytest.param(
        "torchrun", "SIGTERM", 1, marks=pytest.mark.slow
    ),  # of every day: tools/launch.py, ranks/test_stopping.py
    pytest.param("torchrun", "SIGINT", 1, marks=pytest.mark.slow),
    pytest.param("torchrun", "STOP", 1, marks=pytest.mark.slow),
    pytest.param("mpirun", "SIGUSR1", 75, marks=pytest.mark.slow),
    pytest.param("mpirun", "SIGUSR2", 75, marks=pytest.mark.slow),
    pytest.param("mpirun", "STOP", 75, marks=pytest.mark.slow),
    pytest.param("deepspeed", "STOP", 75, marks=pytest.mark.slow),
]
LOSES = [
    # launcher, what it is sent, its exit status, whether the ranks hear of it only by its being gone
    ("torchrun", "SIGUSR1", -10, True),
    ("torchrun", "SIGUSR2", -12, True),
    ("mpirun", "SIGTERM", 1, False),
    ("deepspeed", "SIGTERM", -15, True),
    ("deepspeed", "SIGUSR1", -10, True),
    ("deepspeed", "SIGUSR2", -12, True),
]


@pytest.mark.parametrize(("launcher", "what", "status"), SAVES)
def test_a_launcher_that_passes_the_wish_on_leaves_a_checkpoint(
    nano: Path, tmp_path: Path, launcher: str, what: str, status: int
) -> None:
    asked = ask(launcher, nano, tmp_path / "run", what)
    assert asked.status == status, asked.output
    assert asked.saved and asked.orphans == 0, asked
    assert asked.record["state"] == "stopped"
    reason = "the file STOP" if what == "STOP" else f"signal {what}"
    assert asked.record["reason"] == f"{reason} at step {asked.steps}"


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "what", "status", "dies"), LOSES)
def test_one_that_does_not_is_gone_with_its_ranks_and_the_run_goes_on_from_what_was_saved(
    nano: Path, tmp_path: Path, launcher: str, what: str, status: int, dies: bool
) -> None:
    folder = tmp_path / "run"
    asked = ask(launcher, nano, folder, what, "--save_interval_iteration", "1")
    assert (asked.status, asked.orphans) == (status, 0), asked
    assert asked.record["state"] != "complete" and asked.checkpoints, asked
    if dies:
        assert asked.record["reason"].startswith(f"The launcher {launcher} (process "), asked
    goes_on(nano, folder, asked)


def goes_on(nano: Path, folder: Path, asked: Asked) -> None:
    """A start afterwards continues from the newest checkpoint; what is trained again is trained in the same way."""
    before, newest = metrics(folder), asked.checkpoints[-1]
    last = str(asked.steps + 2)
    flags = ["--config", str(nano), "--save_checkpoint_path", str(folder), "--max_steps", last, "--lr_warmup", "0"]
    ended = run(command("torchrun", 2, ROOT / "train.py", *flags, "--allow_change", "schedule"))
    assert ended.status == 0, ended.output
    assert f"continuing from {folder}/iter_{newest:07d}" in ended.output
    assert json.loads((folder / "run.json").read_text())["state"] == "complete"
    after = metrics(folder)
    assert sorted(after) == list(range(1, asked.steps + 3))
    assert all(after[step]["data_hash"] == line["data_hash"] for step, line in before.items())
