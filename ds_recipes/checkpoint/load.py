"""Find the newest checkpoint that is whole, on all ranks alike, and read any range of it."""

import contextlib
import errno
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from ds_recipes.checkpoint.files import read_bytes, unreadable, why_damaged
from ds_recipes.checkpoint.manifest import BUFFERS, MANIFEST, RANGES, STATE, Manifest, read_manifest
from ds_recipes.checkpoint.native.reader import open_layout
from ds_recipes.errors import CheckpointError, UnreadableError
from ds_recipes.fsops import calls
from ds_recipes.fsops.again import again
from ds_recipes.fsops.durable import DELETED, remove_tree
from ds_recipes.ranges import RangeReader, SafetensorsFile, file_inside
from ds_recipes.world.group import World

SHOWN_DIFFERENCES = 5
CHECKPOINT_NAME = re.compile(r"iter_\d{7,}")
RANK_FILE = re.compile(r"rank-\d+-of-\d+\..*")
SMALL_BYTES = 32 << 20
"""Files up to this size are hashed even where sizes are enough: state, tokenizer and config are read whole anyway."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint. `skipped` holds a line for each newer one that is damaged."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    skipped: tuple[str, ...]


def find_newest(folder: Path, world: World, verify: str = "full", before: int | None = None) -> Found | None:
    """The newest checkpoint of a run folder that is whole; None where there is none at all.

    `folder` may also be one checkpoint. The ranks share the reading; `latest` is not asked, since it can be stale. Every
    rank must call it.

    Args:
        verify: "full": every file has its size and hash; "sizes": its size, and small files their hash.
        before: only checkpoints of earlier steps count.

    Raises:
        CheckpointError: there are checkpoints, and none can be used. Training does not start from nothing then.
        UnreadableError: the disk does not give a file of one. It is not taken for damaged, and no older one is used.
    """
    skipped: list[str] = []
    paths = world.check("look for checkpoints", lambda: _candidates(folder, before) if world.rank == 0 else [])
    for path in world.broadcast(paths):
        try:
            manifest, state = _verified(path, world, verify)
        except UnreadableError:
            raise
        except CheckpointError as error:
            skipped.append(f"{path} is not used: {error}")
            continue
        return Found(path, manifest, state, tuple(skipped))
    if skipped:
        number = f"none of its {len(skipped)} checkpoints" if len(skipped) > 1 else "its only checkpoint"
        verb = "can" if len(skipped) > 1 else "cannot"
        raise CheckpointError(
            f"{folder}: {number} {verb} be used, and a run never starts again from nothing by itself.\n"
            + "\n".join(skipped)
            + "\nBring one back from a copy, or name another folder (--save_checkpoint_path, --load_checkpoint_path)."
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first; a checkpoint's own folder is the only one."""
    if is_checkpoint(folder):
        return [folder]
    found = [
        folder / name for name in _names_in(folder) if CHECKPOINT_NAME.fullmatch(name) and (folder / name).is_dir()
    ]
    return sorted(found, key=_step_of, reverse=True)


def is_checkpoint(folder: Path) -> bool:
    """True for the folder of one checkpoint, by its name or, where it has been renamed, by its manifest."""
    return CHECKPOINT_NAME.fullmatch(folder.name) is not None or (folder / MANIFEST).is_file()


def _names_in(folder: Path) -> list[str]:
    """The names in a run folder; none if it does not exist. One that cannot be read is not taken for an empty one."""
    try:
        return again(lambda: calls.names_in(folder))
    except FileNotFoundError:
        return []


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("iter_"))


def _candidates(folder: Path, before: int | None) -> list[Path]:
    """What may be continued from, newest first.

    Raises:
        CheckpointError: there is none, but something that once was one.
    """
    found = checkpoints(folder)
    if before is not None:
        return [path for path in found if _step_of(path) < before]
    if not found:
        others = [name for name in _names_in(folder) if name.startswith("iter_")]
        if others:
            raise CheckpointError(
                f"{folder}: holds no checkpoint that can be continued, but {others[-1]}, and a run never starts again from "
                f"nothing by itself. Name that one with --resume {folder / others[-1]}, rename it to iter_NNNNNNN, or move it "
                "away."
            )
    return found


def _verified(path: Path, world: World, verify: str) -> tuple[Manifest, dict[str, Any]]:
    """Read the manifest and the state on rank 0, then verify each rank's share of the files.

    Raises:
        CheckpointError: the first thing that is wrong.
    """
    read = world.check("read manifest", lambda: _read_contents(path) if world.rank == 0 else None)
    manifest, state = world.broadcast(read)  # type: ignore[misc]
    mine = range(world.rank, len(manifest.files), world.size)
    patient = world.rank > 0  # rank 0 has seen every name, so one that is missing here is only late
    check = partial(check_files, path, manifest, mine, verify, patient, world.break_off_if_asked)
    world.check("verify checkpoint", check)
    return manifest, state


def _read_contents(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest and the state; and see that the folder holds the files that the manifest names, and no other rank's.

    Raises:
        CheckpointError: it does not, or they contradict each other.
    """
    if path.is_symlink():
        raise CheckpointError(
            f"it is a link to {path.resolve()}; name that folder itself (--resume, --load_checkpoint_path)"
        )
    if (path / MANIFEST).is_symlink():
        raise CheckpointError(f"{MANIFEST} is a link; nothing is read through links")
    manifest = read_manifest(path)
    check_names(path, manifest)
    if CHECKPOINT_NAME.fullmatch(path.name) and manifest.step != _step_of(path):
        raise CheckpointError(f"its {MANIFEST} is that of step {manifest.step}")
    if STATE not in manifest.files:
        raise CheckpointError(f"its {MANIFEST} names no {STATE}")
    number = list(manifest.files).index(STATE)
    check_files(path, manifest, range(number, number + 1))
    try:
        state: dict[str, Any] = json.loads(read_bytes(path / STATE))
        step = state.get("step", manifest.step)
    except OSError as error:
        raise unreadable(path / STATE, error) from error
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{STATE} cannot be read ({error!r})") from error
    if step != manifest.step:
        raise CheckpointError(f"{STATE} is that of step {step}, {MANIFEST} of step {manifest.step}")
    return manifest, state


def check_names(path: Path, manifest: Manifest) -> None:
    """See that the folder holds every file that the manifest names, and no further file of a rank.

    Raises:
        CheckpointError: one is missing, or one is too many: it could be of another save.
    """
    try:
        there = set(again(lambda: calls.names_in(path)))
    except OSError as error:
        raise unreadable(path / MANIFEST, error) from error
    for folder in {name.split("/")[0] for name in manifest.files if "/" in name} & there:
        inner = path / folder
        if not inner.is_symlink() and inner.is_dir():
            there |= {f"{folder}/{name}" for name in again(partial(calls.names_in, inner))}
    for name in manifest.files:
        if name not in there:
            raise CheckpointError(f"{name} is missing")
    for name in sorted(there - manifest.files.keys()):
        if RANK_FILE.fullmatch(name) or "/" in name:
            raise CheckpointError(f"{name} is not in its {MANIFEST}: files of two saves are mixed")


def check_files(
    path: Path,
    manifest: Manifest,
    which: range,
    verify: str = "full",
    patient: bool = False,
    pause: Callable[[], None] = lambda: None,
) -> None:
    """Verify files of a checkpoint; `which` are numbers in the manifest's order.

    With `verify` "sizes", files above `SMALL_BYTES` are not hashed. `patient`: a missing file is waited for, as one that
    another host has seen already. `pause` is called before each file, and may raise.

    Raises:
        CheckpointError: a file is missing, cut short or damaged, or is a link.
    """
    names = list(manifest.files)
    for number in which:
        pause()
        file, record = path / names[number], manifest.files[names[number]]
        if file.is_symlink():
            raise CheckpointError(f"{names[number]} is a link; nothing is read through links")
        if patient:
            with contextlib.suppress(OSError):
                again(partial(calls.size_of, file), also=(errno.ENOENT,))
        problem = why_damaged(file, record, sizes_only=verify == "sizes" and record.size > SMALL_BYTES)
        if problem:
            raise CheckpointError(problem)


def remove_partials(folder: Path, world: World) -> None:
    """Delete what interrupted saves and deletions left. Every rank must call it, once rank 0 holds the run lock.

    A save in progress is of a job that has lost the lock. It is renamed first: from then on its job cannot publish it.

    Raises:
        CheckpointError: one cannot be renamed.
    """

    def remove() -> None:
        for partly in folder.glob(".iter_*.partial-*") if world.rank == 0 else ():
            if not partly.name.endswith(DELETED):
                _hide(partly)
        if world.rank == 0:
            remove_half_deleted(folder)

    world.check("remove unfinished checkpoints", remove)


def remove_half_deleted(folder: Path) -> None:
    """Delete what is left of checkpoints whose names are gone, as far as that can be done now: it is in nobody's way."""
    for hidden in folder.glob(f".iter_*{DELETED}"):
        with contextlib.suppress(OSError):
            remove_tree(hidden)


def _hide(partly: Path) -> None:
    try:
        again(lambda: calls.rename(partly, partly.with_name(partly.name + DELETED)))
    except (
        FileNotFoundError
    ):  # published at the last moment, and found by whoever looks now; or the server's answer was lost
        return
    except OSError as error:
        raise CheckpointError(f"{partly}: an unfinished checkpoint cannot be removed: {error.strerror}") from error


def set_aside(folder: Path, after_step: int, attempt: str, world: World) -> list[Path]:
    """Rename the checkpoints of later steps, newest first, so that a run goes on from `after_step`; returns the new names.

    They are not looked at again, not counted, and not deleted. Every rank must call it.
    """

    def rename() -> list[Path]:
        made = []
        for path in checkpoints(folder) if world.rank == 0 else ():
            if _step_of(path) > after_step:
                aside = _free_name(path.with_name(f"{path.name}.aside-{attempt}"))
                calls.rename(path, aside)
                made.append(aside)
        if made:
            calls.sync_folder(folder)
        return made

    return world.broadcast(world.check("set checkpoints aside", rename))


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(name for name in chain([path], names) if not name.exists())


def check_same_model(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare a checkpoint's parameters and saved buffers with a model's.

    Raises:
        CheckpointError: a name or a shape differs; the first few are listed.
    """
    saved = {**manifest.shapes(), **manifest.buffers}
    differences = [
        f"  {name}: {_shape(saved.get(name))} in the checkpoint, {_shape(shapes.get(name))} in the model"
        for name in sorted(saved.keys() | shapes.keys())
        if saved.get(name) != shapes.get(name)
    ]
    if differences:
        more = len(differences) - SHOWN_DIFFERENCES
        tail = [f"  and {more} more"] if more > 0 else []
        raise CheckpointError(
            f"{where} holds another model than this run's:\n"
            + "\n".join(differences[:SHOWN_DIFFERENCES] + tail)
            + "\nName the model that it was made with, or another folder (--save_checkpoint_path, --load_checkpoint_path)."
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def open_reader(path: Path, manifest: Manifest) -> RangeReader:
    """A range reader over a verified checkpoint."""
    if manifest.layout != RANGES:
        return open_layout(path, manifest.layout, manifest.optimizer_step, manifest.missed_steps)
    return CheckpointReader(path, manifest)


def read_buffers(path: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The saved buffers of a verified checkpoint in this package's own layout."""
    if not manifest.buffers:
        return {}
    file = SafetensorsFile(file_inside(path, BUFFERS))
    return {name: file.tensor(name) for name in manifest.buffers}


class CheckpointReader:
    """A range reader over a checkpoint: any slice of any parameter, from whichever files hold it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._files: dict[str, SafetensorsFile] = {}
        self.optimizer_step, self.missed_steps = manifest.optimizer_step, manifest.missed_steps

    @property
    def names(self) -> list[str]:
        return list(self._manifest.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._manifest.parameters[name].shape

    def has(self, kind: str) -> bool:
        return kind in self._manifest.kinds

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        return read_buffers(self._path, self._manifest)

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened parameter into `out`, converting its dtype.

        The moments of a parameter that was frozen are zeros: it has not been trained yet.
        """
        if kind != "fp32" and name in self._manifest.frozen:
            out.zero_()
            return
        end = start + out.numel()
        for part in self._manifest.parameters[name].cover:
            first, last = max(start, part.start), min(end, part.start + part.length)
            if first < last:
                self._open(part.file).read_into(f"{kind}/{name}", first - part.start, out[first - start : last - start])

    def _open(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            self._files[name] = SafetensorsFile(self._path / name)
        return self._files[name]
