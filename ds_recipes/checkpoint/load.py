"""Find the newest checkpoint that is whole, on all ranks alike, and read any range of it."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds_recipes.checkpoint.files import why_damaged
from ds_recipes.checkpoint.manifest import STATE, Manifest, read_manifest
from ds_recipes.errors import CheckpointError
from ds_recipes.ranges import SafetensorsFile
from ds_recipes.world.group import World

SHOWN_DIFFERENCES = 5
CHECKPOINT_NAME = re.compile(r"iter_\d{7,}")


@dataclass(frozen=True)
class Found:
    """A verified checkpoint. `skipped` holds a line for each newer one that is damaged."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    skipped: tuple[str, ...]


def find_newest(folder: Path, world: World) -> Found | None:
    """The newest checkpoint of a run folder whose every file has its hash; None where there is none at all.

    `folder` may also be one checkpoint. The ranks share the reading; `latest` is not asked, since it can be stale. Every
    rank must call it.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged. Training does not start from nothing then.
    """
    skipped: list[str] = []
    for path in world.broadcast(checkpoints(folder)):
        try:
            manifest, state = world.check("verify checkpoint", partial(_verified, path, world))
        except CheckpointError as error:
            skipped.append(f"{path} is not used: {error}")
            continue
        return Found(path, manifest, state, tuple(skipped))
    if skipped:
        raise CheckpointError(
            f"{folder}: none of its {len(skipped)} checkpoints can be used, and a run never starts again from nothing by "
            "itself.\n"
            + "\n".join(skipped)
            + "\nBring one back from a copy, or name another folder (--save_checkpoint_path, --load_checkpoint_path)."
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first; a checkpoint's own folder is the only one."""
    if CHECKPOINT_NAME.fullmatch(folder.name):
        return [folder]
    found = [path for path in folder.glob("iter_*") if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("iter_")), reverse=True)


def _verified(path: Path, world: World) -> tuple[Manifest, dict[str, Any]]:
    """Read the manifest and the state, and verify this rank's share of the files.

    Raises:
        CheckpointError: the first thing that is wrong.
    """
    manifest = read_manifest(path)
    check_files(path, manifest, range(world.rank, len(manifest.files), world.size))
    try:
        return manifest, json.loads((path / STATE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{STATE} cannot be read ({error})") from error


def check_files(path: Path, manifest: Manifest, which: range) -> None:
    """Verify files of a checkpoint by size and hash; `which` are numbers in the manifest's order.

    Raises:
        CheckpointError: a file is missing, cut short or damaged.
    """
    names = list(manifest.files)
    for number in which:
        problem = why_damaged(path / names[number], manifest.files[names[number]])
        if problem:
            raise CheckpointError(problem)


def remove_partials(folder: Path, world: World) -> None:
    """Delete what interrupted saves and deletions left. Every rank must call it."""

    def remove() -> None:
        for pattern in (".iter_*.partial-*", ".iter_*.deleted") if world.rank == 0 else ():
            for path in folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    world.check("remove unfinished checkpoints", remove)


def check_same_model(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare a checkpoint's parameters with a model's.

    Raises:
        CheckpointError: a name or a shape differs; the first few are listed.
    """
    saved = manifest.shapes()
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


class CheckpointReader:
    """A range reader over a checkpoint: any slice of any parameter, from whichever files hold it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._files: dict[str, SafetensorsFile] = {}
        self.optimizer_step = manifest.optimizer_step

    @property
    def names(self) -> list[str]:
        return list(self._manifest.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._manifest.parameters[name].shape

    def has(self, kind: str) -> bool:
        return kind in self._manifest.kinds

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
