"""Steps that go wrong on one rank are skipped on all; a run that diverged goes back, as one that was never there."""

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.nano import make_nano
from tests.ranks.bad_rows import bad_rows, with_bad_rows
from tests.ranks.training import Ended, metrics, train

ROWS = 12  # a step
STEADY = ("--batch_size_training", "3", "--lr_decay_style", "constant", "--lr_warmup", "0", "--eval_interval", "0")
EXACT = ("loss", "lr", "grad_norm", "tokens", "samples", "data_hash")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


def launch(nano: Path, folder: Path, bad: Mapping[str, str], *flags: str, ranks: int = 2) -> Ended:
    argv = ("--config", str(nano), "--save_checkpoint_path", str(folder), *STEADY, *flags)
    return train(ranks, *argv, outputs=nano.parent / f"outputs-{folder.name}", env=bad, program=with_bad_rows)


def rows_of(first_step: int, last_step: int | None = None) -> range:
    """Positions of the rows of steps, while none is left out."""
    return range((first_step - 1) * ROWS, (last_step or first_step) * ROWS)


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] in kinds]


def hashes(folder: Path, step: int) -> dict[str, str]:
    """Of the weights and moments of a checkpoint, by file."""
    files = json.loads((folder / f"iter_{step:07d}" / "manifest.json").read_text())["files"]
    return {name: entry["xxh3_128"] for name, entry in files.items() if name.startswith("rank-")}


def exact_lines(folder: Path, after: int) -> dict[int, dict[str, Any]]:
    """What must be equal in the metrics of later steps."""
    return {step: {key: line[key] for key in EXACT} for step, line in metrics(folder).items() if step > after}


def test_skipped_steps_change_nothing_and_too_many_end_the_run_with_a_way_on(nano: Path, tmp_path: Path) -> None:
    """One row on one rank is enough, whether its loss or its gradient is not finite. The way on ends where a run ends that
    has never seen those data.
    """
    bad = bad_rows(loss=[rows_of(3)[5], rows_of(7)[0]], gradient=[rows_of(6)[7], rows_of(8)[11]])
    folder = tmp_path / "poisoned"
    flags = ("--max_skipped_steps", "3", "--save_interval_iteration", "4", "--max_steps")
    ended = launch(nano, folder, bad, *flags, "10")
    assert ended.statuses == (1, 1), ended.text
    positions = f"{rows_of(6)[0]}-{rows_of(8)[-1]}"
    assert ended.text.count("3 steps in a row had a loss or a gradient that is not finite (the last is step 8)") == 1
    assert f"The weights are those of step 5. The newest checkpoint is {folder}/iter_0000005." in ended.text, ended.text
    assert re.search(rf"the positions {positions} .* begin with .*train.jsonl:\d+", ended.text), ended.text
    assert [event["step"] for event in events(folder, "skipped_step")] == [3, 6, 7, 8]
    assert events(folder, "skipped_step")[1]["positions"] == f"{rows_of(6)[0]}-{rows_of(6)[-1]}"
    lines = metrics(folder)
    assert [lines[step]["skipped_steps"] for step in (2, 3, 5)] == [0, 1, 1]
    assert lines[3]["loss"] is None and lines[6]["loss"] is not None
    state = json.loads((folder / "iter_0000005" / "state.json").read_text())
    assert (state["step"], state["position"], state["skipped_in_a_row"]) == (5, rows_of(5).stop, 0)
    assert json.loads((folder / "run.json").read_text())["state"] == "failed"

    (flag,) = re.findall(r"(--skip_samples) ([\d-]+)\.", ended.text)
    assert launch(nano, folder, bad, *flags, "10", *flag).statuses == (0, 0)
    never = tmp_path / "never"
    left_out = ("--skip_samples", f"{rows_of(3)[0]}-{rows_of(3)[-1]}", flag[1])
    assert launch(nano, never, bad, *flags, "9", *left_out).statuses == (0, 0)
    assert not events(never, "skipped_step")
    assert hashes(folder, 10) == hashes(never, 9)


WATCH = ("--spike_window", "8", "--spike_patience", "3", "--spike_recovery", "rewind")
FSDP = ("--engine", "fsdp")
REWINDING = ("--max_steps", "16", "--save_interval_iteration", "2", *WATCH)
BAD = bad_rows(gradient=[rows_of(3)[5]], loss=[rows_of(4)[0]], spike=rows_of(11, 13))
LEFT_OUT = f"{rows_of(11)[0]}-{rows_of(13)[-1]}"


@pytest.fixture(scope="module")
def rewound(nano: Path) -> Path:
    """The run folder of a run that goes back from step 13 to 10. It has seen a checkpoint at step 12."""
    folder = nano.parent / "rewound"
    ended = launch(nano, folder, BAD, *FSDP, *REWINDING)
    assert ended.statuses == (0, 0), ended.text
    return folder


def from_step_10(rewound: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copytree(rewound / "iter_0000010", folder / "iter_0000010")
    return folder


def test_a_rewind_is_told_in_full(rewound: Path) -> None:
    assert hashes(rewound, 2) == hashes(rewound, 4)  # steps 3 and 4 were skipped
    assert hashes(rewound, 6) != hashes(rewound, 4)
    assert [event["step"] for event in events(rewound, "skipped_step")] == [3, 4]
    spikes = events(rewound, "loss_spike")
    assert [event["step"] for event in spikes] == [11, 12, 13]
    assert spikes[1]["positions"] == f"{rows_of(12)[0]}-{rows_of(12)[-1]}"
    assert all(event["loss"] > event["median"] + 6 * event["sigma"] for event in spikes)
    (divergence,) = events(rewound, "divergence")
    assert (divergence["step"], divergence["first_step"], divergence["positions"]) == (13, 11, LEFT_OUT)
    (back,) = events(rewound, "rewind")
    assert (back["step"], back["from_step"], back["checkpoint"]) == (10, 13, "iter_0000010")
    assert (back["positions"], back["number"]) == (LEFT_OUT, 1)
    assert len(list(rewound.glob("iter_0000012.aside-*"))) == 1
    lines = [line for line in map(json.loads, (rewound / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert [line["rewinds"] for line in lines] == [0] * 10 + [1] * 6
    assert [line["loss_spikes"] for line in lines] == [0] * 16


def test_a_rewind_ends_as_a_run_that_left_those_data_out(rewound: Path, nano: Path, tmp_path: Path) -> None:
    folder = from_step_10(rewound, tmp_path / "left-out")
    assert launch(nano, folder, BAD, *FSDP, *REWINDING, "--skip_samples", LEFT_OUT).statuses == (0, 0)
    assert not events(folder, "loss_spike", "rewind")
    assert exact_lines(folder, 10) == exact_lines(rewound, 10)
    assert hashes(folder, 16) == hashes(rewound, 16)


def test_a_divergence_before_any_checkpoint_is_told_and_one_too_many_ends_the_run(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    bad = bad_rows(spike=[*rows_of(9, 11), *rows_of(21, 26)])
    flags = ("--max_steps", "30", "--save_interval_iteration", "12", "--spike_recoveries", "1")
    ended = launch(nano, folder, bad, *FSDP, *WATCH, *flags)
    assert ended.statuses == (1, 1), ended.text
    assert [event["step"] for event in events(folder, "divergence")] == [11, 23, 23]
    assert "there is no checkpoint before step 9; the run goes on" in ended.text
    assert [event["step"] for event in events(folder, "rewind_impossible")] == [11]
    assert [event["positions"] for event in events(folder, "rewind")] == [f"{rows_of(21)[0]}-{rows_of(23)[-1]}"]
    assert (
        "the loss diverged in steps 21 to 23, and the run has gone back as often as it may (spike_recoveries 1)"
        in ended.text
    )
    assert f"Their data are the positions {rows_of(24)[0]}-{rows_of(26)[-1]} " in ended.text, ended.text
    assert f"--skip_samples {rows_of(21)[0]}-{rows_of(26)[-1]}." in ended.text, (
        "the first rewind is in no checkpoint yet"
    )


def test_a_run_killed_while_it_goes_back_ends_as_one_that_was_not(rewound: Path, nano: Path, tmp_path: Path) -> None:
    """It starts again between the spikes, from the checkpoint that was about to be set aside, and remembers the first."""
    folder = from_step_10(rewound, tmp_path / "killed")
    fault = {"FAULT_TEST": "1", "DS_RECIPES_FAULTS": "kill@1 rank=0 kind=rename path=*.aside-*"}
    ended = launch(nano, folder, {**BAD, **fault}, *FSDP, *REWINDING)
    assert 0 not in ended.statuses and (folder / "iter_0000012").is_dir(), ended.text
    assert not events(folder, "rewind")
    assert launch(nano, folder, BAD, *FSDP, *REWINDING).statuses == (0, 0)
    assert [event["step"] for event in events(folder, "loss_spike")] == [11, 12, 13, 13]
    assert exact_lines(folder, 12) == exact_lines(rewound, 12)
    assert hashes(folder, 16) == hashes(rewound, 16)


def in_json(folder: Path, zero: Mapping[str, Any]) -> tuple[str, str]:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": dict(zero)}))
    return "--ds_config", str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, zero",
    [(2, {"stage": 3}), (2, {"stage": 2}), (2, {"stage": 1}), (4, {"stage": 3, "zero_hpz_partition_size": 2})],
    ids=["zero3", "zero2", "zero1", "hpz"],
)
def test_a_rewind_of_deepspeed(ranks: int, zero: dict[str, Any], nano: Path, tmp_path: Path) -> None:
    """Loading into an engine that has trained is loading into a new one, for all that it keeps beside the weights."""
    flags = (*REWINDING, *in_json(tmp_path, zero))
    back = tmp_path / "back"
    ended = launch(nano, back, BAD, *flags, ranks=ranks)
    assert ended.statuses == (0,) * ranks, ended.text
    assert hashes(back, 2) == hashes(back, 4)
    assert [event["step"] for event in events(back, "rewind")] == [10]
    folder = from_step_10(back, tmp_path / "left-out")
    assert launch(nano, folder, BAD, *flags, "--skip_samples", LEFT_OUT, ranks=ranks).statuses == (0,) * ranks
    assert exact_lines(folder, 10) == exact_lines(back, 10)
    assert hashes(folder, 16) == hashes(back, 16)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_anywhere_around_two_rewinds_ends_as_one_that_was_not(
    nano: Path, tmp_path: Path, seed: int
) -> None:
    """Two rewinds to one checkpoint, and before the third checkpoint a kill at any call of the file layer, on any rank."""
    bad = bad_rows(spike=[*rows_of(11, 13), *rows_of(15, 17)])
    flags = (*FSDP, *WATCH, "--max_steps", "18", "--save_interval_iteration", "6")
    whole, logs = tmp_path / "whole", [tmp_path / f"calls{rank}.txt" for rank in (0, 1)]
    counted = "; ".join(f"log:{log}@1 rank={rank} within=saving" for rank, log in enumerate(logs))
    counting = {"FAULT_TEST": "1", "DS_RECIPES_FAULTS": counted}
    assert launch(nano, whole, {**bad, **counting}, *flags).statuses == (0, 0)
    assert [event["from_step"] for event in events(whole, "rewind")] == [13, 14]
    chosen = random.Random(seed)
    calls, killed = [len(log.read_text().splitlines()) for log in logs], 0
    for number in range(6):
        folder = tmp_path / f"killed{number}"
        rank = chosen.randint(0, 1)
        fault = f"kill@{chosen.randint(1 + calls[rank] // 4, calls[rank])} rank={rank} within=saving"
        ended = launch(nano, folder, {**bad, "FAULT_TEST": "1", "DS_RECIPES_FAULTS": fault}, *flags)
        if ended.statuses != (0, 0):
            killed += 1
            ended = launch(nano, folder, bad, *flags)
        assert ended.statuses == (0, 0), (fault, ended.text)
        assert hashes(folder, 18) == hashes(whole, 18), fault
        assert metrics(folder)[18]["data_hash"] == metrics(whole)[18]["data_hash"], fault
    assert killed >= 4, "the test shows less than it says"
