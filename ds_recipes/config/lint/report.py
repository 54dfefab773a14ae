"""Lint a DeepSpeed JSON: what DeepSpeed refuses or ignores, what this program does with the rest, and what a step will be."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_recipes.config.ds.check import check_tree
from ds_recipes.config.ds.findings import Findings
from ds_recipes.config.ds.old_names import with_todays_names
from ds_recipes.config.ds.read import read_json
from ds_recipes.config.ds.table import ds_table
from ds_recipes.config.ds.table_check import (
    COMMENT_NAMES,
    Finding,
    ignored_keys,
    no_effect,
    table_problems,
    table_warnings,
)
from ds_recipes.config.lint.advice import ADDRESSES, notes, removed_optimizers, warnings, world_problems
from ds_recipes.config.lint.batch import check_batch
from ds_recipes.config.lint.lines import Places, find_places
from ds_recipes.config.lint.memory import Memory, memory_of

ERROR, UNSUPPORTED, WARNING, NOTE = "errors", "not in this program", "warnings", "notes"
LEVELS = (ERROR, UNSUPPORTED, WARNING, NOTE)


GIVEN_ELSEWHERE = {"activation_checkpointing.contiguous_memory_optimization"}
"""Keys that need another, which programs may also hand to DeepSpeed themselves (checkpointing.configure)."""


@dataclass(frozen=True)
class Line:
    """One line of the report, without the file's name. `line` counts from 1; None where no key stands for it."""

    level: str
    key: str
    text: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


@dataclass
class Report:
    """What there is to say about one file."""

    path: str
    lines: list[Line] = field(default_factory=list)
    batch: str = ""
    memory: Memory | None = None

    def of(self, level: str) -> list[Line]:
        return [line for line in self.lines if line.level == level]

    @property
    def verdict(self) -> str:
        """The last line: errors, or none and what train.py would refuse."""
        errors, refused = len(self.of(ERROR)), len(self.of(UNSUPPORTED))
        words = f"{errors} error{'s' * (errors != 1)}" if errors else "no errors"
        if refused:
            words += f"; train.py would refuse {refused} setting{'s' * (refused != 1)}{' more' * (errors > 0)}"
        return f"{self.path}: {words}"


def lint_tree(tree: Mapping[str, Any], engine: str = "deepspeed", world: int | None = None) -> Report:
    """Check what was read from a file."""
    report = Report("")
    _check(report, tree, Places(), engine, world)
    return report


def lint_file(path: str, engine: str = "deepspeed", world: int | None = None) -> Report:
    """Read a file as DeepSpeed does and check it, for an engine and, if given, a number of ranks."""
    report = Report(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        places = find_places(text)
        tree, file_notes = read_json(path)
    except (OSError, UnicodeDecodeError):
        return _unreadable(report)
    except ValueError as error:
        twins, file_notes = _in_spite_of_twins(text, places), ()
        if twins is None:
            report.lines.append(_file_error(path, str(error)))
            return report
        tree = twins
    report.lines += [Line(NOTE, "", note) for note in file_notes]
    report.lines += [
        Line(
            ERROR,
            key,
            f"stands here a second time; DeepSpeed refuses the file. The first is in line {places.lines[key]}",
            line,
        )
        for key, line in places.twice
    ]
    _check(report, tree, places, engine, world)
    return report


def _unreadable(report: Report) -> Report:
    try:
        read_json(report.path)
    except ValueError as error:
        report.lines.append(_file_error(report.path, str(error)))
    return report


def _file_error(path: str, message: str) -> Line:
    """The reader's message with the file's name and the line taken off its front."""
    rest = message.removeprefix(path)
    where = re.match(r":(\d+)?:? ?", rest)
    return Line(ERROR, "", rest[where.end() :] if where else rest, int(where[1]) if where and where[1] else None)


def _in_spite_of_twins(text: str, places: Places) -> Mapping[str, Any] | None:
    """The tree of a file that is refused only for a key that stands twice; None for others."""
    if not places.twice:
        return None
    try:
        tree = json.loads(text)
    except ValueError:
        import hjson  # only for files that need it

        try:
            tree = hjson.loads(text)
        except (ValueError, IndexError, OverflowError):
            return None
    return tree if isinstance(tree, dict) else None


def _check(report: Report, tree: Mapping[str, Any], places: Places, engine: str, world: int | None) -> None:
    found = check_tree(tree, engine)
    today = with_todays_names(tree, Findings())
    stage = _stage(today)
    errors = _merged([*table_problems(tree), *removed_optimizers(today)], [_finding(line) for line in found.problems])
    errors, unsupported, comments = _sorted_out(errors, tree)
    batch = check_batch(tree, world)
    refused = {error.key for error in errors}
    errors += [
        problem for problem in (*batch.problems, *world_problems(today, stage, world)) if problem.key not in refused
    ]
    unsupported = _merged(unsupported, [_finding(line) for line in found.unsupported])
    warned = [*table_warnings(tree), *warnings(today, stage)]
    heard = {each.key for each in (*errors, *unsupported, *comments, *(_finding(line) for line in found.notes))}
    warned += [each for each in ignored_keys(tree) if each.key not in heard]
    noted = [*comments, *(_finding(line) for line in found.notes)]
    if engine == "fsdp":
        noted += [
            Finding(key, "has no counterpart on FSDP2: it goes without, and no result depends on it")
            for key in found.lacking
        ]
    spoken = {each.key for each in (*errors, *unsupported, *noted)}
    noted += [each for each in no_effect(today, stage) if not spoken & {each.key, each.key.rpartition(".")[0]}]
    noted += notes(today, stage)
    said: set[str] = set()
    for level, findings in ((ERROR, errors), (UNSUPPORTED, unsupported), (WARNING, warned), (NOTE, noted)):
        fresh = [each for each in findings if level == NOTE or each.key not in said]
        said |= {each.key for each in findings}
        report.lines += [Line(level, each.key, _with_address(each), places.line_of(each.key)) for each in fresh]
    report.batch = batch.words
    if not errors:
        report.memory = memory_of(today, stage, engine, world or 1)


def _finding(line: str) -> Finding:
    key, _, text = line.partition(" ")
    return Finding(key.rstrip(":"), text)


def _merged(first: Sequence[Finding], second: Sequence[Finding]) -> list[Finding]:
    """Both, without the second's line about a key that the first speaks of."""
    keys = {each.key for each in first}
    return [*first, *(each for each in second if each.key not in keys)]


def _sorted_out(errors: list[Finding], tree: Mapping[str, Any]) -> tuple[list[Finding], list[Finding], list[Finding]]:
    """Errors, what DeepSpeed takes after all and train.py does not, and keys that are comments."""
    table, mine = ds_table(), {problem.key for problem in table_problems(tree)}
    ignored = {each.key: each for each in ignored_keys(tree)}
    misread = {each.key: each for each in table_warnings(tree)}
    real: list[Finding] = []
    taken: list[Finding] = []
    comments: list[Finding] = []
    for error in errors:
        entry = table.keys.get(error.key)
        if error.key in ignored:
            is_comment = "." not in error.key and COMMENT_NAMES.match(error.key)
            (comments if is_comment else taken).append(ignored[error.key])
        elif entry and error.key not in mine and error.text.startswith("must be "):
            taken.append(misread.get(error.key) or Finding(error.key, f"{error.text} (DeepSpeed takes it)"))
        elif error.key not in mine and ("DeepSpeed ignores" in error.text or error.key in GIVEN_ELSEWHERE):
            taken.append(error)
        else:
            real.append(error)
    return real, taken, comments


def _with_address(finding: Finding) -> str:
    address = next((ADDRESSES[key] for key in _around(finding.key) if key in ADDRESSES), "")
    return finding.text if not address or "https://" in finding.text else f"{finding.text} ({address})"


def _around(key: str) -> list[str]:
    """A key and the sections around it, up to the second level."""
    return [key, *([key.rpartition(".")[0]] if key.count(".") > 1 else [])]


def _stage(tree: Mapping[str, Any]) -> int:
    zero = tree.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if stage == "auto":
        return 3
    return int(stage) if str(stage) in ("0", "1", "2", "3") else 0
