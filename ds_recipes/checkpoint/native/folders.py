"""Which files of a folder are DeepSpeed's, rank by rank."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.errors import InputError

LAYOUT = "deepspeed"
"""What the manifest of a checkpoint in DeepSpeed's own layout calls it."""

POINTERS = ("latest", "latest_universal")
OPTIMIZER = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
FOREIGN = {
    r"(layer_\d+_)?expert_\d+_.*|expp_rank_\d+_.*": "experts of DeepSpeed's own MoE layers are split over ranks by another rule",
    r"layer_\d+-.*": "pipeline stages are split over ranks by another rule",
    r"offloaded_tensors": "the optimizer's state was on NVMe, and DeepSpeed copied its swap files as they were",
}
"""What this reader does not know how to put together, and why."""


@dataclass(frozen=True)
class Files:
    """DeepSpeed's files of one step. `optimizer` and `model` are by rank; `model` has one entry at stages 0 to 2.

    `universal` is the folder of the universal form, a folder a parameter; None for the files as they were saved.
    """

    folder: Path
    model: tuple[Path, ...]
    optimizer: tuple[Path, ...]
    universal: Path | None


def is_deepspeed(path: Path) -> bool:
    """True for a `global_stepN` folder, by whatever name, a folder that holds such ones, and one of the universal form."""
    return path.is_dir() and (_holds_states(path) or bool(_steps_in(path)))


def find_files(path: Path) -> Files:
    """The files of `path`, or of the folder in it that its `latest` names.

    Raises:
        InputError: `latest` is empty, wrong or leads elsewhere; a file is missing, of two saves, or leads elsewhere.
    """
    folder = path if _holds_states(path) else _pointed(path)
    names = sorted(entry.name for entry in folder.iterdir())
    for name in names:
        for pattern, reason in FOREIGN.items():
            if re.fullmatch(pattern, name):
                raise InputError(f"{folder / name}: {reason}. This reader does not put them together.")
    model = _by_rank(folder, names, MODEL)
    optimizer = _by_rank(folder, names, OPTIMIZER)
    universal = folder / "zero"
    found = Files(folder, model, optimizer, inside(folder, universal) if universal.is_dir() else None)
    if not model:
        raise InputError(
            f"{folder}: no *mp_rank_00_model_states.pt in it, which holds the parameters' names and shapes"
        )
    return found


def inside(folder: Path, path: Path) -> Path:
    """`path`, if it leads to something within `folder`.

    Raises:
        InputError: it is a link to somewhere else.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path}: leads out of its folder, to {path.resolve()}; nothing of it was read")
    return path


def check_ranks(folder: Path, what: str, found: int, expected: int) -> None:
    """See that there is one file a rank.

    Raises:
        InputError: too few (the first missing rank is named) or too many.
    """
    if found < expected:
        raise InputError(
            f"{folder}: {expected} ranks saved, but {what} of {found} are here; rank {found}'s is missing. Copy the folder whole: "
            "on a cluster without a shared disk each host has its own ranks' files."
        )
    if found > expected:
        raise InputError(
            f"{folder}: {expected} ranks saved, but {what} of {found} are here: some are of another save. Remove those whose time "
            "differs."
        )


def _holds_states(folder: Path) -> bool:
    return folder.is_dir() and any(MODEL.fullmatch(file.name) for file in folder.glob("*_model_states.pt"))


def _steps_in(path: Path) -> list[str]:
    """Folders of one save each. DeepSpeed calls them global_stepN, Accelerate pytorch_model."""
    return sorted(folder.name for folder in path.iterdir() if _holds_states(folder))


def _pointed(path: Path) -> Path:
    """The folder that a pointer file names."""
    choose = f"Name one of the folders in it yourself: {', '.join(_steps_in(path)) or 'none'}."
    pointer = next((path / name for name in POINTERS if (path / name).is_file()), None)
    if pointer is None:
        raise InputError(f"{path}: no DeepSpeed checkpoint, and no file `latest` that names one. {choose}")
    with pointer.open("rb") as file:
        tag = file.read(256).decode(errors="replace").strip()
    if not tag:
        raise InputError(f"{pointer}: empty. {choose}")
    if Path(tag).name != tag or tag in (".", ".."):
        raise InputError(f"{pointer}: names {tag!r}, which is not a folder beside it; nothing was read. {choose}")
    if not _holds_states(inside(path, path / tag)):
        raise InputError(f"{pointer}: names {tag!r}, where no *_model_states.pt lies. {choose}")
    return path / tag


def _by_rank(folder: Path, names: Iterable[str], pattern: re.Pattern[str]) -> tuple[Path, ...]:
    found: dict[int, str] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        rank, model_rank = int(match[1] or 0), int(match[2])
        if model_rank:
            raise InputError(
                f"{folder / name}: the model was split by tensor parallelism, and this reader does not put such parts together. "
                "Convert the folder with DeepSpeed's ds_to_universal.py first."
            )
        if rank in found:
            raise InputError(
                f"{folder}: two files of rank {rank}, {found[rank]} and {name}: of two saves. Remove the older one."
            )
        found[rank] = name
    _check_gaps(folder, found)
    return tuple(inside(folder, folder / found[rank]) for rank in sorted(found))


def _check_gaps(folder: Path, found: Mapping[int, str]) -> None:
    missing = [rank for rank in range(max(found, default=-1) + 1) if rank not in found]
    if missing:
        example = next(iter(found.values()))
        raise InputError(
            f"{folder}: the file of rank {missing[0]} is missing ({len(missing)} of {max(found) + 1} ranks' are), such as "
            f"{re.sub(r'rank_[0-9]+', f'rank_{missing[0]}', example, count=1)}. Copy the folder whole: on a cluster without a "
            "shared disk each host has its own ranks' files."
        )
