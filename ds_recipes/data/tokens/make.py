"""Making one part: read its slices, render, encode, and write what comes of it. Runs in ranks and in their workers.

Nothing here imports torch or transformers: a worker process must start quickly and stay small.
"""

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ds_recipes.data.array_files import ArrayFile
from ds_recipes.data.encode import Encoded, Encoder
from ds_recipes.data.formats.choose import make_format
from ds_recipes.data.formats.remarks import Remark, counted
from ds_recipes.data.formats.sample import Format, FormatSettings, Parts, Rendered, Sample
from ds_recipes.data.published import publishing
from ds_recipes.data.sources.record import Bad, Record, Source
from ds_recipes.data.tokens.files import DataFile, OpenFiles
from ds_recipes.data.tokens.parts import (
    DOCUMENT,
    MOST_BAD_SHOWN,
    SPAN,
    Part,
    PartFacts,
    Slice,
    part_folder,
    read_facts,
    source_bytes,
    write_facts,
)
from ds_recipes.errors import DsRecipesError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_RECORDS = 1000
BATCH_CHARACTERS = 2 << 20
"""A batch ends with the record that reaches one of these, so long records do not fill the memory."""

FULL = (errno.ENOSPC, errno.EDQUOT)

GoOn = Callable[[int], bool]
"""Whether to go on with a part of which so many source bytes are tokenised. Asked from record to record, as a user's function
may take its time, and from window to window of a long text."""


class Stopped(Exception):
    """Another rank has found an earlier wrong record, or has failed, or the run is to stop; this is not needed."""


@dataclass(frozen=True)
class Task:
    """All that a process needs to make the parts of a store. Picklable."""

    folder: Path  # of the store
    files: tuple[DataFile, ...]
    parts: tuple[Part, ...]
    format: FormatSettings
    tokenizer: "PreTrainedTokenizerBase | None"  # where the format needs it
    encoder: Encoder
    vocabulary_size: int
    skip_bad: bool
    keeps_ids: bool


@dataclass
class _Batch:
    """Entries `start` to `stop`: records to be encoded at once, and what was no record among them."""

    start: int
    stop: int
    records: list[Record] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    num_left_out: int = 0
    remarks: Counter[Remark] = field(default_factory=Counter)
    characters: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.records) + len(self.bad) >= BATCH_RECORDS or self.characters >= BATCH_CHARACTERS


@dataclass
class _Position:
    """How far a part is, for who is asked whether to go on with it."""

    go_on: GoOn
    source_bytes: int = 0

    def check(self) -> None:
        if not self.go_on(self.source_bytes):
            raise Stopped


class PartMaker:
    """Makes parts of one store, one after the other."""

    def __init__(self, task: Task) -> None:
        """Make the format.

        Raises:
            InputError: its template or function cannot be used.
        """
        self._task = task
        self._format = None if task.files[0].holds_tokens else make_format(task.format, task.tokenizer)
        self._files = OpenFiles(task.files, most_open=1)

    def make(self, number: int, go_on: GoOn = lambda source_bytes: True) -> PartFacts:
        """Write a part unless it is there already. `go_on` is asked again and again, the last time about all source bytes.

        Raises:
            InputError: the first record that cannot be used, unless such are skipped.
            Stopped: `go_on` said no.
        """
        part = self._task.parts[number]
        target = part_folder(self._task.folder, number)
        facts = read_facts(target, part)
        if facts is not None:  # another job works on the same store
            return facts
        try:
            with publishing(target) as folder:
                facts = self._write(folder, part, _Position(go_on))
        except OSError as error:
            facts = read_facts(target, part)
            if facts is not None:  # another job made it, and has cleared away what it found half done
                return facts
            if error.errno in FULL:
                raise _full(self._task.folder, error) from error
            raise
        return facts

    def _write(self, folder: Path, part: Part, position: _Position) -> PartFacts:
        with PartWriter(folder, self._task.vocabulary_size if self._task.keeps_ids else None) as writer:
            for piece in part.slices:
                writer.begin_slice()
                name = self._task.files[piece.file].name
                for encoded, bad, num_left_out, remarks in self._encoded(piece, position):
                    if bad and not self._task.skip_bad:
                        raise InputError(bad[0].message)
                    writer.add(encoded)
                    writer.add_others(piece.file, name, bad, num_left_out, remarks)
                    position.check()
        facts = writer.facts()
        write_facts(folder, part, facts)
        return facts

    def _encoded(self, piece: Slice, position: _Position) -> Iterator[tuple[Encoded, list[Bad], int, Counter[Remark]]]:
        """Documents of a slice, batch by batch; entries that cannot be used, in order; how many were left out; remarks."""
        task = self._task
        if self._format is None:
            stop = piece.start
            for encoded, bad in self._files.token_file(piece.file).read(piece.start, piece.stop, task.vocabulary_size):
                start, stop = stop, stop + len(encoded.entries) + len(bad)
                position.source_bytes += source_bytes(self._files, Slice(piece.file, start, stop))
                yield encoded, bad, 0, Counter()
            return
        for batch in read_batches(self._files.source(piece.file), piece, self._format, task.skip_bad, position):
            encoded = self._encode(
                batch, source_bytes(self._files, Slice(piece.file, batch.start, batch.stop)), position
            )
            yield (
                encoded,
                sorted([*batch.bad, *encoded.bad], key=lambda one: one.entry),
                batch.num_left_out,
                batch.remarks + Counter(encoded.remarks),
            )

    def _encode(self, batch: _Batch, batch_bytes: int, position: _Position) -> Encoded:
        """Move on by the bytes of the batch, as its characters are read."""
        before, characters = position.source_bytes, 0

        def note(more: int) -> None:
            nonlocal characters
            characters += more
            position.source_bytes = before + batch_bytes * min(characters, batch.characters) // max(batch.characters, 1)
            position.check()

        encoded = self._task.encoder.encode(batch.records, batch.samples, note)
        position.source_bytes = before + batch_bytes
        return encoded


def read_batches(
    source: Source, piece: Slice, record_format: Format, skip_bad: bool, position: _Position
) -> Iterator[_Batch]:
    """The records of a slice as samples, in batches. Without `skip_bad` nothing is read after a bad entry.

    Raises:
        Stopped: see `GoOn`.
    """
    batch = _Batch(piece.start, piece.start)
    for record in source.read(piece.start, piece.stop):
        position.check()
        batch.stop = record.entry + 1
        try:
            sample = record_format.read(record) if isinstance(record, Record) else record
        except InputError as error:
            sample = Bad(record.entry, str(error))
        if isinstance(sample, Bad):
            batch.bad.append(sample)
            if not skip_bad:
                break
        elif sample is None:
            batch.num_left_out += 1
        else:
            assert isinstance(record, Record)
            batch.records.append(record)
            batch.samples.append(sample)
            batch.remarks.update(sample.remarks)
            batch.characters += _characters(sample)
        if batch.is_full:
            yield batch
            batch = _Batch(batch.stop, batch.stop)
    batch.stop = piece.stop  # the last entries may be blank
    yield batch


def _characters(sample: Sample) -> int:
    if isinstance(sample, Parts):
        return sum(len(text) for text, _ in sample.parts)
    return len(sample.text) if isinstance(sample, Rendered) else len(sample.ids)


def _full(folder: Path, error: OSError) -> DsRecipesError:
    return DsRecipesError(
        f"{folder}: tokens cannot be written ({error.strerror}). Free some space, or name another folder with "
        "--data_cache. What is done stays, and is used again."
    )


class PartWriter:
    """Writes the arrays of a part, batch by batch."""

    def __init__(self, folder: Path, vocabulary_size: int | None) -> None:
        """Without a `vocabulary_size` ids are not kept."""
        self._folder = folder
        self._files = {"documents.npy": ArrayFile(folder / "documents.npy", DOCUMENT)}
        self._files["spans.npy"] = ArrayFile(folder / "spans.npy", SPAN, (2,))
        if vocabulary_size is not None:
            self._files["ids.npy"] = ArrayFile(folder / "ids.npy", ids_type(vocabulary_size))
        self._documents: list[int] = []  # of each slice
        self._tokens = self._num_bad = self._num_left_out = 0
        self._first_bad: list[tuple[int, str]] = []
        self._remarks: Counter[Remark] = Counter()

    def begin_slice(self) -> None:
        """What is added from now on belongs to the next slice."""
        self._documents.append(0)

    def add(self, encoded: Encoded) -> None:
        """Add documents."""
        table = np.empty(len(encoded.lengths), DOCUMENT)  # [documents]
        table["length"], table["entry"] = encoded.lengths, encoded.entries
        table["hash"], table["spans"] = encoded.hashes, encoded.span_counts
        self._files["documents.npy"].append(table)
        self._files["spans.npy"].append(encoded.spans)
        if "ids.npy" in self._files:
            self._files["ids.npy"].append(encoded.ids)
        self._documents[-1] += len(table)
        self._tokens += int(encoded.lengths.sum())

    def add_others(self, file: int, name: str, bad: list[Bad], num_left_out: int, remarks: Counter[Remark]) -> None:
        """Count remarks, and records that become no document: the first messages, without the file's present name."""
        self._remarks.update(remarks)
        self._num_bad += len(bad)
        self._num_left_out += num_left_out
        for one in bad[: MOST_BAD_SHOWN - len(self._first_bad)]:
            is_named = one.message.startswith(name)
            self._first_bad.append((file, one.message.removeprefix(name)) if is_named else (-1, one.message))

    def facts(self) -> PartFacts:
        """What was written. The files must have been closed."""
        return PartFacts(
            documents=tuple(self._documents),
            tokens=self._tokens,
            spans=self._files["spans.npy"].rows,
            num_bad=self._num_bad,
            num_left_out=self._num_left_out,
            first_bad=tuple(self._first_bad),
            sizes={name: (self._folder / name).stat().st_size for name in self._files},
            remarks=counted(self._remarks),
        )

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files.values():
            file.close()


def ids_type(vocabulary_size: int) -> np.dtype[np.uint16 | np.uint32]:
    """The smallest type that holds every id."""
    return np.dtype("<u2") if vocabulary_size <= 1 << 16 else np.dtype("<u4")
