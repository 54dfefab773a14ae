"""Data sets of the hub, and folders that `save_to_disk` of the `datasets` library wrote, both opened by that library.

No code of a data set is run: `datasets` runs none, and a saved folder names nothing outside of itself.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import xxhash

from ds_recipes.config.data_paths import HubData, is_saved_dataset
from ds_recipes.data.index.cache import Progress, file_fingerprint
from ds_recipes.data.sources.arrow_rows import batch_rows, records_of
from ds_recipes.data.sources.messages import first_line, named, quoted
from ds_recipes.data.sources.record import Bad, Record, even_cuts, is_inside
from ds_recipes.errors import InputError, NoRecordsError
from ds_recipes.hub_probe import ensure_hub_reachable_or_offline
from ds_recipes.world.hang.activity import here

if TYPE_CHECKING:
    import datasets

COMMIT = re.compile("[0-9a-f]{40}")
SPLITS_FILE = "dataset_dict.json"
STATE_FILE = "state.json"
NO_RECORDS = "holds no records. Name a data set with rows."
FILE_LISTS = ("_data_files", "_indices_data_files", "_indices_files")
"""What state.json of any version of `datasets` may name files in."""


class ArrowRows:
    """A `Source` over an opened data set of the `datasets` library."""

    random_access = True
    notes: tuple[str, ...] = ()

    def __init__(self, name: str, fingerprint: str, dataset: "datasets.Dataset") -> None:
        self.name, self.fingerprint = name, fingerprint
        # As Arrow, nothing is decoded: an image is its bytes, and no image library is needed to read the text beside it.
        self._dataset = dataset.with_format("arrow")
        self._step = batch_rows(len(dataset), dataset.data.nbytes)

    def __len__(self) -> int:
        return len(self._dataset)

    def line(self, entry: int) -> int:
        return entry + 1

    def cuts(self, pieces: int) -> list[int]:
        return even_cuts(len(self), pieces)

    def read(self, start: int, stop: int) -> Iterator[Record | Bad]:
        for low in range(start, stop, self._step):
            yield from records_of(self.name, low, self._dataset[low : min(low + self._step, stop)])


def open_saved(folder: Path, cache: Path, progress: Progress | None = None) -> ArrowRows:
    """Open a folder that `Dataset.save_to_disk` wrote.

    Raises:
        InputError: it is no such folder, holds several splits, is damaged, or names files outside of itself.
    """
    if (folder / SPLITS_FILE).is_file():
        raise InputError(f"{folder}: holds several splits. Name one of them: {_splits(folder)}.")
    if not is_saved_dataset(folder):
        raise InputError(f"{folder}: is a folder. Name the JSONL or JSON files in it.")
    files = _data_files(folder)
    with _quiet():
        import datasets

        try:
            dataset = datasets.Dataset.load_from_disk(str(folder.resolve()), keep_in_memory=False)
        except Exception as error:  # whatever json, fsspec and pyarrow make of a damaged folder
            raise InputError(
                f"{folder}: cannot be opened as a data set ({first_line(error)}). Save it again."
            ) from error
    return _rows(str(folder), dataset, files, cache, progress)


def open_hub(data: HubData, cache: Path, progress: Progress | None = None) -> ArrowRows:
    """Open a split of a data set on the hub; it is downloaded the first time.

    Raises:
        InputError: there is no such data set, configuration or split, or the hub cannot be reached and the cache has none.
    """
    name = f"hub:{data.name}" + (f"@{data.revision}" if data.revision else "")
    name += (f":{data.config}" if data.config else "") + f":{data.split}"
    if Path(data.name).exists():
        raise InputError(
            f"{name}: there is a {data.name} in {Path.cwd()}, which `datasets` would read. Name ./{data.name}."
        )
    reachable = ensure_hub_reachable_or_offline()
    with _quiet():
        import datasets

        offline = datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE or not reachable
        try:
            with here().trusted():
                dataset = datasets.load_dataset(
                    data.name, data.config, split=data.split, revision=data.revision, keep_in_memory=False
                )
        except Exception as error:  # its own errors, those of the hub, and those of each file format
            where = (
                "the hub could not be reached, and it is not in the cache" if offline else "the hub gave no such data"
            )
            raise InputError(
                f"{name}: {where} ({first_line(error)}). Check the spelling, or pass a file or folder."
            ) from error
    files = [Path(file["filename"]) for file in dataset.cache_files]
    if data.revision is not None and (offline or COMMIT.fullmatch(data.revision)):
        _check_revision(name, data.name, data.revision, files)
    return _rows(name, dataset, files, cache, progress)


def _check_revision(name: str, repository: str, revision: str, files: list[Path]) -> None:
    """Where the hub does not answer, `datasets` takes the newest version of its cache, whatever it is asked for."""
    commit = revision
    if not COMMIT.fullmatch(revision):
        from huggingface_hub import constants

        known = Path(constants.HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}" / "refs" / revision
        commit = known.read_text(encoding="utf-8").strip() if known.is_file() else revision
    found = {file.parent.name for file in files}  # each version has a folder named by its commit
    if found != {commit}:
        raise InputError(
            f"{name}: the hub did not give this revision, and the cache has {named(found)} only. "
            "Name that one, or run once where the hub can be reached."
        )


def _rows(
    name: str, dataset: "datasets.Dataset", files: list[Path], cache: Path, progress: Progress | None
) -> ArrowRows:
    if len(dataset) == 0:
        raise NoRecordsError(f"{name}: {NO_RECORDS}")
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(bytes.fromhex(file_fingerprint(file, cache, progress)))
    return ArrowRows(name, str(digest.hexdigest()), dataset)


def _data_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved data set in their order, from a list that is not trusted."""
    state = _read_json(folder / STATE_FILE)
    lists = [state[key] for key in FILE_LISTS if state.get(key) is not None]
    if not all(isinstance(entries, list) for entries in lists):
        raise InputError(f"{folder / STATE_FILE}: does not list the files. Save the data set again.")
    names = [_file_name(folder, entry) for entries in lists for entry in entries]
    if not names:
        raise NoRecordsError(f"{folder}: {NO_RECORDS}")
    for name in names:
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not is_inside(path, folder):
            raise InputError(
                f"{folder}: its {STATE_FILE} names {quoted(name)}, which is outside of the folder. Do not use it."
            )
        if not path.is_file():
            raise InputError(f"{folder}: {quoted(name)} is missing. Copy the whole folder again.")
    return [folder / name for name in names]


def _file_name(folder: Path, entry: Any) -> str:
    name = entry.get("filename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder / STATE_FILE}: has an entry without a file's name. Save the data set again.")
    return name


def _splits(folder: Path) -> str:
    splits = _read_json(folder / SPLITS_FILE).get("splits")
    names = splits if isinstance(splits, list) else []
    # In full: one of them is to be copied into a command.
    return ", ".join(f"'{folder / str(split)}'" for split in names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}). Save the data set again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: does not hold a JSON object. Save the data set again.")
    return value


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and warnings of `datasets`: every rank would show them."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level = datasets.logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled()
    hub_bars = not are_progress_bars_disabled() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if hub_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
        if hub_bars:
            enable_progress_bars()
