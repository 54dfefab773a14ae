"""Which tests run every day and which only in `make test-all`: asked of pytest itself, which knows every mark.

python -m pytest --collect-only -p tests.house.tiers tests
"""

import subprocess
import sys
from functools import cache

import pytest

from tests.house.tree import ROOT

DAILY, SLOW = "daily", "slow"
MARK = "tier:"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Print the tier of each test: a line for each of its cases."""
    for item in session.items:
        if item.get_closest_marker("gpu") is None:
            print(MARK, SLOW if item.get_closest_marker("slow") else DAILY, item.nodeid)


@cache
def collected() -> dict[str, set[str]]:
    """Names of tests (`tests/ranks/test_lock.py::test_x`), without their cases, by tier; one may be in both."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "tests.house.tiers", "tests"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    found: dict[str, set[str]] = {DAILY: set(), SLOW: set()}
    for line in result.stdout.splitlines():
        if line.startswith(MARK):
            _, tier, name = line.split(" ", 2)
            found[tier].add(name.split("[", 1)[0])
    return found


def is_named(name: str, test: str) -> bool:
    """True if `name`, of a test, a file or a folder (`tests/faults/`), stands for `test`."""
    return test == name or (test.startswith(name) and (name.endswith("/") or test.startswith(f"{name}::")))
