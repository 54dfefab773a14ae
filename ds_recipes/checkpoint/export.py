"""A checkpoint becomes a Hugging Face model: streamed, published in one step, and checked in a fresh process."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ds_recipes.checkpoint.files import write_file
from ds_recipes.checkpoint.load import CheckpointReader, check_files, check_same_model
from ds_recipes.checkpoint.manifest import PROBE, STATE, Manifest, read_manifest
from ds_recipes.errors import CheckpointError, InputError
from ds_recipes.fsops.durable import publish
from ds_recipes.models.skeleton import build_skeleton, parameter_shapes
from ds_recipes.ranges import header_bytes, tensor_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TOLERANCE = {"float32": 2e-5, "bfloat16": 0.02, "float16": 0.02}
"""Largest difference of logits, as a share of the largest logit, between training and the exported model. The coarser
of the two precisions counts. On the embedded model trained in float32: 0 in float32, 4e-4 in float16, 3e-3 in bfloat16;
with one output projection's rows reversed 0.1. Rounding hides smaller mistakes, so float32 is the sharpest check."""

LOAD_SECONDS = 3600


@dataclass(frozen=True)
class Piece:
    """One tensor of the exported files, and the parameter that it is made from."""

    name: str
    shape: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Exported:
    """What an export made. `difference` is None if the model was not loaded again."""

    folder: Path
    files: tuple[str, ...]
    tensors: int
    dtype: str
    difference: float | None


def export(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    trust_remote_code: bool = False,
    load_check: bool = True,
) -> Exported:
    """Write the checkpoint's weights, config and tokenizer to the folder `out`, which must not exist or be empty.

    Host memory is bounded by the largest tensor. `dtype` is the precision of the weights, by default the one that the
    model was trained in. With `load_check` the result is loaded in a fresh process and its logits compared with those
    recorded in training, before the folder gets its name.

    Raises:
        CheckpointError: the checkpoint is damaged, or the exported model does not compute what was trained.
        InputError: `out` exists, or the dtype is unknown.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists already, and an export never writes over anything. Choose a new folder.")
    manifest = read_manifest(checkpoint)
    check_files(checkpoint, manifest, range(len(manifest.files)))
    trained_in = str(manifest.engine["parameters"])
    dtype = dtype or trained_in
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    hf_config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(hf_config, torch.float32, "eager", torch.device("cpu"), trust_remote_code)
    check_same_model(manifest, parameter_shapes(skeleton), str(checkpoint))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        pieces = plan_pieces(skeleton, manifest)
        names = _write_weights(
            partial, pieces, CheckpointReader(checkpoint, manifest), skeleton, dtype, max_shard_bytes
        )
        _write_small_files(partial, checkpoint, manifest, dtype)
        difference = None
        if load_check:
            tolerance = max(TOLERANCE[dtype], TOLERANCE[trained_in])
            difference = _check_fresh_load(partial, checkpoint / PROBE, dtype, trust_remote_code, tolerance)
        publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Exported(out, tuple(names), len(pieces), dtype, difference)


def plan_pieces(skeleton: PreTrainedModel, manifest: Manifest) -> list[Piece]:
    """The tensors of the exported files in the checkpoint's order, found without reading any weight.

    transformers fuses some models' tensors on loading (experts of a mixture, for one); the files get them apart again,
    under the names that the hub knows.

    Raises:
        CheckpointError: transformers needs several parameters at once for one tensor of the files.
    """
    pieces = [
        Piece(name, tuple(tensor.shape), source)
        for source, shape in manifest.shapes().items()
        for name, tensor in _apart(skeleton, source, torch.empty(shape, device="meta")).items()
    ]
    whole = revert_weight_conversion(
        skeleton, {name: torch.empty(shape, device="meta") for name, shape in manifest.shapes().items()}
    )
    if {piece.name: piece.shape for piece in pieces} != {name: tuple(tensor.shape) for name, tensor in whole.items()}:
        raise CheckpointError(
            f"models of type {skeleton.config.model_type} mix several parameters into one tensor of their files, which an "
            "export tensor by tensor cannot do"
        )
    return pieces


def _apart(skeleton: PreTrainedModel, source: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = revert_weight_conversion(skeleton, {source: tensor})
    return made


def _write_weights(
    folder: Path,
    pieces: Sequence[Piece],
    reader: CheckpointReader,
    skeleton: PreTrainedModel,
    dtype: str,
    max_shard_bytes: int,
) -> list[str]:
    """Write the safetensors shards, and their index if there are several; returns the files' names."""
    shards = _shards(pieces, DTYPES[dtype].itemsize, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        layout = {piece.name: (DTYPES[dtype], piece.shape) for piece in shard}
        write_file(
            folder / name, _bytes(header_bytes(layout, {"format": "pt"}), shard, reader, skeleton, DTYPES[dtype])
        )
    if len(shards) > 1:
        total = sum(torch.Size(piece.shape).numel() for piece in pieces) * DTYPES[dtype].itemsize
        where = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
        write_file(folder / "model.safetensors.index.json", [index.encode()])
    return names


def _shards(pieces: Sequence[Piece], itemsize: int, max_bytes: int) -> list[list[Piece]]:
    """Split in order; the tensors of one parameter stay together, so that it is read once."""
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.source, []).append(piece)
    shards: list[list[Piece]] = [[]]
    filled = 0
    for group in groups.values():
        size = sum(torch.Size(piece.shape).numel() for piece in group) * itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    return shards


def _bytes(
    head: bytes, shard: Sequence[Piece], reader: CheckpointReader, skeleton: PreTrainedModel, dtype: torch.dtype
) -> Iterator[bytes | memoryview]:
    """A file's bytes, one parameter in memory at a time."""
    yield head
    for source in dict.fromkeys(piece.source for piece in shard):
        shape = reader.shape(source)
        flat = torch.empty(torch.Size(shape).numel(), dtype=dtype)
        reader.read_into("fp32", source, 0, flat)
        for tensor in _apart(skeleton, source, flat.reshape(shape)).values():
            yield from tensor_bytes(tensor)


def _write_small_files(folder: Path, checkpoint: Path, manifest: Manifest, dtype: str) -> None:
    for name in manifest.files:
        if name in (STATE, PROBE) or name.startswith("rank-"):
            continue
        data = (checkpoint / name).read_bytes()
        if name == "config.json":
            data = (json.dumps(json.loads(data) | {"dtype": dtype}, indent=2) + "\n").encode()
        write_file(folder / name, [data])


def _check_fresh_load(folder: Path, probe: Path, dtype: str, trust_remote_code: bool, tolerance: float) -> float:
    """Load the folder in a fresh process; returns the largest difference of its logits from training's.

    Raises:
        CheckpointError: it does not load, misses or adds tensors, or computes something else.
    """
    script = Path(__file__).with_name("fresh_load.py")
    trust = ["trust"] if trust_remote_code else []
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), str(probe), dtype, *trust],
        capture_output=True,
        text=True,
        timeout=LOAD_SECONDS,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        raise CheckpointError(f"the exported model does not load with plain transformers:\n{done.stderr[-3000:]}")
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    wrong = [f"{kind} {', '.join(seen[kind][:3])}" for kind in ("missing", "unexpected", "mismatched") if seen[kind]]
    if wrong:
        raise CheckpointError(f"transformers finds other tensors in the exported model: {'; '.join(wrong)}")
    difference, scale = float(seen["difference"]), float(seen["largest_logit"])
    if not difference <= tolerance * scale:
        raise CheckpointError(
            f"the exported model does not compute what was trained: its logits differ by {difference:.3g} (the largest is "
            f"{scale:.3g}) from those recorded in training"
        )
    return difference
