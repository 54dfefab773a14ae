"""What a source holds, in numbers: for `tools/inspect_data.py` and anyone who wants to know before training."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ds_recipes.data.dataset import PackedDataset


@dataclass(frozen=True)
class LengthBin:
    """Documents of `first` to `last` tokens."""

    first: int
    last: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class SourceStatistics:
    """One source. `duplicates` are documents whose content an earlier one has already."""

    name: str
    files: int
    records: int  # all that were read: documents, bad records, and those left out by the format
    bad_records: int
    left_out: int
    documents: int
    tokens: int
    longest: int  # tokens
    median: int  # tokens
    duplicates: int
    most_copies: int  # of one document
    bins: tuple[LengthBin, ...]


def statistics_of(source: PackedDataset) -> SourceStatistics:
    """Count one source's documents; one pass over their lengths and content hashes."""
    documents = source.documents
    lengths = np.asarray(documents.lengths)
    _, copies = np.unique(np.asarray(documents.hashes), return_counts=True)
    return SourceStatistics(
        name=source.name,
        files=len(documents.files),
        records=len(documents) + documents.num_bad + documents.num_left_out,
        bad_records=documents.num_bad,
        left_out=documents.num_left_out,
        documents=len(documents),
        tokens=int(documents.offsets[-1]),
        longest=int(lengths.max(initial=0)),
        median=int(np.median(lengths)) if len(lengths) else 0,
        duplicates=len(documents) - len(copies),
        most_copies=int(copies.max(initial=0)),
        bins=length_bins(lengths),
    )


def length_bins(lengths: np.ndarray[Any, np.dtype[Any]]) -> tuple[LengthBin, ...]:
    """A histogram of lengths in tokens, by powers of two, from the shortest to the longest."""
    if len(lengths) == 0:
        return ()
    powers = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)  # [documents]
    low, high = int(powers.min()), int(powers.max())
    counts = np.bincount(powers - low, minlength=high - low + 1)
    tokens = np.bincount(powers - low, weights=lengths, minlength=high - low + 1)
    return tuple(
        LengthBin(2 ** (low + i), 2 ** (low + i + 1) - 1, int(counts[i]), int(tokens[i])) for i in range(len(counts))
    )
