"""How much room checkpoints take on the disk, before they are written."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ds_recipes.checkpoint.retention import Keep
from ds_recipes.errors import CheckpointError

BYTES_A_VALUE = 4
BYTES_A_TENSOR = 160  # of a rank's range and kind: its line in the header, and in the manifest
BYTES_A_RANK = 40_000  # of the random generators in state.json, and the file's own entry
BLOCK_BYTES = 4096  # what the last block of a file wastes at most
GB = 1e9


@dataclass(frozen=True)
class Size:
    """What decides about the bytes of one checkpoint. `kinds` is 1 for the weights alone, 3 with Adam's moments."""

    shapes: Mapping[str, tuple[int, ...]]
    kinds: int
    ranks: int
    small_bytes: int  # of the model's and the tokenizer's files, the probe and the state without the generators

    @property
    def num_bytes(self) -> int:
        """An upper bound, close where the tensors are not tiny."""
        values = sum(prod(shape) for shape in self.shapes.values()) * self.kinds
        tensors = len(self.shapes) * self.kinds * self.ranks
        around = tensors * BYTES_A_TENSOR + self.ranks * (BYTES_A_RANK + BLOCK_BYTES) + 8 * BLOCK_BYTES
        return values * BYTES_A_VALUE + around + self.small_bytes


@dataclass(frozen=True)
class Plan:
    """The saves that lie ahead: after every `interval` steps (0: none) and after the last one."""

    step: int
    total_steps: int
    interval: int

    @property
    def num_saves(self) -> int:
        return len(self._steps) + self._one_more

    def num_multiples(self, of: int) -> int:
        """How many of them come after a multiple of so many steps."""
        return sum(step % of == 0 for step in self._steps) + (self._one_more and self.total_steps % of == 0)

    @property
    def _steps(self) -> range:
        if self.interval == 0:
            return range(0)
        return range((self.step // self.interval + 1) * self.interval, self.total_steps + 1, self.interval)

    @property
    def _one_more(self) -> int:
        return int(self.step < self.total_steps and (self.interval == 0 or self.total_steps % self.interval != 0))


def kept_at_once(keep: Keep, plan: Plan, existing: Sequence[int]) -> int:
    """How many checkpoints lie on the disk at most, the one that is being written included; `existing` are steps."""
    everything = len(existing) + plan.num_saves
    if keep.last is None:
        return everything
    older = keep.best or 0
    if keep.every is not None:
        older += plan.num_multiples(keep.every) + sum(step % keep.every == 0 for step in existing)
    return min(everything, max(len(existing), keep.last + older) + 1)


def check_space(folder: Path, size: Size, keep: Keep, plan: Plan, existing: Sequence[int]) -> list[str]:
    """Compare what the run's checkpoints will take with what is free; return what is to be said.

    `existing` are the steps of those that are there.

    Raises:
        CheckpointError: not even one more fits.
    """
    if plan.num_saves == 0:
        return []
    one, free = size.num_bytes, free_bytes(folder)
    most = kept_at_once(keep, plan, existing)
    needed = max(1, most - len(existing)) * one
    there = f" beside the {len(existing)} that are there" if existing else ""
    line = (
        f"a checkpoint takes {one / GB:.2f} GB; {most} at a time need {needed / GB:.2f} GB{there}, "
        f"{free / GB:.2f} GB are free at {folder}"
    )
    if free < one:
        raise CheckpointError(
            f"{folder}: not even one more checkpoint fits: {line}. Make room, name another --save_checkpoint_path, or set "
            "--save_optimizer false (for export only)."
        )
    if free < needed:
        return [f"warning: {line}. The run will end when the disk is full: make room, or set --keep_last."]
    return [line]


def describe_room(path: Path) -> str:
    """What is left where `path` is, or will be: bytes, and inodes where that is what is used up."""
    numbers = os.statvfs(_existing(path))
    no_inodes = numbers.f_files > 0 and numbers.f_favail == 0
    return (
        f"{free_bytes(path):,} bytes are free there{', but no inode: it can hold no further file' if no_inodes else ''}"
    )


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` is, or will be. A quota is not among what is seen here."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    """`path`, or the folder above it that is there already."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
