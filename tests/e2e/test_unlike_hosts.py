"""Ranks with other code, other packages or other settings than the rest are refused when they meet, with each difference."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_recipes.config.load import load_config
from ds_recipes.training.launch_facts import facts_of
from tests.e2e.launchers import ROOT, environment, free_port
from tests.nano import make_nano


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def other_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another host may have: a file was changed, one is new, and torch is another."""
    tree = tmp_path_factory.mktemp("other") / "tree"
    shutil.copytree(ROOT / "ds_recipes", tree / "ds_recipes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tree)
    with (tree / "ds_recipes/training/loop.py").open("a") as file:
        file.write("# one line more\n")
    (tree / "ds_recipes/training/mine.py").write_text("")
    (tree / "torch-9.9.9.dist-info").mkdir()
    (tree / "torch-9.9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    return tree


def launch(folder: Path, programs: list[list[str]]) -> tuple[list[int], str]:
    """Start each program as a rank; their statuses and all that they print."""
    port, size = free_port(), str(len(programs))
    started = []
    for rank, words in enumerate(programs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        with (folder / f"output-{rank}").open("wb") as output:
            env = environment(own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            started.append(
                subprocess.Popen([sys.executable, *words], cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
            )
    deadline = time.monotonic() + 120
    statuses = [process.wait(max(deadline - time.monotonic(), 1)) for process in started]
    return statuses, "".join((folder / f"output-{rank}").read_text() for rank in range(len(programs)))


def test_each_difference_is_named_once_before_anything_is_loaded(nano: Path, other_tree: Path, tmp_path: Path) -> None:
    json = tmp_path / "other.json"
    json.write_text((ROOT / "ds_configs/zero3.json").read_text().replace('"stage": 3', '"stage": 2'))
    flags = ["--config", str(nano), "--save_checkpoint_path", str(tmp_path / "run"), "--max_steps", "1"]
    usual = [str(ROOT / "train.py"), *flags, "--ds_config", str(ROOT / "ds_configs/zero3.json")]
    other = [str(other_tree / "train.py"), *flags, "--seed", "7", "--ds_config", str(json)]
    statuses, text = launch(tmp_path, [usual, other])
    host = socket.gethostname()
    assert statuses == [2, 2] and text.count("The ranks of this launch do not run the same") == 1, text
    assert f"setting seed: 42 (rank 0 on {host}); 7 (rank 1 on {host})" in text
    assert "ds_config zero_optimization.stage: 3 (rank 0" in text
    assert f"torch: {facts_of(load_config(flags))['torch']} (rank 0 on {host}); 9.9.9 (rank 1 on {host})" in text
    assert f"ds_recipes/training/mine.py: missing (rank 0 on {host})" in text
    assert "ds_recipes/training/loop.py: " in text and "training data" not in text
    settings = {"setting seed", "ds_config zero_optimization"}
    named = {line.strip().split(": ")[0] for line in text.splitlines() if " (rank 1 on " in line}
    files = {"ds_recipes/training/loop.py", "ds_recipes/training/mine.py"}
    assert {name.split(".stage")[0] for name in named} == settings | files | {"torch"}, text


def test_what_is_compared_is_there(nano: Path) -> None:
    facts = facts_of(load_config(["--config", str(nano), "--save_checkpoint_path", "run"]))
    assert {"torch", "deepspeed", "transformers"} <= facts.keys()
    assert len([name for name in facts if name.startswith("ds_recipes/")]) == len(list(ROOT.glob("ds_recipes/**/*.py")))
    assert facts["setting seed"] == "42"
