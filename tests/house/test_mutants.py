"""The hand-made faults of tests/mutants fit the code as it is, and name tests of every day (`make mutants` runs them)."""

import ast

import pytest

from tests.house.tiers import DAILY, collected, is_named
from tests.house.tree import ROOT
from tests.mutants.entries import Mutant, read_mutants

LEAST = 120
MUTANTS = read_mutants()


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    names = [one.name for one in MUTANTS]
    assert len(names) >= LEAST and len(set(names)) == len(names)


@pytest.mark.parametrize("one", MUTANTS, ids=lambda one: one.name)
def test_it_stands_once_and_is_other_code(one: Mutant) -> None:
    text = (ROOT / one.file).read_text(encoding="utf-8")
    changed = one.changed(text)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))


@pytest.fixture(scope="module")
def daily() -> set[str]:
    return collected()[DAILY]


@pytest.mark.parametrize("one", MUTANTS, ids=lambda one: one.name)
def test_its_tests_exist_and_run_every_day(one: Mutant, daily: set[str]) -> None:
    assert one.tests
    for name in one.tests:
        assert any(is_named(name.split("[")[0], test) for test in daily), name
