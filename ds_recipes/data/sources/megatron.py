"""Token files in Megatron's form (`X.bin` with the tokens, `X.idx` with where each document lies), read as they are.

The form is that of `IndexedDataset` of Megatron-LM (megatron/core/datasets/indexed_dataset.py), version 1.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ds_recipes.data.index.cache import Progress, file_fingerprint
from ds_recipes.data.index.raw import open_packed
from ds_recipes.data.mapped import map_file
from ds_recipes.errors import InputError, NoRecordsError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, entries of the document index
VERSION = 1
TOKEN_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CHECKED_SEQUENCES = 1 << 20

Ints = np.ndarray[Any, np.dtype[np.int64]]


def is_megatron(path: Path) -> bool:
    """True if `path` is X.bin, X.idx or X, and X.idx is Megatron's index."""
    try:
        with _pair(path)[1].open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class MegatronFile:
    """The documents of a pair of token files; several threads may read them at once.

    `lengths` is int64 [documents]: tokens of each. A document is the sequences between two entries of the document index.
    """

    def __init__(self, path: Path, cache: Path, progress: Progress | None = None) -> None:
        """Map the pair and check everything that the index says of the tokens.

        Raises:
            InputError: a file is missing, or the index contradicts itself or the size of the files.
        """
        self._bin, self._idx = _pair(path)
        for file in (self._idx, self._bin):
            open_packed(file).close()
        self.name = str(self._bin)
        self._read_index()
        self._check_sequences()
        first_tokens = np.concatenate([[0], np.cumsum(self._sequence_lengths, dtype=np.int64)])  # [sequences + 1]
        self.lengths: Ints = np.diff(first_tokens[self._document_index])  # [documents]
        digests = [file_fingerprint(file, cache, progress) for file in (self._idx, self._bin)]
        self.fingerprint = str(xxhash.xxh3_128(bytes.fromhex("".join(digests))).hexdigest())

    def __len__(self) -> int:
        return len(self._document_index) - 1

    def tokens(self, document: int) -> np.ndarray[Any, Any]:
        """A document's ids [tokens] in the file's own dtype: a view of the map, unless its sequences lie apart.

        Raises:
            InputError: an id is negative; the message names the document, from 1.
        """
        first, last = int(self._document_index[document]), int(self._document_index[document + 1])
        starts = self._pointers[first:last] // self._tokens.itemsize
        lengths = self._sequence_lengths[first:last].astype(np.int64)
        if first == last:
            return self._tokens[:0]
        if np.array_equal(starts[1:], (starts + lengths)[:-1]):
            ids = self._tokens[int(starts[0]) : int(starts[0]) + int(lengths.sum())]
        else:
            pieces = zip(starts.tolist(), lengths.tolist(), strict=True)
            ids = np.concatenate([self._tokens[start : start + length] for start, length in pieces])
        if ids.dtype.kind == "i" and len(ids) and int(ids.min()) < 0:
            raise InputError(f"{self._bin}:{document + 1}: holds the token id {int(ids.min()):,}. {AGAIN}")
        return ids

    def _read_index(self) -> None:
        size = self._idx.stat().st_size
        with self._idx.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise self._wrong("is no index of Megatron's")
        _, version, code, sequences, entries = HEADER.unpack(header)
        if version != VERSION:
            raise self._wrong(f"has version {version}, not {VERSION}")
        if code not in TOKEN_DTYPES:
            kind = {6: "float64", 7: "float32"}.get(code, f"an unknown dtype (code {code})")
            raise self._wrong(f"says that the tokens are {kind}, not whole numbers")
        expected = HEADER.size + sequences * 12 + entries * 8
        if size != expected:
            raise self._wrong(
                f"has {size:,} bytes, but {sequences:,} sequences and {entries:,} entries of documents need {expected:,}"
            )
        if sequences == 0 or entries < 2:
            raise NoRecordsError(f"{self._idx}: holds no documents. {AGAIN}")
        index = np.frombuffer(map_file(self._idx), np.uint8)
        lengths_end = HEADER.size + 4 * sequences
        pointers_end = lengths_end + 8 * sequences
        self._sequence_lengths = index[HEADER.size : lengths_end].view("<i4")  # [sequences]
        self._pointers = index[lengths_end:pointers_end].view("<i8")  # [sequences], in bytes
        self._document_index = index[pointers_end:].view("<i8")  # [documents + 1]
        self._tokens = self._map_tokens(np.dtype(TOKEN_DTYPES[code]))

    def _map_tokens(self, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        size = self._bin.stat().st_size
        if size == 0:
            raise InputError(f"{self._bin}: is empty. {AGAIN}")
        if size % dtype.itemsize:
            raise self._wrong(f"says that a token has {dtype.itemsize} bytes, but {self._bin} has {size:,} bytes")
        return np.frombuffer(map_file(self._bin), dtype)

    def _check_sequences(self) -> None:
        """Every sequence lies in the token file, and the documents cover the sequences in order."""
        itemsize, size = self._tokens.itemsize, self._bin.stat().st_size
        for low in range(0, len(self._pointers), CHECKED_SEQUENCES):
            pointers = self._pointers[low : low + CHECKED_SEQUENCES]
            lengths = self._sequence_lengths[low : low + CHECKED_SEQUENCES].astype(np.int64)
            wrong = (lengths < 0) | (pointers < 0) | (pointers % itemsize != 0) | (pointers > size - lengths * itemsize)
            if wrong.any():
                at = int(wrong.argmax())
                raise self._wrong(
                    f"lays sequence {low + at:,} at byte {int(pointers[at]):,} with {int(lengths[at]):,} tokens of "
                    f"{itemsize} bytes, but {self._bin} has {size:,} bytes"
                )
        documents = self._document_index
        if documents[0] != 0 or documents[-1] != len(self._pointers) or (documents[1:] < documents[:-1]).any():
            raise self._wrong(
                f"has documents that do not cover its {len(self._pointers):,} sequences in order "
                f"(from {int(documents[0]):,} to {int(documents[-1]):,})"
            )

    def _wrong(self, problem: str) -> InputError:
        return InputError(f"{self._idx}: {problem}. {AGAIN}")


AGAIN = "Copy both files again, or write them again with Megatron's preprocessing."


def _pair(path: Path) -> tuple[Path, Path]:
    """(X.bin, X.idx) for X.bin, X.idx or X."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
