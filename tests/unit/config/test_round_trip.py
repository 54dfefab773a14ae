"""Printing the effective run file and loading it again gives the same settings, whatever they are."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_recipes.config.load import load_config
from ds_recipes.config.render import to_yaml
from ds_recipes.config.schema import SETTINGS, values_of
from ds_recipes.config.setting import Limits
from ds_recipes.config.values import base_type
from ds_recipes.errors import ConfigError
from tests.unit.config.settings import NEEDED, load, write_json

LETTERS = "abz09 -_:#'\"\\/,[]{}&*!|>%@`~?=\t.日本é\u0085\u2028\ud800\U0001f600"
PITFALLS = (
    "no",
    "null",
    "~",
    "1e-4",
    "0x10",
    "2024-01-01",
    "- a",
    "a: b",
    "a #b",
    " a",
    "a ",
    "'",
    '"',
    "{",
    "%",
    "é",
    "..",
)


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(PITFALLS)
    return "x" + "".join(rng.choices(LETTERS, k=rng.randint(0, 12)))


def random_value(name: str, rng: random.Random) -> str | list[str]:
    """A text that a user could give on the command line."""
    item = SETTINGS[name]
    kind, limits = base_type(item), item.metadata["limits"]
    assert isinstance(limits, Limits)
    if kind is tuple:
        return [rng.choice(limits.choices) if limits.choices else random_text(rng) for _ in range(rng.randint(1, 3))]
    if limits.choices:
        return rng.choice(limits.choices)
    if item.metadata["unit"] == "duration":
        return f"{rng.randint(0, 30)}h{rng.randint(0, 90)}m{rng.randint(1, 99)}s"
    numbers: dict[type, Any] = {
        int: rng.randint(2, 10**6),
        float: rng.choice([rng.random(), 10 ** rng.uniform(-12, 0)]),
    }
    return str(numbers[kind]) if kind in numbers else rng.choice(["true", "no"]) if kind is bool else random_text(rng)


def loads(argv: list[str]) -> Any:
    """The settings, or None if this draw breaks a rule between settings."""
    try:
        return load_config(argv, env={})
    except ConfigError:
        return None


@pytest.mark.parametrize("seed", range(60))
def test_print_and_load(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    names = [name for name in SETTINGS if f"--{name}" not in NEEDED and name not in ("ds_config", "model_config")]
    argv = list(NEEDED)
    for name in rng.sample(names, k=rng.randint(1, 8)):
        texts = random_value(name, rng)
        trial = [*argv, f"--{name}", *texts] if isinstance(texts, list) else [*argv, f"--{name}={texts}"]
        argv = trial if loads(trial) else argv
    config = loads(argv)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(["--config", str(path)]) == config
    assert to_yaml(load_config(["--config", str(path)])).count("\n") == to_yaml(config).count("\n")


def test_what_the_json_said_is_printed_and_agrees_with_it_when_loaded(tmp_path: Path) -> None:
    tree = {
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": False},
        "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.25, "momentum": 0.9}},
        "activation_checkpointing": {"partition_activations": False},
    }
    write_json(tmp_path, tree)
    config = load(f"--ds_config {tmp_path}/zero3.json")
    (tmp_path / "run.yaml").write_text(to_yaml(config), encoding="utf-8")
    again = load_config(["--config", f"{tmp_path}/run.yaml"])
    assert again == config
    assert again.run.precision == "fp32"


def test_other_yaml_readers_see_the_same_texts() -> None:
    config = load_config([*NEEDED, "--wandb_project", "no", "--wandb_name", "1e3: #x"])
    read = yaml.safe_load(to_yaml(config))
    assert (read["wandb_project"], read["wandb_name"]) == ("no", "1e3: #x")
    assert set(read) == set(values_of(config))


def test_print_config_prints_the_run_file_and_ends_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load("--print_config --lr 0.5")
    assert ended.value.code == 0
    assert capsys.readouterr().out == to_yaml(load("--lr 0.5"))


def test_print_config_of_settings_with_a_problem_reports_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        load("--print_config --lr x")
    assert capsys.readouterr().out == ""
