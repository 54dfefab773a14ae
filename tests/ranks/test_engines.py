"""A run of one engine is continued by the other, and the settings that no engine may change behind one's back."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.nano import make_nano
from tests.ranks.training import Ended, metrics, train, train_py

STEPS, HALF = 10, 5
SAME = ("lr", "tokens", "target_tokens", "samples", "epoch", "data_hash")
OTHER = {"deepspeed": "fsdp", "fsdp": "deepspeed"}
STAGE_3 = {"zero_optimization": {"stage": 3}}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


def launch(nano: Path, folder: Path, ranks: int, *flags: str, steps: int = STEPS, **how: Any) -> Ended:
    length = ("--max_steps", str(steps), "--save_interval_iteration", str(HALF), "--run_validation", "false")
    argv = ("--config", str(nano), "--save_checkpoint_path", str(folder), *length, *flags)
    return train(ranks, *argv, outputs=nano.parent / f"outputs-{folder.name}", **how)


@pytest.fixture(scope="module")
def whole(nano: Path) -> dict[str, Path]:
    """The run folder of an uninterrupted run on two ranks, by engine."""
    folders = {engine: nano.parent / engine for engine in OTHER}
    for engine, folder in folders.items():
        ended = launch(nano, folder, 2, "--engine", engine)
        assert ended.statuses == (0, 0), ended.text
    return folders


def half_of(whole: Path, folder: Path) -> Path:
    """A run folder as a kill after half of the steps leaves it."""
    shutil.copytree(whole / f"iter_{HALF:07d}", folder / f"iter_{HALF:07d}")
    return folder


def test_both_engines_train_the_same_run(whole: dict[str, Path]) -> None:
    one, other = (metrics(folder) for folder in whole.values())
    assert sorted(one) == sorted(other) == list(range(1, STEPS + 1))
    for step in one:
        assert one[step]["loss"] == pytest.approx(other[step]["loss"], abs=1e-5)
        assert {key: one[step][key] for key in SAME} == {key: other[step][key] for key in SAME}
    assert one[1]["grad_norm"] == pytest.approx(other[1]["grad_norm"], rel=1e-6)
    assert one[STEPS]["loss"] < one[1]["loss"]


@pytest.mark.parametrize("ranks", [3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2))])
@pytest.mark.parametrize("saved_by", OTHER)
def test_each_engine_continues_the_others_checkpoint(
    nano: Path, whole: dict[str, Path], tmp_path: Path, saved_by: str, ranks: int
) -> None:
    folder = half_of(whole[saved_by], tmp_path / f"{saved_by}-{ranks}")
    ended = launch(nano, folder, ranks, "--engine", OTHER[saved_by])
    assert ended.statuses == (0,) * ranks, ended.text
    assert f"continuing from {folder}/iter_{HALF:07d} (step {HALF} of {STEPS})" in ended.outputs[0]
    mine, theirs = metrics(folder), metrics(whole[saved_by])
    assert sorted(mine) == list(range(HALF + 1, STEPS + 1))
    assert mine[HALF + 1]["loss"] == pytest.approx(theirs[HALF + 1]["loss"], rel=5e-7), "its weights are others"
    for step, line in mine.items():
        assert line["loss"] == pytest.approx(theirs[step]["loss"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(theirs[step]["grad_norm"], rel=1e-4)
        assert {key: line[key] for key in SAME} == {key: theirs[step][key] for key in SAME}


def test_each_engine_continues_its_own_bit_for_bit(nano: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = half_of(whole["fsdp"], tmp_path / "own")
    assert launch(nano, folder, 2, "--engine", "fsdp").statuses == (0, 0)
    assert [line["loss"] for line in metrics(folder).values()] == [
        line["loss"] for step, line in metrics(whole["fsdp"]).items() if step > HALF
    ]


def test_the_precision_of_a_checkpoint_is_told_stored_and_kept(
    nano: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    """A checkpoint's manifest holds the table that the start prints; another precision needs to be asked for."""
    stored = json.loads((whole["fsdp"] / f"iter_{HALF:07d}" / "manifest.json").read_text())["engine"]
    assert stored["engine"] == "fsdp" and stored["master"] == stored["reduction"] == "float32"
    folder = half_of(whole["fsdp"], tmp_path / "precision")
    refused = launch(nano, folder, 1, "--engine", "deepspeed", "--precision", "bf16")
    assert refused.statuses == (2,)
    assert "precision: the checkpoint has fp32, this run has bf16" in refused.text
    assert "precision.parameters: the checkpoint has float32, this run has bfloat16" in refused.text
    assert "precision.master" not in refused.text
    assert "allow the change with --allow_change precision." in refused.text
    allowed = launch(nano, folder, 1, "--precision", "bf16", "--allow_change", "precision", "schedule", steps=6)
    assert allowed.statuses == (0,), allowed.text
    lines = [" ".join(line.split()) for line in allowed.outputs[0].splitlines()]
    assert "parameters bfloat16" in lines and "master float32" in lines and "reduction float32" in lines


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_profile_of_activations_is_in_the_metrics_and_changes_no_loss(
    nano: Path, whole: dict[str, Path], tmp_path: Path, engine: str
) -> None:
    section = {"number_checkpoints": 1, "contiguous_memory_optimization": True, "profile": True}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(STAGE_3 | {"activation_checkpointing": section}))
    ended = launch(nano, tmp_path / "run", 2, "--engine", engine, "--ds_config", str(path), steps=2)
    assert ended.statuses == (0, 0), ended.text
    assert "blocks kept, in one buffer" in ended.outputs[0]
    for step, line in metrics(tmp_path / "run").items():
        assert line["blocks_forward_seconds"] > 0 and line["blocks_recompute_seconds"] > 0
        assert line["checkpoints_gib"] > 0
        if step == 1:  # the second step's learning rate depends on the run's length
            assert line["loss"] == metrics(whole[engine])[step]["loss"]


@pytest.mark.parametrize("engine", OTHER)
def test_fp16_is_refused_on_a_cpu_before_anything_is_read(nano: Path, tmp_path: Path, engine: str) -> None:
    data = tmp_path / "broken.jsonl"
    data.write_text("{")
    ended = launch(nano, tmp_path / "fp16", 2, "--engine", engine, "--precision", "fp16", "--train_data", str(data))
    assert ended.statuses == (2, 2)
    assert ended.text.count("precision is fp16 (command line), which needs a GPU") == 1, ended.text
    assert "broken.jsonl" not in ended.text and "Traceback" not in ended.text


def test_quantised_communication_is_refused_on_a_cpu(nano: Path, tmp_path: Path) -> None:
    path = tmp_path / "quantised.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}))
    ended = launch(nano, tmp_path / "quantised", 1, "--ds_config", str(path))
    assert ended.statuses == (2,)
    assert f"{path}: zero_quantized_gradients needs a GPU" in ended.text, ended.text


def in_fp16_without_a_gpu(argv: Sequence[str]) -> int:
    """train.py where nothing looks at the device: fp16 is slow on a CPU, and FSDP2 can do it."""
    from ds_recipes.training import start

    start.check_device = lambda *_: None
    return train_py(argv)


def test_overflow_steps_are_told_and_left_out_of_the_schedule(nano: Path, tmp_path: Path) -> None:
    """The first steps overflow until the loss scale has come down; the warm-up waits for them. So it is resumed."""
    path = tmp_path / "fp16.json"
    path.write_text(json.dumps(STAGE_3 | {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}))
    flags = ("--engine", "fsdp", "--precision", "fp16", "--ds_config", str(path), "--lr_warmup", "6")
    folder = tmp_path / "fp16"
    ended = launch(nano, folder, 2, *flags, program=in_fp16_without_a_gpu)
    assert ended.statuses == (0, 0), ended.text
    lines = metrics(folder)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    overflows = [event for event in events if event["kind"] == "overflow"]
    assert 2 <= len(overflows) <= HALF + 2, "the test shows less than it says"
    assert [event["loss_scale"] for event in overflows] == [2.0 ** (24 - number) for number in range(len(overflows))]
    assert not [event for event in events if event["kind"] == "skipped_step"]
    skipped = {event["step"] for event in overflows}
    assert [lines[step]["loss_scale"] for step in sorted(skipped)] == [event["loss_scale"] for event in overflows]
    done = 0
    for step, line in sorted(lines.items()):
        assert line["lr"] == pytest.approx(1e-3 * min((done + 1) / 7, 1), rel=1e-6), step
        done += step not in skipped
    assert lines[STEPS]["target_tokens"] > lines[1]["target_tokens"]
    state = json.loads((folder / f"iter_{STEPS:07d}" / "state.json").read_text())
    assert state["overflow_steps"] == state["skipped_steps"] == len(overflows)
    assert state["scaler"]["scale"] == 2.0 ** (24 - len(overflows))
    resumed = half_of(folder, tmp_path / "resumed")
    assert launch(nano, resumed, 2, *flags, program=in_fp16_without_a_gpu).statuses == (0, 0)
    for step, line in metrics(resumed).items():
        for key in ("loss", "lr", "loss_scale"):
            assert line[key] == lines[step][key], (step, key)


@pytest.mark.slow
def test_a_loss_scale_may_fall_for_longer_than_other_steps_may_be_skipped(nano: Path, tmp_path: Path) -> None:
    path = tmp_path / "fp16.json"
    path.write_text(json.dumps(STAGE_3 | {"fp16": {"enabled": True, "initial_scale_power": 36, "hysteresis": 1}}))
    flags = ("--engine", "fsdp", "--precision", "fp16", "--ds_config", str(path))
    ended = launch(nano, tmp_path / "long", 1, *flags, steps=24, program=in_fp16_without_a_gpu)
    assert ended.statuses == (0,), ended.text
    assert ended.text.count("overflow: ") > 10
    assert metrics(tmp_path / "long")[24]["loss_scale"] < 2.0**26


def test_a_gradient_that_never_fits_ends_the_run_and_names_the_scale(nano: Path, tmp_path: Path) -> None:
    path = tmp_path / "fp16.json"
    path.write_text(json.dumps(STAGE_3 | {"fp16": {"enabled": True, "loss_scale": 2.0**40}}))
    flags = ("--engine", "fsdp", "--precision", "fp16", "--ds_config", str(path))
    ended = launch(nano, tmp_path / "fixed", 2, *flags, steps=30, program=in_fp16_without_a_gpu)
    assert ended.statuses == (1, 1), ended.text
    assert "10 steps in a row had a loss or a gradient that is not finite at a loss scale of 1.09951e+12" in ended.text
