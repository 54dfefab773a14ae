"""The token store of a data path: opened if it is there, made by all ranks if it is not.

A store is a folder `tokens-KEY` in the cache folder. The key is made of everything that decides what is in it, so a store
never changes; a changed data file, tokenizer or format has another one. See `parts.py` for what lies in it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash
from transformers import PreTrainedTokenizerBase

from ds_recipes.config.data_paths import DataPath, splits_by_name
from ds_recipes.data.encode import Encoder
from ds_recipes.data.formats.choose import make_format, needs_tokenizer
from ds_recipes.data.formats.sample import Format, FormatSettings
from ds_recipes.data.formats.token_ids import TokensFormat
from ds_recipes.data.tokenizer import tokenizer_fingerprint
from ds_recipes.data.tokens.build import build
from ds_recipes.data.tokens.documents import Documents, Origin, Table
from ds_recipes.data.tokens.files import DataFile, OpenFiles
from ds_recipes.data.tokens.finish import SHOWN_SECONDS
from ds_recipes.data.tokens.ids import Ids, MegatronIds, StoredIds, StreamedIds
from ds_recipes.data.tokens.make import Task, ids_type
from ds_recipes.data.tokens.opening import check_same, find_places, open_together
from ds_recipes.data.tokens.parts import plan_parts
from ds_recipes.data.tokens.peers import find_peers
from ds_recipes.data.tokens.summary import Summary, find_damage, read_summary
from ds_recipes.errors import DsRecipesError, InputError
from ds_recipes.world.channel import wait_until
from ds_recipes.world.group import World

VERSION = 1
"""Goes up whenever the same data would give other tokens, or other files."""

EXACT_PARTS = "parts joined exactly"
MORE_BEFORE = "special tokens other than BOS before texts"

KEY_DIGITS = 20
SHOWN_FILES = 8


@dataclass(frozen=True)
class Recipe:
    """How records become tokens, and where the tokens are kept."""

    format: FormatSettings
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    skip_bad: bool
    streaming: bool
    workers: int  # processes a rank that tokenise; 0: the rank itself
    cache: Path | None
    fallback_cache: Path | None

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer as it is now."""
        return tokenizer_fingerprint(self.tokenizer)

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer without transformers."""
        return Encoder.of(self.tokenizer, self.vocabulary_size)

    def version_for(self, record_format: Format) -> str:
        """`VERSION`, with what is newer than it and changes the tokens of this tokenizer and format alone."""
        encoder, joining = self.encoder, self.encoder.joining
        newer = [
            (EXACT_PARTS, record_format.joins_parts and (joining.bare is not None or not joining.is_exact)),
            (MORE_BEFORE, encoder.begin not in ((), (encoder.bos,)) and record_format.name != TokensFormat.name),
        ]
        return ", ".join([str(VERSION), *(name for name, is_changed in newer if is_changed)])


def open_documents(path: DataPath, recipe: Recipe, world: World, say: Callable[[str], None]) -> Documents:
    """The documents of a data path; what is not in its store yet is tokenised. Every rank must call it.

    Raises:
        InputError: on all ranks: the first record that cannot be used (unless such are skipped), files that cannot be
            read or that differ between hosts, data without a usable record, or streaming of a file that cannot be.
        DsRecipesError: on all ranks: a worker was killed, a disk is full.
    """
    phase = f"opening {path.text}"
    record_format = world.check(phase, lambda: make_format(recipe.format, recipe.tokenizer))
    places = world.check(phase, lambda: find_places(path, recipe.cache, recipe.fallback_cache))
    cache = places[0][1]
    peers = find_peers(world, cache)
    files, empty = open_together(path, places, peers, world, say)
    world.check(phase, lambda: _check_streamable(files, recipe))
    identity = _Identity.of(files, recipe, record_format)
    _check_agreement(path, identity, world, phase)
    folder = cache / f"tokens-{identity.key}"
    problem = world.check(phase, lambda: _problem(folder) if peers.is_leader else None)
    if any(found is not None for found in world.gather(problem)):
        if problem and world.rank == 0:
            say(f"tokens of {path.text}: {problem}; what is damaged is made again")
        task = world.check(phase, lambda: _task(folder, files, recipe))
        build(path.text, task, recipe.workers, peers, world, say)
    elif world.rank == 0:
        say(f"tokens of {path.text}: taken from {folder}")
    own_notes = (note for file in files for note in file.notes)
    notes = (*_left_out(empty, len(places)), *_several_splits(files), *own_notes)
    return world.check(phase, lambda: _open(path.text, folder, files, recipe, record_format, identity, notes))


@dataclass(frozen=True)
class _Identity:
    key: str
    """Of everything that decides what is in the store."""

    fingerprint: str
    """Of the documents: what a run's identity depends on."""

    @classmethod
    def of(cls, files: Sequence[DataFile], recipe: Recipe, record_format: Format) -> "_Identity":
        content = [
            [(file.fingerprint, file.num_entries) for file in files],  # a text index may leave entries out
            recipe.tokenizer_fingerprint,
            record_format.fingerprint,
            recipe.skip_bad,
            *([] if recipe.version_for(record_format) == str(VERSION) else [recipe.version_for(record_format)]),
        ]
        more = [VERSION, recipe.vocabulary_size, recipe.streaming]
        return cls(_digest([*content, *more])[:KEY_DIGITS], _digest(content))


def _check_agreement(path: DataPath, identity: _Identity, world: World, phase: str) -> None:
    check_same(
        world,
        phase,
        identity.key,
        f"{path.text}: not the same tokens on all hosts",
        "came with another tokenizer, format or text index than rank 0. Copy their files again, or put them on a shared disk.",
    )


def _digest(content: object) -> str:
    return str(xxhash.xxh3_128(json.dumps(content).encode()).hexdigest())


def _check_streamable(files: Sequence[DataFile], recipe: Recipe) -> None:
    for file in files:
        if recipe.streaming and not file.random_access:
            raise InputError(
                f"{file.name}: is compressed as a whole, or in row groups that are too large, so single records of it cannot "
                "be read again, as --streaming needs. Unpack it, write smaller row groups, or leave --streaming out."
            )


def _problem(folder: Path) -> str | None:
    """None for a whole store, nothing to say of one that is not there, else what is damaged."""
    summary = read_summary(folder)
    return "" if summary is None else find_damage(folder, summary)


def _task(folder: Path, files: tuple[DataFile, ...], recipe: Recipe) -> Task:
    holds_tokens = files[0].holds_tokens
    return Task(
        folder=folder,
        files=files,
        parts=plan_parts(files),
        format=recipe.format,
        tokenizer=recipe.tokenizer if needs_tokenizer(recipe.format) and not holds_tokens else None,
        encoder=recipe.encoder,
        vocabulary_size=recipe.vocabulary_size,
        skip_bad=recipe.skip_bad,
        keeps_ids=not recipe.streaming and not holds_tokens,
    )


def _open(
    name: str,
    folder: Path,
    files: tuple[DataFile, ...],
    recipe: Recipe,
    record_format: Format,
    identity: _Identity,
    notes: tuple[str, ...],
) -> Documents:
    wait_until(lambda: read_summary(folder) is not None, SHOWN_SECONDS)  # another rank may have written it just now
    summary = read_summary(folder)
    if summary is None:
        raise DsRecipesError(f"{folder}: is not there, though it was made. Has it been removed? Start again.")
    first_bad = tuple((files[file].name if file >= 0 else "") + message for file, message in summary.first_bad)
    if summary.documents == 0:
        raise _nothing_usable(name, summary, first_bad)
    table = Table.open(folder / "documents")
    opened = OpenFiles(files)
    ids = _ids(folder, opened, table, summary, recipe, record_format)
    origin = Origin(
        name, identity.fingerprint, summary.num_bad, first_bad, summary.num_left_out, notes, summary.remarks
    )
    return Documents(folder, origin, opened, table, ids)


def _ids(folder: Path, opened: OpenFiles, table: Table, summary: Summary, recipe: Recipe, record_format: Format) -> Ids:
    dtype = ids_type(recipe.vocabulary_size)
    if opened.files[0].holds_tokens:
        return MegatronIds(opened, table.place, dtype)
    if not recipe.streaming:
        return StoredIds(folder, summary.parts, table.offsets, dtype)
    return StreamedIds(opened, table.place, record_format, recipe.encoder, table.offsets, table.hashes)


def _left_out(empty: Sequence[str], num_files: int) -> list[str]:
    if not empty:
        return []
    more = f" and {len(empty) - SHOWN_FILES:,} more" if len(empty) > SHOWN_FILES else ""
    shown = ", ".join(empty[:SHOWN_FILES])
    return [f"{len(empty):,} of {num_files:,} files hold no record and were left out: {shown}{more}"]


def _several_splits(files: Sequence[DataFile]) -> list[str]:
    """A folder of a data set may hold what was meant for a test, too."""
    splits = splits_by_name(file.place for file in files if isinstance(file.place, Path))
    if len(splits) < 2:
        return []
    found = ", ".join(f"{split} ({count:,})" for split, count in splits.items())
    return [
        f"files of several splits by their names, of which all are read: {found}. To read one, name its files alone."
    ]


def _nothing_usable(name: str, summary: Summary, first_bad: Sequence[str]) -> InputError:
    counts = f"{summary.num_bad:,} are bad, {summary.num_left_out:,} are left out by the format's function"
    first = f"; the first: {first_bad[0]}" if first_bad else ". Name other data, or another format."
    return InputError(f"{name}: holds no record that can be used ({counts}){first}")
