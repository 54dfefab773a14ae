"""The table of DeepSpeed's keys, read from table.json, which tools/make_ds_table.py writes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("table.json")


@dataclass(frozen=True)
class Entry:
    """What DeepSpeed knows of one key. `path` is dotted: zero_optimization.offload_optimizer.device."""

    path: str
    kind: str  # "bool", "int", "float", "text", "list", "object", "choice", "any", "section" or "removed"
    about: str = ""
    default: Any = None
    has_default: bool = False
    choices: tuple[Any, ...] = ()  # of the value, or of each in a list
    items: str = ""  # "text": a list of texts
    least: float | None = None
    above: float | None = None  # strictly
    most: float | None = None
    below: float | None = None  # strictly
    null: bool = False  # null may stand there
    checked: bool = False  # by a pydantic model; others are read as they stand
    open: bool = False  # a section that is handed on whole
    stages: tuple[int, ...] = ()  # where it acts; empty: at every stage
    condition: tuple[str, Any] | None = None  # another key and the value that it must have
    replaced_by: str = ""  # of an old name
    short_name: str = ""  # a second name of the key, in the same section

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class Table:
    """All keys, and the parameters of the optimizers and schedules by type."""

    deepspeed: str
    keys: Mapping[str, Entry]
    optimizers: Mapping[str, Mapping[str, Mapping[str, Any]]]  # types in lower case
    schedulers: Mapping[str, Mapping[str, Mapping[str, Any]]]

    def find(self, section: str, name: str) -> Entry | None:
        """A key of a section ("" for the top) under either of its names."""
        return self.keys.get(f"{section}.{name}" if section else name) or self.short_names.get((section, name))

    def names(self, section: str) -> list[str]:
        """The names that may stand in a section."""
        return [entry.name for entry in self.keys.values() if entry.parent == section and entry.kind != "removed"]

    @cached_property
    def short_names(self) -> Mapping[tuple[str, str], Entry]:
        return {(entry.parent, entry.short_name): entry for entry in self.keys.values() if entry.short_name}

    @cached_property
    def models(self) -> frozenset[str]:
        """The sections that a pydantic model reads, which refuses unknown keys."""
        return frozenset(entry.parent for entry in self.keys.values() if entry.checked)


@cache
def ds_table() -> Table:
    """Read the table once."""
    raw = json.loads(FILE.read_text(encoding="utf-8"))
    return Table(
        raw["deepspeed"],
        {path: _entry(path, given) for path, given in raw["keys"].items()},
        raw["optimizers"],
        raw["schedulers"],
    )


def _entry(path: str, given: Mapping[str, Any]) -> Entry:
    fields = dict(given)
    condition = fields.pop("while", None)
    return Entry(
        path,
        fields.pop("kind", "any"),
        has_default="default" in fields,
        choices=tuple(fields.pop("choices", ())),
        stages=tuple(fields.pop("stages", ())),
        condition=(condition[0], condition[1]) if condition else None,
        **fields,
    )
