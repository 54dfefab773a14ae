"""train.py on one rank that is asked to stop, or dies, just when it comes to a chosen place: for tests of every phase.

The environment says when: `WHEN` is a JSON object with

    place    "module:name" or "module:Class.method", whose `call`-th call (from 1) is the moment
    ranks    which ranks act; the others run as they are
    act      a signal's name, which the rank sends to itself; "STOP", which makes that file in `folder`; or "limit", which
             leaves it no more memory than it has
    slow     optional: "module:..." like `place`, each call of which takes `seconds` more, on all ranks or on `slow_ranks`
"""

import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.ranks.training import train_py


def when(place: str, act: str, *ranks: int, call: int = 1, **more: Any) -> dict[str, str]:
    """The environment of ranks that run `signalled`."""
    return {"WHEN": json.dumps({"place": place, "act": act, "ranks": ranks, "call": call, **more})}


def signalled(argv: Sequence[str]) -> int:
    """What one rank does."""
    plan = json.loads(os.environ["WHEN"])
    if plan.get("small_parts"):
        from tests.unit.data.tokens.stores import cut_small

        cut_small(plan["small_parts"])
    if "slow" in plan and int(os.environ["RANK"]) in plan.get("slow_ranks", [int(os.environ["RANK"])]):
        _before(plan["slow"], lambda number: time.sleep(plan["seconds"]))
    if int(os.environ["RANK"]) in plan["ranks"]:
        _before(plan["place"], lambda number: _act(plan) if number == plan["call"] else None)
    return train_py(argv)


def acted_at(folder: Path) -> float:
    """The `time.monotonic()` at which the first rank acted."""
    return min(float(file.read_text()) for file in folder.glob("acted-*"))


def _before(place: str, action: Callable[[int], None]) -> None:
    """Let `action(number of the call)` come before each call of what `place` names."""
    module, _, path = place.partition(":")
    holder: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    original, calls = getattr(holder, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        action(calls)
        return original(*args, **kwargs)

    setattr(holder, name, call)


def _act(plan: Mapping[str, Any]) -> None:
    Path(plan["folder"], f"acted-{os.environ['RANK']}").write_text(str(time.monotonic()))
    if plan["act"] == "STOP":
        Path(plan["folder"], "STOP").touch()
    elif plan["act"] == "limit":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)
    else:
        os.kill(os.getpid(), signal.Signals[plan["act"]])


if __name__ == "__main__":
    sys.exit(signalled(sys.argv[1:]))
