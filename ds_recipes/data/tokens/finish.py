"""The end of a build: the documents of all parts in one table, then store.json. Before it: what is there already."""

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ds_recipes.data.array_files import INT64, ArrayFile, array_bytes, map_array
from ds_recipes.data.formats.remarks import joined
from ds_recipes.data.published import publishing
from ds_recipes.data.tokens.parts import MOST_BAD_SHOWN, SPAN, Part, PartFacts, part_folder, read_facts
from ds_recipes.data.tokens.summary import Summary, read_summary, write_summary
from ds_recipes.errors import DsRecipesError
from ds_recipes.world.channel import wait_until
from ds_recipes.world.hang.activity import progress

SHOWN_SECONDS = 120.0
"""How long a shared file system may take to show a rank what another one has written."""

UINT64 = np.dtype("<u8")


def missing_parts(folder: Path, parts: Sequence[Part]) -> list[int]:
    """The parts that have to be made. Damaged ones are taken away."""
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    return [part.number for part in parts if not _whole_or_gone(part_folder(folder, part.number), _reads(part))]


def _reads(part: Part) -> Callable[[Path], bool]:
    return lambda place: read_facts(place, part) is not None


def finish(folder: Path, parts: Sequence[Part]) -> None:
    """Join the parts' tables, and declare the store whole. What killed jobs have left half done is cleared away.

    Raises:
        DsRecipesError: a part that another rank has made does not show up.
    """
    facts = [_shown(folder, part) for part in parts]
    table, sizes = folder / "documents", _table_sizes(parts, facts)
    if not _whole_or_gone(table, lambda place: _has(place, sizes)):
        with unless(lambda: _has(table, sizes)), publishing(table) as hidden:
            _join(folder, hidden, parts, facts)
    with unless(lambda: read_summary(folder) is not None):
        write_summary(folder, _summary(parts, facts, sizes))
    for left in [*folder.glob(".*.part"), *(folder / "parts").glob(".*.part")]:
        _delete(left)


@contextmanager
def unless(is_done: Callable[[], bool]) -> Iterator[None]:
    """Forgive a failed write if another job has done the same meanwhile, and has cleared away what was half done."""
    try:
        yield
    except OSError:
        if not is_done():
            raise


def _has(folder: Path, sizes: dict[str, int]) -> bool:
    try:
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return False


def _shown(folder: Path, part: Part) -> PartFacts:
    place = part_folder(folder, part.number)
    wait_until(lambda: read_facts(place, part) is not None, SHOWN_SECONDS)
    facts = read_facts(place, part)
    if facts is None:
        raise DsRecipesError(
            f"{place}: is not there {SHOWN_SECONDS:.0f} s after it was made. Has it been removed, or do the ranks see different "
            "folders under this name? Start again; what is done is used again."
        )
    return facts


def _join(folder: Path, table: Path, parts: Sequence[Part], facts: Sequence[PartFacts]) -> None:
    """Write the arrays of all documents, part by part."""
    with (
        ArrayFile(table / "offsets.npy", INT64) as offsets,
        ArrayFile(table / "span_offsets.npy", INT64) as span_offsets,
        ArrayFile(table / "entries.npy", INT64) as entries,
        ArrayFile(table / "hashes.npy", UINT64) as hashes,
        ArrayFile(table / "spans.npy", SPAN, (2,)) as spans,
        ArrayFile(table / "slices.npy", INT64, (2,)) as slices,
    ):
        tokens = num_spans = documents = 0
        offsets.append(np.zeros(1, INT64))
        span_offsets.append(np.zeros(1, INT64))
        for part, fact in zip(parts, facts, strict=True):
            progress()
            rows = map_array(part_folder(folder, part.number) / "documents.npy")  # [documents of the part]
            offsets.append(tokens + np.cumsum(rows["length"]))
            span_offsets.append(num_spans + np.cumsum(rows["spans"]))
            entries.append(rows["entry"])
            hashes.append(rows["hash"])
            spans.append(map_array(part_folder(folder, part.number) / "spans.npy"))
            for piece, count in zip(part.slices, fact.documents, strict=True):
                slices.append(np.array([[documents, piece.file]]))
                documents += count
            tokens, num_spans = tokens + fact.tokens, num_spans + fact.spans


def _table_sizes(parts: Sequence[Part], facts: Sequence[PartFacts]) -> dict[str, int]:
    documents = sum(sum(fact.documents) for fact in facts)
    return {
        "offsets.npy": array_bytes(INT64, (), documents + 1),
        "span_offsets.npy": array_bytes(INT64, (), documents + 1),
        "entries.npy": array_bytes(INT64, (), documents),
        "hashes.npy": array_bytes(UINT64, (), documents),
        "spans.npy": array_bytes(SPAN, (2,), sum(fact.spans for fact in facts)),
        "slices.npy": array_bytes(INT64, (2,), sum(len(part.slices) for part in parts)),
    }


def _summary(parts: Sequence[Part], facts: Sequence[PartFacts], table_sizes: dict[str, int]) -> Summary:
    ids = {
        f"parts/{part.number:05d}/ids.npy": fact.sizes["ids.npy"]
        for part, fact in zip(parts, facts, strict=True)
        if "ids.npy" in fact.sizes
    }
    return Summary(
        documents=sum(sum(fact.documents) for fact in facts),
        tokens=sum(fact.tokens for fact in facts),
        num_bad=sum(fact.num_bad for fact in facts),
        num_left_out=sum(fact.num_left_out for fact in facts),
        first_bad=tuple(bad for fact in facts for bad in fact.first_bad)[:MOST_BAD_SHOWN],
        parts=tuple((sum(fact.documents), fact.tokens) for fact in facts),
        sizes={f"documents/{name}": size for name, size in table_sizes.items()} | ids,
        remarks=joined(fact.remarks for fact in facts),
    )


def _whole_or_gone(folder: Path, is_whole: Callable[[Path], bool]) -> bool:
    """True if a folder is there and whole. A damaged one is taken away at once, then removed in peace.

    Whether it is there is asked first: one that another job publishes after that is not taken for a damaged one. It would
    be removed under that job's feet.
    """
    if not folder.exists():
        return False
    if is_whole(folder):
        return True
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        folder.rename(hidden)
        if is_whole(hidden):  # another job has replaced the damaged one just now
            hidden.rename(folder)
            return True
    except OSError:
        return False
    _delete(hidden)
    return False


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
