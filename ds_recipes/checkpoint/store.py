"""Save a checkpoint so that no kill can lose the one before: write hidden, agree, manifest last, one rename."""

import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ds_recipes.checkpoint.files import FileRecord, why_damaged, write_file
from ds_recipes.checkpoint.load import checkpoints
from ds_recipes.checkpoint.manifest import MANIFEST, PROBE, STATE, Manifest, Parameter, Range, check_cover
from ds_recipes.checkpoint.rng import capture_rng
from ds_recipes.engine.base import Engine, Shard
from ds_recipes.errors import TrainingError
from ds_recipes.fsops.durable import publish, remove_folder, replace_file
from ds_recipes.ranges import header_bytes, tensor_bytes
from ds_recipes.world.group import World

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
LATEST = "latest"

T = TypeVar("T")


@dataclass(frozen=True)
class _Written:
    """One range that a rank wrote: of which parameter, its full shape, and the kinds."""

    parameter: str
    shape: tuple[int, ...]
    start: int
    length: int
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class _RankFile:
    """What one rank wrote."""

    name: str
    record: FileRecord
    ranges: tuple[_Written, ...]


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` optimizer steps."""
    return f"iter_{step:07d}"


def save_checkpoint(
    folder: Path,
    step: int,
    engine: Engine,
    *,
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
    probe: tuple[torch.Tensor, torch.Tensor],
    tied: Mapping[str, str],
    world: World,
    save_optimizer: bool,
    keep_last: int | None,
) -> Path:
    """Write `folder`/iter_NNNNNNN; return it once it is published and durable. Every rank must call it.

    Args:
        state: JSON-able, equal on all ranks; the ranks' random generators are added to it.
        files: small files by name (model config, tokenizer); rank 0's are written.
        probe: token ids [1, tokens] and the model's float32 logits for them, [1, tokens, vocabulary].
        keep_last: how many checkpoints to keep, None for all; older ones go after the new one is verified.

    Raises:
        TrainingError: it could not be written, on all ranks; what was there before is whole.
    """
    final = folder / checkpoint_name(step)
    partial = folder / f".{final.name}.partial-{world.broadcast(secrets.token_hex(4))}"

    def on_all(name: str, fn: Callable[[], T]) -> T:
        return world.check(name, lambda: _naming_os_errors(partial, fn))

    try:
        on_all("make checkpoint folder", lambda: partial.mkdir(parents=True, exist_ok=True))
        own = on_all("write checkpoint", lambda: _write_rank(partial, world, engine, save_optimizer))
        written, generators = world.gather(own), world.gather(capture_rng())

        def finish() -> None:
            if world.rank == 0:
                records = {rank_file.name: rank_file.record for rank_file in written}
                records |= _write_small_files(partial, {**state, "rng": generators}, files, probe)
                manifest = _manifest(step, engine, written, records, tied)
                write_file(partial / MANIFEST, [manifest.to_bytes()])
                if final.exists():  # a damaged one that this run did not continue from
                    remove_folder(final)
                publish(partial, final)
                replace_file(folder / LATEST, f"{final.name}\n".encode())

        on_all("publish checkpoint", finish)
        if keep_last is not None:
            on_all("verify checkpoint", lambda: _verify(final, own))
            on_all("delete old checkpoints", lambda: _delete_old(folder, keep_last) if world.rank == 0 else None)
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _naming_os_errors(path: Path, fn: Callable[[], T]) -> T:
    try:
        return fn()
    except OSError as error:
        existing = next(folder for folder in path.parents if folder.exists())
        free = shutil.disk_usage(existing).free
        raise TrainingError(
            f"{error.filename or path}: the checkpoint could not be written: {error.strerror} ({free:,} bytes are free "
            "there). Those before it are whole. Make room, then start the same command again."
        ) from error


def _write_rank(partial: Path, world: World, engine: Engine, save_optimizer: bool) -> _RankFile:
    """Write this rank's ranges, one tensor a range and kind, streaming."""
    name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
    wanted = KINDS if save_optimizer else KINDS[:1]
    ranges = tuple(_written(shard, wanted) for shard in engine.shards() if shard.length)
    layout = {f"{kind}/{one.parameter}": (torch.float32, (one.length,)) for one in ranges for kind in one.kinds}

    def pieces() -> Iterator[bytes | memoryview]:
        yield header_bytes(layout, {"format": "pt"})
        for shard in engine.shards():
            for kind in _written(shard, wanted).kinds if shard.length else ():
                yield from tensor_bytes(getattr(shard, kind))

    return _RankFile(name, write_file(partial / name, pieces()), ranges)


def _written(shard: Shard, wanted: Sequence[str]) -> _Written:
    """A frozen parameter has no moments."""
    kinds = tuple(kind for kind in wanted if getattr(shard, kind) is not None)
    return _Written(shard.name, shard.shape, shard.start, shard.length, kinds)


def _write_small_files(
    partial: Path, state: Mapping[str, Any], files: Mapping[str, bytes], probe: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, FileRecord]:
    input_ids, logits = probe
    layout = {"input_ids": (torch.int64, tuple(input_ids.shape)), "logits": (torch.float32, tuple(logits.shape))}
    head = header_bytes(layout, {"format": "pt"})
    contents: dict[str, Iterable[bytes | memoryview]] = {
        STATE: [json.dumps(state).encode()],
        PROBE: [head, *tensor_bytes(input_ids), *tensor_bytes(logits)],
        **{name: [data] for name, data in files.items()},
    }
    return {name: write_file(partial / name, pieces) for name, pieces in contents.items()}


def _manifest(
    step: int,
    engine: Engine,
    written: Sequence[_RankFile],
    records: Mapping[str, FileRecord],
    tied: Mapping[str, str],
) -> Manifest:
    shapes: dict[str, tuple[int, ...]] = {}
    covers: dict[str, list[Range]] = {}
    kinds_of: dict[str, set[str]] = {}
    for rank_file in written:
        for one in rank_file.ranges:
            shapes[one.parameter] = one.shape
            covers.setdefault(one.parameter, []).append(Range(rank_file.name, one.start, one.length))
            kinds_of[one.parameter] = kinds_of.get(one.parameter, set(KINDS)) & set(one.kinds)
    parameters = {
        name: Parameter(shape, tuple(sorted(covers[name], key=lambda part: part.start)))
        for name, shape in shapes.items()
    }
    check_cover(parameters, records, "this checkpoint")
    kinds = tuple(kind for kind in KINDS if any(kind in mine for mine in kinds_of.values()))
    frozen = tuple(name for name, mine in kinds_of.items() if len(mine) < len(kinds))
    return Manifest(
        step, engine.optimizer_step, kinds, dict(records), parameters, dict(tied), engine.describe(), frozen
    )


def _verify(final: Path, own: _RankFile) -> None:
    """Read back what this rank wrote.

    Raises:
        TrainingError: it is not what was written.
    """
    problem = why_damaged(final / own.name, own.record)
    if problem:
        raise TrainingError(f"{final}: {problem}, right after it was saved. No older checkpoint was deleted.")


def _delete_old(folder: Path, keep_last: int) -> None:
    for old in checkpoints(folder)[keep_last:]:
        remove_folder(old)
