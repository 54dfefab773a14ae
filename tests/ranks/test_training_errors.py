"""What cannot go on ends with status 1 on all ranks, says what it was, and leaves its trace in the run folder."""

import json
from pathlib import Path

import pytest

from tests.nano import make_nano
from tests.ranks.training import Ended, metrics, train


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


def launch(nano: Path, folder: Path, ranks: int, *flags: str) -> Ended:
    argv = ("--config", str(nano), "--save_checkpoint_path", str(folder), *flags)
    return train(ranks, *argv, outputs=nano.parent / f"outputs-{folder.name}")


def events(folder: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()]


def test_steps_that_are_not_finite_are_skipped_aloud_and_end_the_run_after_ten(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "infinite"
    flags = ("--optimizer_type", "sgd", "--lr", "1e38", "--max_grad_norm", "0", "--save_interval_iteration", "0")
    ended = launch(nano, folder, 2, *flags)
    assert ended.statuses == (1, 1)
    told = "10 steps in a row had a loss or a gradient that is not finite (the last is step 11)"
    assert ended.text.count(told) == 1, ended.text
    assert f"The weights are those of step 1. The newest checkpoint is {folder}/iter_0000001." in ended.text
    assert events(folder).count("skipped_step") == 10
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "failed" and "not finite" in record["reason"]


def test_a_step_without_any_target_names_its_records(nano: Path, tmp_path: Path) -> None:
    """In a stream cut into rows, one short row may hold nothing but a prompt."""
    flags = ("--packing", "concat", "--context_size", "16", "--global_batch_size", "1", "--max_steps", "200")
    ended = launch(nano, tmp_path / "empty", 1, *flags)
    assert ended.statuses == (1,)
    assert "has no target token in any of its rows" in ended.text and "train.jsonl:" in ended.text, ended.text


@pytest.mark.slow
def test_validation_on_uneven_ranks_is_the_same_number(nano: Path, tmp_path: Path) -> None:
    seen = {}
    for ranks in (1, 2, 3):
        folder = tmp_path / f"even{ranks}"
        assert launch(nano, folder, ranks, "--max_steps", "1").statuses == (0,) * ranks
        seen[ranks] = metrics(folder, "eval_loss")[1]
    assert seen[1]["eval_target_tokens"] == seen[2]["eval_target_tokens"] == seen[3]["eval_target_tokens"]
    for ranks in (2, 3):
        assert seen[ranks]["eval_loss"] == pytest.approx(seen[1]["eval_loss"], rel=1e-6)
