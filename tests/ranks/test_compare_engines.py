"""tools/compare_engines.py on real ranks: it finds agreement, and an engine that was made to be wrong."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.nano import make_nano
from tests.ranks.training import Ended, train


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


def honest(argv: Sequence[str]) -> int:
    from ds_recipes.world.failure import run_guarded
    from tools import compare_engines

    return run_guarded(compare_engines.main, argv)


def sabotaged(change: Callable[[float, Any], float], argv: Sequence[str]) -> int:
    """The tool with an FSDP2 engine that gets another scale than the loop gave."""
    from ds_recipes.engine.fsdp2.step import Fsdp2Engine

    plain = Fsdp2Engine.backward
    Fsdp2Engine.backward = lambda engine, batch, scale: plain(engine, batch, change(scale, engine))  # type: ignore[method-assign]
    return honest(argv)


def scaled(argv: Sequence[str]) -> int:
    return sabotaged(lambda scale, engine: 1.01 * scale, argv)


def averaged(argv: Sequence[str]) -> int:
    return sabotaged(lambda scale, engine: scale / engine._world.size, argv)


def faster(argv: Sequence[str]) -> int:
    """The tool with an FSDP2 engine that takes longer steps than it is told to."""
    from ds_recipes.engine.fsdp2.step import Fsdp2Engine

    plain = Fsdp2Engine.update
    Fsdp2Engine.update = lambda engine, lr: plain(engine, 1.01 * lr)  # type: ignore[method-assign]
    return honest(argv)


def without_deepspeed(argv: Sequence[str]) -> int:
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        del sys.modules[name]
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    return honest(argv)


def launch(nano: Path, folder: Path, *flags: str, program: Callable[[Sequence[str]], int] = honest) -> Ended:
    argv = ("--config", str(nano), "--save_checkpoint_path", str(folder / "run"), "--steps", "4", *flags)
    return train(2, *argv, outputs=folder / "outputs", program=program)


def test_the_engines_agree_and_nothing_is_left_in_the_run_folder(nano: Path, tmp_path: Path) -> None:
    ended = launch(nano, tmp_path, "--engine", "fsdp", "--output", str(tmp_path / "it.json"))
    assert ended.statuses == (0, 0), ended.text
    assert ended.text.rstrip().endswith("the engines agree") and ended.text.count("the engines agree") == 1
    assert not (tmp_path / "run").exists()
    tree = json.loads((tmp_path / "it.json").read_text())
    assert [engine["engine"] for engine in tree["engines"]] == ["deepspeed", "fsdp"]
    assert tree["world_size"] == 2 and len(tree["engines"][0]["steps"]) == 4
    assert 0 < tree["verdict"]["loss_difference"] < 1e-6, "no rounding at all: was it the same engine twice?"
    for engine in tree["engines"]:
        assert engine["tokens_per_sec"] > 0 and engine["memory_gib"] > 0


@pytest.mark.parametrize("program, factor", [(scaled, 1.01), pytest.param(averaged, 0.5, marks=pytest.mark.slow)])
def test_a_wrong_gradient_is_found_though_adam_hides_it(
    nano: Path, tmp_path: Path, program: Callable[[Sequence[str]], int], factor: float
) -> None:
    output = tmp_path / "it.json"
    ended = launch(nano, tmp_path, "--max_grad_norm", "0", "--lr", "1e-4", "--output", str(output), program=program)
    assert ended.statuses == (1, 1), ended.text
    assert "THE ENGINES DO NOT AGREE" in ended.text and "the gradient norm of step 1" in ended.text
    tree = json.loads(output.read_text())
    one, other = (engine["steps"][0]["grad_norm"] for engine in tree["engines"])
    assert other / one == pytest.approx(factor, rel=1e-6)
    assert tree["verdict"]["loss_difference"] < 1e-4, (
        "the losses alone would have told: the test shows less than it says"
    )


def test_weights_that_go_another_way_are_found_before_the_losses_tell(nano: Path, tmp_path: Path) -> None:
    output = tmp_path / "it.json"
    ended = launch(nano, tmp_path, "--lr", "1e-6", "--output", str(output), program=faster)
    assert ended.statuses == (1, 1), ended.text
    (line,) = [line for line in ended.text.splitlines() if line.startswith("- ")]
    assert "the weights are 9.9e-03 of their way apart after the last step, where 1.0e-03 is allowed" in line
    assert json.loads(output.read_text())["verdict"]["loss_difference"] < 1e-5


def test_an_output_that_cannot_be_written_is_refused_before_the_training(nano: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = launch(nano, tmp_path, "--output", str(tmp_path / "file" / "it.json"))
    assert ended.statuses == (2, 2)
    assert ended.text.count("file/it.json") == 1 and "loss" not in ended.text, ended.text


@pytest.mark.slow
def test_a_missing_library_is_told_in_one_line(nano: Path, tmp_path: Path) -> None:
    ended = launch(nano, tmp_path, program=without_deepspeed)
    assert ended.statuses[0] == 2 and 0 not in ended.statuses
    assert "Traceback" not in ended.text and "deepspeed" in ended.text and "pip install" in ended.text, ended.text
