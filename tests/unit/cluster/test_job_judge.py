"""The truth table of a launch: run.json's own entry decides, whatever the launcher says."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.cluster.judge import judge
from tools.judge_launch import main

MINE = "77.2"


def write(
    folder: Path, state: str, first: int | None = None, last: int | None = None, reason: str = "why", launch: str = MINE
) -> None:
    earlier = {"launch": "77.1", "state": "complete", "reason": "step 9 of 9", "first_step": 0, "last_step": 9}
    entry = {"launch": launch, "state": state, "reason": reason, "first_step": first, "last_step": last}
    (folder / "run.json").write_text(json.dumps({"launch": launch, "state": state, "launches": [earlier, entry]}))


@pytest.mark.parametrize("launcher", [0, 1, 2, 75, 137, 247])
@pytest.mark.parametrize(
    ("entry", "status"),
    [
        (("complete", 0, 9), lambda launcher: 1 if launcher == 75 else launcher),
        (("complete", 9, 9), lambda launcher: 1 if launcher == 75 else launcher),
        (("stopped", 3, 4), lambda launcher: 75),
        (("stopped", 4, 4), lambda launcher: 1 if launcher in (0, 75) else launcher),
        (("stopped", None, None), lambda launcher: 1 if launcher in (0, 75) else launcher),
        (("failed", 0, 9), lambda launcher: 1 if launcher in (0, 75) else launcher),
        (("running", 0, None), lambda launcher: 1 if launcher in (0, 75) else launcher),
    ],
)
def test_status(entry: tuple[str, int | None, int | None], status: Any, launcher: int, tmp_path: Path) -> None:
    write(tmp_path, *entry)
    assert judge(tmp_path, MINE, launcher).status == status(launcher)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", '{"launches": [3]}', '{"launches": [{"state": "complete"}]}']
)
def test_without_a_word_of_this_launch_it_has_failed(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    for launcher, status in ((0, 1), (75, 1), (2, 2)):
        verdict = judge(tmp_path, MINE, launcher)
        assert (verdict.status, verdict.again) == (status, False)
        assert "no word of launch 77.2" in verdict.why


def test_another_launch_that_is_complete_says_nothing_of_this_one(tmp_path: Path) -> None:
    write(tmp_path, "complete", 0, 9, launch="78.1")
    assert judge(tmp_path, MINE, 0).status == 1
    assert judge(tmp_path, "77.1", 0).status == 0


@pytest.mark.parametrize(
    ("reason", "signal", "again"),
    [
        ("stop_after 40000 s at step 4", "", True),
        ("the file STOP at step 4", "USR1", True),
        ("signal SIGUSR1 at step 4", "", True),
        ("the file STOP at step 4", "", False),
        ("the file STOP at step 4", "TERM", False),
        ("the file STOP at step 4", "INT", False),
        ("signal SIGTERM at step 4", "", False),
    ],
)
def test_only_a_time_limit_queues_a_job_again(reason: str, signal: str, again: bool, tmp_path: Path) -> None:
    """Who writes a STOP file or cancels a job does not want to see it come back."""
    write(tmp_path, "stopped", 3, 4, reason)
    verdict = judge(tmp_path, MINE, 0, signal)
    assert (verdict.status, verdict.again) == (75, again)


def test_a_deadline_without_a_step_does_not_queue_for_ever(tmp_path: Path) -> None:
    write(tmp_path, "stopped", 4, 4, "stop_after 10 s during loading")
    verdict = judge(tmp_path, MINE, 75, "USR1")
    assert (verdict.status, verdict.again) == (1, False)
    assert "without a single step" in verdict.why


def test_the_tool_says_again_on_its_output_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "stopped", 3, 4, "stop_after 40000 s at step 4")
    words = ["--run_folder", str(tmp_path), "--launch", MINE, "--launcher_status", "1"]
    assert main([*words, "--hosts", "localhost"]) == 75
    said = capsys.readouterr()
    assert said.out == "again\n"
    assert "stopped after step 4" in said.err
    write(tmp_path, "complete", 0, 9)
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "complete: why; but the launcher ended with status 1" in said.err


def test_a_launch_whose_ranks_were_started_again_began_with_the_first_of_them(tmp_path: Path) -> None:
    tries = [("failed", 4, 12), ("failed", None, None), ("stopped", 10, 10)]
    entries = [
        {"launch": MINE, "state": state, "reason": "stop_after 9 s", "first_step": first, "last_step": last}
        for state, first, last in tries
    ]
    (tmp_path / "run.json").write_text(json.dumps({"launches": entries}))
    verdict = judge(tmp_path, MINE, 1)
    assert (verdict.status, verdict.again) == (75, True) and "this launch began at step 4" in verdict.why
