"""Finding and opening the files of a data path on all ranks: each file is indexed once, and all must see the same bytes."""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import xxhash

from ds_recipes.config.data_paths import DataPath, HubData, find_files
from ds_recipes.data.index.cache import Progress
from ds_recipes.data.published import cache_beside
from ds_recipes.data.sources.megatron import is_megatron
from ds_recipes.data.tokens.files import DataFile, describe
from ds_recipes.data.tokens.make import Stopped
from ds_recipes.data.tokens.peers import Peers
from ds_recipes.data.tokens.progress import Ticker
from ds_recipes.errors import InputError, NoRecordsError
from ds_recipes.world.channel import name_ranks
from ds_recipes.world.group import World
from ds_recipes.world.hang.activity import progress
from ds_recipes.world.together import work_together

Place = tuple[Path | HubData, Path]
"""A file, and the folder for what is derived from it."""

Say = Callable[[str], None]


def find_places(path: DataPath, cache: Path | None, fallback_cache: Path | None) -> list[Place]:
    """The files that a data path means, each with its cache folder: `cache`, else one beside it, else `fallback_cache`.

    Raises:
        InputError: there are none, one is missing, or no folder can be written.
    """
    if path.hub is not None:
        return [(path.hub, cache_beside(Path.cwd(), cache or fallback_cache))]
    try:
        files = find_files(path.text)
    except ValueError as error:
        raise InputError(f"{path.text}: {error}.") from error
    caches: dict[Path, Path] = {}
    places: dict[Path, Path] = {}
    for file in files:
        if not file.exists() and not is_megatron(file):
            raise InputError(f"{file}: no such file (looked in {Path.cwd()}). Check the path.")
        # A pair of token files is named by either.
        one = file.with_suffix(".bin") if file.suffix == ".idx" and is_megatron(file) else file
        folder = one if one.is_dir() else one.parent
        if folder not in caches:
            caches[folder] = cache_beside(one, cache, fallback_cache)
        places[one] = caches[folder]
    return list(places.items())


def open_together(
    path: DataPath, places: Sequence[Place], peers: Peers, world: World, say: Say
) -> tuple[tuple[DataFile, ...], tuple[str, ...]]:
    """Open every file on every rank; of those that share a folder, one indexes a file. Every rank must call it.

    Second: the names of files without a record, which are left out where a folder or a pattern stands for them.

    Raises:
        InputError: on all ranks: a file cannot be opened, none has a record, ranks see different bytes, or records and
            tokens are mixed.
    """
    phase = f"reading {path.text}"
    ticker = Ticker(say if world.rank == 0 else None)
    given_up = threading.Event()
    latest: list[str] = []
    known: dict[Place, DataFile] = {}

    def progress_of(place: Place) -> Progress:
        name = path.text if isinstance(place[0], HubData) else place[0]

        def note(done: int, total: int) -> None:
            progress()
            if given_up.is_set():
                raise Stopped
            latest[:] = [f"reading {name} for the first time: {100 * done / max(total, 1):.0f} %"]

        return note

    def open_share() -> None:
        for place in places[peers.index :: peers.size]:
            with contextlib.suppress(InputError):  # raised below, on all ranks
                known[place] = describe(*place, progress_of(place))

    def hear(_: object) -> None:
        if latest:
            ticker.tick(latest[0])

    work_together(world, phase, open_share, lambda: None, hear, given_up.set)
    files, empty = world.check(phase, lambda: _without_empty(path, places, known))
    content = str(xxhash.xxh3_128(",".join(file.fingerprint for file in files).encode()).hexdigest())
    check_same(
        world,
        phase,
        content,
        f"{path.text}: not the same content on all hosts",
        "read other bytes than rank 0. Copy the files again, or put them on a shared disk.",
    )
    world.check(phase, lambda: _check_one_kind(path, files))
    return files, empty


def _without_empty(
    path: DataPath, places: Sequence[Place], known: Mapping[Place, DataFile]
) -> tuple[tuple[DataFile, ...], tuple[str, ...]]:
    """The files that hold a record, opened if they are not `known`, and the names of the others."""
    named = Path(path.text)
    files, empty = [], []
    for place in places:
        try:
            files.append(known.get(place) or describe(*place))
        except NoRecordsError:
            # A pair of token files is named by either, or by what both names begin with.
            if path.hub is not None or place[0] in (named, named.with_suffix(".bin"), Path(f"{named}.bin")):
                raise
            empty.append(str(place[0]))
    if not files:
        raise InputError(
            f"{path.text}: none of its {len(empty):,} files holds a record; the first is {empty[0]}. Name other files."
        )
    return tuple(files), tuple(empty)


def check_same(world: World, phase: str, value: str, problem: str, advice: str) -> None:
    """See that all ranks have the same `value`. Every rank must call it.

    Raises:
        InputError: on all ranks, "`problem`: ranks 2, 3 ... `advice`".
    """
    values = world.gather(value)
    different = [rank for rank, other in enumerate(values) if other != values[0]]

    def refuse() -> None:
        if different:
            raise InputError(f"{problem}: {name_ranks(different)} {advice}")

    world.check(phase, refuse)


def _check_one_kind(path: DataPath, files: Sequence[DataFile]) -> None:
    tokens = [file for file in files if file.holds_tokens]
    if tokens and len(tokens) < len(files):
        records = next(file for file in files if not file.holds_tokens)
        raise InputError(
            f"{path.text}: means files of tokens ({tokens[0].name}) and files of records ({records.name}). Name them "
            "apart, each with its own word of --train_data."
        )
