"""SGD's momentum is state too: a continued run has it, on either engine and at any stage."""

import shutil
from pathlib import Path

import pytest

from tests.nano import make_nano
from tests.ranks.training import Ended, metrics, train

STEPS, HALF = 6, 3
SGD = ("--optimizer_type", "sgd", "--sgd_momentum", "0.9", "--lr", "0.05", "--lr_decay_style", "constant")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def whole(nano: Path) -> Path:
    """The run folder of a run that was not stopped."""
    assert launch(nano, nano.parent / "whole", *SGD).statuses == (0, 0)
    return nano.parent / "whole"


def launch(nano: Path, folder: Path, *flags: str) -> Ended:
    argv = ("--config", str(nano), "--save_checkpoint_path", str(folder), "--max_steps", str(STEPS))
    more = ("--save_interval_iteration", str(HALF), "--run_validation", "false")
    return train(2, *argv, *more, *flags, outputs=nano.parent / f"outputs-{folder.name}")


@pytest.mark.parametrize(
    "name, json, flags, tolerance",
    [
        ("stage 3", '{"zero_optimization": {"stage": 3}}', (), 0.0),
        ("stage 2", '{"zero_optimization": {"stage": 2}}', (), 1e-6),
        ("fsdp", '{"zero_optimization": {"stage": 3}}', ("--engine", "fsdp"), 1e-6),
    ],
)
def test_a_continued_run_keeps_its_momentum(nano, whole, tmp_path, name, json, flags, tolerance) -> None:
    shutil.copytree(whole / f"iter_{HALF:07d}", tmp_path / "run" / f"iter_{HALF:07d}")
    (tmp_path / "ds.json").write_text(json)
    ended = launch(nano, tmp_path / "run", *SGD, "--ds_config", str(tmp_path / "ds.json"), *flags)
    assert ended.statuses == (0, 0), ended.text
    losses, expected = (
        {step: line["loss"] for step, line in metrics(folder).items()} for folder in (tmp_path / "run", whole)
    )
    assert sorted(losses) == list(range(HALF + 1, STEPS + 1))
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], abs=tolerance), f"step {step}"
