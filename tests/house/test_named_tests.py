"""The tests that README.md and docs/reliability.md name exist, and run when they say: every day, or in `make test-all`."""

import re
from dataclasses import dataclass

import pytest

from tests.house.tiers import DAILY, SLOW, collected, is_named
from tests.house.tree import ROOT

PAGES = ("README.md", "docs/reliability.md")
TIERS = {"every day": DAILY, "besides": SLOW}
"""The heading of a column, and the tier of the tests in it."""
OTHER_PROOF = re.compile(r"make \w+|benchmarks/\w+\.py")
TEST = re.compile(r"(?:\w+/)*(?:\w+\.py(?:::test_\w+)?)?")
DEMANDS, FAULTS = 25, 41


@dataclass(frozen=True)
class Named:
    """A test, a file or a folder of tests that a row names."""

    page: str
    row: str
    tier: str
    name: str


def rows_of(text: str) -> list[tuple[str, dict[str, str]]]:
    """(first cell, cell by heading) of each row of the tables that have a column of a tier."""
    rows, headings = [], []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            headings = []
        elif not headings:
            headings = cells
        elif set(headings) & set(TIERS) and not set(cells[0]) <= {"-"}:
            rows.append((cells[0], dict(zip(headings, cells, strict=True))))
    return rows


def named() -> list[Named]:
    found = []
    for page in PAGES:
        for row, cells in rows_of((ROOT / page).read_text(encoding="utf-8")):
            for heading, tier in TIERS.items():
                for name in re.findall(r"`([^`]+)`", cells[heading]):
                    if not OTHER_PROOF.match(name):
                        assert TEST.fullmatch(name), f"{page}, {row}: {name} is no test"
                        found.append(Named(page, row, tier, name))
    return found


@pytest.fixture(scope="module")
def by_tier() -> dict[str, set[str]]:
    return collected()


def test_each_exists_and_runs_when_it_is_said_to(by_tier: dict[str, set[str]]) -> None:
    wrong = [one for one in named() if not any(is_named(f"tests/{one.name}", test) for test in by_tier[one.tier])]
    assert not wrong


def test_each_demand_and_each_fault_has_a_test_of_every_day() -> None:
    rows = rows_of((ROOT / "docs/reliability.md").read_text(encoding="utf-8"))
    numbers = [*(str(number) for number in range(1, DEMANDS + 1)), *(f"F{number}" for number in range(1, FAULTS + 1))]
    assert [row for row, _ in rows] == numbers
    held = {row for row, cells in rows if ".py" in cells["every day"]}
    elsewhere = {row: re.findall(r"F\d+", cells["every day"]) for row, cells in rows if row not in held}
    assert all(faults and set(faults) <= held for faults in elsewhere.values()), elsewhere
    assert all("F" not in row for row in elsewhere), elsewhere
    assert len([row for row, _ in rows_of((ROOT / "README.md").read_text(encoding="utf-8"))]) > 20


def test_a_name_that_is_in_no_tier_is_found(by_tier: dict[str, set[str]]) -> None:
    daily = next(iter(by_tier[DAILY] - by_tier[SLOW]))
    assert is_named(daily, daily) and is_named(daily.split("::")[0], daily)
    assert not any(is_named(daily, test) for test in by_tier[SLOW])
    assert not any(is_named(daily + "_more", test) for test in by_tier[DAILY])
    assert not is_named("tests/unit/data/test_row.py", "tests/unit/data/test_rows.py::test_x")
