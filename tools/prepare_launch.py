"""What a job script calls before it starts the ranks: prints shell assignments that the script evaluates.

Reads the hosts of SLURM, PBS or Grid Engine, or a hostfile; checks the settings against the number of ranks; writes hostfile, log
folder and variables for other hosts into RUN/jobs/JOB/; chooses address, port and the launch's id. The job scripts in launch/
show how it is used.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_recipes.cluster.job import LAUNCHERS, parse_walltime
from ds_recipes.cluster.prepare import Request, prepare
from ds_recipes.config.values import path_argument
from ds_recipes.errors import DsRecipesError


def main(arguments: Sequence[str] | None = None) -> int:
    given = vars(parse(arguments))
    try:
        walltime = given.pop("walltime")
        given["walltime_seconds"] = parse_walltime(walltime) if walltime else None
        given |= {"arguments": tuple(given["arguments"]), "export": tuple(given["export"])}
        prepared = prepare(Request(**given), os.environ, Path.cwd())
    except DsRecipesError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    for line in prepared.notes:
        print(line, file=sys.stderr)
    print(prepared.assignments())
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_folder", required=True, type=path_argument)
    parser.add_argument("--config", required=True, help="the run file")
    parser.add_argument("--launcher", required=True, choices=LAUNCHERS)
    parser.add_argument("--ranks_per_host", required=True, type=int)
    parser.add_argument("--num_hosts", type=int, help="refuse any other number")
    parser.add_argument("--hostfile", help="instead of the scheduler's hosts; an empty word for none")
    parser.add_argument("--walltime", metavar="H:MM:SS", help="the job's time limit")
    parser.add_argument("--lead_seconds", type=int, default=300, help="time before the limit that is kept for saving")
    parser.add_argument("--elapsed_seconds", type=int, default=0, help="how long the job has run")
    parser.add_argument("--export", nargs="*", default=(), metavar="NAME", help="further variables for other hosts")
    parser.add_argument("--launch_id", default="", metavar="WORD", help="where each host runs a copy of the script")
    parser.add_argument("arguments", nargs="*", metavar="-- FLAG", help="flags of train.py")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
