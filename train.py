"""Train a causal language model. Start it with deepspeed, mpirun, srun, torchrun or plain python; see --help."""

import os
import sys
import time
from collections.abc import Sequence

from ds_recipes.config.check import check_inputs
from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.errors import ConfigError
from ds_recipes.fsops.faults import arm_from_environment
from ds_recipes.world.failure import run_guarded
from ds_recipes.world.resolve import resolve
from ds_recipes.world.signals import listen

STARTED = time.monotonic()


def main(argv: Sequence[str]) -> int:
    """Check everything that needs no torch, then train. Returns the exit status."""
    listen()
    arm_from_environment()
    config = load_config(argv)
    place = resolve(os.environ, config.run.use_mpi, config.run.expected_world_size)
    make_plan(config, place.size)
    problems = check_inputs(config)
    if problems:
        raise ConfigError(problems)
    from ds_recipes.training.launch import open_launch  # these import torch
    from ds_recipes.training.loop import train
    from ds_recipes.training.start import prepare

    with open_launch(config, place, STARTED) as launch:
        run = prepare(config, launch)
        return 0 if run is None else train(run)


if __name__ == "__main__":
    sys.exit(run_guarded(main, sys.argv[1:]))
