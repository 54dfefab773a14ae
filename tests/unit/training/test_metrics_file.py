"""What lies in the run folder after kills, new starts and numbers that are not finite."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.errors import TrainingError
from ds_recipes.fsops import calls, faults
from ds_recipes.training.trackers.base import METRIC_NAMES
from ds_recipes.training.trackers.metrics_file import JsonLines, MetricsFiles


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(step: int) -> dict[str, Any]:
    return dict.fromkeys(METRIC_NAMES, 0.1 + step) | {"step": step}


def test_a_line_a_step_with_the_agreed_names_in_their_order(tmp_path: Path) -> None:
    files = MetricsFiles(tmp_path, "launch", 0)
    files.log(1, {"weight_l2": 3.0} | metrics_of(1))
    files.evaluation(1, {"eval_loss": 2.5, "eval_perplexity": 12.2})
    files.log(2, metrics_of(2))
    lines = read(tmp_path / "metrics.jsonl")
    assert [tuple(line) for line in lines] == [METRIC_NAMES, ("step", "eval_loss", "eval_perplexity"), METRIC_NAMES]
    assert read(tmp_path / "state_norms.jsonl") == [{"step": 1, "weight_l2": 3.0}]


@pytest.mark.parametrize("value", [0.1 + 0.2, 1 / 3, 6.432230123456789, 5e-324])
def test_a_float_comes_back_bit_for_bit(tmp_path: Path, value: float) -> None:
    file = JsonLines(tmp_path / "m.jsonl")
    file.append({"loss": value})
    assert read(file.path)[0]["loss"] == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_in_strict_json(tmp_path: Path, value: float) -> None:
    file = JsonLines(tmp_path / "m.jsonl")
    file.append({"loss": value})
    assert file.path.read_text() == '{"loss": null}\n'


@pytest.mark.parametrize("resume_step, kept", [(0, []), (3, [1, 2, 3]), (9, [1, 2, 3, 4, 5])])
def test_starting_again_removes_later_steps_and_says_so(tmp_path: Path, resume_step: int, kept: list[int]) -> None:
    first = MetricsFiles(tmp_path, "first", 0)
    for step in range(1, 6):
        first.log(step, metrics_of(step))
    first.evaluation(5, {"eval_loss": 1.0})
    second = MetricsFiles(tmp_path, "second", resume_step)
    steps = [line["step"] for line in read(tmp_path / "metrics.jsonl") if "loss" in line]
    assert steps == kept
    second.log(resume_step + 1, metrics_of(resume_step + 1))
    assert read(tmp_path / "metrics.jsonl")[-1]["step"] == resume_step + 1
    removals = [] if resume_step == 9 else read(tmp_path / "events.jsonl")
    removed = 5 - len(kept) + (resume_step < 5)
    assert [(event["kind"], event["lines"], event["launch"]) for event in removals] == (
        [("metrics_removed", removed, "second")] if removed else []
    )


def test_going_back_removes_later_steps_and_says_so(tmp_path: Path) -> None:
    files = MetricsFiles(tmp_path, "launch", 0)
    for step in range(1, 6):
        files.log(step, {"weight_l2": 3.0} | metrics_of(step))
    files.rewind(2, 10)
    files.log(3, {"weight_l2": 4.0} | metrics_of(3))
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [line["weight_l2"] for line in read(tmp_path / "state_norms.jsonl")] == [3.0, 3.0, 4.0]
    events = [(event["kind"], event["after_step"], event["lines"]) for event in read(tmp_path / "events.jsonl")]
    assert events == [("metrics_removed", 2, 3)] * 2


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_cut_off_by_a_kill_is_removed(tmp_path: Path, cut: int) -> None:
    file = JsonLines(tmp_path / "m.jsonl")
    file.append({"step": 1})
    whole = file.path.read_bytes()
    file.append({"step": 2})
    file.path.write_bytes(file.path.read_bytes()[:-cut])
    removed = JsonLines(file.path).drop_after(2)
    assert file.path.read_bytes() == whole
    assert removed == (cut < len(whole))
    file.append({"step": 2})
    assert read(file.path) == [{"step": 1}, {"step": 2}]


def test_nothing_is_rewritten_when_nothing_is_removed(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "m.jsonl")
    file.append({"step": 1})
    before = file.path.stat()
    assert file.drop_after(1) == 0
    assert (file.path.stat().st_ino, file.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_events_carry_time_launch_and_kind_and_are_never_removed(tmp_path: Path) -> None:
    MetricsFiles(tmp_path, "first", 0).event("saved", {"step": 7})
    MetricsFiles(tmp_path, "second", 3).event("signal", {"name": "SIGTERM"})
    events = read(tmp_path / "events.jsonl")
    assert [(event["launch"], event["kind"]) for event in events] == [("first", "saved"), ("second", "signal")]
    assert all(event["time"].endswith("+00:00") for event in events)


def test_a_full_disk_is_an_error_that_names_the_file() -> None:
    with pytest.raises(TrainingError, match=r"/dev/full cannot be written: No space left on device"):
        JsonLines(Path("/dev/full")).append({"step": 1})


def test_a_line_behind_one_that_was_cut_off_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    JsonLines(path).append({"step": 1})
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    file = JsonLines(path)
    file.append({"step": 3})
    file.append({"step": 4})
    assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 2, "lo', '{"step": 3}', '{"step": 4}']


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
def test_a_full_disk_is_named_and_the_next_line_stands_alone(tmp_path: Path, error: str) -> None:
    file = JsonLines(tmp_path / "events.jsonl")
    calls.interceptor = faults.Faults(faults.parse(f"fail:{error}@2 kind=append"))
    try:
        file.append({"step": 1})
        with pytest.raises(TrainingError, match=r"events\.jsonl cannot be written"):
            file.append({"step": 2})
        file.append({"step": 3})
    finally:
        calls.interceptor = None
    lines = file.path.read_text().splitlines()
    assert (lines[0], lines[-1]) == ('{"step": 1}', '{"step": 3}')
