"""How fast a corpus becomes a token store, beside `datasets.map` with the same tokenizer and as many processes.

    python benchmarks/tokenise.py --megabytes 60 --processes 2

Both begin with the same JSONL file (half English, half Japanese, generated) and an empty cache folder, and end with token
ids on disk: ours in a token store, with lengths, target spans and content hashes; theirs in the Arrow files of `datasets`,
input_ids alone. Sides take turns, each run in a new process; imports are not counted. Both must give as many tokens.

`ratio` is tokens/s, ours / theirs, with all that lies between the JSONL file and the ids. `ratio_to_map` leaves out, on
their side alone, the conversion of JSONL to Arrow, which `datasets` does first.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MB = 1_000_000
TIME_LIMIT_SECONDS = 1800
SIDES = ("ours", "theirs")
JAPANESE_WORDS = 4000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--tokenizer", default=str(ROOT / "embedded" / "model"), help="a tokenizer's folder or hub id")
    parser.add_argument("--json", help="write the result to this file too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # set for the runs that this program starts
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run = run_ours if arguments.side == "ours" else run_theirs
        print(json.dumps(run(Path(arguments.folder), arguments.tokenizer, arguments.processes)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus.jsonl"
        make_corpus(corpus, arguments.megabytes)
        runs = [(side, run_side(side, corpus, arguments)) for _ in range(arguments.rounds) for side in SIDES]
        return report(arguments, corpus.stat().st_size, runs)


def make_corpus(path: Path, megabytes: float) -> None:
    """Write records of some hundred to some thousand characters, alternately English and Japanese."""
    generator = random.Random(0)
    english = [json.loads(line)["text"] for line in (ROOT / "embedded" / "text.jsonl").read_text().splitlines()]
    japanese = japanese_sentences(generator)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * MB:
            if generator.random() < 0.5:
                text = "\n\n".join(generator.choices(english, k=generator.randint(1, 3)))
            else:
                text = "".join(next(japanese) for _ in range(generator.randint(3, 30)))
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())


def japanese_sentences(generator: random.Random) -> Iterator[str]:
    """Sentences of made-up words, whose frequencies fall as those of words do, with particles between them."""
    kanji = [chr(0x4E00 + generator.randrange(3000)) for _ in range(800)]
    kana = [chr(code) for code in range(0x3042, 0x3094)]
    katakana = [chr(code) for code in range(0x30A2, 0x30F4)]
    words = [
        "".join(generator.choices(generator.choices([kanji, kana, katakana], [6, 2, 2])[0], k=generator.randint(1, 4)))
        for _ in range(JAPANESE_WORDS)
    ]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    while True:
        chosen = generator.choices(words, weights, k=generator.randint(4, 14))
        yield "".join(word + generator.choice("はがをにでとも") for word in chosen) + "です。"


def run_side(side: str, corpus: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """One run of one side, in a process of its own and a fresh cache folder."""
    with tempfile.TemporaryDirectory(dir=corpus.parent) as folder:
        (Path(folder) / corpus.name).hardlink_to(corpus)
        command = [sys.executable, __file__, "--side", side, "--folder", folder]
        command += ["--tokenizer", arguments.tokenizer, "--processes", str(arguments.processes)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": folder}
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS, env=environment
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{side:>6}: {result['tokens'] / result['seconds'] / 1e6:6.3f} M tokens/s, {result['seconds']:6.2f} s",
        flush=True,
    )
    return result


def run_ours(folder: Path, tokenizer_name: str, processes: int) -> dict[str, float]:
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
        workers=processes,
        cache=folder / "cache",
        fallback_cache=None,
    )
    started = time.perf_counter()
    documents = open_documents(parse_data_path(str(folder / "corpus.jsonl")), recipe, solo(), lambda line: None)
    return {"seconds": time.perf_counter() - started, "tokens": int(documents.offsets[-1])}


def run_theirs(folder: Path, tokenizer_name: str, processes: int) -> dict[str, float]:
    import datasets

    from ds_recipes.data.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(tokenizer_name, trust_remote_code=False)
    end = [tokenizer.eos_token_id]

    def tokenise(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(batch["text"], return_attention_mask=False, return_token_type_ids=False, verbose=False)
        return {"input_ids": [ids + end for ids in encoded.input_ids]}

    started = time.perf_counter()
    records = datasets.load_dataset(
        "json", data_files=str(folder / "corpus.jsonl"), split="train", cache_dir=str(folder / "cache")
    )
    converted = time.perf_counter()
    tokenised = records.map(tokenise, batched=True, num_proc=processes, remove_columns=records.column_names)
    ended = time.perf_counter()
    tokens = sum(len(chunk.flatten()) for chunk in tokenised.data.column("input_ids").chunks)
    return {"seconds": ended - started, "map_seconds": ended - converted, "tokens": tokens}


def report(arguments: argparse.Namespace, size: int, runs: list[tuple[str, dict[str, float]]]) -> int:
    """Print the medians and a line of JSON; 1 if the sides disagree on the tokens."""
    tokens = {result["tokens"] for _, result in runs}
    ours = median(result["seconds"] for side, result in runs if side == "ours")
    theirs = median(result["seconds"] for side, result in runs if side == "theirs")
    their_map = median(result["map_seconds"] for side, result in runs if side == "theirs")
    result = {
        "megabytes": size / MB,
        "processes": arguments.processes,
        "tokens": max(tokens),
        "ours_tokens_per_s": max(tokens) / ours,
        "theirs_tokens_per_s": max(tokens) / theirs,
        "ours_mb_per_s": size / MB / ours,
        "ratio": theirs / ours,
        "ratio_to_map": their_map / ours,
        "same_tokens": len(tokens) == 1,
    }
    print(f"ours / theirs: {result['ratio']:.2f}; beside map alone {result['ratio_to_map']:.2f}")
    print(json.dumps(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    return int(len(tokens) != 1)


if __name__ == "__main__":
    sys.exit(main())
