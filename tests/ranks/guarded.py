"""A small program under `run_guarded`, for tests of how a run ends: `guarded.py SCENARIO [RANK]`.

It starts a world without DeepSpeed, except in the scenario `deepspeed`. RANK is the one that meets the trouble.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence

from ds_recipes.errors import ConfigError, InputError
from ds_recipes.world.failure import run_guarded
from ds_recipes.world.resolve import resolve


def main(argv: Sequence[str]) -> int:
    arguments = [argument for argument in argv if not argument.startswith("--local_rank")]
    scenario, culprit = arguments[0], int(arguments[1]) if len(arguments) > 1 else -1
    place = resolve(os.environ)
    mine = culprit in (-1, place.rank)
    if scenario == "before" and mine:
        raise ConfigError(["the flag is wrong", "and another one"])
    if scenario == "bug_before" and mine:
        raise ValueError("a bug in the checks")
    from ds_recipes.world.group import start

    limit = float(os.environ.get("START_SECONDS", "60"))
    if scenario == "absent" and mine:
        time.sleep(60)
    world = start(place, timeout_seconds=limit, with_deepspeed=scenario == "deepspeed")
    if scenario == "after" and mine:
        raise InputError("the record is wrong")
    if scenario == "bug_after" and mine:
        raise ValueError("a bug in a rank")
    if scenario == "interrupt" and mine:
        raise KeyboardInterrupt
    if scenario == "leave" and mine:
        sys.exit(7)
    if scenario == "stuck":
        if mine:
            raise ValueError("a bug in a rank")
        time.sleep(60)
    if scenario == "check":
        world.check("the files", lambda: _refuse() if mine else None)
    if scenario == "check_bug":
        world.check("the files", lambda: _stumble() if mine else None)
    if scenario == "kill" and mine:
        os.kill(os.getpid(), signal.SIGKILL)
    if scenario == "late":
        if mine:
            time.sleep(60)
        world.barrier("the meeting point", timeout_seconds=2)
    for _ in range(3):
        total = world.sum([world.rank])
    if scenario == "stop":
        return 75
    if world.rank == 0:
        print(f"finished, sum {total[0]} of {world.size}, from {place.source}", flush=True)
    if scenario != "forgets_to_close":
        world.close()
    return 0


def _refuse() -> None:
    raise InputError("the file is missing")


def _stumble() -> None:
    raise OSError("the disk stumbled")


if __name__ == "__main__":
    sys.exit(run_guarded(main, sys.argv[1:]))
