"""Make a Hugging Face model out of a checkpoint.

    python tools/convert_to_hf.py --ckpt RUN/iter_0000100 --out DIR [--dtype bfloat16]

The weights are streamed, so memory is bounded by the largest tensor. Then the folder is loaded in a fresh process with
plain transformers, and its logits are compared with those recorded in training; only a folder that passes gets its name.
"""

import argparse
import re
import sys
from pathlib import Path

from ds_recipes.errors import DsRecipesError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_in_bytes(text: str) -> int:
    """5GB, 500MB: as transformers writes them."""
    match = re.fullmatch(r"(\d+) ?([KMGT]B)", text.upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 5GB or 500MB")
    return int(match[1]) * UNITS[match[2]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint, RUN/iter_0000100")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the model")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the weights (default: what it was trained in)",
    )
    parser.add_argument(
        "--max_shard_size", type=size_in_bytes, default="5GB", help="largest size of a file (default: 5GB)"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the Python files in the checkpoint")
    parser.add_argument(
        "--no_load_check",
        action="store_true",
        help="do not load the result again (for a machine whose memory the model does not fit)",
    )
    given = parser.parse_args()
    from ds_recipes.checkpoint.export import export  # imports torch

    try:
        made = export(
            given.ckpt, given.out, given.dtype, given.max_shard_size, given.trust_remote_code, not given.no_load_check
        )
    except DsRecipesError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    checked = (
        "not loaded again: its logits were NOT compared"
        if made.difference is None
        else f"loads with plain transformers; its logits differ from training's by {made.difference:.2g} at most"
    )
    print(f"{made.folder}: {made.tensors} tensors in {made.dtype}, {len(made.files)} file(s); {checked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
