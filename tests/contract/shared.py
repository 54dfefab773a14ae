"""One start of the ranks for many cases: test files say at import what they will ask for, and it is run together.

GRADIENT = planned(2, train_and_report, Case(), 1)               # at module level
seen = report(GRADIENT, "fsdp")                                  # in a test: rank 0's report
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ds_recipes.world.group import World
from tests.contract.engines import ENGINES, Case, traced
from tests.ranks.launch import run_ranks

SECONDS = 400


@dataclass(frozen=True)
class Planned:
    """`function(world, case, *args, folder)` on so many ranks, for each engine; it returns a dictionary."""

    ranks: int
    function: Callable[..., dict[str, Any]]
    case: Case
    args: tuple[Any, ...]


PLANNED: list[Planned] = []


def planned(ranks: int, function: Callable[..., dict[str, Any]], case: Case, *args: Any) -> Planned:
    """Note what a test will ask for."""
    one = Planned(ranks, function, case, args)
    if one not in PLANNED:
        PLANNED.append(one)
    return one


def report(one: Planned, engine: str) -> dict[str, Any]:
    """What rank 0 saw with this engine. The first question runs everything planned for as many ranks."""
    return _checked(_reports(one.ranks, engine)[PLANNED.index(one)])


def alone(one: Planned, engine: str) -> dict[str, Any]:
    """What rank 0 saw in a start of its own, for a slow test: nobody else waits for it."""
    return _checked(_started(one.ranks, [(0, one)], engine)[0])


def _checked(seen: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in seen, seen["error"]
    return seen


@cache
def _reports(ranks: int, engine: str) -> dict[int, dict[str, Any]]:
    return _started(ranks, [(number, one) for number, one in enumerate(PLANNED) if one.ranks == ranks], engine)


def _started(ranks: int, mine: list[tuple[int, Planned]], engine: str) -> dict[int, dict[str, Any]]:
    assert engine in ENGINES
    with tempfile.TemporaryDirectory() as tmp:
        return run_ranks(_run, ranks, mine, engine, tmp, timeout=SECONDS)[0]


def _run(world: World, mine: list[tuple[int, Planned]], engine: str, tmp: str) -> dict[int, dict[str, Any]]:
    return {
        number: traced(one.function, world, replace(one.case, engine=engine), *one.args, tmp) for number, one in mine
    }
