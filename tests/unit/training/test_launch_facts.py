"""What ranks compare when they meet tells two hosts' settings apart, of one run and of several."""

import json
from pathlib import Path

import pytest

from ds_recipes.config.load import load_config
from ds_recipes.config.schema import Config
from ds_recipes.training.launch_facts import facts_of


@pytest.fixture
def configs(tmp_path: Path) -> list[Config]:
    """Two, which differ in one entry of the JSON alone."""
    found = []
    for stage in (2, 3):
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        flags = ["--model_config", "m.json", "--tokenizer_name", "t", "--train_data", "d.jsonl"]
        found.append(
            load_config([*flags, "--save_checkpoint_path", "run", "--max_steps", "1", "--ds_config", str(path)])
        )
    return found


def different(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def test_another_entry_of_the_engines_json_is_another_fact(configs: list[Config]) -> None:
    first, second = configs
    assert different(facts_of(first), facts_of(second)) == {"ds_config zero_optimization.stage"}


def test_of_several_runs_each_has_its_own(configs: list[Config]) -> None:
    first, second = configs
    assert different(facts_of(first, second), facts_of(second, second)) == {
        "ds_config of run 1 zero_optimization.stage"
    }
    assert different(facts_of(first, second), facts_of(first, first)) == {"ds_config of run 2 zero_optimization.stage"}
