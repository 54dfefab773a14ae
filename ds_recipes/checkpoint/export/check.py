"""Load an exported folder in a fresh process, before it gets its name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ds_recipes.checkpoint.export.sources import Source
from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.errors import CheckpointError

TOLERANCE = {"float32": 2e-5, "bfloat16": 0.02, "float16": 0.02}
"""Largest difference of logits, as a share of the largest logit, between the source and the exported model. The coarser
of the two precisions counts. On the embedded model trained in float32: 0 in float32, 4e-4 in float16, 3e-3 in bfloat16;
with one output projection's rows reversed 0.1. Rounding hides smaller mistakes, so float32 is the sharpest check."""

LOAD_SECONDS = 3600


def check_fresh_load(folder: Path, source: Source, dtype: str, wanted: Wanted) -> float:
    """Load the folder in a fresh process; returns the largest difference of its logits.

    They are compared with those that training recorded, or else with those of the architecture filled with the source's
    own tensors in float32.

    Raises:
        CheckpointError: it does not load, misses or adds tensors, or computes something else.
    """
    request = {
        "folder": str(folder),
        "dtype": dtype,
        "trust_remote_code": wanted.trust_remote_code,
        "probe": None if source.probe is None else str(source.probe),
        "source": str(source.path),
        "wanted": wanted.to_json(),
        "tokenizer": str(_folder_of_tokenizer(source)) if source.has_tokenizer else None,
    }
    seen = _load_afresh(request)
    wrong = [f"{kind} {', '.join(seen[kind][:3])}" for kind in ("missing", "unexpected", "mismatched") if seen[kind]]
    if wrong:
        raise CheckpointError(f"transformers finds other tensors in the exported model: {'; '.join(wrong)}")
    if seen["other_tokens"]:
        raise CheckpointError(
            f"the exported tokenizer is not the checkpoint's: it makes other tokens of {seen['other_tokens']}"
        )
    computed_in = source.trained_in if source.probe is not None else "float32"
    tolerance = max(TOLERANCE[dtype], TOLERANCE[computed_in])
    difference, scale = float(seen["difference"]), float(seen["largest_logit"])
    if not difference <= tolerance * scale:
        raise CheckpointError(
            f"the exported model does not compute what was trained: its logits differ by {difference:.3g} (the largest is "
            f"{scale:.3g}) from those {'recorded in training' if source.probe is not None else 'of the checkpoint'}"
        )
    return difference


def _folder_of_tokenizer(source: Source) -> Path:
    """Where the tokenizer's files lie: the checkpoint's own folder, or that of --model."""
    return next(path.parent for name, path in source.files.items() if "/" not in name and "token" in name)


def _load_afresh(request: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).with_name("fresh_load.py")
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(script), json.dumps(request)],
            capture_output=True,
            text=True,
            timeout=LOAD_SECONDS,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"the exported model was not loaded within {LOAD_SECONDS} s") from error
    if done.returncode:
        hint = " (killed: too little memory? --no_load_check leaves this check out)" if done.returncode < 0 else ""
        raise CheckpointError(f"the exported model does not load with plain transformers{hint}:\n{done.stderr[-3000:]}")
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen
