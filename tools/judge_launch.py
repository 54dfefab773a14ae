"""What a job script calls after its launcher has ended: ends what is left of the ranks, and leaves with the launch's true status.

0: complete. 75: stopped early with progress. Else a failure. Prints `again` if the job is to be queued again. It believes
run.json in the run folder, where the launch has its own entry, and no launcher (docs/stopping.md).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_recipes.cluster.judged import settle
from ds_recipes.cluster.leftovers import GRACE_SECONDS, end_ranks_here
from ds_recipes.config.values import path_argument


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.end_ranks_here:
        killed = end_ranks_here(given.end_ranks_here, given.grace_seconds)
        if killed:
            print(f"{killed} processes outlived their launcher and were killed", file=sys.stderr)
        return 0
    verdict = settle(
        given.run_folder,
        given.launch,
        given.launcher_status,
        given.signal,
        given.hosts,
        Path(__file__).absolute(),
        given.grace_seconds,
    )
    if verdict.again:
        print("again")
    return verdict.status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_folder", type=path_argument)
    parser.add_argument("--launch", help="its id, DS_RECIPES_LAUNCH")
    parser.add_argument("--launcher_status", type=int, default=0)
    parser.add_argument("--signal", default="", help="the signal that the script has answered with the STOP file")
    parser.add_argument(
        "--hosts", nargs="*", default=(), help="where ranks that are left are ended; on others through ssh"
    )
    parser.add_argument("--grace_seconds", type=float, default=GRACE_SECONDS, help="how long they may go on")
    parser.add_argument("--end_ranks_here", metavar="LAUNCH", help="only end what is left of a launch on this host")
    given = parser.parse_args(arguments)
    if not given.end_ranks_here and not (given.run_folder and given.launch):
        parser.error("give --run_folder and --launch")
    return given


if __name__ == "__main__":
    sys.exit(main())
