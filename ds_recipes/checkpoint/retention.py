"""Which checkpoints of a run are kept, and how the others are deleted: never so that half of one looks whole."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.checkpoint.files import read_bytes
from ds_recipes.checkpoint.load import checkpoints
from ds_recipes.checkpoint.manifest import MANIFEST, STATE
from ds_recipes.fsops import calls
from ds_recipes.fsops.durable import remove_folder, replace_file

LATEST = "latest"
BEST = "best"
"""Files of a run folder that name a checkpoint, for people. Nothing reads them."""

EVALUATION = "evaluation"
"""The key of state.json that holds the validation after a checkpoint's step, if there was one."""


@dataclass(frozen=True)
class Keep:
    """What is kept: the `last` newest ones (None: all), of the older ones those whose step is a multiple of `every`, and the
    `best` ones by validation loss.
    """

    last: int | None = None
    every: int | None = None
    best: int | None = None

    def to_delete(self, losses: Mapping[int, float | None]) -> list[int]:
        """The steps of checkpoints to delete, in ascending order, out of all (validation losses by step)."""
        if self.last is None:
            return []
        steps = sorted(losses)
        kept = {*steps[-self.last :], *best_first(losses)[: self.best or 0]}
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        return [step for step in steps if step not in kept]


def best_first(losses: Mapping[int, float | None]) -> list[int]:
    """Steps with a validation loss, the lowest first; of equal ones the newer."""
    known = [(loss, -step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    return [-step for _, step in sorted(known)]


class Retention:
    """The checkpoints of a run folder, seen from rank 0."""

    def __init__(self, folder: Path, keep: Keep) -> None:
        self._folder = folder
        self._keep = keep
        self._losses: dict[str, float | None] = {}

    def doomed(self, newest: Path) -> list[Path]:
        """What goes now that `newest` is published: the ones not kept, and what an earlier deletion left half done.

        One of a later step, which this run has not continued from, neither counts nor goes.
        """
        if self._keep.last is None:
            return []
        older = [path for path in checkpoints(self._folder) if _step(path) <= _step(newest)]
        whole = {_step(path): path for path in older if (path / MANIFEST).is_file()}
        losses = {step: self._loss(path) for step, path in whole.items()}
        halves = [path for path in older if _step(path) not in whole]
        return [*halves, *(whole[step] for step in self._keep.to_delete(losses))]

    def note(self, newest: Path) -> None:
        """Write the hints: the newest checkpoint's name, and the best one's if such are kept."""
        self._losses.pop(newest.name, None)  # a run that went back has been there before
        replace_file(self._folder / LATEST, f"{newest.name}\n".encode())
        if self._keep.best is not None:
            there = {_step(path): path for path in checkpoints(self._folder) if (path / MANIFEST).is_file()}
            best = best_first({step: self._loss(path) for step, path in there.items()})
            if best:
                replace_file(self._folder / BEST, f"{there[best[0]].name}\n".encode())

    def _loss(self, path: Path) -> float | None:
        """The validation loss of a checkpoint; None where there is none that can be read."""
        if path.name not in self._losses:
            loss = None
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                loss = float(json.loads(read_bytes(path / STATE))[EVALUATION]["eval_loss"])
            self._losses[path.name] = loss
        return self._losses[path.name]


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint. Its manifest goes first: from then on it is none, whatever happens to the rest.

    Raises:
        OSError: it could not be deleted in full.
    """
    with contextlib.suppress(FileNotFoundError):
        calls.remove_file(path / MANIFEST)
    calls.sync_folder(path)
    remove_folder(path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("iter_"))
