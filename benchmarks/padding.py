"""How much of the compute is padding: packed rows beside the ancestor's way and a greedy packer, on a real data file.

    python benchmarks/padding.py [FILE] [--dataset alpaca] [--tokenizer FOLDER] [--context 2048]

Tokenises the file as train.py does (default: the embedded Alpaca records and tokenizer) and lays its documents into rows:

- `documents`, `concat`, `off`: our packings;
- `next fit`: a greedy packer that puts each piece into the last row if it fits there, else into a new one;
- `ancestor`: every record padded to the context size, its end cut off.

`padding` is the share of all positions without a token, `beside documents` the number of rows beside those of `documents`.
One row at the end of the data cannot be filled; `padding_without_last_row` leaves it out, and is what counts for a file of
few rows. Bound, and exit status 1 if it is broken: that of `documents` is at most 1 %.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ds_recipes.config.data_paths import parse_data_path
from ds_recipes.data.formats.choose import make_format
from ds_recipes.data.formats.sample import FormatSettings
from ds_recipes.data.packing import Ints, Packing, pack
from ds_recipes.data.tokenizer import load_tokenizer
from ds_recipes.data.tokens.store import Recipe, open_documents
from ds_recipes.world.group import solo

ROOT = Path(__file__).resolve().parents[1]
MOST_PADDING = 0.01
TIMED_DOCUMENTS = 100_000


@dataclass(frozen=True)
class Result:
    """How a way of packing fills its rows."""

    rows: int
    padding: float  # share of all positions, 0 to 1
    padding_without_last_row: float
    cut_tokens: int  # lost, of documents that are longer than a row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default=str(ROOT / "embedded" / "alpaca.jsonl"))
    parser.add_argument("--dataset", choices=("alpaca", "text"), default="alpaca", help="the file's format")
    parser.add_argument("--tokenizer", default=str(ROOT / "embedded" / "model"), help="a tokenizer's folder or hub id")
    parser.add_argument("--context", type=int, default=2048, help="tokens a row")
    parser.add_argument("--json", help="write the result to this file too")
    arguments = parser.parse_args()
    lengths, splits_long = read_lengths(arguments.file, arguments.dataset, arguments.tokenizer)
    long_documents = "split" if splits_long else "truncate"
    results = measure(lengths, arguments.context, long_documents)
    return report(arguments, lengths, results, documents_per_second(lengths, arguments.context, long_documents))


def read_lengths(file: str, dataset: str, tokenizer_name: str) -> tuple[Ints, bool]:
    """Tokens of each document, and whether the format splits long ones unless asked otherwise."""
    tokenizer = load_tokenizer(tokenizer_name, trust_remote_code=False)
    settings = FormatSettings(dataset)
    with tempfile.TemporaryDirectory() as cache:
        recipe = Recipe(
            format=settings,
            tokenizer=tokenizer,
            vocabulary_size=len(tokenizer),
            skip_bad=False,
            streaming=False,
            workers=1,
            cache=Path(cache),
            fallback_cache=None,
        )
        documents = open_documents(parse_data_path(file), recipe, solo(), lambda line: None)
        return documents.lengths, make_format(settings, tokenizer).splits_long


def measure(lengths: Ints, context: int, long_documents: str) -> dict[str, Result]:
    pieces = pack("off", lengths, context, long_documents).length
    ways = {
        "documents": tokens_of_rows(pack("documents", lengths, context, long_documents)),
        "concat": tokens_of_rows(pack("concat", lengths, context, "split")),
        "off": pieces,
        "next fit": next_fit(pieces, context),
        "ancestor": np.minimum(lengths, context),
    }
    return {way: judge(filled, int(lengths.sum()), context) for way, filled in ways.items()}


def tokens_of_rows(packing: Packing) -> Ints:
    before = np.append(0, np.cumsum(packing.length))
    return np.diff(before[packing.row_offsets])  # [rows]


def judge(filled: Ints, num_tokens: int, context: int) -> Result:
    """`filled`: tokens of each row."""
    rows, kept = len(filled), int(filled.sum())
    without_last = kept - int(filled.min())
    return Result(
        rows=rows,
        padding=1 - kept / (rows * context),
        padding_without_last_row=1 - without_last / ((rows - 1) * context) if rows > 1 else 0.0,
        cut_tokens=num_tokens - kept,
    )


def documents_per_second(lengths: Ints, context: int, long_documents: str) -> float:
    """How fast `documents` packs; the file's lengths are repeated to make a number that can be timed."""
    many = np.resize(lengths, TIMED_DOCUMENTS)
    started = time.perf_counter()
    pack("documents", many, context, long_documents)
    return TIMED_DOCUMENTS / (time.perf_counter() - started)


def next_fit(pieces: Ints, context: int) -> Ints:
    filled = [0]
    for length in pieces.tolist():
        if filled[-1] + length > context:
            filled.append(0)
        filled[-1] += length
    return np.array(filled)


def report(arguments: argparse.Namespace, lengths: Ints, results: dict[str, Result], documents_per_s: float) -> int:
    """Print a table and a line of JSON; 1 if the bound is broken."""
    tokens, context = int(lengths.sum()), arguments.context
    print(
        f"{len(lengths):,} documents, {tokens:,} tokens; rows of {context:,}, at least {-(-tokens // context):,} of them"
    )
    ours = results["documents"]
    for way, result in results.items():
        print(
            f"{way:>10}: {result.rows:7,} rows, {100 * result.padding:6.2f} % padding "
            f"({100 * result.padding_without_last_row:6.2f} % without the last row), "
            f"{result.rows / ours.rows:6.2f} x beside documents, {result.cut_tokens:,} tokens cut off"
        )
    print(f"documents are packed at {documents_per_s:,.0f} a second")
    content: dict[str, Any] = {
        "file": Path(arguments.file).name,
        "context": context,
        "documents": len(lengths),
        "tokens": tokens,
        "ancestor_rows_beside_ours": results["ancestor"].rows / ours.rows,
        "next_fit_rows_beside_ours": results["next fit"].rows / ours.rows,
        "documents_per_s": documents_per_s,
        "ways": {way: asdict(result) for way, result in results.items()},
    }
    print(json.dumps(content))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n")
    return int(ours.padding_without_last_row > MOST_PADDING)


if __name__ == "__main__":
    sys.exit(main())
