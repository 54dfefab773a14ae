"""The parts that a data path is cut into, what is kept of each, and how a whole one is told from a damaged one.

Parts depend on the data alone, never on ranks or workers. A part is a folder `parts/00012/` of

    ids.npy        uint16 or uint32 [tokens]; not where ids are read from the source itself
    documents.npy  DOCUMENT [documents]
    spans.npy      int32 [spans, 2]
    part.json      what it was made of, counts, and the sizes of the files above
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ds_recipes.data.formats.remarks import Counts
from ds_recipes.data.sources.entries import ByteEntries
from ds_recipes.data.tokens.files import DataFile, OpenFiles

# A part that was cut otherwise is told by its slices and made again; a whole store knows its own parts.

LEAST_BYTES, MOST_BYTES, MOST_PARTS = 2 << 20, 16 << 20, 1024
"""A part has about this much of the source, so that all workers are busy and little is lost by a kill. There are at most
about so many parts; of a larger corpus they are larger."""

PARTS_OF_SMALL = 64  # a corpus that gives fewer parts of MOST_BYTES is cut into about so many

UNPACKED = 4  # bytes of text in a byte of a Parquet file, roughly
BYTES_PER_ENTRY = 2000  # where a source has no size of its own
BYTES_PER_TOKEN = 2

DOCUMENT = np.dtype([("length", "<i8"), ("entry", "<i8"), ("hash", "<u8"), ("spans", "<i8")])
SPAN = np.dtype("<i4")
MOST_BAD_SHOWN = 10
PART_JSON = "part.json"


@dataclass(frozen=True)
class Slice:
    """Entries `start` to `stop` of one file."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """Some slices, in the order of files and entries. `source_bytes` is how much there is to read, see there."""

    number: int
    slices: tuple[Slice, ...]
    source_bytes: int


@dataclass(frozen=True)
class PartFacts:
    """What came of a part."""

    documents: tuple[int, ...]  # of each slice
    tokens: int
    spans: int
    num_bad: int
    num_left_out: int
    first_bad: tuple[tuple[int, str], ...]
    """The first messages: the file's number, whose name is left out at the message's start; or -1 and all of it."""
    sizes: dict[str, int]
    """Bytes of each array file."""
    remarks: Counts = ()
    """On the records that are used."""


def plan_parts(files: Sequence[DataFile]) -> tuple[Part, ...]:
    """Cut all entries of all files into parts of about equal work."""
    opened = OpenFiles(tuple(files))
    work = [source_bytes(opened, Slice(number, 0, file.num_entries)) for number, file in enumerate(files)]
    total = sum(work)
    most = max(LEAST_BYTES, min(MOST_BYTES, total // PARTS_OF_SMALL), total // MOST_PARTS)
    groups: list[list[Slice]] = [[]]
    sizes = [0]
    for number, file_bytes in enumerate(work):
        for piece in _slices(opened, number, round(file_bytes / most)):
            piece_bytes = source_bytes(opened, piece)
            if groups[-1] and sizes[-1] + piece_bytes > 1.25 * most:
                groups.append([])
                sizes.append(0)
            groups[-1].append(piece)
            sizes[-1] += piece_bytes
    return tuple(
        Part(number, tuple(group), size) for number, (group, size) in enumerate(zip(groups, sizes, strict=True))
    )


def _slices(opened: OpenFiles, number: int, pieces: int) -> list[Slice]:
    cuts = opened.entries(number).cuts(max(pieces, 1))
    return [Slice(number, start, stop) for start, stop in pairwise(cuts)]


def source_bytes(opened: OpenFiles, piece: Slice) -> int:
    """How much a slice is to read. What a file is cut into has together what the whole has.

    Lines, elements and rows of CSV: their bytes, unpacked, as they differ a hundredfold in how they are packed. Rows of tables: an
    equal share of an estimate. Documents of token files: by their tokens.
    """
    file = opened.files[piece.file]
    if file.holds_tokens:
        return BYTES_PER_TOKEN * int(opened.token_file(piece.file).lengths[piece.start : piece.stop].sum())
    entries = opened.entries(piece.file)
    if isinstance(entries, ByteEntries):
        return entries.content_bytes(piece.start, piece.stop)
    place = file.place
    is_one_file = isinstance(place, Path) and not place.is_dir()
    total = UNPACKED * place.stat().st_size if is_one_file else BYTES_PER_ENTRY * file.num_entries  # type: ignore[union-attr]
    return total * piece.stop // file.num_entries - total * piece.start // file.num_entries


def part_folder(store: Path, number: int) -> Path:
    """Where a part lies."""
    return store / "parts" / f"{number:05d}"


def write_facts(folder: Path, part: Part, facts: PartFacts) -> None:
    """Write part.json."""
    content = {"slices": [asdict(piece) for piece in part.slices], **asdict(facts)}
    (folder / PART_JSON).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_facts(folder: Path, part: Part) -> PartFacts | None:
    """What came of a part, if all of it is there and was made of the same slices."""
    try:
        content: dict[str, Any] = json.loads((folder / PART_JSON).read_text(encoding="utf-8"))
        slices = tuple(Slice(**piece) for piece in content.pop("slices"))
        for name in ("documents", "first_bad", "remarks"):
            content[name] = tuple(tuple(item) if isinstance(item, list) else item for item in content.get(name, ()))
        facts = PartFacts(**content)
        is_whole = slices == part.slices and all(
            (folder / name).stat().st_size == size for name, size in facts.sizes.items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return facts if is_whole else None
