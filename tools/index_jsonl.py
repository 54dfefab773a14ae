"""Index JSONL files and JSON arrays before a run, and check them.

    python tools/index_jsonl.py FILE... [--strict] [--json] [--text] [--cache FOLDER] [--quiet]

FILE is a path, a glob, or a folder, whose JSONL and JSON files are taken; gzip and zstd are read as they are. The index
goes to .index_cache/ beside each file, where training finds it. Training makes it by itself if it is missing; this makes
it ahead, on one core or many, and without torch. Exit status 2 if a file is wrong or has faults.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ds_recipes.config.data_paths import find_files
from ds_recipes.config.values import path_argument
from ds_recipes.data.index.cache import Index, index_folder, open_index, open_whole_index
from ds_recipes.data.index.raw import compression_of
from ds_recipes.data.index.strict import check_lines
from ds_recipes.data.index.text_index import text_index_name, write_text_index
from ds_recipes.data.published import cache_beside
from ds_recipes.errors import DsRecipesError, InputError

WRONG = 2
OTHER_DATA = (".parquet", ".csv", ".bin")
"""Data files in folders and globs that have no index of lines."""

GB = 10**9
LINE_SECONDS = 10


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    wrong = 0
    for path, problem in all_files(given.files):
        try:
            if problem is not None:
                raise InputError(problem)
            wrong += index_one(path, given) > 0
        except DsRecipesError as error:
            wrong += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
    return WRONG if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, a glob or a folder")
    parser.add_argument("--strict", action="store_true", help="check that all bytes are UTF-8 without NUL")
    parser.add_argument("--json", action="store_true", help="check that every entry is a JSON object too (slower)")
    parser.add_argument("--text", action="store_true", help="write the text index (.idx) that Kotoba-Recipes reads")
    parser.add_argument(
        "--cache",
        "--data_cache",
        type=path_argument,
        metavar="FOLDER",
        help="folder for the indexes (default: .index_cache beside each file)",
    )
    parser.add_argument("--quiet", action="store_true", help="show only notes and what is wrong")
    return parser.parse_args(arguments)


def all_files(words: Sequence[str]) -> Iterator[tuple[Path, str | None]]:
    """Each file that is meant, once; with a problem where a word means none."""
    seen = set()
    for word in words:
        try:
            found = find_files(word)
        except ValueError as error:
            yield Path(word), f"{word}: {error}"
            continue
        named = found == [Path(word)]
        for path in found:
            if path not in seen and (named or not path.name.endswith(OTHER_DATA)):
                seen.add(path)
                yield path, None


def index_one(path: Path, given: argparse.Namespace) -> int:
    """Index one file, check it if asked for, and print what was found; the number of faults."""
    compression_of(path)  # refuses what is no file, before a folder is made beside it
    cache = cache_beside(path, given.cache)
    folder = index_folder(path, cache)
    was_there = folder.exists()
    with progress_of(f"{path}: index", given.quiet) as shown:
        started = time.perf_counter()
        index = open_whole_index(path, cache, shown)
        seconds = time.perf_counter() - started
    if not given.quiet:
        num_bytes = path.stat().st_size
        entries = f"{len(index.starts):,} {'elements' if index.is_array else 'lines'} in {num_bytes:,} bytes"
        took = "was there" if was_there else f"{seconds:.2f} s, {num_bytes / seconds / GB:.2f} GB/s"
        print(f"{path}: {entries}, {took}, index in {folder}", flush=True)
    if given.text:
        write_text_index(index, cache / text_index_name(path))
    index = open_index(path, cache)  # what training will use: a text index beside the file may leave lines out
    for note in index.notes:
        print(f"{path}: note: {note}", flush=True)
    return check_one(index, given) if given.strict or given.json else 0


def check_one(index: Index, given: argparse.Namespace) -> int:
    """Check the content of a file and print its faults; their number."""
    with progress_of(f"{index.path}: check", given.quiet) as shown:
        started = time.perf_counter()
        report = check_lines(index, given.json, shown)
        seconds = time.perf_counter() - started
    for line, what in report.first:
        print(f"{index.path}:{line}: {what}", flush=True)
    if report.num_faults or not given.quiet:
        checked = "UTF-8 and JSON" if given.json else "UTF-8"
        shown_first = f", the first {len(report.first)} above" if report.num_faults > len(report.first) else ""
        faults = f"{report.num_faults:,} fault{'s' * (report.num_faults != 1)}{shown_first}"
        print(f"{index.path}: checked as {checked} in {seconds:.2f} s: {faults}", flush=True)
    return report.num_faults


@contextmanager
def progress_of(name: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """What shows the bytes done of the bytes in all: a bar on a terminal, else a line now and then."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield Lines(name)


class Lines:
    """Prints how far it is, every few seconds."""

    def __init__(self, name: str) -> None:
        self._name, self._printed = name, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._printed > LINE_SECONDS:
            self._printed = time.monotonic()
            print(f"{self._name}: {done / GB:.1f} of {total / GB:.1f} GB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
