"""Run many rounds of faults against whole runs: python -m tests.faults --rounds 200 --seed 1

Each round's seed is printed before it runs; `--rounds 1 --seed N` repeats the round of seed N. A round that fails is
shown with its output and what it was, to be added to `cases.py`, and the others go on. The exit status is 1 then.
"""

import argparse
import collections
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.nano_runs import References
from tests.faults.rounds import draw, run


def main() -> int:
    arguments = _arguments()
    failed, ends = [], collections.Counter[str]()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        references = References(Path(name))
        started = time.monotonic()
        for seed in range(arguments.seed, arguments.seed + arguments.rounds):
            planned = draw(seed, references)
            print(f"seed {seed}: {planned}", flush=True)
            try:
                statuses = run(planned, references, Path(name) / f"round{seed}")
                ends[str(statuses)] += 1
                print(f"  {statuses}", flush=True)
            except AssertionError as error:
                failed.append(seed)
                print(f"  FAILED: {error}\n  again: python -m tests.faults --rounds 1 --seed {seed}\n  case: {planned}")
        seconds = time.monotonic() - started
    print(
        f"{arguments.rounds} rounds from seed {arguments.seed} in {seconds:.0f} s; statuses with the fault: {dict(ends)}"
    )
    print(f"failed: {failed or 'none'}")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
