"""All documents of a data set as tokens, made by all ranks in parallel."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_recipes.data.formats import Format, Sample
from ds_recipes.data.records import Record, open_records
from ds_recipes.data.tokenizer import adds_bos
from ds_recipes.errors import InputError
from ds_recipes.world.group import World

BATCH_RECORDS = 1000

Ints = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Documents:
    """Documents laid end to end. Token `i` of document `d` is a target if `i >= target_start[d]`.

    `target_start` is at least 1: nothing in its own document could predict a first token.
    """

    paths: tuple[Path, ...]
    ids: Ints  # uint16 or uint32 [tokens]
    offsets: Ints  # int64 [documents + 1], into ids
    target_start: Ints  # int64 [documents]
    file: Ints  # int64 [documents], into paths
    line: Ints  # int64 [documents]

    def __len__(self) -> int:
        return len(self.target_start)

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)  # [documents]

    def tokens(self, document: int) -> Ints:
        """A document's token ids, [its tokens]."""
        return self.ids[self.offsets[document] : self.offsets[document + 1]]

    def where(self, document: int) -> str:
        """The file and line that a document came from."""
        return f"{self.paths[self.file[document]]}:{self.line[document]}"


def tokenise(
    paths: Sequence[Path], record_format: Format, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, world: World
) -> Documents:
    """Read and tokenise all records; every rank takes a contiguous slice and gets all documents.

    Raises:
        InputError: on all ranks, the first wrong record of all files, or a token id beyond the embedding.
    """
    dtype = np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32)
    outcome = world.check(
        "tokenising", lambda: _attempt(paths, record_format, tokenizer, vocabulary_size, world.rank, world.size)
    )
    errors = world.gather(str(outcome) if isinstance(outcome, InputError) else None)
    for message in errors:  # ranks hold slices in order, so the first message is of the first wrong record
        if message is not None:
            raise InputError(message)
    assert not isinstance(outcome, InputError)
    ids, table = outcome
    all_ids = np.concatenate(world.gather_array(ids.astype(dtype)))
    lengths, target_start, file, line = np.concatenate(world.gather_array(table), axis=1)
    return Documents(tuple(paths), all_ids, np.append(0, np.cumsum(lengths)), target_start, file, line)


def _attempt(
    paths: Sequence[Path],
    record_format: Format,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary_size: int,
    rank: int,
    size: int,
) -> tuple[Ints, Ints] | InputError:
    """This rank's slice: token ids [tokens] and (length, target start, file, line) [4, documents], or what is wrong.

    The error is returned, so that ranks can agree on the first one. A file that nobody can open is raised by all.
    """
    files = open_records(paths)
    total = sum(len(file) for file in files)
    start, stop = total * rank // size, total * (rank + 1) // size
    ids: list[Ints] = [np.zeros(0, np.int64)]
    tables: list[Ints] = [np.zeros((4, 0), np.int64)]
    try:
        file_start = 0
        for number, file in enumerate(files):
            records = file.read(max(start - file_start, 0), max(min(stop - file_start, len(file)), 0))
            # Each record is checked before the next is parsed, so the first wrong one is the one reported.
            samples = ((record, record_format.read(record)) for record in records)
            while batch := list(islice(samples, BATCH_RECORDS)):
                batch_ids, lengths, target_start = _encode(batch, tokenizer, vocabulary_size)
                lines = np.array([record.line for record, _ in batch])
                ids.append(batch_ids)
                tables.append(np.stack([lengths, target_start, np.full(len(batch), number), lines]))
            file_start += len(file)
    except InputError as error:
        return error
    return np.concatenate(ids), np.concatenate(tables, axis=1)


def _encode(
    batch: Sequence[tuple[Record, Sample]], tokenizer: PreTrainedTokenizerBase, vocabulary_size: int
) -> tuple[Ints, Ints, Ints]:
    """Token ids of all records, end to end, their lengths and target starts."""
    texts = [text for _, sample in batch for text in (sample.prompt, sample.response)]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    begin, end = [tokenizer.bos_token_id] if adds_bos(tokenizer) else [], [tokenizer.eos_token_id]
    documents, prompt_lengths = [], []
    for (record, _), prompt, response in zip(batch, encoded[::2], encoded[1::2], strict=True):
        if not response:
            raise InputError(f"{record.where}: its text makes no tokens, so it has no target. Fill it in or remove it.")
        documents.append(begin + prompt + response + end)
        prompt_lengths.append(len(begin) + len(prompt))
    ids = np.fromiter(chain.from_iterable(documents), np.int64)
    lengths = np.array([len(document) for document in documents])
    if ids.max() >= vocabulary_size:
        first = int(np.argmax(ids >= vocabulary_size))
        record, _ = batch[int(np.searchsorted(np.cumsum(lengths), first, side="right"))]
        raise _beyond(int(ids[first]), tokenizer, vocabulary_size, record)
    return ids, lengths, np.maximum(np.array(prompt_lengths), 1)


def _beyond(token: int, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, record: Record) -> InputError:
    return InputError(
        f"{record.where}: the tokenizer makes token {tokenizer.convert_ids_to_tokens(token)!r} (id {token:,}), but the "
        f"model has embeddings for ids below {vocabulary_size:,}. Set --tokenizer_name to the model's own tokenizer, "
        "or enlarge the model's embedding."
    )
