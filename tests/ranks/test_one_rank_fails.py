"""An error of one rank alone, in a call of its engine, an evaluation or the log: all ranks leave soon, with that error, its rank
and its place told once, and the newest checkpoint is whole and goes on."""

import json
import re
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.checkpoint.load import find_newest
from ds_recipes.engine.base import calls_of_engines
from ds_recipes.world.device_errors import DEVICE_ADVICE, MEMORY_ADVICE
from ds_recipes.world.group import solo
from tests.faults.nano_runs import EXACT
from tests.nano import make_nano
from tests.ranks.failing import ENGINES, ERRORS, failing, fails
from tests.ranks.training import Ended, metrics, train

BEGIN, STEPS = 2, 5
SOON_SECONDS = 15
"""5 s where the machine does nothing else."""

AT_START = ("load_shards", "load_scaler_state", "input_gradient", "evaluate", "logits")
"""Calls that are made before the first step."""

BEFORE_IT_ALONE = AT_START[:3]
NOT_IN_TRAINING = ("weights", "close")
ADVICE = {"memory": MEMORY_ADVICE, "device": DEVICE_ADVICE}
IN_FORMAT = {"write_native": ("--checkpoint_format", "deepspeed")}


def started(folder: Path, run: Path, engine: str, *flags: str, **how: Any) -> Ended:
    argv = (
        "--config",
        str(folder / "run.yaml"),
        "--save_checkpoint_path",
        str(run),
        "--engine",
        engine,
        "--data_cache",
    )
    argv += (str(folder / "cache"), "--max_steps", str(STEPS), "--save_interval_iteration", "1", "--eval_interval", "1")
    argv += ("--global_batch_size", "4", *flags)
    return train(2, *argv, outputs=folder / f"outputs-{run.name}", timeout=150, grace=60, **how)


class Reference:
    """A run of each engine without a fault, which faulted runs go on from, with its later checkpoints taken away."""

    def __init__(self, folder: Path) -> None:
        make_nano(folder)
        self.folder = folder

    @cache  # noqa: B019 - one for the whole session
    def whole(self, engine: str) -> Path:
        run = self.folder / f"whole-{engine}"
        ended = started(self.folder, run, engine)
        assert ended.statuses == (0, 0), ended.text
        return run

    def begun(self, run: Path, engine: str = "fsdp") -> Path:
        """A run folder that goes on after step `BEGIN`, with either engine."""
        shutil.copytree(self.whole(engine), run)
        for path in run.glob("iter_*"):
            if int(path.name.removeprefix("iter_")) > BEGIN:
                shutil.rmtree(path)
        return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"))


def check_left(ended: Ended, run: Path, folder: Path, rank: int) -> None:
    """Both ranks left soon with status 1, `rank` was named, and the newest checkpoint is whole."""
    seconds = time.monotonic() - float((folder / "failed").read_text())
    assert ended.statuses == (1, 1), ended.text
    assert seconds < SOON_SECONDS, f"{seconds:.1f} s\n{ended.text}"
    assert f"rank {rank}" in ended.text and "Lost contact" not in ended.text, ended.text
    found = find_newest(run, solo())
    assert found is not None and not found.skipped and found.manifest.step >= BEGIN
    assert json.loads((run / "run.json").read_text())["state"] == "failed"


def check_goes_on(reference: Reference, run: Path, engine: str, *flags: str) -> None:
    """The same command again comes to the end of the run without a fault, number by number."""
    ended = started(reference.folder, run, engine, *flags)
    assert ended.statuses == (0, 0), ended.text
    last, wanted = metrics(run)[STEPS], metrics(reference.whole(engine))[STEPS]
    assert {name: last[name] for name in EXACT} == {name: wanted[name] for name in EXACT}


def fail_in_a_call(
    reference: Reference, folder: Path, engine: str, method: str, error: str, rank: int, **when: Any
) -> tuple[Path, Ended]:
    run = reference.begun(folder / "run", when.pop("begun_by", "fsdp"))
    env = fails(rank, error, folder, method=method, **when)
    ended = started(reference.folder, run, engine, *IN_FORMAT.get(method, ()), env=env, program=failing)
    assert (folder / "failed").exists(), f"{method} was not called\n{ended.text}"
    check_left(ended, run, folder, rank)
    told = f"{ENGINES[engine][1]}.{method}: {str(ERRORS[error]()).splitlines()[0]}\n{ADVICE[error]}"
    assert ended.text.count(told) == 1, ended.text
    return run, ended


def test_memory_that_is_not_enough_in_a_step_of_one_rank_ends_all(reference: Reference, tmp_path: Path) -> None:
    run, ended = fail_in_a_call(reference, tmp_path, "fsdp", "backward", "memory", 1, trained=True)
    assert f"during step {BEGIN + 2})" in ended.text and "Traceback" in ended.text, ended.text
    check_goes_on(reference, run, "fsdp")


def test_a_device_that_fails_while_the_state_of_one_rank_is_copied_for_a_save_ends_all(
    reference: Reference, tmp_path: Path
) -> None:
    """The other rank's copy waits for it in the thread that writes."""
    _, ended = fail_in_a_call(reference, tmp_path, "deepspeed", "shards", "device", 0, trained=True, call=2)
    assert "during saving)" in ended.text, ended.text


def test_a_device_that_fails_before_the_first_step_is_not_taken_for_a_model_that_cannot_be_trained(
    reference: Reference, tmp_path: Path
) -> None:
    _, ended = fail_in_a_call(reference, tmp_path, "deepspeed", "logits", "device", 1)
    assert "(rank 1 of 2 on" in ended.text and "during loss head)" in ended.text, ended.text


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_the_evaluation_of_one_rank_ends_all(reference: Reference, tmp_path: Path, rank: int) -> None:
    run = reference.begun(tmp_path / "run")
    env = fails(rank, "disk", tmp_path, place="ds_recipes.data.stream:EvalStream.__iter__")
    ended = started(reference.folder, run, "fsdp", env=env, program=failing)
    check_left(ended, run, tmp_path, rank)
    assert ended.text.count("OSError: [Errno 5] Input/output error: '/data/validation.bin'") == 1, ended.text
    where = rf"\(rank {rank} of 2 on \S+, during the evaluation after step {BEGIN + 1}\)"
    assert len(re.findall(where, ended.text)) == 1, ended.text


def test_an_error_in_the_log_of_rank_1_ends_all(reference: Reference, tmp_path: Path) -> None:
    run = reference.begun(tmp_path / "run")
    env = fails(1, "disk", tmp_path, place="ds_recipes.training.meter:StepMeter.read")
    ended = started(reference.folder, run, "fsdp", env=env, program=failing)
    check_left(ended, run, tmp_path, 1)
    assert ended.text.count("OSError: [Errno 5] Input/output error") == 1, ended.text


def test_a_full_disk_under_the_metrics_ends_all_and_a_tracker_that_fails_ends_nothing(
    reference: Reference, tmp_path: Path
) -> None:
    """Rank 0 alone writes them. Then a file lies where TensorBoard makes its folder."""
    run = reference.begun(tmp_path / "run")
    env = {"FAULT_TEST": "1", "DS_RECIPES_FAULTS": "fail:ENOSPC@4 path=*metrics.jsonl"}
    ended = started(reference.folder, run, "fsdp", env=env)
    seconds = time.time() - (run / "metrics.jsonl").stat().st_mtime  # of the step before
    assert ended.statuses == (1, 1) and seconds < SOON_SECONDS, ended.text
    assert ended.text.count("metrics.jsonl cannot be written: No space left on device") == 1, ended.text
    assert re.search(rf"\(rank 0 of 2 on \S+, during step {BEGIN + 2}\)", ended.text), ended.text
    (run / "tensorboard").write_text("a file")
    check_goes_on(reference, run, "fsdp", "--tensorboard")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (noted,) = [event["message"] for event in events if event["kind"] == "tracker"]
    assert noted.startswith("tensorboard failed; the run goes on without it")


SWEEP = [
    (engine, method, trained)
    for engine in ENGINES
    for method in calls_of_engines()
    for trained in (False, True)
    if method not in NOT_IN_TRAINING
    and (trained or method in AT_START)
    and not (trained and method in BEFORE_IT_ALONE)
    and not (method == "write_native" and engine == "fsdp")
]


@pytest.mark.slow
@pytest.mark.parametrize("engine, method, trained", SWEEP)
def test_a_device_that_fails_in_any_call_ends_all_and_the_run_goes_on(
    reference: Reference, tmp_path: Path, engine: str, method: str, trained: bool
) -> None:
    """One engine's memory is not enough and the other's device fails, on one rank before the first step, on the other after it."""
    error = "memory" if engine == "fsdp" else "device"
    rank = int(trained)
    run, _ = fail_in_a_call(reference, tmp_path, engine, method, error, rank, trained=trained, begun_by=engine)
    check_goes_on(reference, run, engine, *IN_FORMAT.get(method, ()))
