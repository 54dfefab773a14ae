"""Put each hand-made fault into a copy of the code and run the tests that must catch it.

python -m tests.mutants [--only WORD ...] [--workers 2]

First the tests are run without any fault: one that fails by itself would catch everything. Status 0: every fault was caught.
"""

import argparse
import compileall
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.house.tree import ROOT
from tests.mutants.entries import Mutant, read_mutants
from tests.mutants.runner import ALIVE, CAUGHT, DOES_NOT_RUN, LIMIT_SECONDS, TOO_LONG, run_in

SHOWN_LINES = 25
LINKED = (".venv", "embedded")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only mutants with such a word in area or name"
    )
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args(arguments)
    mutants = [
        one
        for one in read_mutants()
        if not chosen.only or any(word in f"{one.area}/{one.name}" for word in chosen.only)
    ]
    if not mutants:
        parser.error(f"no mutant has one of {', '.join(chosen.only)} in its area or name")
    misfits = [f"{one.area}/{one.name}: {reason}" for one in mutants if (reason := _misfit(one))]
    if misfits:
        print("\n".join([*misfits, "these do not fit the code as it is"]))
        return 1
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name, ThreadPoolExecutor(chosen.workers) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(chosen.workers):
            copies.put(_copy(Path(name) / str(number)))
        tests = sorted({test for one in mutants for test in one.tests})
        red = [out for out in pool.map(lambda test: _without(copies, test), _grouped(tests)) if out]
        if red:
            print("\n".join([*red, "without any fault these tests do not pass"]))
            return 1
        print(f"{len(tests)} names of tests pass without a fault, after {time.monotonic() - started:.0f} s", flush=True)
        verdicts = Counter(pool.map(lambda one: _try(copies, one), mutants))
    seconds = time.monotonic() - started
    print(
        f"{len(mutants)} mutants in {seconds:.0f} s: "
        + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    )
    return 0 if set(verdicts) <= {CAUGHT} else 1


def _grouped(tests: Sequence[str]) -> Iterator[list[str]]:
    """Tests of one file together."""
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.split("::")[0], []).append(test)
    for file, names in by_file.items():
        yield [file] if file in names else names


def _copy(folder: Path) -> Path:
    """The tree as git sees it, compiled so that a changed file is compiled again whatever its time says."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    for part in ("ds_recipes", "tests"):
        compileall.compile_dir(
            folder / part, quiet=2, invalidation_mode=compileall.py_compile.PycInvalidationMode.CHECKED_HASH
        )
    return folder


def _without(copies: "SimpleQueue[Path]", tests: Sequence[str]) -> str:
    """The output of tests that fail without a fault; empty if they pass."""
    folder = copies.get()
    try:
        result = run_in(folder, tests)
    finally:
        copies.put(folder)
    return "" if result.verdict == ALIVE else f"{' '.join(tests)}: {_told(result.verdict)}\n{_end_of(result.output)}"


def _try(copies: "SimpleQueue[Path]", mutant: Mutant) -> str:
    folder = copies.get()
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(mutant.changed(text), encoding="utf-8")
        result = run_in(folder, mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")
        copies.put(folder)
    print(f"{result.verdict:14} {result.seconds:5.1f} s  {mutant.area}/{mutant.name}", flush=True)
    if result.verdict in (DOES_NOT_RUN, TOO_LONG):
        print(_end_of(result.output), flush=True)
    return result.verdict


def _misfit(mutant: Mutant) -> str:
    """Why a fault cannot be put in; empty if it can."""
    try:
        mutant.changed((ROOT / mutant.file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _told(verdict: str) -> str:
    return {CAUGHT: "fail", TOO_LONG: f"take more than {LIMIT_SECONDS:.0f} s"}.get(verdict, verdict)


def _end_of(output: str) -> str:
    return "\n".join(output.splitlines()[-SHOWN_LINES:])


if __name__ == "__main__":
    sys.exit(main())
