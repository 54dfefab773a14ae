"""How a key of a DeepSpeed JSON is treated: the kinds of rules that the tables of keys are made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STAGES = (1, 2, 3)
LOW = (1, 2)
SHARDED = (3,)

SAME = "same"  # FSDP2 does the same
LACKING = "lacking"  # FSDP2 has no counterpart, and no result depends on it


@dataclass(frozen=True)
class Value:
    """Honoured: bound to a setting of the run, or passed to the engine where `setting` is empty.

    "auto" is the setting's value, or DeepSpeed's own default where there is no setting.
    """

    kind: str  # see values.py
    setting: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = 0  # of numbers; None: any
    stages: tuple[int, ...] = STAGES  # where it has an effect
    fsdp: str = LACKING  # SAME, LACKING, or why FSDP2 cannot do it
    nullable: bool = False  # DeepSpeed's model takes null for absent


@dataclass(frozen=True)
class Only:
    """Accepted with these values, since they ask for nothing; others are valid for DeepSpeed and unsupported here."""

    kind: str
    values: tuple[Any, ...]
    reason: str
    stages: tuple[int, ...] = STAGES
    nullable: bool = False


@dataclass(frozen=True)
class NoEffect:
    """Accepted, and noted unless it asks for nothing: it changes nothing here."""

    reason: str
    kind: str = "any"
    stages: tuple[int, ...] = STAGES
    nullable: bool = False


@dataclass(frozen=True)
class Removed:
    """A problem wherever it stands: DeepSpeed refuses the key itself."""

    reason: str


@dataclass(frozen=True)
class Section:
    """An object with keys of its own.

    `is_model`: DeepSpeed reads it with pydantic, which takes "5" for 5 and refuses null.
    """

    keys: Mapping[str, "Rule"]
    is_model: bool = False
    stages: tuple[int, ...] = STAGES
    nullable: bool = False


@dataclass(frozen=True)
class Switch:
    """A section with a key "enabled": nothing while that is false; switched on it is unsupported, or only noted."""

    keys: tuple[str, ...]
    reason: str
    is_noted: bool = False
    is_model: bool = False


Rule = Value | Only | NoEffect | Removed | Section | Switch


def asks_nothing(value: Any) -> bool:
    """True for the values that leave everything as it is."""
    return value is None or value is False or value in ("auto", "none") or value in ([], {})
