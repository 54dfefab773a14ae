"""Train a causal language model. Start it with deepspeed, mpirun, srun, torchrun or plain python; see --help."""

import sys
from collections.abc import Sequence

from ds_recipes.config.check import check_inputs
from ds_recipes.config.load import load_config
from ds_recipes.errors import ConfigError
from ds_recipes.world.failure import run_guarded


def main(argv: Sequence[str]) -> int:
    """Check everything that needs no torch, then train. Returns the exit status."""
    config = load_config(argv)
    problems = check_inputs(config)
    if problems:
        raise ConfigError(problems)
    from ds_recipes.training.loop import train  # imports torch

    return train(config)


if __name__ == "__main__":
    sys.exit(run_guarded(main, sys.argv[1:]))
