"""Start a launcher and end with the status that its run deserves, as job scripts do: 0 complete, 75 stopped early, else a failure.

    python tools/launch.py -- deepspeed --num_gpus 8 train.py --config run.yaml

`deepspeed` and `mpirun` may end with 0 although a part of them was killed, and torchrun turns 75 into 1: what counts is the
record in the run folder, and that the last step is durable. The first TERM, INT, HUP, USR1 or USR2 has the ranks save and stop;
a second Ctrl-C ends the launcher at once. Ranks on this machine that outlive their launcher are ended. Wrong settings are told
before the start, with status 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_recipes.cluster.judged import run_judged
from ds_recipes.errors import DsRecipesError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="+", metavar="-- LAUNCHER", help="the launcher's command, with train.py in it")
    words = parser.parse_args(arguments).command
    try:
        return run_judged(words, os.environ, Path(__file__).absolute().with_name("judge_launch.py")).status
    except DsRecipesError as error:
        print(error, file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
