"""The memory that one long line takes while it is tokenised, in the process that tokenises it.

    python benchmarks/long_record.py --megabytes 21 100 --kind english japanese

Each line is a record {"text": ...} of so many bytes on disk; each run is a process of its own that makes the token store as
a rank without workers does. `growth` is the peak of its resident memory over what it had before it opened the file;
`ratio` is (growth - 300 MB) / bytes of the line, which must stay below 10.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MB = 1_000_000
FIXED_BYTES = 300 * MB
KINDS = ("english", "japanese", "escaped", "emoji", "code", "digits")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[21.0])
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--tokenizer", default=str(ROOT / "embedded" / "model"), help="a tokenizer's folder or hub id")
    parser.add_argument("--file", help=argparse.SUPPRESS)  # set for the runs that this program starts
    arguments = parser.parse_args()
    if arguments.file:
        print(json.dumps(tokenise(Path(arguments.file), arguments.tokenizer)))
        return 0
    for kind in arguments.kind:
        for megabytes in arguments.megabytes:
            with tempfile.TemporaryDirectory() as name:
                path = Path(name) / "long.jsonl"
                write_line(path, kind, int(megabytes * MB))
                command = [sys.executable, __file__, "--file", str(path), "--tokenizer", arguments.tokenizer]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                result = json.loads(done.stdout.splitlines()[-1])
                ratio = (result["growth_bytes"] - FIXED_BYTES) / path.stat().st_size
                print(
                    json.dumps({"kind": kind, "megabytes": megabytes, "ratio": round(ratio, 2), **result}), flush=True
                )
    return 0


def write_line(path: Path, kind: str, size: int) -> None:
    """A file with one line of about so many bytes."""
    from benchmarks.tokenise import japanese_sentences

    generator = random.Random(0)
    texts = [json.loads(line)["text"] for line in (ROOT / "embedded" / "text.jsonl").read_text().splitlines()]
    japanese = japanese_sentences(generator)
    code = (ROOT / "benchmarks" / "tokenise.py").read_text()
    makers = {
        "english": lambda number: generator.choice(texts) + "\n\n",
        "japanese": lambda number: next(japanese),
        "escaped": lambda number: next(japanese),
        "emoji": lambda number: generator.choice(texts) + "🙂",
        "code": lambda number: code.replace("megabytes", f"size_{number}"),
        "digits": lambda number: str(generator.getrandbits(256)),
    }
    with path.open("w", encoding="utf-8") as file:
        file.write('{"text": "')
        for number in count():
            piece = json.dumps(makers[kind](number), ensure_ascii=kind == "escaped")[1:-1]
            file.write(piece)
            size -= len(piece.encode())
            if size <= 0:
                break
        file.write('"}\n')


def tokenise(path: Path, tokenizer_name: str) -> dict[str, Any]:
    from ds_recipes.config.data_paths import parse_data_path
    from ds_recipes.data.formats.sample import FormatSettings
    from ds_recipes.data.tokenizer import load_tokenizer
    from ds_recipes.data.tokens.store import Recipe, open_documents
    from ds_recipes.world.group import solo

    tokenizer = load_tokenizer(tokenizer_name, trust_remote_code=False)
    recipe = Recipe(
        format=FormatSettings("text"),
        tokenizer=tokenizer,
        vocabulary_size=len(tokenizer),
        skip_bad=False,
        streaming=False,
        workers=0,
        cache=path.parent / "cache",
        fallback_cache=None,
    )
    before, started = resident_peak(), time.perf_counter()
    documents = open_documents(parse_data_path(str(path)), recipe, solo(), lambda line: print(line, file=sys.stderr))
    return {
        "growth_bytes": resident_peak() - before,
        "before_bytes": before,
        "tokens": int(documents.offsets[-1]),
        "seconds": round(time.perf_counter() - started, 1),
    }


def resident_peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
