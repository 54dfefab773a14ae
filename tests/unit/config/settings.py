"""What the tests of the settings share: a smallest valid command line, and loading with files beside it."""

import json
from pathlib import Path
from typing import Any

from ds_recipes.config.load import load_config
from ds_recipes.config.schema import Config
from ds_recipes.errors import ConfigError

NEEDED = ("--model_name", "m", "--train_data", "d.jsonl", "--save_checkpoint_path", "run")
STAGE_3: dict[str, Any] = {"zero_optimization": {"stage": 3}}


def load(flags: str = "", needed: tuple[str, ...] = NEEDED) -> Config:
    """Load the needed settings and more flags, as one would type them."""
    return load_config([*needed, *flags.split()], env={})


def problems_of(flags: str = "", needed: tuple[str, ...] = NEEDED) -> tuple[str, ...]:
    """The problems that loading reports; none if it succeeds."""
    try:
        load(flags, needed)
    except ConfigError as error:
        return error.problems
    return ()


def write_json(folder: Path, tree: dict[str, Any], name: str = "zero3.json") -> None:
    (folder / name).write_text(json.dumps(tree), encoding="utf-8")
