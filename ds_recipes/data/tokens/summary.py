"""store.json: what a whole store holds, and the sizes of its files. It is written last, so where it lies all is there."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_recipes.data.formats.remarks import Counts
from ds_recipes.data.published import replacing

STORE_JSON = "store.json"


@dataclass(frozen=True)
class Summary:
    """Counts over all parts."""

    documents: int
    tokens: int
    num_bad: int
    num_left_out: int
    first_bad: tuple[tuple[int, str], ...]  # see PartFacts
    parts: tuple[tuple[int, int], ...]  # documents and tokens of each
    sizes: dict[str, int]  # bytes of each file that is read from a whole store
    remarks: Counts = ()  # on the records that are used


def write_summary(folder: Path, summary: Summary) -> None:
    """Write store.json; it appears whole."""
    with replacing(folder / STORE_JSON) as file:
        file.write(json.dumps(asdict(summary)).encode() + b"\n")


def read_summary(folder: Path) -> Summary | None:
    """What store.json says, if it is there and can be read."""
    try:
        content: dict[str, Any] = json.loads((folder / STORE_JSON).read_text(encoding="utf-8"))
        for name in ("first_bad", "parts", "remarks"):
            content[name] = tuple(tuple(item) for item in content.get(name, ()))
        return Summary(**content)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def find_damage(folder: Path, summary: Summary) -> str | None:
    """The first file that is not as it was written, and how so. Only sizes are looked at."""
    for name, size in summary.sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        if found != size:
            return f"{folder / name} has {found:,} bytes, not {size:,}"
    return None
