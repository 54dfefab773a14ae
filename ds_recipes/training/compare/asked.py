"""What the comparison of engines is asked for: everything that needs no torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.config.check import check_inputs
from ds_recipes.config.entries import read_flags
from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import SETTINGS
from ds_recipes.config.seed_flags import translate
from ds_recipes.errors import ConfigError
from ds_recipes.training.launch_facts import facts_of
from ds_recipes.world.resolve import resolve

ENGINES: tuple[str, ...] = SETTINGS["engine"].metadata["limits"].choices
STEPS = 50


@dataclass(frozen=True)
class Asked:
    """What the tool's own flags ask for, and the settings of train.py without the engine."""

    steps: int
    output: Path | None
    settings: tuple[str, ...]


def compare_engines(argv: Sequence[str]) -> int:
    """Train the first steps of a run with each engine; returns 0 if they agree, 1 if not.

    Raises:
        ConfigError: as train.py would, for either engine.
    """
    asked = read_asked(argv)
    configs = [load_config([*asked.settings, "--engine", engine]) for engine in ENGINES]
    place = resolve(os.environ, configs[0].run.use_mpi, configs[0].run.expected_world_size)
    make_plan(configs[0], place.size)
    problems = [problem for config in configs for problem in check_inputs(config)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    from ds_recipes.engine.create import start_world  # these import torch
    from ds_recipes.training.compare.run import compare_on

    return compare_on(start_world(place, *configs, facts=facts_of(*configs)), configs, asked.steps, asked.output)


def read_asked(argv: Sequence[str]) -> Asked:
    """Separate --steps and --output from the settings of train.py, and leave out what chooses an engine.

    Raises:
        ConfigError: --steps is no whole number above 0, --output is no path, or a word belongs to no flag.
    """
    flags, problems = read_flags(argv)
    flags, more = translate(flags)
    own = {flag.name: flag.texts for flag in flags if flag.name in ("steps", "output")}
    problems += more
    texts = own.get("steps", (str(STEPS),))
    if len(texts) != 1 or not texts[0].isdecimal() or int(texts[0]) < 1:
        problems.append(f"--steps must be a whole number above 0, not {' '.join(texts)!r} (command line)")
    if len(own.get("output", ("",))) != 1:
        problems.append("--output needs one path, of the JSON to write (command line)")
    if problems:
        raise ConfigError(problems)
    settings = [
        word
        for flag in flags
        if flag.name not in ("steps", "output", "engine")
        for word in ([f"--{flag.name}={flag.texts[0]}"] if len(flag.texts) == 1 else [f"--{flag.name}", *flag.texts])
    ]
    return Asked(int(texts[0]), Path(own["output"][0]) if "output" in own else None, tuple(settings))
