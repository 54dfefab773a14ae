"""Names that users' scripts, dashboards and files depend on. `python -m tests.house.public_names` records them as they are now."""

import ast
import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from ds_recipes.checkpoint import run_lock
from ds_recipes.config.schema import GROUPS, Config
from ds_recipes.config.seed_flags import DATASETS, LAUNCHER_FLAGS, SWITCHES
from ds_recipes.training.run_record import RunRecord
from ds_recipes.training.state import TrainingState
from ds_recipes.training.trackers.base import METRIC_NAMES, PANELS
from tests.house.tree import parsed, python_files
from tests.unit.checkpoint.flat_engine import save

RECORDED = Path(__file__).with_name("public_names.json")
SHIPPED = ("ds_recipes", "tools")
NESTED = {"run.json": ("launches",), "state.json": ("state",)}
ENVIRONMENT = re.compile(r"DS_RECIPES_[A-Z_]+|FAULT_TEST")


def public_names() -> dict[str, list[str]]:
    """Each kind of name, sorted."""
    return {
        "settings: flags and keys of the YAML": sorted(
            item.name for group in GROUPS.values() for item in fields(group)
        ),
        "flags of earlier job scripts and of launchers": sorted({*SWITCHES, *DATASETS, *LAUNCHER_FLAGS}),
        "tools": [file.name for file in python_files("tools")],
        "options of tools": sorted(set(_options())),
        "variables of the environment": sorted(set(_variables())),
        "kinds of events": sorted(set(_events())),
        "metrics": sorted(METRIC_NAMES),
        "panels": sorted(PANELS.values()),
        "counts in state.json": sorted(field.name for field in fields(TrainingState)),
        "files of a run": sorted(_files_of_a_run()),
    }


def _files_of_a_run() -> Iterator[str]:
    """Paths below a run folder, and of JSON files the keys: `run.json: state`, `run.json: launches.started`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lock = run_lock.take(folder, "launch", lambda line: None)
        RunRecord(folder, Config(), 1, ["host"]).write_precision({})
        save(folder, 3)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                shown = path.relative_to(folder).as_posix()
                yield shown
                with contextlib.suppress(ValueError):
                    yield from (f"{shown}: {key}" for key in _keys(json.loads(path.read_bytes()), path.name))
        lock.release()


def _keys(content: Any, file: str) -> Iterator[str]:
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        yield key
        inner = value[0] if isinstance(value, list) and value else value
        if key in NESTED.get(file, ()):
            yield from (f"{key}.{more}" for more in _keys(inner, file))


def _options() -> Iterator[str]:
    """`tool.py: --option` and `tool.py: argument`; of tools whose arguments the library reads, without the tool's name."""
    for file in python_files(*SHIPPED):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                tool = f"{file.name}: " if file.parts[0] == "tools" else ""
                yield from (
                    f"{tool}{word.value}"
                    for word in node.args
                    if isinstance(word, ast.Constant) and isinstance(word.value, str)
                )


def _variables() -> Iterator[str]:
    for file in python_files(*SHIPPED):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and ENVIRONMENT.fullmatch(node.value):
                yield node.value


def _events() -> Iterator[str]:
    for file in python_files(*SHIPPED):
        for node in ast.walk(parsed(file)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "event"
                and node.args
            ):
                kind = node.args[0]
                if isinstance(kind, ast.Constant):
                    yield str(kind.value)


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(public_names(), indent=1) + "\n", encoding="utf-8")
