"""Every run file of examples/ loads, wherever it lies, and its batch divides for the ranks that people try first."""

from pathlib import Path

import pytest

from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from tests.house.tree import ROOT

EXAMPLES = sorted(path for suffix in ("yaml", "yml") for path in (ROOT / "examples").rglob(f"*.{suffix}"))
TINY = [path for path in EXAMPLES if path.name.startswith("tiny_")]
DS_CONFIGS = sorted((ROOT / "ds_configs").rglob("*.json"))


def test_their_number() -> None:
    """A new file is tested because this number has to change with it."""
    assert len(EXAMPLES) == 5
    assert len(DS_CONFIGS) == 6


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_example_loads_on_any_small_number_of_ranks(path: Path, world_size: int, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(["--config", str(path)], env={})
    plan = make_plan(config, world_size)
    assert plan.global_rows == 12
    assert config.checkpoint.save_checkpoint_path == f"runs/{path.stem}"


@pytest.mark.parametrize("path", sorted(set(EXAMPLES) - set(TINY)), ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 64, 128])
def test_example_for_a_real_model_has_values_for_one(path: Path, world_size: int, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(["--config", str(path)], env={})
    plan = make_plan(config, world_size, rows_per_epoch=100_000)
    assert plan.total_steps is not None and plan.total_steps > 1000 and plan.warmup_steps
    assert 1e-7 < plan.lr_min < plan.lr <= 5e-5 and config.run.precision == "bf16" and config.run.max_steps is None
    assert plan.tokens_per_step >= 2**19 and config.run.activation_checkpointing
    assert config.checkpoint.save_checkpoint_path == f"runs/{path.stem}"


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
def test_json_loads(path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(["--config", "examples/tiny_alpaca.yaml", "--ds_config", str(path)], env={})
    assert config.ds is not None
