"""Publish a checkpoint so that no kill can lose the one before: write hidden, agree, manifest last, one rename."""

import contextlib
import errno
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ds_recipes.checkpoint.contents import Contents, capture
from ds_recipes.checkpoint.files import FileRecord, drop_from_cache, read_record, write_file
from ds_recipes.checkpoint.load import remove_half_deleted
from ds_recipes.checkpoint.manifest import BUFFERS, MANIFEST, PROBE, STATE, Manifest, Parameter, Range, check_cover
from ds_recipes.checkpoint.rank_file import KINDS, Part, Streamed, Written, own_ranges
from ds_recipes.checkpoint.retention import Keep, Retention, delete_checkpoint
from ds_recipes.checkpoint.space import describe_room, free_bytes
from ds_recipes.engine.base import Engine
from ds_recipes.errors import SaveError
from ds_recipes.fsops import calls
from ds_recipes.fsops.again import again
from ds_recipes.fsops.durable import make_folders, publish, remove_tree
from ds_recipes.ranges import header_bytes, tensor_bytes
from ds_recipes.world.group import World

T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """A checkpoint that is durable, and what did not work around it (deleting older ones), a line each."""

    path: Path
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Problem:
    """Why a rank could not read back what it wrote."""

    text: str
    is_damaged: bool


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` optimizer steps."""
    return f"iter_{step:07d}"


class Store:
    """A run folder into which all ranks together publish checkpoints, one after the other.

    `attempt` is this launch's own name for its hidden folders. `fence` is called on rank 0 right before a checkpoint gets its
    name, and raises if another launch has taken the folder over.
    """

    def __init__(
        self, folder: Path, world: World, attempt: str, keep: Keep, fence: Callable[[], None] = lambda: None
    ) -> None:
        self._folder = folder
        self._world = world
        self._attempt = attempt
        self._retention = Retention(folder, keep)
        self._fence = fence
        self._told: set[str] = set()  # checkpoints whose deletion failed, and was told

    def publish(self, contents: Contents, part: Part) -> Published:
        """Write `contents` and every rank's part; return once it is durable. Every rank must call it.

        Raises:
            SaveError: it could not be written, on all ranks; what was there before is whole.
        """
        final = self._folder / checkpoint_name(contents.step)
        partial = self._folder / f".{final.name}.partial-{self._attempt}"
        needed = int(self._world.sum([part.num_bytes])[0])

        def on_all(name: str, fn: Callable[[], T], communicates: bool = False) -> T:
            return self._world.check(name, lambda: _naming_os_errors(partial, needed, fn), communicates)

        try:
            on_all("make checkpoint folder", lambda: self._make(partial, needed) if self._world.rank == 0 else None)
            on_all("see checkpoint folder", lambda: again(lambda: calls.size_of(partial), also={errno.ENOENT}))
            own = on_all("write checkpoint", lambda: part.write(partial), part.communicates)
            parts, generators = self._world.gather(own), self._world.gather(contents.generators)

            def finish() -> dict[str, FileRecord]:
                if self._world.rank > 0:
                    return {}
                return self._finish(partial, final, contents, part.layout, parts, generators)

            small = on_all("publish checkpoint", finish)
        except BaseException:
            if self._world.rank == 0:
                with contextlib.suppress(OSError):
                    remove_tree(partial)
            raise
        return Published(final, self._retire(final, parts, small))

    def _make(self, partial: Path, needed: int) -> None:
        make_folders(self._folder)
        remove_tree(partial)  # of a save that failed, if it could not be removed then
        if free_bytes(self._folder) < needed:
            raise OSError(errno.ENOSPC, "not enough room on the disk, nothing was tried", str(partial))
        calls.make_folder(partial)

    def _finish(
        self,
        partial: Path,
        final: Path,
        contents: Contents,
        layout: str,
        parts: Sequence[Written],
        generators: Sequence[Mapping[str, Any] | None],
    ) -> dict[str, FileRecord]:
        """Write what rank 0 writes besides its part, and publish all; the records of these files."""
        small = _write_small_files(partial, contents, [one for one in generators if one is not None])
        records = {name: record for written in parts for name, record in written.files.items()} | small
        manifest = write_file(partial / MANIFEST, [_manifest(contents, layout, parts, records).to_bytes()])
        self._fence()
        publish(partial, final)  # never over another: that could be a later launch's
        return small | {MANIFEST: manifest}

    def _retire(self, final: Path, parts: Sequence[Written], small: Mapping[str, FileRecord]) -> tuple[str, ...]:
        """Delete the checkpoints that need not be kept, once the new one was read back, by other hosts than wrote it.

        Raises:
            SaveError: it cannot be read back, or is not what was written. The old ones are there; a new one that is damaged
                is gone again.
        """
        warnings: list[str] = []
        doomed = self._world.broadcast(self._doomed(final, warnings) if self._world.rank == 0 else [])
        if doomed:
            files = [written.files for written in parts]
            files[0] = {**files[0], **self._world.broadcast(dict(small))}
            self._read_back(final, files)
            self._world.check("run lock", lambda: self._fence() if self._world.rank == 0 else None)
        if self._world.rank == 0:
            self._delete(doomed, warnings)
        return tuple(self._world.broadcast(warnings))

    def _delete(self, doomed: Sequence[Path], warnings: list[str]) -> None:
        """What cannot be deleted is told once, and tried again at each later save and start."""
        remove_half_deleted(self._folder)
        for path in doomed:
            failed: list[str] = []
            _try(lambda path=path: delete_checkpoint(path), f"{path} could not be deleted", failed)  # type: ignore[misc]
            if failed and path.name not in self._told:
                self._told.add(path.name)
                warnings.append(f"{failed[0]}. Its deletion is tried again at each save and start.")

    def _read_back(self, final: Path, files: Sequence[Mapping[str, FileRecord]]) -> None:
        """Let every rank read what another host wrote: no cache of the writer answers. `files` are by the rank that wrote them."""
        me, hosts = self._world.rank, self._world.hosts
        duty = {
            name: record
            for rank, reader in enumerate(readers(hosts))
            if reader == me
            for name, record in files[rank].items()
        }
        findings = self._world.gather(self._world.check("verify checkpoint", lambda: _verify(final, duty)))
        found = next(((hosts[rank], one) for rank, one in enumerate(findings) if one is not None), None)
        if found is None:
            return
        is_damaged = any(one.is_damaged for one in findings if one is not None)
        if is_damaged and me == 0:
            with contextlib.suppress(OSError):
                delete_checkpoint(final)
        host, problem = found
        raise SaveError(
            f"{final}: {problem.text}, as {host} reads it right after it was saved"
            f"{': it is removed again' if is_damaged else ''}. No older checkpoint was deleted. Look at the disk, or the file "
            "server, and at the memory of the hosts."
        )

    def _doomed(self, final: Path, warnings: list[str]) -> list[Path]:
        found: list[Path] = []
        _try(lambda: self._retention.note(final), "the checkpoint's name could not be noted", warnings)
        _try(lambda: found.extend(self._retention.doomed(final)), "older checkpoints could not be listed", warnings)
        return found


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
    """Write `folder`/iter_NNNNNNN and wait for it; return it once it is published and durable. Every rank must call it.

    Args:
        state: JSON-able, equal on all ranks; the ranks' random generators are added to it.
        files: small files by name (model config, tokenizer); rank 0's are written.
        probe: token ids [1, tokens] and the model's float32 logits for them, [1, tokens, vocabulary].
        keep_last: how many checkpoints to keep, None for all; older ones go after the new one is verified.

    Raises:
        SaveError: it could not be written, on all ranks; what was there before is whole.
    """
    store = Store(folder, world, world.broadcast(secrets.token_hex(4)), Keep(keep_last))
    contents = capture(engine, step, state, files, probe, tied)
    part = Streamed(engine, own_ranges(engine.shards(), world, save_optimizer))
    return store.publish(contents, part).path


def readers(hosts: Sequence[str]) -> list[int]:
    """For each rank (`hosts` are theirs) the one that reads back what it wrote: of the next host; on one host alone itself."""
    ranks_of: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks_of.setdefault(host, []).append(rank)
    names = list(ranks_of)
    found = list(range(len(hosts)))
    for number, name in enumerate(names if len(names) > 1 else ()):
        others = ranks_of[names[(number + 1) % len(names)]]
        for index, rank in enumerate(ranks_of[name]):
            found[rank] = others[index % len(others)]
    return found


def _naming_os_errors(path: Path, needed: int, fn: Callable[[], T]) -> T:
    try:
        return fn()
    except OSError as error:
        raise SaveError(
            f"{error.filename or path}: the checkpoint could not be written: {error.strerror} ({describe_room(path)}, it takes "
            f"about {needed:,} bytes; a quota may allow less). Those before it are whole. Make room, then start the same "
            "command again."
        ) from error


def _try(fn: Callable[[], object], what: str, warnings: list[str]) -> None:
    try:
        fn()
    except OSError as error:
        warnings.append(f"{what}: {error}")


def _write_small_files(
    partial: Path, contents: Contents, generators: Sequence[Mapping[str, Any]]
) -> dict[str, FileRecord]:
    input_ids, logits = contents.probe
    layout = {"input_ids": (torch.int64, tuple(input_ids.shape)), "logits": (torch.float32, tuple(logits.shape))}
    head = header_bytes(layout, {"format": "pt"})
    files: dict[str, Iterable[bytes | memoryview]] = {
        STATE: [json.dumps({**contents.state, "rng": generators}).encode()],
        PROBE: [head, *tensor_bytes(input_ids), *tensor_bytes(logits)],
        **{name: [data] for name, data in contents.files.items()},
    }
    if contents.buffers:
        files[BUFFERS] = _buffers_file(contents.buffers)
    return {name: write_file(partial / name, pieces) for name, pieces in files.items()}


def _buffers_file(buffers: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield header_bytes({name: (one.dtype, tuple(one.shape)) for name, one in buffers.items()}, {"format": "pt"})
    for one in buffers.values():
        yield from tensor_bytes(one)


def _manifest(contents: Contents, layout: str, parts: Sequence[Written], records: Mapping[str, FileRecord]) -> Manifest:
    shapes: dict[str, tuple[int, ...]] = {}
    covers: dict[str, list[Range]] = {}
    kinds_of: dict[str, set[str]] = {}
    for one in (own for written in parts for own in written.ranges):
        shapes[one.parameter] = one.shape
        covers.setdefault(one.parameter, []).append(Range(one.file, one.start, one.length))
        kinds_of[one.parameter] = kinds_of.get(one.parameter, set(KINDS)) & set(one.kinds)
    parameters = {
        name: Parameter(shape, tuple(sorted(covers[name], key=lambda part: part.start)))
        for name, shape in shapes.items()
    }
    check_cover(parameters, records, "this checkpoint")
    kinds = tuple(kind for kind in KINDS if any(kind in mine for mine in kinds_of.values()))
    return Manifest(
        step=contents.step,
        optimizer_step=contents.optimizer_step,
        kinds=kinds,
        files=dict(records),
        parameters=parameters,
        tied=dict(contents.tied),
        engine=contents.engine,
        frozen=tuple(name for name, mine in kinds_of.items() if len(mine) < len(kinds)),
        missed_steps=contents.missed_steps,
        layout=layout,
        buffers={name: tuple(buffer.shape) for name, buffer in contents.buffers.items()},
    )


def _verify(final: Path, files: Mapping[str, FileRecord]) -> _Problem | None:
    """Read files back, from the disk where the system allows that; None if they are whole."""
    for name, record in files.items():
        with contextlib.suppress(OSError):
            drop_from_cache(final / name)
        try:  # a host may see for some seconds no name that another one has just made
            found = again(lambda path=final / name: read_record(path), also={errno.ENOENT})  # type: ignore[misc]
        except OSError as error:
            return _Problem(f"{name} cannot be read back ({error.strerror})", is_damaged=False)
        if (found.size, found.xxh3_128) != (record.size, record.xxh3_128):
            return _Problem(
                f"{name} is damaged (its hash is {found.xxh3_128}, {record.xxh3_128} was written)", is_damaged=True
            )
    return None
