"""A checkpoint becomes a Hugging Face model: streamed, published in one step, and checked in a fresh process."""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.checkpoint.export.adapter import TENSORS, read_adapter_config, write_adapter
from ds_recipes.checkpoint.export.check import LOAD_SECONDS, check_fresh_load
from ds_recipes.checkpoint.export.model_card import model_card
from ds_recipes.checkpoint.export.pieces import plan_pieces
from ds_recipes.checkpoint.export.sources import CONFIG, Source, dtypes_apart, open_adapter, open_source
from ds_recipes.checkpoint.export.transformers4 import (
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    portable_config,
    portable_tokenizer_config,
)
from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.weights import DTYPES, WeightFiles
from ds_recipes.checkpoint.files import read_bytes
from ds_recipes.errors import CheckpointError, InputError
from ds_recipes.fsops import calls
from ds_recipes.fsops.durable import make_folders, publish, remove_tree, write_file

DEAD_SECONDS = 2 * LOAD_SECONDS
"""Nothing in a folder was written for so long: the export that it belongs to is dead. A load check may take half of that."""

NO_TOKENIZER = (
    "no tokenizer lies with the checkpoint, so the folder has none: copy the files of the one that was trained with into it, "
    "or name a folder or hub id that has them with --model"
)


@dataclass(frozen=True)
class Exported:
    """What an export made. `difference` is None if the model was not loaded again."""

    folder: Path
    files: tuple[str, ...]
    tensors: int
    dtype: str
    difference: float | None
    notes: tuple[str, ...] = ()


def export(checkpoint: Path, out: Path, wanted: Wanted | None = None) -> Exported:
    """Write the checkpoint's weights, config and tokenizer to the folder `out`, which must not exist or be empty.

    `checkpoint` is one of ours, a folder that DeepSpeed wrote, or a file that holds a state_dict. Host memory is bounded by
    a few buffers. The result is loaded in a fresh process and its logits compared with those recorded in training, or with
    those of the source's own tensors, before the folder gets its name.

    Raises:
        CheckpointError: the checkpoint is damaged, or the exported model does not compute what was trained.
        InputError: `out` exists, or `checkpoint` cannot be exported as asked.
    """
    wanted = wanted or Wanted()
    refuse_target(out)
    if wanted.dtype is not None and wanted.dtype not in DTYPES:
        raise InputError(f"--dtype {wanted.dtype}: choose one of {', '.join(DTYPES)}")
    with _naming_errors(checkpoint), _partial_folder(out) as partial:
        made = _write_adapter if wanted.lora == "adapter" else _write_model
        done = made(partial, checkpoint, wanted)
        publish(partial, out)
    return Exported(out, *done)


Done = tuple[tuple[str, ...], int, str, float | None, tuple[str, ...]]


def _write_model(partial: Path, checkpoint: Path, wanted: Wanted) -> Done:
    source = open_source(checkpoint, wanted)
    dtype = wanted.dtype or source.trained_in
    shapes = {name: source.reader.shape(name) for name in source.reader.names}
    shapes |= {name: tuple(buffer.shape) for name, buffer in source.reader.buffers.items()}
    pieces = plan_pieces(source.skeleton, shapes, dtypes_apart(source.hf_config, DTYPES[dtype], wanted))
    files = WeightFiles(source.reader, dtype, source.skeleton).write_model(partial, pieces, wanted.max_shard_bytes)
    note = _write_small_files(partial, source, dtype)
    source.finish()
    difference = check_fresh_load(partial, source, dtype, wanted) if wanted.load_check else None
    further = (note, None if source.has_tokenizer else NO_TOKENIZER)
    notes = (*source.notes, *(each for each in further if each is not None))
    return tuple(files), len(pieces), dtype, difference, notes


def _write_adapter(partial: Path, checkpoint: Path, wanted: Wanted) -> Done:
    reader, trained_in = open_adapter(checkpoint, wanted)
    dtype = wanted.dtype or trained_in
    config = read_adapter_config(checkpoint, wanted.adapter_config, wanted.model)
    pieces = write_adapter(partial, reader, dtype, config)
    return (TENSORS,), len(pieces), dtype, None, ()


def _write_small_files(folder: Path, source: Source, dtype: str) -> str | None:
    """Write config, tokenizer and card; returns what the user should know of the config."""
    config = deepcopy(source.hf_config)
    config.architectures = [type(source.skeleton).__name__]
    config.dtype = DTYPES[dtype]
    files = {name: read_bytes(path) for name, path in source.files.items()}
    python_files = [name for name in files if name.endswith(".py")]
    content, note = portable_config(config, python_files)
    write_file(folder / CONFIG, [(json.dumps(content, indent=2, sort_keys=True) + "\n").encode()])
    if TOKENIZER_CONFIG in files:
        written, tokens = files[TOKENIZER_CONFIG], files.get(TOKENIZER_JSON)
        files[TOKENIZER_CONFIG] = portable_tokenizer_config(written, tokens, python_files)
    for name, content_of in files.items():
        make_folders((folder / name).parent)
        write_file(folder / name, [content_of])
    write_file(folder / "README.md", [model_card(source, dtype).encode()])
    return note


def refuse_target(out: Path) -> None:
    """See that there is nothing at `out`.

    Raises:
        InputError: something is there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists already, and an export never writes over anything. Choose a new folder.")


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which goes if anything fails; those of dead exports go before."""
    make_folders(out.parent)
    for left in out.parent.glob(f".{out.name}.partial-*"):
        if _idle_seconds(left) > DEAD_SECONDS:
            remove_tree(left)
    partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    calls.make_folder(partial)
    try:
        yield partial
    except BaseException:
        with suppress(OSError):
            remove_tree(partial)
        raise


def _idle_seconds(folder: Path) -> float:
    """Since when nothing in a folder has changed, by the clock of the machine that changed it."""
    times = [path.stat().st_mtime for path in (folder, *folder.iterdir())]
    return time.time() - max(times)


@contextmanager
def _naming_errors(checkpoint: Path) -> Iterator[None]:
    """Errors of the system become errors for the user; one that follows from a deletion of the checkpoint says so."""
    was_there = checkpoint.exists()
    try:
        yield
    except (OSError, CheckpointError, InputError) as error:
        if was_there and not checkpoint.exists():
            raise CheckpointError(
                f"{checkpoint} was deleted while it was exported: a run in training keeps its last ones only (keep_last, "
                "keep_every). Nothing was published."
            ) from error
        if isinstance(error, OSError):
            raise CheckpointError(f"{error.filename}: {error.strerror}. Nothing was published.") from error
        raise
