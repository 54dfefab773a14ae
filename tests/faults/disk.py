"""What a file system may leave of a list of calls after a kill or a power cut: a model of it, small enough to be checked.

After a kill everything that was called is there. After a power cut only this is sure:

- A file holds what was written to it before its last fsync. What came later may be missing, be there in part (a prefix),
  or be torn (the length is there, some of the bytes are zeros), each file for itself.
- A folder holds the names that it had at its own last fsync. Each later change of a name (a new file, a removal, a
  rename, which is one change) may be missing or there, in any combination, except that of two changes of one name the
  later one does not come to lie under the earlier. What happens in one folder says nothing about another one.

That is more than any one file system does wrong, so what survives it survives all of them (Pillai et al., "All File
Systems Are Not Created Equal", OSDI 2014, lists which file system does which).
"""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ds_recipes.fsops.calls import Call

Tree = dict[str, bytes | None]
"""What lies in a folder, by relative path: a file's bytes, None for a folder."""

Event = Call | int
"""A call, or the step of a checkpoint that was reported as saved at this point."""

SHARES = (0.0, 0.5, 1.0)
"""How probable it is that a change since the last fsync is there; drawn for a whole state, for names and data apart."""


@dataclass
class _File:
    durable: bytes = b""
    pending: bytes = b""


@dataclass
class _Folder:
    durable: "dict[str, _File | _Folder]" = field(default_factory=dict)
    pending: "list[dict[str, _File | _Folder | None]]" = field(default_factory=list)

    def after(self, changes: "Sequence[dict[str, _File | _Folder | None]]") -> "dict[str, _File | _Folder]":
        names: dict[str, _File | _Folder | None] = dict(self.durable)
        for change in changes:
            names |= change
        return {name: node for name, node in names.items() if node is not None}

    @property
    def names(self) -> "dict[str, _File | _Folder]":
        return self.after(self.pending)


class Disk:
    """A folder as a running program sees it, and what of it is durable. It begins with a real folder, all durable."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = _load(folder)

    def apply(self, call: Call) -> None:
        """Let a call happen; one that would fail (no such file, name taken) changes nothing, nor does one elsewhere."""
        if not call.path.is_relative_to(self._folder) or call.kind in ("open", "stat", "list"):
            return
        if call.kind == "fsync_folder":
            folder = self._node(call.path)
            if isinstance(folder, _Folder):
                folder.durable, folder.pending = folder.names, []
            return
        parent = self._node(call.path.parent)
        if not isinstance(parent, _Folder):
            return
        name, node = call.path.name, parent.names.get(call.path.name)
        if call.kind in ("create", "mkdir", "append") and node is None:
            node = _Folder() if call.kind == "mkdir" else _File()
            parent.pending.append({name: node})
        elif (call.kind == "unlink" and isinstance(node, _File)) or (
            call.kind == "rmdir" and isinstance(node, _Folder) and not node.names
        ):
            parent.pending.append({name: None})
        elif call.kind in ("rename", "replace") and node is not None:
            self._rename(parent, node, call)
        elif call.kind == "fsync" and isinstance(node, _File):
            node.durable, node.pending = node.durable + node.pending, b""
        if call.kind in ("write", "append") and isinstance(node, _File):
            node.pending += bytes(call.data or b"")

    def after_kill(self) -> Tree:
        """Everything that was called."""
        return dict(_lines(self._root, _Survival(random.Random(0), 1.0, 1.0)))

    def after_power_cut(self, chosen: random.Random, names: float, data: float) -> Tree:
        """One of the states that may be left. `names` and `data` are the shares of later changes that are there."""
        return dict(_lines(self._root, _Survival(chosen, names, data)))

    def _rename(self, parent: _Folder, node: _File | _Folder, call: Call) -> None:
        assert call.target is not None and call.target.parent == call.path.parent, "a rename stays in its folder"
        there = parent.names.get(call.target.name)
        if isinstance(there, _Folder) and there.names:
            return
        parent.pending.append({call.path.name: None, call.target.name: node})

    def _node(self, path: Path) -> _File | _Folder | None:
        node: _File | _Folder | None = self._root
        for name in path.relative_to(self._folder).parts:
            node = node.names.get(name) if isinstance(node, _Folder) else None
        return node


@dataclass(frozen=True)
class Crash:
    """One state that a program's end may leave: after which event, what was reported as saved by then, what is there."""

    event: int
    last: str
    kind: str
    saved: int | None
    tree: Tree

    def __str__(self) -> str:
        lines = [f"{name}  {'folder' if data is None else len(data)}" for name, data in sorted(self.tree.items())]
        return "\n".join(
            [f"{self.kind} after event {self.event} ({self.last}), saved: {self.saved}. There is:", *lines]
        )


def crashes(disk: Disk, events: Sequence[Event], seed: int, cuts: int = 4) -> Iterator[Crash]:
    """Each different state after each event: that of a kill, the four extreme power cuts, and `cuts` random ones.

    `disk` stays as it was before the events.
    """
    disk = copy.deepcopy(disk)
    chosen, seen, saved, last = random.Random(seed), set(), None, "nothing"
    for number, event in enumerate([None, *events]):
        if isinstance(event, Call):
            disk.apply(event)
            last = f"{event.kind} {event.path.name}"
        elif event is not None:
            saved = event
        drawn = [(chosen.choice(SHARES), chosen.choice(SHARES)) for _ in range(cuts)]
        states = [("kill", disk.after_kill())]
        for names, data in [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 0.5), *drawn]:
            states.append((f"power cut (names {names}, data {data})", disk.after_power_cut(chosen, names, data)))
        for kind, tree in states:
            key = (saved, hash(frozenset(tree.items())))
            if key not in seen:
                seen.add(key)
                yield Crash(number, last, kind, saved, tree)


def write_tree(tree: Tree, folder: Path) -> Path:
    """Make a folder, which must not exist, that holds the tree."""
    folder.mkdir()
    for name, data in sorted(tree.items()):
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
    return folder


class Scratch:
    """A folder that shows one tree after the other; only what differs is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = write_tree({}, folder)
        self._shown: Tree = {}

    def show(self, tree: Tree) -> Path:
        for name, data in sorted(self._shown.items(), reverse=True):
            if name not in tree or (data is None) != (tree[name] is None):
                (self._folder / name).rmdir() if data is None else (self._folder / name).unlink()
                del self._shown[name]
        for name, data in sorted(tree.items()):
            if name not in self._shown:
                (self._folder / name).mkdir() if data is None else (self._folder / name).write_bytes(data)
            elif data is not None and data != self._shown[name]:
                (self._folder / name).write_bytes(data)
        self._shown = dict(tree)
        return self._folder


def read_tree(folder: Path) -> Tree:
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in found}


@dataclass(frozen=True)
class _Survival:
    chosen: random.Random
    names: float
    data: float

    def is_there(self, share: float) -> bool:
        return self.chosen.random() < share

    def content(self, file: _File) -> bytes:
        pending = file.pending
        if not pending or self.data == 1.0:
            return file.durable + pending
        if self.data == 0.0:
            return file.durable
        start, stop = sorted(self.chosen.choices(range(len(pending) + 1), k=2))
        torn = pending[:start] + bytes(stop - start) + pending[stop:]
        return file.durable + self.chosen.choice((pending, pending[:start], torn))


def _lines(folder: _Folder, survival: _Survival, prefix: str = "") -> Iterator[tuple[str, bytes | None]]:
    there = [change for change in folder.pending if survival.is_there(survival.names)]
    for name, node in sorted(folder.after(there).items()):
        if isinstance(node, _File):
            yield prefix + name, survival.content(node)
        else:
            yield prefix + name, None
            yield from _lines(node, survival, f"{prefix}{name}/")


def _load(folder: Path) -> _Folder:
    return _Folder({p.name: _load(p) if p.is_dir() else _File(p.read_bytes()) for p in folder.iterdir()})
