"""What it costs to go on late in a run: the first rows at position 1,000,000 of a store of 10,000,000 rows, and at 0.

    python benchmarks/data_resume.py [--rows 10000000] [--json FILE]

Writes token files in Megatron's form (two sources with weights, documents of some ten short rows), and stores and packs
them once (minutes). Then each round starts a new process for each position, in turns. It opens the data as train.py does
(stores, packings, mixture) and takes the first 100 rows from the stream at that position. Imports are not counted; the
files are in page cache. Shown are medians over the rounds. Bound, and exit status 1 if it is broken: at most 1 s more
than at position 0.

The peers, in processes of their own in the same rounds:

- `stored order`: a permutation that is kept in memory, made by sorting a random number a row;
- `fast forward`: a stream that cannot seek takes all rows before the position. Some are timed, the rest is scaled.
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ds_recipes.config.data_settings import DataConfig
from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config, RunConfig
from ds_recipes.data.reading import read_corpora
from ds_recipes.data.stream import Stream
from ds_recipes.data.tokenizer import load_tokenizer
from ds_recipes.world.group import solo

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 16
ROWS_OF_A_DOCUMENT = 10
VOCABULARY = 2000
SOURCES = {"large.bin": 0.6, "small.bin": 0.4}
"""Shares of the rows. Both have the same weight, so the small one is repeated sooner."""

FIRST_ROWS, ROWS_A_STEP = 100, 10
FAST_FORWARD_ROWS = 20_000
MOST_SECONDS_MORE = 1.0
TIME_LIMIT_SECONDS = 3600

Result = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the result to this file too")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # set for the processes that this program starts
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side, Path(arguments.folder), arguments.rows)))
        return 0
    positions = [0, arguments.rows // 10, arguments.rows * 9 // 10]
    sides = [*map(str, positions), "stored order", "fast forward"]
    with tempfile.TemporaryDirectory() as name:
        for file, share in SOURCES.items():
            write_tokens(Path(name) / file, round(arguments.rows * share / ROWS_OF_A_DOCUMENT))
        made = in_process("0", Path(name), arguments.rows)
        print(f"{int(made['rows']):,} rows stored and packed in {made['open_seconds']:.0f} s", flush=True)
        runs: dict[str, list[Result]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side in sides:
                runs[side].append(in_process(side, Path(name), arguments.rows))
    return report(arguments.json, positions, runs)


def write_tokens(path: Path, num_documents: int) -> None:
    """Random documents in Megatron's form, 16 bits a token."""
    random = np.random.default_rng(num_documents)
    mean = ROWS_OF_A_DOCUMENT * CONTEXT
    lengths = random.integers(mean // 2, mean * 3 // 2, num_documents).astype("<i4")
    ends = np.cumsum(lengths, dtype="<i8")
    random.integers(10, VOCABULARY, int(ends[-1]), dtype=np.uint16).tofile(path)
    with path.with_suffix(".idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, num_documents, num_documents + 1))
        for array in (lengths, (ends - lengths) * 2, np.arange(num_documents + 1, dtype="<i8")):
            file.write(array.tobytes())


def in_process(side: str, folder: Path, rows: int) -> Result:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--rows", str(rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def run_side(side: str, folder: Path, rows: int) -> Result:
    if side == "stored order":
        return sort_random_numbers(rows)
    tokenizer = load_tokenizer(str(ROOT / "embedded" / "model"), trust_remote_code=False)
    paths = tuple(f"0.5:{folder / file}" for file in SOURCES)
    config = Config(
        data=DataConfig(train_data=paths, context_size=CONTEXT, data_cache=str(folder / "cache")),
        run=RunConfig(batch_size_training=ROWS_A_STEP, max_steps=10**9),
    )
    started = time.perf_counter()
    corpus = read_corpora(config, tokenizer, VOCABULARY, solo(), lambda line: None).corpus
    opened = time.perf_counter()
    stream = Stream(corpus, make_plan(config, 1, corpus.num_rows), 0, position=int(side) if side.isdigit() else 0)
    taken = FAST_FORWARD_ROWS if side == "fast forward" else FIRST_ROWS
    while taken > 0:
        stream.take()
        taken -= ROWS_A_STEP
    ended = time.perf_counter()
    return {"rows": corpus.num_rows, "open_seconds": opened - started, "rows_seconds": ended - opened}


def sort_random_numbers(rows: int) -> Result:
    started = time.perf_counter()
    order = np.argsort(np.random.Philox(key=[0, 0]).random_raw(rows), kind="stable")
    assert len(order[:FIRST_ROWS]) == FIRST_ROWS
    return {"seconds": time.perf_counter() - started}


def report(json_path: str | None, positions: list[int], runs: dict[str, list[Result]]) -> int:
    """Print the medians and a line of JSON; 1 if the bound is broken."""
    seconds = {}
    for position in positions:
        found = runs[str(position)]
        seconds[position] = median(run["open_seconds"] + run["rows_seconds"] for run in found)
        opening, taking = (median(run[part] for run in found) for part in ("open_seconds", "rows_seconds"))
        print(f"position {position:10,}: {opening:.3f} s to open, {taking:.3f} s for {FIRST_ROWS} rows")
    more = {position: seconds[position] - seconds[0] for position in positions[1:]}
    stored = median(run["seconds"] for run in runs["stored order"])
    a_row = median(run["rows_seconds"] for run in runs["fast forward"]) / FAST_FORWARD_ROWS
    for position, difference in more.items():
        print(
            f"position {position:10,}: {difference:+.3f} s beside position 0; a stored order takes {stored:.2f} s at each "
            f"start, a fast forward {a_row * position:.0f} s"
        )
    result = {
        "rows": int(runs["0"][0]["rows"]),
        "seconds_by_position": seconds,
        "seconds_more_by_position": more,
        "stored_order_seconds": stored,
        "fast_forward_seconds_by_position": {position: a_row * position for position in more},
        "fast_forward_beside_ours": a_row * positions[1] / seconds[positions[1]],
    }
    print(json.dumps(result))
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    return int(max(more.values()) > MOST_SECONDS_MORE)


if __name__ == "__main__":
    sys.exit(main())
