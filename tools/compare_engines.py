"""Do both engines train your model alike, on this machine? The first thing to run on a new cluster.

    python tools/compare_engines.py --config run.yaml [--steps 50] [--output FILE.json] [--any_setting value ...]
    mpirun -np 8 python tools/compare_engines.py --use_mpi --config run.yaml          # or any other launcher

Takes the settings of train.py. Trains the first steps of the run with each engine, one after the other, on the same
batches from the same initial weights, and prints losses, gradient norms, tokens per second and memory side by side, and
how far apart the weights are after the last step: as a whole, and whether one engine has changed what the other has left alone.
Exit status: 0 they agree, 1 they do not (the bound is printed), 2 the settings are wrong. Checkpoints are neither read
nor written, and the run folder is left alone.
"""

import sys
from collections.abc import Sequence

from ds_recipes.training.compare.asked import compare_engines
from ds_recipes.world.failure import run_guarded


def main(argv: Sequence[str]) -> int:
    """Print the help, or compare."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    return compare_engines(argv)


if __name__ == "__main__":
    sys.exit(run_guarded(main, sys.argv[1:]))
