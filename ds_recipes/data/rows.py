"""From documents to packed rows: which documents are used, what becomes of long ones, and what that leaves."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from ds_recipes.data.dataset import PackedDataset, PackingFacts
from ds_recipes.data.packed import open_packing
from ds_recipes.data.packing import Packing, pack
from ds_recipes.data.targets import TargetCounts
from ds_recipes.data.tokens.documents import Documents
from ds_recipes.errors import InputError
from ds_recipes.world.group import World

Ints = np.ndarray[Any, np.dtype[Any]]

SPLIT_SALT = b"held-out split"


@dataclass(frozen=True)
class Layout:
    """How documents become rows. `long_documents`: split, truncate, drop or error; `skip_bad` leaves out documents that a
    cut would rob of every target, instead of refusing them.
    """

    packing: str
    context_size: int
    long_documents: str
    skip_bad: bool
    padding_id: int


@dataclass(frozen=True)
class Side:
    """Which documents of a source are used.

    With `fraction`, a document is held out if its content's hash falls below it: `held_out` takes those, its contrary
    the others. `excluded` are hashes of documents that are never used, ascending, with the fingerprint of where they
    come from.
    """

    fraction: float | None = None
    held_out: bool = False
    excluded: Ints | None = None  # uint64 [hashes]
    excluded_by: str = ""

    @property
    def key(self) -> dict[str, Any]:
        return {"fraction": self.fraction, "held_out": self.held_out, "excluded_by": self.excluded_by}


def build_rows(documents: Documents, layout: Layout, side: Side, world: World) -> PackedDataset:
    """Pack the documents of one source, or open the packing that lies beside them. Every rank must call it.

    Raises:
        InputError: on all ranks: a document that is too long or left without a target, where that is refused.
    """
    key = {
        "packing": layout.packing,
        "context_size": layout.context_size,
        "long_documents": layout.long_documents,
        "skip_bad": layout.skip_bad,
        "side": side.key,
    }

    def opened() -> tuple[Packing, dict[str, int]]:
        return open_packing(documents.folder, key, lambda: _make(documents, layout, side, world.break_off_if_asked))

    # The first rank of each host packs, the others find it done; a host that shares no disk with rank 0 packs too.
    world.check("packing", lambda: opened() if world.local_rank == 0 else None)
    packing, numbers = world.check("packing", opened)
    facts = PackingFacts(**numbers)
    left_out_by = json.dumps(side.key) if facts.held_out else ""
    return PackedDataset(documents, packing, facts, layout.context_size, layout.padding_id, layout.packing, left_out_by)


def is_held_out(hashes: Ints, fraction: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which content hashes (uint64) fall on the validation side; the same for equal content in any corpus and any run."""
    salt = np.uint64(xxhash.xxh3_64_intdigest(SPLIT_SALT))
    mixed = (np.asarray(hashes, np.uint64) ^ salt) * np.uint64(0x9E3779B97F4A7C15)  # wraps
    below: np.ndarray[Any, np.dtype[np.bool_]] = (mixed >> np.uint64(11)).astype(np.float64) < fraction * 2.0**53
    return below


def _make(
    documents: Documents, layout: Layout, side: Side, pause: Callable[[], None]
) -> tuple[Packing, dict[str, int]]:
    lengths = documents.lengths
    used = _chosen(documents, side)
    held_out = len(documents) - len(used)
    too_long = used[lengths[used] - 1 > layout.context_size]  # a last token may be a target alone
    if layout.long_documents == "error" and len(too_long):
        _refuse_long(documents, too_long, layout.context_size)
    counts = TargetCounts(documents)
    without = np.zeros(0, np.int64)
    if layout.long_documents == "truncate":
        seen = np.minimum(lengths[used], layout.context_size + 1)
        without = used[counts.between(used, np.ones_like(used), seen) == 0]
        if len(without) and not layout.skip_bad:
            _refuse_without_target(documents, without, layout.context_size)
        used = np.setdiff1d(used, without, assume_unique=True)
    how = "split" if layout.long_documents == "error" else layout.long_documents
    packing = pack(layout.packing, lengths, layout.context_size, how, used, pause)
    stop = np.minimum(packing.start + packing.length + 1, lengths[packing.document])
    facts = PackingFacts(
        tokens=int(packing.length.sum()),
        target_tokens=int(counts.between(packing.document, packing.start + 1, stop).sum()),
        documents=int((packing.start == 0).sum()),
        truncated=len(np.setdiff1d(too_long, without)) if how == "truncate" else 0,
        dropped=packing.num_dropped,
        without_target=len(without),
        held_out=held_out,
    )
    return packing, asdict(facts)


def _chosen(documents: Documents, side: Side) -> Ints:
    """The numbers of the documents on this side, ascending."""
    used = np.ones(len(documents), bool)
    if side.fraction is not None:
        used = is_held_out(documents.hashes, side.fraction) == side.held_out
    if side.excluded is not None:
        used &= ~np.isin(documents.hashes, side.excluded)
    return np.flatnonzero(used)


def _refuse_long(documents: Documents, too_long: Ints, context_size: int) -> None:
    first = int(too_long[0])
    length = int(documents.offsets[first + 1] - documents.offsets[first])
    raise InputError(
        f"{documents.where(first)}: the document has {length:,} tokens, more than a row of {context_size:,}."
        f"{_also(len(too_long))} Raise --context_size, or choose another --truncation."
    )


def _refuse_without_target(documents: Documents, without: Ints, context_size: int) -> None:
    first = int(without[0])
    border = int(documents.spans_of(first)[0, 0])
    raise InputError(
        f"{documents.where(first)}: the prompt has {border:,} tokens, so no target fits into a row of {context_size:,}."
        f"{_also(len(without))} Raise --context_size, shorten or remove the record, or leave such records out with "
        "--bad_records skip."
    )


def _also(number: int) -> str:
    return f" The same holds for {number - 1:,} more records." if number > 1 else ""
