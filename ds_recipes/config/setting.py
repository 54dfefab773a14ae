"""How one setting is declared: a dataclass field with its documentation, unit and limits."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What a value must satisfy beyond its type. `above` and `below` exclude their bound, `least` includes it."""

    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    below: float | None = None


def setting(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    default_doc: str = "",
    is_path: bool = False,
) -> Any:
    """Declare a documented dataclass field. `default_doc` says what an unset (None) value means.

    `is_path`: a value may be a path, in which `~` and variables are replaced; always so where the unit is "path".
    """
    metadata = {
        "doc": doc,
        "unit": unit,
        "limits": Limits(choices, least, above, below),
        "default_doc": default_doc,
        "is_path": is_path or unit == "path",
    }
    return field(default=default, metadata=metadata)
