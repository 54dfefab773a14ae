"""Where data lie: `[weight:]path`, `[weight:]glob`, a folder, or `hub:owner/name`, and which files that means.

Nothing is opened here. What a file holds is seen when it is read; here only its name and its existence count.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.config.values import WEIGHT

HUB = re.compile(r"hub:(\w[\w.-]*/\w[\w.-]*)(?:@((?!\S*\.\.)[\w./-]+))?(?::([\w.-]+))?(?::([\w.-]+))?", re.ASCII)
DATA_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet", ".csv", ".bin")
"""What is taken from a folder. Files that are named themselves, or by a glob, may be called anything."""

TOKEN_SUFFIXES = (".bin", ".idx")
"""Of a pair of Megatron's token files, which may be named by what comes before."""

SPLIT = re.compile(r"(?:^|[-_. ])(train|training|validation|valid|val|dev|test)(?:[-_. ]|$)", re.IGNORECASE)
OTHER_NAMES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}
"""What splits are called, as `datasets` has them."""

SAVED_DATASET = ("dataset_info.json", "state.json")
"""What `Dataset.save_to_disk` of the `datasets` library leaves in a folder."""

SAVED_SPLITS = "dataset_dict.json"
"""What `DatasetDict.save_to_disk` leaves beside one folder for each split."""


@dataclass(frozen=True)
class HubData:
    """A data set on the hub: `hub:owner/name[@revision][:config][:split]`; with one name after the last colon, a split."""

    name: str
    revision: str | None
    config: str | None
    split: str


@dataclass(frozen=True)
class DataPath:
    """One word of `train_data` or `validation_data`. `weight` is its share of the tokens, None where none is given."""

    text: str  # as written, without the weight
    weight: float | None
    hub: HubData | None

    @property
    def name(self) -> str:
        """What metrics and messages call it."""
        return self.text


def parse_data_path(text: str) -> DataPath:
    """Read one word. A file whose own name begins like a weight is meant as `./0.5:file`.

    Raises:
        ValueError: the weight is not a positive number, or a hub name is none; the message completes "NAME ".
    """
    match = WEIGHT.match(text)
    weight = float(match.group()[:-1]) if match else None
    rest = text[match.end() :] if match else text
    if weight is not None and not 0 < weight < float("inf"):
        raise ValueError(f"has a weight of {weight:g} in {text!r}; a weight must be above 0")
    if not rest:
        raise ValueError(f"names no path after the weight in {text!r}")
    if not rest.startswith("hub:"):
        return DataPath(rest, weight, None)
    hub = HUB.fullmatch(rest)
    if hub is None:
        raise ValueError(f"must name a data set as hub:owner/name[@revision][:config][:split], not {rest!r}")
    config, split = (hub[3], hub[4]) if hub[4] else (None, hub[3] or "train")
    return DataPath(rest, weight, HubData(hub[1], hub[2], config, split))


def find_files(path: str) -> list[Path]:
    """The files that a path, a glob or a folder means, sorted. A folder saved by `datasets` is one entry, itself.

    A folder stands for the data files below it; X stands for X.bin where that and X.idx are a pair of token files. Names
    that begin with a dot are left out unless the path itself has one.

    Raises:
        ValueError: there are none; the message completes "PATH: ".
    """
    named = Path(path)
    if named.is_dir():
        try:
            found = sorted(_data_in(named, frozenset()))
        except OSError as error:
            raise ValueError(f"cannot be listed ({error.filename}: {error.strerror})") from error
        if not found:
            raise ValueError(f"is a folder without data files ({', '.join(DATA_SUFFIXES)})")
        return found
    if not named.exists() and all(named.with_name(named.name + suffix).is_file() for suffix in TOKEN_SUFFIXES):
        return [named.with_name(named.name + TOKEN_SUFFIXES[0])]
    if named.exists() or not re.search(r"[*?\[]", path):
        return [named]
    root = Path(named.anchor)
    relative = named.relative_to(root)
    names_hidden = any(part.startswith(".") for part in relative.parts if part != "..")
    found = sorted(
        file
        for file in root.glob(str(relative))
        if is_saved_dataset(file) or (file.is_file() and not is_saved_dataset(file.parent))
        if names_hidden or not _is_hidden(file.relative_to(root))
    )
    if not found:
        raise ValueError("no file matches this pattern")
    return found


def splits_by_name(files: Iterable[Path]) -> dict[str, int]:
    """How many files are named for which split, as data sets of the hub name theirs: train-00000-of-00004.parquet, test/a.jsonl."""
    found: dict[str, int] = {}
    for file in files:
        match = SPLIT.search(file.name) or SPLIT.fullmatch(file.parent.name)
        if match is not None:
            split = OTHER_NAMES.get(match[1].lower(), match[1].lower())
            found[split] = found.get(split, 0) + 1
    return found


def is_saved_dataset(folder: Path) -> bool:
    """True for a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    return (folder / SAVED_SPLITS).is_file() or all((folder / name).is_file() for name in SAVED_DATASET)


def _data_in(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Links are followed, but not back to a folder that they lie in."""
    if is_saved_dataset(folder):
        yield folder
        return
    above = above | {folder.resolve()}
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if path.resolve() not in above:
                yield from _data_in(path, above)
        elif path.is_file() and path.name.endswith(DATA_SUFFIXES):
            yield path


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") and part != ".." for part in path.parts)
