"""run.json over several launches, killed ones among them."""

import json
import subprocess
import sys
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.config.schema import Config, OptimizerConfig
from ds_recipes.errors import STOPPED_EARLY
from ds_recipes.training import run_record
from ds_recipes.training.run_record import LAUNCH_VARIABLE, RunRecord, git_state

CONFIG = Config(optimizer=OptimizerConfig(lr=0.25))


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def test_a_launch_says_running_from_the_start_and_then_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, "job-17")
    record = RunRecord(tmp_path / "new" / "run", CONFIG, 2, ["node1", "node2"])
    folder = tmp_path / "new" / "run"
    assert {name: read(folder)[name] for name in ("launch", "state", "reason")} == {
        "launch": "job-17",
        "state": "running",
        "reason": None,
    }
    record.continues_from(40)
    record.reached(45)
    record.finish("stopped", "signal SIGTERM at step 45")
    record.fail("an error while leaving")  # too late: the checkpoint is durable
    entry = read(folder)["launches"][0]
    assert read(folder)["state"] == entry["state"] == "stopped"
    assert (entry["first_step"], entry["last_step"], entry["world_size"]) == (40, 45, 2)
    assert entry["hosts"] == ["node1", "node2"]
    assert entry["command"] == sys.orig_argv
    assert {"python", "torch", "deepspeed", "transformers"} <= set(entry["versions"])
    assert entry["started"] <= entry["ended"]
    assert "lr: 0.25" in (folder / "run.yaml").read_text()


def test_a_launch_that_never_came_to_its_first_step_stands_where_the_one_before_ended(tmp_path: Path) -> None:
    RunRecord(tmp_path, CONFIG, 1, ["a"]).fail("Stopped before the first step", STOPPED_EARLY)
    trained = RunRecord(tmp_path, CONFIG, 1, ["a"])
    trained.continues_from(0)
    trained.reached(7)
    trained.fail("the disk is full")
    RunRecord(tmp_path, CONFIG, 1, ["a"]).fail("Stopped before the first step", STOPPED_EARLY)
    launches = read(tmp_path)["launches"]
    assert [launch["state"] for launch in launches] == ["stopped", "failed", "stopped"]
    assert [(launch["first_step"], launch["last_step"]) for launch in launches] == [(0, 0), (0, 7), (7, 7)]


def test_a_clock_that_is_set_back_makes_no_negative_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SetBack(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime(1999, 1, 1, tzinfo=tz)

    record = RunRecord(tmp_path, CONFIG, 1, ["a"])
    monkeypatch.setattr(run_record, "datetime", SetBack)
    record.finish("complete", "done")
    entry = read(tmp_path)["launches"][0]
    assert datetime.fromisoformat(entry["ended"]) >= datetime.fromisoformat(entry["started"])


def test_earlier_launches_are_kept_and_a_killed_one_is_called_failed(tmp_path: Path) -> None:
    RunRecord(tmp_path, CONFIG, 1, ["a"]).finish("stopped", "the file STOP at step 5")
    RunRecord(tmp_path, CONFIG, 1, ["a"])  # killed: never says how it ended
    last = RunRecord(tmp_path, CONFIG, 1, ["a"])
    launches = read(tmp_path)["launches"]
    assert [launch["state"] for launch in launches] == ["stopped", "failed", "running"]
    assert launches[1]["reason"].startswith("ended without a word")
    assert len({launch["launch"] for launch in launches}) == 3
    assert read(tmp_path)["launch"] == last.launch


@pytest.mark.parametrize("text", ["", "{", "[]", '{"launches": 3}', '{"launches": [3]}'])
def test_a_damaged_run_json_does_not_stop_a_launch_and_is_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    RunRecord(tmp_path, CONFIG, 1, ["a"])
    assert [launch["state"] for launch in read(tmp_path)["launches"]] == ["running"]
    assert (tmp_path / "run.json.damaged").read_text() == text


def test_the_effective_deepspeed_json_is_written(tmp_path: Path) -> None:
    effective = {"zero_optimization": {"stage": 3}, "train_batch_size": 8}
    RunRecord(tmp_path, CONFIG, 1, ["a"]).write_ds_config(effective)
    assert json.loads((tmp_path / "ds_config.json").read_text()) == effective


def test_the_commit_is_that_of_the_work_tree_that_tracks_this_code(tmp_path: Path) -> None:
    code = tmp_path / "site-packages"
    code.mkdir()
    (code / "run_record.py").write_text("")

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", *identity, "-C", str(tmp_path), *arguments], check=True, capture_output=True, text=True
        ).stdout

    assert git_state(code) is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "someone else's repository")
    assert git_state(code) is None  # installed below a work tree that does not track it
    git("add", "-A")
    git("commit", "-q", "-m", "code")
    assert git_state(code) == {"commit": git("rev-parse", "HEAD").strip(), "changed": False}
    (code / "run_record.py").write_text("changed")
    assert git_state(code) == {"commit": git("rev-parse", "HEAD").strip(), "changed": True}


def test_a_failure_is_recorded_with_its_reason_and_the_last_step(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, CONFIG, 1, ["a"])
    record.continues_from(3)
    record.reached(7)
    record.fail("10 steps in a row had a gradient that is not finite")
    entry = read(tmp_path)["launches"][0]
    assert (entry["state"], entry["first_step"], entry["last_step"]) == ("failed", 3, 7)
    assert read(tmp_path)["reason"] == "10 steps in a row had a gradient that is not finite"


def test_once_the_lock_is_anothers_run_json_is_left_alone(tmp_path: Path) -> None:
    held = True
    record = RunRecord(tmp_path, CONFIG, 1, ["node1"], lambda: held, "mine")
    record.continues_from(0)
    (tmp_path / "run.json").write_text('{"launch": "another", "state": "running", "launches": []}')
    held = False
    record.reached(7)
    record.finish("complete", "step 7 of 7")
    assert read(tmp_path) == {"launch": "another", "state": "running", "launches": []}
