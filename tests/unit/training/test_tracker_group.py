"""The trackers together: what the loop calls, and what lies in the run folder afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config, LoggingConfig, RunConfig
from ds_recipes.errors import ConfigError
from ds_recipes.training.run_record import RunRecord
from ds_recipes.training.trackers import group
from ds_recipes.training.trackers.base import METRIC_NAMES
from ds_recipes.training.trackers.group import Trackers, check_trackers, start_trackers
from ds_recipes.world.group import solo


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(folder: Path, logging: LoggingConfig, resume_step: int = 0) -> Trackers:
    config = Config(run=RunConfig(max_steps=10), logging=logging)
    record = RunRecord(folder, config, 1, ["here"])
    return start_trackers(config, folder, make_plan(config, 1), solo(), resume_step, record)


def metrics_of(step: int) -> dict[str, Any]:
    return dict.fromkeys(METRIC_NAMES, 1.5) | {"step": step, "mfu": None, "data_hash": "ab"}


def test_a_run_leaves_its_record_in_the_folder_and_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = start(tmp_path, LoggingConfig())
    trackers.log(1, metrics_of(1) | {"weight_l2": 2.0})
    trackers.evaluation(1, {"eval_loss": 3.0})
    trackers.event("saved", step=1, path="iter_0000001")
    trackers.finish("complete", "step 1 of 1")
    assert [tuple(line) for line in lines(tmp_path / "metrics.jsonl")] == [METRIC_NAMES, ("step", "eval_loss")]
    assert [event["kind"] for event in lines(tmp_path / "events.jsonl")] == ["saved", "complete"]
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["state"], run["launches"][0]["last_step"]) == ("complete", 1)
    assert capsys.readouterr().out.count("\n") == 4


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    trackers = Trackers([], None, 0)
    trackers.log(1, metrics_of(1))
    trackers.event("saved", step=1)
    trackers.finish("complete", "done")
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_is_recorded_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ConnectionError("api.wandb.ai: no route to host")

    monkeypatch.setattr(group, "WandbTracker", broken)
    trackers = start(tmp_path, LoggingConfig(wandb_mode="online"))
    for step in range(1, 4):
        trackers.log(step, metrics_of(step))
    trackers.finish("complete", "step 3 of 3")
    events = [event for event in lines(tmp_path / "events.jsonl") if event["kind"] == "tracker"]
    message = "wandb failed; the run goes on without it (ConnectionError: api.wandb.ai: no route to host)"
    assert [event["message"] for event in events] == [message]
    assert capsys.readouterr().err == f"{message}\n"
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        trackers = start(tmp_path, LoggingConfig(tensorboard=True), resume_step)
        for step in steps:
            trackers.log(step, metrics_of(step) | {"loss": float(step)})
        if resume_step:
            trackers.rewind(2, 10)
            trackers.log(3, metrics_of(3) | {"loss": 0.5})
        trackers.finish("stopped", "the file STOP")
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("training/loss")] == [(1, 1.0), (2, 2.0), (3, 0.5)]


@pytest.mark.parametrize(
    "logging, missing",
    [
        (LoggingConfig(wandb_project="p"), "wandb"),
        (LoggingConfig(tensorboard=True), "tensorboard"),
    ],
)
def test_a_missing_package_is_a_setting_that_cannot_be_met(
    logging: LoggingConfig, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_trackers(Config(logging=logging))
    monkeypatch.setattr(group, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ConfigError, match=f"pip install {missing}"):
        check_trackers(Config(logging=logging))
    check_trackers(Config())
