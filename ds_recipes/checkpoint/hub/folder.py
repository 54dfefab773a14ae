"""What of a folder goes to the hub. Found without network, and before anything is sent."""

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ds_recipes.checkpoint.hub.credentials import secret_in
from ds_recipes.checkpoint.hub.weights import check_weights
from ds_recipes.checkpoint.manifest import FORMAT, MANIFEST, PROBE, STATE
from ds_recipes.errors import InputError

SECRET_NAMES = (
    ".env*", "*.env", "token", "token.txt", "*_token", "*_token.txt", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".netrc",
    ".git-credentials", "stored_tokens",
)  # fmt: skip
"""Files that nobody means to publish. They are refused and not left out, so that their owner learns of them."""

LEFT_OUT = {
    "hidden": (".*",),
    "unfinished": ("*.partial*", "*.tmp", "*.incomplete", "*.lock"),
    "records of a run": ("wandb", "events.out.tfevents.*", "*.log", "metrics.jsonl", "events.jsonl", "run.json", "run.yaml"),
    "state of training": (
        "global_step*", "*_pp_rank_*", "*optim_states*", "optimizer*", "scheduler.*", "scaler.*", "rng_state*", "latest",
        "rank-*-of-*.safetensors", "trainer_state.json", "training_args.bin", "*_to_fp32.py", MANIFEST, STATE, PROBE,
    ),
    "pickle: loading it can run code": ("*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "pytorch_model*"),
    "compiled Python": ("__pycache__", "*.pyc"),
}  # fmt: skip
"""Reason: names of files and folders that stay here."""

KEPT_HIDDEN = ".gitattributes"
SCANNED_BYTES = 64_000_000
"""Files up to this size, weights apart, are searched for secrets. A tokenizer's file is smaller than that."""

EXPORT_NAME = re.compile(r"(?:iter_|global_step|checkpoint-)(\d+)")
"""Exports are named after their checkpoints, ours or those of another program."""


@dataclass(frozen=True)
class LocalFile:
    """A file to send: its path in the repository, the file itself, and its size in bytes."""

    name: str
    path: Path
    size: int

    @cached_property
    def sha256(self) -> str:
        """The hash that the hub keeps for large files."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def git_sha1(self) -> str:
        """The hash that git, and so the hub, keeps for small files."""
        head = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        with self.path.open("rb") as file:
            while data := file.read(1 << 20):
                head.update(data)
        return head.hexdigest()


@dataclass(frozen=True)
class ModelFolder:
    """A folder that may go up, the files of it that do, and those that stay, each with the reason."""

    path: Path
    files: tuple[LocalFile, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def size(self) -> int:
        """Bytes of all files that go up."""
        return sum(file.size for file in self.files)


def read_folder(path: Path, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> ModelFolder:
    """Choose the files of an exported model.

    `include` and `exclude` are patterns of paths inside the folder, as `hf upload` takes them: only what one of `include`
    matches is taken, and nothing that one of `exclude` matches.

    Raises:
        InputError: no such folder, no finished export, a checkpoint of training, incomplete weights, or a secret in it.
    """
    if not path.is_dir():
        raise InputError(f"--path {path}: no such folder")
    if ".partial" in path.resolve().name:
        raise InputError(f"--path {path}: an export that was not finished. Run it again, and upload what it publishes.")
    _refuse_training_checkpoint(path)
    taken: list[LocalFile] = []
    left_out: list[tuple[str, str]] = []
    for name in _names(path):
        reason = _reason_to_leave_out(name, include, exclude)
        if reason is not None:
            left_out.append((name, reason))
        elif not (path / name).is_dir():
            taken.append(_checked_file(path, name))
    folder = ModelFolder(path, tuple(taken), tuple(left_out))
    check_weights(path, [file.name for file in folder.files])
    for file in folder.files:
        if not file.name.endswith(".safetensors") and file.size <= SCANNED_BYTES:
            found = secret_in(file.path.read_bytes())
            if found is not None:
                raise InputError(
                    f"{file.path}: holds what looks like {found}. Remove it there, or leave the file out with "
                    f"--exclude '{file.name}'. Nothing was sent."
                )
    return folder


def exports_in(path: Path, start: int | None, end: int | None, increment: int | None) -> list[Path]:
    """The folders iter_0000600, ... in `path`, sorted by step; with an increment, each step from `start` to `end`.

    Raises:
        InputError: no such folder, no export in it, one of the steps is missing, or two folders are of one step.
    """
    if not path.is_dir():
        raise InputError(f"--path {path}: no such folder")
    by_step: dict[int, Path] = {}
    for child in sorted(path.iterdir()):
        match = EXPORT_NAME.fullmatch(child.name)
        if match is not None and child.is_dir() and by_step.setdefault(int(match[1]), child) != child:
            raise InputError(
                f"--path {path}: {by_step[int(match[1])].name} and {child.name} are of one step. Move one away."
            )
    low = min(by_step, default=0) if start is None else start
    high = max(by_step, default=0) if end is None else end
    steps = sorted(step for step in by_step if low <= step <= high)
    if increment is not None:
        steps = list(range(low, high + 1, increment))
        missing = [str(step) for step in steps if step not in by_step]
        if missing:
            raise InputError(
                f"--path {path}: no export of step {', '.join(missing[:5])} in it. Make it first (tools/convert_to_hf.py)."
            )
    if not steps:
        raise InputError(f"--path {path}: no exported models (iter_0000600, ...) of the asked steps in it")
    return [by_step[step] for step in steps]


def _refuse_training_checkpoint(path: Path) -> None:
    """A checkpoint has a config.json too, so it would pass for a model.

    What transformers' own trainer writes holds a model beside its state; there the state is left out.
    """
    names = {child.name for child in path.iterdir()}
    theirs = ("global_step*", "*optim_states.pt", "model.pt")
    if MANIFEST in names and (STATE in names or FORMAT.encode() in (path / MANIFEST).read_bytes()[:200]):
        kind = "a checkpoint of training"
    elif any(fnmatch.filter(names, pattern) for pattern in theirs) and not fnmatch.filter(names, "*.safetensors"):
        kind = "a checkpoint of another program's training"
    else:
        return
    raise InputError(
        f"--path {path}: {kind}, which no other program loads from the hub. Convert it first:\n"
        f"    python tools/convert_to_hf.py --ckpt {path} --out NEW_FOLDER\nand upload NEW_FOLDER."
    )


def _names(folder: Path) -> Iterator[str]:
    """Paths below the folder, sorted. What lies in folders that are left out is not walked."""
    for root, folders, files in os.walk(folder):
        here = Path(root).relative_to(folder)
        for name in sorted(folders):
            kept = _reason_by_name(name) is None and not (Path(root) / name).is_symlink()
            if not kept:
                yield (here / name).as_posix()
        folders[:] = sorted(name for name in folders if _reason_by_name(name) is None)
        yield from ((here / name).as_posix() for name in sorted(files))


def _reason_by_name(name: str) -> str | None:
    if name == KEPT_HIDDEN:
        return None
    found = (reason for reason, patterns in LEFT_OUT.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns))
    return next(found, None)


def _reason_to_leave_out(name: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Raises: InputError if the name is that of a secret."""
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
        return "--exclude"
    last = name.rpartition("/")[2]
    if any(fnmatch.fnmatchcase(last, pattern) for pattern in SECRET_NAMES):
        raise InputError(
            f"{name}: by its name a secret, which must not lie in a folder that is uploaded. Move it away, or leave it out "
            f"with --exclude '{name}'. Nothing was sent."
        )
    reason = _reason_by_name(last)
    if reason is None and include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return "not in --include"
    return reason


def _checked_file(folder: Path, name: str) -> LocalFile:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{path}: a link to {path.resolve()}, outside of the folder. Put a copy of the file in its place."
        )
    if not path.is_file():
        raise InputError(f"{path}: no regular file. Remove it, or leave it out with --exclude '{name}'.")
    if not name.isprintable():
        raise InputError(f"{name!r}: the hub takes no such name. Rename it, or leave it out with --exclude.")
    return LocalFile(name, path, path.stat().st_size)
