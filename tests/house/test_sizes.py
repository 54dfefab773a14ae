"""Functions stay short enough to be read in one go, and what is public says what it does."""

import ast
from pathlib import Path

import pytest

from tests.house.tree import parsed, python_files

MAX_FUNCTION_LINES = 60

LONGER_FUNCTIONS: dict[str, str] = {}
"""file:function: the reason why it may be longer."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(file: Path) -> list[Function]:
    return [node for node in ast.walk(parsed(file)) if isinstance(node, Function)]


@pytest.mark.parametrize("file", python_files(), ids=str)
def test_functions_are_short(file: Path) -> None:
    long = [
        f"{file}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in functions(file)
        if node.end_lineno and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
        if f"{file}:{node.name}" not in LONGER_FUNCTIONS
    ]
    assert not long


def test_exceptions_are_still_needed() -> None:
    for name in LONGER_FUNCTIONS:
        file, function = name.split(":")
        assert any(
            node.name == function and node.end_lineno and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
            for node in functions(Path(file))
        ), name


@pytest.mark.parametrize("file", [*python_files("ds_recipes", "tools", "benchmarks"), Path("train.py")], ids=str)
def test_modules_and_public_classes_have_docstrings(file: Path) -> None:
    tree = parsed(file)
    if not tree.body:
        return
    missing = [] if ast.get_docstring(tree) else [f"{file}: the module"]
    missing += [
        f"{file}:{node.lineno} {node.name}"
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not missing


DOCUMENTED = (
    "ds_recipes/config",
    "ds_recipes/data",
    "ds_recipes/models",
    "ds_recipes/engine",
    "ds_recipes/checkpoint",
    "ds_recipes/training",
    "ds_recipes/world",
)


@pytest.mark.parametrize("file", [file for folder in DOCUMENTED for file in python_files(folder)], ids=str)
def test_longer_public_functions_have_docstrings(file: Path) -> None:
    missing = [
        f"{file}:{node.lineno} {node.name}"
        for node in parsed(file).body
        if isinstance(node, Function) and not node.name.startswith("_") and not ast.get_docstring(node)
        if node.end_lineno and node.end_lineno - node.lineno > 8
    ]
    assert not missing
