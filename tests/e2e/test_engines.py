"""The example run under a real mpirun: both engines train it alike, and each continues the other's checkpoint.

`tests/ranks/test_engines.py` continues on 1, 2 and 3 ranks; here the whole command is what is tested.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.launchers import ROOT, command, environment, run
from tests.ranks.training import metrics

STEPS = 4
SMALL = ("--global_batch_size", "4", "--run_validation", "false", "--save_interval_iteration", "2")


def train(engine: str, folder: Path, without: Path | None = None) -> str:
    """The command of the example; `without` is a folder of modules that come before the installed ones."""
    flags = ["--use_mpi", "--engine", engine, "--ds_config", "ds_configs/zero3.json"]
    flags += ["--config", "examples/tiny_alpaca.yaml", "--max_steps", str(STEPS), *SMALL]
    words = command("mpirun", 2, ROOT / "train.py", *flags, "--save_checkpoint_path", str(folder))
    env = {} if without is None else {"PYTHONPATH": f"{without}:{environment()['PYTHONPATH']}"}
    ended = run(words, env)
    assert ended.status == 0, ended.output
    return ended.output


def without_deepspeed(folder: Path) -> Path:
    """Modules that come before the installed ones: whoever imports DeepSpeed fails."""
    broken = folder / "broken"
    (broken / "deepspeed").mkdir(parents=True)
    (broken / "deepspeed" / "__init__.py").write_text("raise ImportError('nobody may import this')\n")
    return broken


@pytest.mark.slow
def test_the_example_on_both_engines(tmp_path: Path) -> None:
    """The FSDP2 run cannot import DeepSpeed: it need not be installed."""
    train("deepspeed", tmp_path / "one")
    train("fsdp", tmp_path / "two", without_deepspeed(tmp_path))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for step in range(1, STEPS + 1):
        assert one[step]["loss"] == pytest.approx(two[step]["loss"], abs=1e-5)
        assert one[step]["data_hash"] == two[step]["data_hash"]
    assert one[1]["grad_norm"] == pytest.approx(two[1]["grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine, other", [("fsdp", "deepspeed"), ("deepspeed", "fsdp")])
def test_the_example_from_the_other_engines_checkpoint(engine: str, other: str, tmp_path: Path) -> None:
    train(other, tmp_path / "first")
    folder = tmp_path / "second"
    shutil.copytree(tmp_path / "first" / "iter_0000002", folder / "iter_0000002")
    output = train(engine, folder, without_deepspeed(tmp_path) if engine == "fsdp" else None)
    assert "iter_0000002 (step 2 of 4)" in output
    mine, first = metrics(folder), metrics(tmp_path / "first")
    assert sorted(mine) == [3, 4]
    for step in mine:
        assert mine[step]["loss"] == pytest.approx(first[step]["loss"], abs=1e-5)
    made_by = json.loads((folder / "iter_0000004" / "manifest.json").read_text())["engine"]["engine"]
    assert made_by == engine
