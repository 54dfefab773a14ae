"""Imports point one way: a file imports from floors before its own, and the heavy libraries stay where they belong."""

from pathlib import Path

import pytest

from tests.house.tree import imported_modules, module_name, parsed, python_files

FLOORS = {
    "errors": 0,
    "config": 1,
    "fsops": 1,
    "hub_probe": 2,
    "world": 2,
    "ranges": 2,
    "data": 3,
    "models": 3,
    "engine": 4,
    "checkpoint": 5,
    "training": 6,
    "cluster": 7,
    "planner": 7,
}
"""The floor of each part of ds_recipes; parts on one floor do not import each other."""

MAY_IMPORT = {
    "deepspeed": (
        "ds_recipes/engine/zero3/",
        "ds_recipes/world/",
        "ds_recipes/cluster/probes/",
        "benchmarks/",
        "tests/",
        "tools/make_ds_table.py",
    ),
    "wandb": ("ds_recipes/training/trackers/wandb_tracker.py", "tests/"),
    "mpi4py": ("ds_recipes/world/", "ds_recipes/cluster/probes/", "tests/"),
}
"""Where a library may be imported at all."""

WITHOUT_TORCH = (
    "ds_recipes/errors.py",
    "ds_recipes/fsops/",
    "ds_recipes/hub_probe.py",
    "ds_recipes/config/",
    "ds_recipes/world/allocation.py",
    "ds_recipes/world/ancestors.py",
    "ds_recipes/world/intended.py",
    "ds_recipes/world/launcher_watch.py",
    "ds_recipes/world/resolve.py",
    "ds_recipes/world/restarts.py",
    "ds_recipes/world/signals.py",
    "ds_recipes/world/socket_owner.py",
    "ds_recipes/world/sources.py",
    "ds_recipes/cluster/doctor/",
    "ds_recipes/cluster/scripts/",
    "ds_recipes/cluster/job",
    "ds_recipes/cluster/judge.py",
    "ds_recipes/cluster/prepare.py",
    "ds_recipes/planner/",
    "ds_recipes/data/index/",
    "ds_recipes/data/array_files.py",
    "ds_recipes/data/published.py",
    "ds_recipes/checkpoint/hub/",
)
"""Read before the checks have passed, or by a tool of its own: no import of torch is waited for."""

SLOW_LIBRARIES = {"torch", "transformers", "deepspeed", "safetensors", "tokenizers", "wandb"}

PACKAGE_FILES = python_files("ds_recipes")


def part(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def upward_imports(file: Path) -> list[str]:
    mine = part(module_name(file))
    return [
        f"{file}:{line} imports {name}: {part(name)} is no floor before {mine}"
        for line, name in imported_modules(parsed(file))
        if name.startswith("ds_recipes.") and part(name) != mine and part(name) in FLOORS
        if FLOORS[part(name)] >= FLOORS[mine]
    ]


def test_every_part_has_a_floor() -> None:
    parts = {part(module_name(file)) for file in PACKAGE_FILES} - {""}
    assert parts == set(FLOORS)


@pytest.mark.parametrize("file", [file for file in PACKAGE_FILES if part(module_name(file))], ids=str)
def test_imports_point_one_way(file: Path) -> None:
    assert not upward_imports(file)


def test_the_package_never_imports_what_stands_on_it() -> None:
    above = {"train", "tools", "tests", "benchmarks"}
    found = [
        f"{file}:{line} {name}"
        for file in PACKAGE_FILES
        for line, name in imported_modules(parsed(file))
        if name.split(".")[0] in above
    ]
    assert not found


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_library_is_imported_only_where_it_belongs(library: str) -> None:
    found = [
        f"{file}:{line}"
        for file in python_files()
        if not file.as_posix().startswith(MAY_IMPORT[library])
        for line, name in imported_modules(parsed(file))
        if name.split(".")[0] == library
    ]
    assert not found


def test_the_checks_before_a_start_never_import_torch() -> None:
    files = [file for file in PACKAGE_FILES if file.as_posix().startswith(WITHOUT_TORCH)]
    found = [
        f"{file}:{line} {name}"
        for file in files
        for line, name in imported_modules(parsed(file))
        if name.split(".")[0] in SLOW_LIBRARIES
    ]
    assert len(files) > len(WITHOUT_TORCH)
    assert not found
