"""The hand-made faults of tests/mutants fit the code as it is, and name tests of every day (`make mutants` runs them)."""

import ast
from functools import cache

import pytest

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


@cache
def named_in(file: str) -> dict[str, bool]:
    """Tests of a file, and whether each is slow in all its cases."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    whole = any(
        "slow" in ast.unparse(node)
        for node in tree.body
        if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)
    )
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {
        node.name: whole or any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list)
        for node in functions
    }


@pytest.mark.parametrize("one", MUTANTS, ids=lambda one: one.name)
def test_its_tests_exist_and_run_every_day(one: Mutant) -> None:
    assert one.tests
    for name in one.tests:
        file, _, test = name.partition("::")
        found = named_in(file)
        assert found and not all(found.values()) if not test else found.get(test.split("[")[0]) is False, name
