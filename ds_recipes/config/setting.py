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
) -> Any:
    """Declare a documented dataclass field. `default_doc` says what an unset (None) value means."""
    metadata = {
        "doc": doc,
        "unit": unit,
        "limits": Limits(choices, least, above, below),
        "default_doc": default_doc,
    }
    return field(default=default, metadata=metadata)
