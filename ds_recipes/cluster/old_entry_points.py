"""The programs' places in Kotoba-Recipes, for job scripts that name them: each runs today's program and names it."""

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_recipes.world.resolve import is_speaker

ROOT = Path(__file__).resolve().parents[2]

TODAY = {
    "examples/finetuning.py": "train.py",
    "tools/convert_ckpt.py": "tools/convert_to_hf.py",
    "tools/checkpoint-convert/convert_ckpt.py": "tools/convert_to_hf.py",
    "tools/model-upload/upload.py": "tools/upload_to_hub.py",
    "scripts/kotoba/upload/upload.py": "tools/upload_to_hub.py",
}
"""Old path: the program that does the same, below the root."""

CONTEXT_LENGTH = "--sequence-length"  # convert_ckpt.py's; it went into the model's config


def run_todays_program(old_file: str, arguments: Sequence[str]) -> None:
    """Run what the script at `old_file` is today, as `__main__`, with its arguments. Rank 0 names it."""
    old = Path(old_file).resolve().relative_to(ROOT).as_posix()
    program = ROOT / TODAY[old]
    words, context_length = (
        _without_context_length(arguments) if program.name == "convert_to_hf.py" else (list(arguments), None)
    )
    if is_speaker(os.environ):
        print(f"{old} is {TODAY[old]} here, which this starts.", file=sys.stderr, flush=True)
        if context_length is not None:
            print(
                f"note: {CONTEXT_LENGTH} {context_length} is left out: max_position_embeddings stays as in the config of --model.",
                file=sys.stderr,
                flush=True,
            )
    sys.argv = [str(program), *words]
    sys.path[0] = str(program.parent)
    runpy.run_path(str(program), run_name="__main__")


def _without_context_length(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    words = list(arguments)
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == CONTEXT_LENGTH:
            if equals:
                return words[:at] + words[at + 1 :], value
            return words[:at] + words[at + 2 :], words[at + 1] if at + 1 < len(words) else ""
    return words, None
