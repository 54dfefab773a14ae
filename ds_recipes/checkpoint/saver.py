"""Save beside training: the state is copied once, and one thread writes the copy while the loop goes on.

A save can only be begun when the one before has ended. What went wrong in the thread is raised where its end is noticed.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_recipes.checkpoint.contents import Contents
from ds_recipes.checkpoint.host_memory import available_bytes
from ds_recipes.checkpoint.rank_file import OwnRange, Part, Streamed, file_bytes, own_ranges
from ds_recipes.checkpoint.snapshot import Snapshot
from ds_recipes.checkpoint.store import Published, Store
from ds_recipes.config.hang_settings import SAVE
from ds_recipes.engine.base import Engine
from ds_recipes.errors import TrainingError
from ds_recipes.world.group import World
from ds_recipes.world.hang.activity import of_its_own

SHARE_OF_MEMORY = 0.8
"""Of the host's free memory the copies of its ranks may take this much together."""

GB = 1e9


@dataclass(frozen=True)
class Saved:
    """A save that ended well: what was published, and how long writing it took."""

    published: Published
    write_seconds: float


@dataclass
class _Writing:
    """A save under way. Its thread sets either `saved` or `error` as the last thing that it does."""

    thread: threading.Thread | None = None
    saved: Saved | None = None
    error: BaseException | None = None


class Saver:
    """This rank's part of all saves of a run. `store` works on a world that only the saves use."""

    def __init__(
        self,
        store: Store,
        world: World,
        save_optimizer: bool,
        say: Callable[[str], None],
        foreign: Callable[[Engine, World, int], Part] | None = None,
    ) -> None:
        """`world` is the companion that `store` has too; `say` shows a line.

        `foreign` makes a rank's part after a step in a layout that only the engine can write, which training has to wait for.
        """
        self._store = store
        self._world = world
        self._save_optimizer = save_optimizer
        self._say = say
        self._foreign = foreign
        self._ranges: tuple[OwnRange, ...] | None = None
        self._snapshot: Snapshot | None = None
        self._is_prepared = False
        self._memory_taker: threading.Thread | None = None
        self._writing: _Writing | None = None

    def prepare(self, engine: Engine) -> None:
        """Let a thread take the memory for copies, so that the first save need not. Every rank must call it; once is enough.

        The first touch of memory takes several times as long as a copy into it.
        """
        if self._is_prepared or self._foreign is not None:
            return
        self._is_prepared = True
        ranges = self._own_ranges(engine)
        if self._has_room(file_bytes(ranges)):
            self._memory_taker = threading.Thread(
                target=self._take_memory, args=(ranges,), name="checkpoint-memory", daemon=True
            )
            self._memory_taker.start()

    def begin(self, contents: Contents, engine: Engine, in_background: bool) -> None:
        """Start a save; return once the engine may train again. Every rank must call it, with no other save under way.

        Not in the background, or where the memory for a copy is not there, it has ended when this returns.
        """
        assert self._writing is None, "the save before was not waited for"
        writing = _Writing()
        if self._foreign is not None:
            self._write(writing, contents, self._foreign(engine, self._world, contents.step))
        elif not in_background or (snapshot := self._copied(engine)) is None:
            self._write(writing, contents, Streamed(engine, self._own_ranges(engine)))
        else:
            writing.thread = threading.Thread(
                target=self._write, args=(writing, contents, snapshot), name="checkpoint-writer"
            )
            writing.thread.start()
        self._writing = writing

    @property
    def is_busy(self) -> bool:
        """True while a save is being written. Not collective."""
        return self._writing is not None and self._writing.thread is not None and self._writing.thread.is_alive()

    def outcome(self) -> Saved | None:
        """Wait for the save under way and return how it ended, once; None without one. Not collective.

        Raises:
            SaveError: it failed, on all ranks.
            TrainingError: its thread ended without a word.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        if writing.thread is not None:
            writing.thread.join()
        if isinstance(writing.error, Exception):
            raise writing.error
        if writing.saved is None:  # a SystemExit among others, with which the process would end as if all were well
            reason = repr(writing.error) if writing.error is not None else "no reason given"
            raise TrainingError(
                f"The thread that writes checkpoints ended before it was done ({reason}). Those before this one are whole."
            ) from writing.error
        return writing.saved

    def _write(self, writing: _Writing, contents: Contents, part: Part) -> None:
        started = time.monotonic()
        try:
            with of_its_own("the checkpoint beside training", SAVE, contents.step):
                published = self._store.publish(contents, part)
            writing.saved = Saved(published, time.monotonic() - started)
        except BaseException as error:  # whatever it is, the loop has to hear of it
            writing.error = error

    def _copied(self, engine: Engine) -> Snapshot | None:
        """The state in host memory; None where there is not enough of it, on any rank."""
        self.prepare(engine)
        if self._memory_taker is not None:
            self._memory_taker.join()
            self._memory_taker = None
            (lacking,) = self._world.max([int(self._snapshot is None)])
            if lacking:
                self._snapshot = None
                self._say("training waits while checkpoints are written: the memory for a copy could not be taken")
        if self._snapshot is not None:
            self._snapshot.take(engine)
        return self._snapshot

    def _has_room(self, wanted: int) -> bool:
        """True if the copies of all ranks fit into the free memory of their hosts; else it is said why not."""
        ranks_here = self._world.hosts.count(self._world.hosts[self._world.rank])
        free = available_bytes() / ranks_here
        lacking, most = self._world.max([int(wanted > SHARE_OF_MEMORY * free), wanted])
        if lacking:
            self._say(
                f"training waits while checkpoints are written: a copy of the state takes up to {most / GB:.1f} GB a rank, "
                f"and of {free / GB:.1f} GB that are free for each rank of this host {SHARE_OF_MEMORY:.0%} may be used"
            )
        return not lacking

    def _take_memory(self, ranges: tuple[OwnRange, ...]) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)  # a thread begins with the first one
        with contextlib.suppress(RuntimeError, MemoryError):
            self._snapshot = Snapshot(ranges, pinned=self._world.device.type == "cuda")

    def _own_ranges(self, engine: Engine) -> tuple[OwnRange, ...]:
        """They stay the same for a whole run, and asking for them reads the state where it lies on NVMe."""
        if self._ranges is None:
            self._ranges = own_ranges(engine.shards(), self._world, self._save_optimizer)
        return self._ranges
