"""A run that is stopped and started again is the run that was never stopped, on any number of ranks."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.nano import make_nano
from tests.ranks.signalled import signalled, when
from tests.ranks.training import Ended, metrics, train, until_step

STEPS = 20
EXACT = ("step", "loss", "lr", "grad_norm", "tokens", "target_tokens", "samples", "epoch", "data_hash")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def whole(nano: Path) -> Path:
    """The run folder of the uninterrupted run on two ranks, with checkpoints at steps 10 and 20."""
    folder = nano.parent / "whole"
    assert launch(nano, folder, 2).statuses == (0, 0)
    return folder


def launch(nano: Path, folder: Path, ranks: int, *flags: str, **how: Any) -> Ended:
    argv = ("--config", str(nano), "--save_checkpoint_path", str(folder), *flags)
    return train(ranks, *argv, outputs=nano.parent / f"outputs-{folder.name}", **how)


def only_first_half(whole: Path, folder: Path) -> Path:
    """A run folder as a kill after step 10 leaves it."""
    folder.mkdir()
    shutil.copytree(whole / "iter_0000010", folder / "iter_0000010")
    return folder


def exact_lines(folder: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT} for step, line in sorted(metrics(folder).items()) if step > STEPS // 2]


def weights_of(folder: Path, step: int = STEPS) -> dict[str, str]:
    """The hashes of the ranks' files of a checkpoint, the last one."""
    files = json.loads((folder / f"iter_{step:07d}" / "manifest.json").read_text())["files"]
    return {name: entry["xxh3_128"] for name, entry in files.items() if name.startswith("rank-")}


def test_the_run_trains_and_evaluates(whole: Path) -> None:
    lines = metrics(whole)
    assert sorted(lines) == list(range(1, STEPS + 1))
    assert lines[STEPS]["loss"] < 0.9 * lines[1]["loss"]
    assert sorted(metrics(whole, "eval_loss")) == [10, 20]


def test_resumed_on_the_same_ranks_it_is_equal_bit_for_bit(nano: Path, whole: Path, tmp_path: Path) -> None:
    folder = only_first_half(whole, tmp_path / "same")
    ended = launch(nano, folder, 2)
    assert ended.statuses == (0, 0), ended.text
    assert f"continuing from {folder}/iter_0000010 (step 10 of 20)" in ended.outputs[0]
    assert exact_lines(folder) == exact_lines(whole)
    assert metrics(folder, "eval_loss")[STEPS]["eval_loss"] == metrics(whole, "eval_loss")[STEPS]["eval_loss"]
    assert weights_of(folder) == weights_of(whole)


@pytest.mark.parametrize("ranks", [1, 3])
def test_resumed_on_other_ranks_it_is_equal_but_for_rounding(
    nano: Path, whole: Path, tmp_path: Path, ranks: int
) -> None:
    folder = only_first_half(whole, tmp_path / f"on{ranks}")
    assert launch(nano, folder, ranks).statuses == (0,) * ranks
    for mine, theirs in zip(exact_lines(folder), exact_lines(whole), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        rest = [key for key in EXACT if key not in ("loss", "grad_norm")]
        assert {key: mine[key] for key in rest} == {key: theirs[key] for key in rest}


def test_a_complete_run_started_again_says_so_and_ends_with_zero(nano: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    ended = launch(nano, whole, 2)
    assert ended.statuses == (0, 0)
    assert "the run is complete, iter_0000020 is its last step; nothing to do" in ended.outputs[0]
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert json.loads((whole / "run.json").read_text())["state"] == "complete"


@pytest.mark.slow
def test_the_deadline_is_kept_with_time_to_save(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deadline"
    ended = launch(nano, folder, 2, "--max_steps", "100000", "--lr_warmup", "0", "--stop_after", "25s")
    assert ended.statuses == (75, 75), ended.text
    assert json.loads((folder / "run.json").read_text())["reason"].startswith("stop_after 25 s at step")


def test_a_kill_loses_nothing_that_was_published(nano: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"

    def kill_rank_one(processes: list[Any]) -> None:
        until_step(folder, 13)
        os.kill(processes[1].pid, signal.SIGKILL)

    ended = launch(nano, folder, 2, meanwhile=kill_rank_one)
    assert 0 not in ended.statuses
    assert launch(nano, folder, 2).statuses == (0, 0)
    assert [launch["state"] for launch in json.loads((folder / "run.json").read_text())["launches"]] == [
        "failed",
        "complete",
    ]
    assert exact_lines(folder) == exact_lines(whole)
    assert weights_of(folder) == weights_of(whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(nano: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    path = folder / "iter_0000020" / "rank-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    ended = launch(nano, folder, 2)
    assert ended.statuses == (0, 0), ended.text
    assert f"warning: {folder}/iter_0000020 is not used: " in ended.outputs[0] and path.name in ended.outputs[0]
    assert f"continuing from {folder}/iter_0000010" in ended.outputs[0]
    assert weights_of(folder) == weights_of(whole), "the damaged checkpoint was not made anew"
    (aside,) = folder.glob("iter_0000020.aside-*")
    assert (aside / path.name).read_bytes() == data, "the damaged one is kept"


def test_going_back_to_a_checkpoint_and_queued_again_with_the_same_command(
    nano: Path, whole: Path, tmp_path: Path
) -> None:
    """The first launch goes back, and repeats what came after; the second finds that done and continues it."""
    folder = tmp_path / "back"
    shutil.copytree(whole, folder)
    flags = ("--resume", str(folder / "iter_0000010"))
    ended = launch(nano, folder, 2, *flags)
    assert ended.statuses == (0, 0), ended.text
    (aside,) = folder.glob("iter_0000020.aside-*")
    assert f"newer checkpoints are kept under other names: {aside.name}" in ended.outputs[0]
    assert exact_lines(folder) == exact_lines(whole)
    assert weights_of(folder) == weights_of(whole)
    ended = launch(nano, folder, 2, *flags)
    assert ended.statuses == (0, 0), ended.text
    assert "this run began there already; it goes on from its own newest checkpoint" in ended.outputs[0]
    assert "the run is complete, iter_0000020 is its last step" in ended.outputs[0]
    assert len(list(folder.glob("iter_*"))) == 3


ROWS_PER_STEP = 30
"""A fifth of the rows of `make_nano`: its first epoch ends exactly with step 5."""

TWO_EPOCHS = ("--batch_size_training", "5", "--global_batch_size", str(ROWS_PER_STEP), "--max_steps", "10")
ENGINES = {"deepspeed": "ds_recipes.engine.zero3.step:ZeroEngine", "fsdp": "ds_recipes.engine.fsdp2.step:Fsdp2Engine"}


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every step draws random numbers."""
    return make_nano(tmp_path_factory.mktemp("dropping"), dropout=0.2)


@pytest.fixture(scope="module", params=ENGINES)
def two_epochs(request: pytest.FixtureRequest, dropping: Path) -> tuple[str, Path]:
    """An engine, and the folder of its run of two epochs with dropout that was never stopped."""
    folder = dropping.parent / f"whole-{request.param}"
    ended = launch(dropping, folder, 2, *TWO_EPOCHS, "--engine", request.param)
    assert ended.statuses == (0, 0), ended.text
    return request.param, folder


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT} for _, line in sorted(metrics(folder).items())]


def test_with_dropout_stopped_within_accumulation_at_the_border_of_an_epoch_and_inside_one(
    dropping: Path, two_epochs: tuple[str, Path], tmp_path: Path
) -> None:
    """Each rank's random numbers go on where they were: stopped at the end of the first epoch and within the second."""
    engine, whole = two_epochs
    folder = tmp_path / "stopped"
    for call, stopped_at in ((4 * 3 + 2, 5), (2 * 3 + 3, 8)):  # of three micro-batches a step
        env = when(f"{ENGINES[engine]}.backward", "SIGUSR1", 1, call=call, folder=str(tmp_path))
        ended = launch(dropping, folder, 2, *TWO_EPOCHS, "--engine", engine, program=signalled, env=env)
        assert ended.statuses == (75, 75), ended.text
        assert max(metrics(folder)) == stopped_at and (folder / f"iter_{stopped_at:07d}").is_dir()
    assert launch(dropping, folder, 2, *TWO_EPOCHS, "--engine", engine).statuses == (0, 0)
    theirs = metrics(whole)
    assert theirs[5]["epoch"] == 1 and theirs[8]["epoch"] == pytest.approx(1.6)
    assert lines_of(folder) == lines_of(whole)
    assert weights_of(folder, 10) == weights_of(whole, 10)


def test_two_runs_of_one_seed_are_equal_and_of_another_differ(
    dropping: Path, two_epochs: tuple[str, Path], tmp_path: Path
) -> None:
    engine, whole = two_epochs
    for seed in ("42", "43"):
        flags = (*TWO_EPOCHS, "--engine", engine, "--seed", seed)
        assert launch(dropping, tmp_path / seed, 2, *flags).statuses == (0, 0)
    assert lines_of(tmp_path / "42") == lines_of(whole)
    assert weights_of(tmp_path / "42", 10) == weights_of(whole, 10)
    for mine, theirs in zip(lines_of(tmp_path / "43"), lines_of(whole), strict=True):
        assert mine["loss"] != theirs["loss"] and mine["data_hash"] != theirs["data_hash"]
    assert weights_of(tmp_path / "43", 10) != weights_of(whole, 10)


def test_dropout_was_on(nano: Path, two_epochs: tuple[str, Path], tmp_path: Path) -> None:
    engine, whole = two_epochs
    flags = (*TWO_EPOCHS[:-1], "1", "--engine", engine)
    assert launch(nano, tmp_path / "plain", 2, *flags).statuses == (0, 0)
    plain, dropped = metrics(tmp_path / "plain")[1], metrics(whole)[1]
    assert plain["data_hash"] == dropped["data_hash"] and plain["loss"] != dropped["loss"]


def test_changed_settings_are_refused_until_allowed(nano: Path, whole: Path, tmp_path: Path) -> None:
    folder = only_first_half(whole, tmp_path / "changed")
    refused = launch(nano, folder, 1, "--seed", "43")
    assert refused.statuses == (2,)
    assert "seed: the checkpoint has 42, this run has 43" in refused.text
    shorter = launch(nano, folder, 1, "--max_steps", "11")
    assert shorter.statuses == (2,)
    assert "schedule.decay_steps: the checkpoint has 20, this run has 11" in shorter.text
    flags = ("--seed", "43", "--max_steps", "11", "--allow_change", "seed", "schedule")
    allowed = launch(nano, folder, 1, *flags)
    assert allowed.statuses == (0,), allowed.text
    assert "allowed: seed changed from 42 to 43" in allowed.text
    assert "changed since iter_0000010: ranks 2 -> 1" in allowed.text


def test_without_the_optimizer_it_goes_on_only_if_asked(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "light"
    assert launch(nano, folder, 1, "--max_steps", "2", "--save_optimizer", "False").statuses == (0,)
    longer = ("--max_steps", "4", "--allow_change", "schedule")
    refused = launch(nano, folder, 1, *longer)
    assert refused.statuses == (2,) and "--allow_change optimizer" in refused.text
    assert launch(nano, folder, 1, *longer, "optimizer").statuses == (0,)


def test_keep_last_deletes_older_ones(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    flags = ("--max_steps", "5", "--save_interval_iteration", "1", "--keep_last", "2")
    assert launch(nano, folder, 2, *flags).statuses == (0, 0)
    assert sorted(path.name for path in folder.iterdir() if "iter" in path.name) == ["iter_0000004", "iter_0000005"]


@pytest.mark.slow
def test_the_same_run_on_one_two_three_and_four_ranks(nano: Path, tmp_path: Path) -> None:
    seen = {}
    for ranks in (1, 2, 3, 4):
        folder = tmp_path / f"ranks{ranks}"
        flags = ("--optimizer_type", "sgd", "--lr", "0.1", "--max_steps", "10", "--max_grad_norm", "1.0")
        assert launch(nano, folder, ranks, *flags).statuses == (0,) * ranks
        seen[ranks] = metrics(folder)
    for ranks, lines in seen.items():
        for step, line in lines.items():
            assert line["loss"] == pytest.approx(seen[1][step]["loss"], rel=1e-6), (ranks, step)
            assert line["grad_norm"] == pytest.approx(seen[1][step]["grad_norm"], rel=1e-6), (ranks, step)
            assert line["data_hash"] == seen[1][step]["data_hash"]
    assert seen[1][10]["loss"] < seen[1][1]["loss"]
