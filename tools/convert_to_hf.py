"""Make a Hugging Face model out of a checkpoint, or models out of all checkpoints of a run.

    python tools/convert_to_hf.py --ckpt RUN/iter_0000100 --out DIR [--dtype bfloat16]
    python tools/convert_to_hf.py --ckpt CHECKPOINT/global_step500 --model FOLDER_OR_HUB_ID --out DIR
    python tools/convert_to_hf.py --ckpt model.pt --model FOLDER_OR_HUB_ID --out DIR
    python tools/convert_to_hf.py --run RUN --start 600 --end 800 --increment 200 --jobs 2 --out DIR

A checkpoint is one of ours, a folder that DeepSpeed or torch.distributed.checkpoint (FSDP's sharded states) wrote in any
program, or a file that holds a whole state_dict. The weights are streamed, so memory does not grow with the model. Then the
folder is loaded in a fresh process with plain transformers, and its logits are compared; only a folder that passes gets its
name. Started by mpirun, srun or torchrun, the ranks share the checkpoints of a run; a single checkpoint is rank 0's alone.
docs/export.md says more.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from ds_recipes.config.values import expand_path, path_argument
from ds_recipes.errors import DsRecipesError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_in_bytes(text: str) -> int:
    """5GB, 500MB: as transformers writes them."""
    match = re.fullmatch(r"(\d+) ?([KMGT]B)", text.upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 5GB or 500MB")
    return int(match[1]) * UNITS[match[2]]


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--ckpt", type=path_argument, help="a checkpoint: RUN/iter_0000100, .../global_step500, .../model.pt"
    )
    what.add_argument("--run", type=path_argument, help="a run's folder: its checkpoints, each to OUT/NAME")
    parser.add_argument(
        "--out", type=path_argument, required=True, help="a new folder for the model, or for the run's models"
    )
    parser.add_argument(
        "--model",
        type=expand_path,
        help="folder or hub id with config and tokenizer, if they do not lie with the checkpoint",
    )
    parser.add_argument("--start", type=int, metavar="STEP", help="first step of the run (default: its first)")
    parser.add_argument("--end", type=int, metavar="STEP", help="last step, included (default: the run's last)")
    parser.add_argument(
        "--increment", type=positive, metavar="STEPS", help="every so many steps (default: all there are)"
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, help="checkpoints at a time (default: 1); each check loads a model"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the weights (default: what it was trained in)",
    )
    parser.add_argument(
        "--max_shard_size", type=size_in_bytes, default="5GB", help="largest size of a file (default: 5GB)"
    )
    parser.add_argument(
        "--verify",
        choices=("full", "sizes"),
        default="full",
        help="compare the hashes of a checkpoint of ours, or only the sizes of its files (default: full)",
    )
    parser.add_argument(
        "--lora", choices=("merge", "adapter"), help="merge LoRA into the weights, or export the adapter"
    )
    parser.add_argument(
        "--adapter_config",
        type=path_argument,
        help="PEFT's adapter_config.json, if it does not lie with the checkpoint",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the Python files of the model")
    parser.add_argument(
        "--trust_pickle", action="store_true", help="read a pickle that needs more than tensors: it can run any code"
    )
    parser.add_argument(
        "--no_load_check",
        action="store_true",
        help="do not load the result again (for a machine whose memory the model does not fit)",
    )
    given = parser.parse_args(words)
    if given.ckpt and (given.start, given.end, given.increment) != (None, None, None):
        parser.error("--start, --end and --increment choose from a --run, not from a --ckpt")
    return given


def main() -> int:
    given = parse()
    from ds_recipes.checkpoint.export.wanted import Wanted
    from ds_recipes.fsops.faults import arm_from_environment
    from ds_recipes.world.resolve import resolve

    wanted = Wanted(
        model=given.model,
        dtype=given.dtype,
        max_shard_bytes=given.max_shard_size,
        verify=given.verify,
        load_check=not given.no_load_check,
        trust_remote_code=given.trust_remote_code,
        trust_pickle=given.trust_pickle,
        lora=given.lora,
        adapter_config=given.adapter_config,
    )
    try:
        arm_from_environment()
        place = resolve(os.environ)
        if given.run:
            return export_run(given, wanted, place.rank, place.size)
        if place.rank == 0:
            export_one(given.ckpt, given.out, wanted)
    except DsRecipesError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def export_one(checkpoint: Path, out: Path, wanted: Any) -> None:
    from ds_recipes.checkpoint.export.whole import export  # imports torch

    print(described(export(checkpoint, out, wanted)))


def described(made: Any) -> str:
    """What an export made, in a line, and its notes below."""
    checked = (
        "not loaded again: its logits were NOT compared"
        if made.difference is None
        else f"loads with plain transformers; its logits differ from the checkpoint's by {made.difference:.2g} at most"
    )
    files = f"{len(made.files)} file(s)"
    return "\n".join([f"{made.folder}: {made.tensors} tensors in {made.dtype}, {files}; {checked}", *made.notes])


def export_run(given: argparse.Namespace, wanted: Any, rank: int, size: int) -> int:
    """Export this rank's share of the run's checkpoints; returns 1 if one of them failed."""
    from ds_recipes.checkpoint.export.run import Row, choose, export_all

    mine = choose(given.run, given.start, given.end, given.increment)[rank::size]

    def say(row: Row) -> None:
        print(
            f"{row.checkpoint.name}: {'exported' if row.error is None else 'FAILED'} in {row.seconds:.0f} s", flush=True
        )

    rows = export_all(mine, given.out, wanted, given.jobs, say)
    if rows:
        print(table(rows), flush=True)
    return int(any(row.error is not None for row in rows))


def table(rows: list[Any]) -> str:
    """One line a checkpoint, in the order of the steps, and the reasons of those that failed."""
    rows = sorted(rows, key=lambda row: row.checkpoint.name)
    width = max(len(row.checkpoint.name) for row in rows)
    lines = [
        f"{row.checkpoint.name:<{width}}  {'FAILED: ' + row.error if row.error else described(row.exported)}"
        for row in rows
    ]
    failed = sum(row.error is not None for row in rows)
    return "\n".join([*lines, f"{len(rows) - failed} of {len(rows)} checkpoints exported"])


if __name__ == "__main__":
    sys.exit(main())
