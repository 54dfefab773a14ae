"""Send exported models to a repository, and see that what lies there is what was sent.

The state of an interrupted upload lies on the hub and not in the user's folder: a file that arrived whole is known there by
its hash. All files of a model become visible in one commit, where upload_folder of huggingface_hub would make several.
"""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from ds_recipes.checkpoint.hub.folder import KEPT_HIDDEN, LocalFile, ModelFolder
from ds_recipes.errors import HubError, InputError

LARGE_BYTES = 10_000_000
"""The hub keeps larger files outside of git."""

FILES_AT_ONCE = {True: 1, False: 5}
"""How many large files are sent side by side, with Xet and without. Xet sends the pieces of one file side by side by itself,
and sends all pieces again of a group that was not complete (tests/e2e/test_upload_interrupted.py kills it there)."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")
MAIN = "main"


@dataclass(frozen=True)
class Target:
    """Where a folder goes: a branch, and a tag if the commit gets one."""

    branch: str
    tag: str | None
    message: str


class Repository:
    """A model repository on the hub, seen with one user's token."""

    def __init__(self, api: HfApi, name: str, say: Callable[[str], None]) -> None:
        self._api = api
        self._say = say
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise InputError(f"the token of {user['name']} may only read. Make one with write permission.")
        self.name = name if "/" in name else f"{user['name']}/{name}"

    def open(self, public: bool) -> None:
        """Find the repository or create it, private unless `public`; the visibility of one that exists stays.

        Raises:
            InputError: it exists as a private one and `public` was asked for.
        """
        try:
            private = bool(self._api.model_info(self.name).private)
        except RepositoryNotFoundError:
            self._api.create_repo(self.name, private=not public)
            self._say(f"{self.name}: created, {_visibility(not public)}")
            return
        if private and public:
            raise InputError(
                f"--public: {self.name} exists and is private. An existing repository is never made public here: do that in "
                f"its settings ({self._api.endpoint}/{self.name}/settings), or leave --public out."
            )
        self._say(f"{self.name}: exists and stays as it is, {_visibility(private)}")

    def upload(self, folder: ModelFolder, target: Target, replace: bool) -> None:
        """Send what is missing or different, in one commit, check it, and set the tag.

        With `replace`, files of the branch that the folder does not have are deleted in the same commit.

        Raises:
            InputError: the tag exists with other files, or weights of another export lie in the branch.
            HubError: what lies there is not what was sent.
        """
        refs = self._api.list_repo_refs(self.name)
        tagged = next((ref for ref in refs.tags if ref.name == target.tag), None)
        if tagged is not None:
            self._check_tag(folder, tagged.name, tagged.target_commit)
            return
        head = self._head(target.branch, {ref.name: ref.target_commit for ref in refs.branches})
        there = self._tree(head)
        different = [file for file in folder.files if _difference(file, there.get(file.name)) is not None]
        surplus = _surplus(folder, there)
        if not replace:
            self._refuse_a_mixture(folder, surplus, target)
        if different or (replace and surplus):
            head = self._commit(different, surplus if replace else [], target, head)
            self._check(folder, head)
            self._say(f"  what lies there equals what was sent: {len(folder.files)} files, commit {head[:8]}")
        else:
            self._say(f"  what lies there equals the folder already, commit {head[:8]}; nothing was sent")
        if surplus and not replace:
            self._say(f"  {len(surplus)} other file(s) of the branch stay there ({', '.join(surplus[:3])})")
        if target.tag is not None:
            self._api.create_tag(self.name, tag=target.tag, revision=head)
        self._say(f"  {self._api.endpoint}/{self.name}/tree/{target.tag or target.branch}")

    def _head(self, branch: str, branches: Mapping[str, str]) -> str:
        """The commit that a branch points to. A new one begins at the repository's first commit, without a model in it."""
        if branch in branches:
            return branches[branch]
        if MAIN not in branches:
            raise HubError(f"{self.name}: has no branch main, from whose first commit {branch} would begin")
        first = self._api.list_repo_commits(self.name, revision=MAIN)[-1].commit_id
        self._api.create_branch(self.name, branch=branch, revision=first)
        self._say(f"  branch {branch}: created")
        return first

    def _tree(self, revision: str) -> dict[str, RepoFile]:
        entries = self._api.list_repo_tree(self.name, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _refuse_a_mixture(self, folder: ModelFolder, surplus: Sequence[str], target: Target) -> None:
        """transformers prefers model.safetensors to shards, whichever is newer."""
        old = [name for name in surplus if any(fnmatch.fnmatchcase(name, pattern) for pattern in WEIGHTS)]
        if old:
            raise InputError(
                f"{self.name}, branch {target.branch}: holds weights of another export ({', '.join(old[:3])}), which would be "
                f"mixed with those of {folder.path}. Choose another --branch, or pass --replace to delete from the branch what "
                "the folder does not have (git keeps the old commit)."
            )

    def _commit(self, files: Sequence[LocalFile], surplus: Sequence[str], target: Target, head: str) -> str:
        """Returns the new commit; it follows `head` or fails."""
        additions = {file.name: CommitOperationAdd(file.name, str(file.path)) for file in files}
        large = [file for file in files if file.size > LARGE_BYTES]
        sent = 0
        at_once = FILES_AT_ONCE[find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET]
        for start in range(0, len(large), at_once):
            group = large[start : start + at_once]
            self._api.preupload_lfs_files(
                self.name, [additions[file.name] for file in group], revision=target.branch, free_memory=False
            )
            sent += len(group)
            self._say(f"  {sent} of {len(large)} large files have arrived")
        deletions = [CommitOperationDelete(name) for name in surplus]
        made = self._api.create_commit(
            self.name,
            [*additions.values(), *deletions],
            commit_message=target.message,
            revision=target.branch,
            parent_commit=head,
        )
        return str(made.oid)

    def _check(self, folder: ModelFolder, commit: str) -> None:
        """Raises: HubError if a file is missing there or has another size or hash."""
        wrong = list(_differences(folder, self._tree(commit)))
        if wrong:
            more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise HubError(
                f"{self.name}, commit {commit}: what lies there is not what was sent: {'; '.join(wrong[:5])}{more}. Do not use "
                "it. If no file of the folder changed meanwhile, delete these files there and run the command again."
            )

    def _check_tag(self, folder: ModelFolder, tag: str, commit: str) -> None:
        wrong = list(_differences(folder, self._tree(commit)))
        if wrong:
            raise InputError(
                f"{self.name}: the tag {tag} exists with other files ({'; '.join(wrong[:3])}). Tags are never moved here: choose "
                "another name, or delete the tag on the hub."
            )
        self._say(f"  the tag {tag} exists with exactly these files; nothing was sent")


def _visibility(private: bool) -> str:
    return "private" if private else "PUBLIC: everybody can read it"


def _surplus(folder: ModelFolder, there: Mapping[str, RepoFile]) -> list[str]:
    return sorted(set(there) - {file.name for file in folder.files} - {KEPT_HIDDEN})


def _differences(folder: ModelFolder, there: Mapping[str, RepoFile]) -> Iterator[str]:
    for file in folder.files:
        difference = _difference(file, there.get(file.name))
        if difference is not None:
            yield f"{file.name} {difference}"


def _difference(file: LocalFile, entry: RepoFile | None) -> str | None:
    """How the hub's file differs from ours, by its size and the hash that the hub keeps."""
    if entry is None:
        return "is missing there"
    if entry.size != file.size:
        return f"has {entry.size:,} bytes there, {file.size:,} here"
    if entry.lfs is not None:
        return None if entry.lfs.sha256 == file.sha256 else "has another SHA-256 there"
    return None if entry.blob_id == file.git_sha1 else "has another git hash there"
