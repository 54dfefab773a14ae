"""Whole runs of train.py with a fault in them, and what must hold afterwards: the invariant that no fault may break.

A run of a tiny model is made once without a fault, for each engine and number of ranks; every call of the file layer is
logged on the way. A faulted run begins from nothing or from some of its checkpoints, meets its fault, is started again
without one, and has to come to the same end: the same weights, losses, learning rates and order of the data, bit for bit.
"""

import fnmatch
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ds_recipes.checkpoint.load import find_newest
from ds_recipes.world.group import solo
from tests.nano import make_nano
from tests.ranks.training import Ended, metrics, train

STEPS = 8
SAVES = (2, 4, 6, 8)
BEGIN = 4
KEEPING = ("--keep_last", "2")
FLAGS = (
    *("--max_steps", str(STEPS), "--save_interval_iteration", "2", "--eval_interval", "4", "--global_batch_size", "4"),
)
EXACT = ("step", "loss", "lr", "grad_norm", "tokens", "target_tokens", "samples", "epoch", "data_hash")
STOPPED = 75
TIMEOUT_SECONDS = 90
GRACE_SECONDS = 2.0
"""How long the harness, as a launcher would, lets the other ranks go on after one has failed."""


@dataclass(frozen=True)
class LoggedCall:
    """A call of a rank of the run without faults."""

    kind: str
    path: str

    def matches(self, kinds: tuple[str, ...], pattern: str) -> bool:
        return (not kinds or self.kind in kinds) and fnmatch.fnmatch(self.path, pattern)


class Reference:
    """The run without faults, and the calls of runs like the faulted ones, made when they are first asked for."""

    def __init__(self, nano: Path, engine: str, ranks: int) -> None:
        self.nano, self.engine, self.ranks = nano, engine, ranks
        self._name = f"{engine}-{ranks}"
        self._seconds: list[float] = []

    @property
    def seconds(self) -> float:
        """How long a launch takes."""
        assert self.folder.exists()
        return self._seconds[-1]

    @cached_property
    def folder(self) -> Path:
        """The run folder, with all checkpoints."""
        folder = self.nano.parent / f"whole-{self._name}"
        self._succeed(folder)
        return folder

    @cached_property
    def calls(self) -> list[list[LoggedCall]]:
        """The calls of a run from nothing, by rank."""
        assert self.folder.exists(), "the caches are there"
        return self._logged(self.nano.parent / f"logged-{self._name}")

    @cached_property
    def first_calls(self) -> list[list[LoggedCall]]:
        """The calls of a run from nothing that also tokenises its data, by rank."""
        self.remove_caches()
        return self._logged(self.nano.parent / f"logged-first-{self._name}")

    @cached_property
    def later_calls(self) -> list[list[LoggedCall]]:
        """The calls of a run that goes on from the checkpoint after step `BEGIN`, by rank."""
        folder = self.nano.parent / f"logged-later-{self._name}"
        self.put_checkpoints(folder, BEGIN)
        return self._logged(folder)

    def launch(self, folder: Path, *flags: str, **how: Any) -> Ended:
        argv = ("--config", str(self.nano), "--save_checkpoint_path", str(folder), "--engine", self.engine)
        outputs = folder.with_name(f"{folder.name}-outputs")
        limits = {"timeout": TIMEOUT_SECONDS, "grace": GRACE_SECONDS}
        return train(self.ranks, *argv, *FLAGS, *flags, outputs=outputs, **limits, **how)

    def remove_caches(self) -> None:
        """Remove what was made from the data: the next run tokenises again."""
        shutil.rmtree(self.nano.parent / ".index_cache", ignore_errors=True)

    def put_checkpoints(self, folder: Path, until: int) -> None:
        """Make a run folder that holds the checkpoints up to a step."""
        folder.mkdir()
        for step in SAVES:
            if step <= until:
                shutil.copytree(self.folder / f"iter_{step:07d}", folder / f"iter_{step:07d}")

    def _logged(self, folder: Path) -> list[list[LoggedCall]]:
        logs = [folder.with_name(f"{folder.name}-calls-{rank}") for rank in range(self.ranks)]
        text = "; ".join(f"log:{log}@1 rank={rank}" for rank, log in enumerate(logs))
        self._succeed(folder, *KEEPING, env=armed(text))
        lines = [[line.split(" ", 2) for line in log.read_text().splitlines()] for log in logs]
        return [[LoggedCall(kind, path) for _, kind, path in of_rank] for of_rank in lines]

    def _succeed(self, folder: Path, *flags: str, **how: Any) -> None:
        started = time.monotonic()
        ended = self.launch(folder, *flags, **how)
        assert ended.statuses == (0,) * self.ranks, ended.text
        self._seconds.append(time.monotonic() - started)


class References:
    """Makes each reference when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._nano = make_nano(folder / "nano")
        self._made: dict[tuple[str, int], Reference] = {}

    def get(self, engine: str, ranks: int) -> Reference:
        return self._made.setdefault((engine, ranks), Reference(self._nano, engine, ranks))


def armed(text: str) -> dict[str, str]:
    """The environment that arms faults."""
    return {"FAULT_TEST": "1", "DS_RECIPES_FAULTS": text} if text else {}


def newest_step(folder: Path, damaged: int = 0) -> int:
    """The step of the newest valid checkpoint, 0 without one; a newer one that is damaged must be the one named."""
    found = find_newest(folder, solo()) if folder.exists() else None
    lines = found.skipped if found is not None else ()
    assert all(f"iter_{damaged:07d} is not used" in line for line in lines), lines
    return found.manifest.step if found is not None else 0


def check_faulted(folder: Path, ended: Ended, before: int, damaged: int = 0) -> None:
    """What must hold after a launch with a fault that began with step `before`, and with step `damaged` damaged."""
    newest = newest_step(folder, damaged)
    assert newest >= before, f"step {before} is lost, {newest} is the newest"
    said = [int(event["step"]) for event in events(folder) if event["kind"] == "saved"]
    assert newest >= max(said, default=0), f"step {max(said)} was reported as saved, {newest} is the newest"
    assert newest == STEPS or 0 not in ended.statuses, f"ended with {ended.statuses}, but {newest} is the newest step"
    if set(ended.statuses) == {STOPPED}:
        last = max(metrics(folder), default=before)
        assert newest >= last, f"stopped after step {last}, but {newest} is the newest"
    assert None not in ended.statuses
    if (folder / "run.json").exists():
        assert json.loads((folder / "run.json").read_text())["launches"]


def check_whole(reference: Reference, folder: Path, first: int) -> None:
    """The run from step `first` on is, to the bit, the one that met no fault; nothing hidden is left over."""
    mine, theirs = metrics(folder), metrics(reference.folder)
    assert [exact(mine, step) for step in sorted(mine)] == [exact(theirs, step) for step in range(first + 1, STEPS + 1)]
    evaluations, wanted = metrics(folder, "eval_loss"), metrics(reference.folder, "eval_loss")
    assert evaluations[STEPS]["eval_loss"] == wanted[STEPS]["eval_loss"]
    assert weights(folder) == weights(reference.folder)
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(".iter_") or ".part" in path.name)
    assert not left, f"{left} is left over"
    assert json.loads((folder / "run.json").read_text())["state"] == "complete"


def exact(lines: Mapping[int, Mapping[str, Any]], step: int) -> dict[str, Any]:
    return {key: lines[step][key] for key in EXACT}


def weights(folder: Path) -> dict[str, str]:
    """The hashes of the ranks' files of the last checkpoint."""
    files = json.loads((folder / f"iter_{STEPS:07d}" / "manifest.json").read_text())["files"]
    found = {name: entry["xxh3_128"] for name, entry in files.items() if name.startswith("rank-")}
    assert found
    return found


def events(folder: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl that are whole."""
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
