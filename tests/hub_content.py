"""What the hub of the tests holds: repositories with branches, tags and commits, large files by their hash, and ordered faults."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.xet_store import XetStore

USER = "someone"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of a commit: its bytes (a large one's lie in the store, by their hash)."""

    content: bytes = b""
    oid: str | None = None


@dataclass(frozen=True)
class Commit:
    tree: dict[str, Entry]
    parent: str | None
    title: str


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, tree: dict[str, Entry], parent: str | None, title: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits[oid] = Commit(tree, parent, title)
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None


@dataclass
class Store:
    """The hub's content, what it was asked, and the faults that a test has ordered."""

    tokens: dict[str, str] = field(default_factory=dict)  # token: role
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)  # keys of bodies that arrived whole at the storage
    tokens_at_storage: list[str] = field(default_factory=list)
    part_bytes: int = 1_000_000
    answers: dict[str, tuple[int, dict[str, str], str]] = field(default_factory=dict)  # "POST /path": forced answer
    on_put: Callable[[int], bool] = lambda number: False  # True: the connection is dropped in the middle of this body
    spoil: Callable[[str, bytes], bytes] = lambda name, content: content
    on_ask: Callable[[str], None] = lambda asked: None
    puts: int = 0
    xet: XetStore = field(default_factory=XetStore)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def create(self, name: str, private: bool) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.add("main", {".gitattributes": Entry(b"*.safetensors filter=lfs\n")}, None, "initial commit")
        return repo

    def files(self, name: str, revision: str) -> dict[str, bytes]:
        """What a user would download."""
        repo = self.repos[name]
        tree = repo.commits[repo.find(revision) or ""].tree
        return {path: self.content(entry) for path, entry in tree.items() if path != ".gitattributes"}

    def content(self, entry: Entry) -> bytes:
        return entry.content if entry.oid is None else self.objects[entry.oid]
