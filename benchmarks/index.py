"""How fast line offsets are found, beside `wc -l` and a plain Python reader, and how fast a file is checked to be UTF-8.

    python benchmarks/index.py [--gigabytes 1] [--json FILE]

Writes Japanese JSONL with lines of very different lengths into a temporary folder. Each round measures every way once, in
turns, on the file in page cache; shown are medians over the rounds. Two bounds, and exit status 1 if one is broken:

- offsets at 3 GB/s at least, and at half the speed of `wc -l` at least;
- the UTF-8 check at 0.5 GB/s at least.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_recipes.data.index.cache import open_index
from ds_recipes.data.index.newlines import scan_file
from ds_recipes.data.index.strict import check_lines

GB = 10**9
ROUNDS = 7
BLOCK_LINES = 20_000
READER_SHARE = 0.1  # of the file is read by the plain reader; its time is scaled
LEAST_OFFSETS_GB_S, LEAST_OF_WC, LEAST_UTF8_GB_S = 3.0, 0.5, 0.5
SIGNS = "東京大学日本語処理研究人工知能学習機械言語モデルのはにをがでとしたしていますこのそのあるいるれるられ、。"
WAYS = {
    "offsets": "our offsets alone",
    "open_index": "our whole index: offsets, fingerprint, published",
    "open_again": "our index, opened again",
    "wc": "wc -l",
    "reader": "a plain Python reader",
    "utf8": "our strict UTF-8 check",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the file (default: 1)")
    parser.add_argument("--json", help="write the result to this file too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train.jsonl"
        num_lines = write_japanese(path, int(arguments.gigabytes * GB))
        seconds = measure(path, num_lines)
        num_bytes = path.stat().st_size
    return report(arguments.json, num_bytes, num_lines, seconds)


def write_japanese(path: Path, num_bytes: int) -> int:
    """Write about so many bytes: one block of random lines, a few characters to some thousand, over and over."""
    choose = random.Random(0)
    phrases = ["".join(choose.choices(SIGNS, k=choose.randint(5, 60))) for _ in range(2000)]
    lengths = [min(200, int(2 * choose.paretovariate(1.2))) for _ in range(BLOCK_LINES)]
    records = [{"text": "".join(choose.choices(phrases, k=length))} for length in lengths]
    block = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    repeats = max(1, round(num_bytes / len(block)))
    with path.open("wb") as file:
        for _ in range(repeats):
            file.write(block)
    return repeats * BLOCK_LINES


def measure(path: Path, num_lines: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round. One round before the first fills the page cache."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_ in range(ROUNDS + 1):
        cache = path.with_name(f"cache{round_}")
        index = open_index(path, cache.with_name("kept"))
        ways: dict[str, Callable[[], int]] = {
            "offsets": lambda: sum(len(piece) for piece in scan_file(path)),
            "open_index": lambda cache=cache: len(open_index(path, cache).starts),
            "open_again": lambda cache=cache: len(open_index(path, cache).starts),
            "wc": lambda: int(subprocess.run(["wc", "-l", path], capture_output=True, check=True).stdout.split()[0]),
            "reader": lambda: read_plainly(path, num_lines),
            "utf8": lambda index=index: check_lines(index).num_faults + num_lines,
        }
        for way, run in ways.items():
            started = time.perf_counter()
            found = run()
            took = time.perf_counter() - started
            assert found == num_lines, f"{way} found {found} lines of {num_lines}"
            if round_:
                seconds[way].append(took / READER_SHARE if way == "reader" else took)
    return seconds


def read_plainly(path: Path, num_lines: int) -> int:
    """Offsets as one would find them without numpy, of the first lines; returns the lines of the whole file."""
    offsets, position = [], 0
    with path.open("rb") as file:
        for line, _ in zip(file, range(int(num_lines * READER_SHARE)), strict=False):
            offsets.append(position)
            position += len(line)
    return round(len(offsets) / READER_SHARE)


def report(target: str | None, num_bytes: int, num_lines: int, seconds: dict[str, list[float]]) -> int:
    """Print a table and a line of JSON; 1 if a bound is broken."""
    median = {way: statistics.median(values) for way, values in seconds.items()}
    speed = {way: num_bytes / GB / value for way, value in median.items()}
    of_wc = statistics.median(wc / ours for wc, ours in zip(seconds["wc"], seconds["offsets"], strict=True))
    print(f"{num_bytes / GB:.2f} GB, {num_lines:,} lines, {len(os.sched_getaffinity(0))} cores, {ROUNDS} rounds")
    for way, name in WAYS.items():
        shown = "" if way == "open_again" else f"{speed[way]:9.2f} GB/s"
        print(f"{name:>50} {median[way]:9.4f} s {shown}")
    print(f"offsets: {of_wc:.2f} x wc -l, {median['reader'] / median['offsets']:.0f} x the plain reader")
    offsets_hold = speed["offsets"] >= LEAST_OFFSETS_GB_S and of_wc >= LEAST_OF_WC
    within = offsets_hold and speed["utf8"] >= LEAST_UTF8_GB_S
    result = {"bytes": num_bytes, "lines": num_lines, "within": within, "offsets_of_wc": of_wc}
    result |= {f"{way}_gb_per_second": value for way, value in speed.items() if way != "open_again"}
    result["open_again_seconds"] = median["open_again"]
    print(json.dumps(result))
    if target:
        Path(target).write_text(json.dumps(result, indent=2) + "\n")
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
