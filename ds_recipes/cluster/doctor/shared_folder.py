"""Whether the run folder is one folder for all hosts: what one of them writes, the others see, soon."""

import contextlib
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_recipes.cluster.doctor.findings import Finding, error, fine, warning
from ds_recipes.cluster.doctor.folder import nearest

LOOK_SECONDS = 15.0
"""NFS shows a new name after at most `acdirmax` (nfs(5)), 60 s where nobody has changed it, a few seconds as a rule."""

LATE_SECONDS = 5.0


def begin(folder: Path) -> str | None:
    """On rank 0: make a folder for the test with a file in it; returns its path, None where that is not possible."""
    own = nearest(folder) / f".doctor-{uuid.uuid4().hex[:8]}"
    try:
        own.mkdir()
        (own / "rank-0").write_text("rank 0", encoding="ascii")
    except OSError:
        return None
    return str(own)


def answer(path: str, rank: int) -> dict[str, Any]:
    """On the first rank of another host: look for rank 0's file, and write one; returns how long it took, in seconds."""
    folder, began = Path(path), time.monotonic()
    seconds = _wait_for(folder / "rank-0")
    problem = None
    if seconds is not None:
        try:
            (folder / f"rank-{rank}").write_text(f"rank {rank}", encoding="ascii")
        except OSError as failure:
            problem = failure.strerror
    return {"seconds": seconds, "problem": problem, "looked": time.monotonic() - began}


def verdict(path: str, answers: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Finding]:
    """On rank 0: what the others saw, and whether their files are here."""
    folder = Path(path)
    blind = [rank for rank, said in answers.items() if said["seconds"] is None]
    unseen = [
        rank
        for rank, said in answers.items()
        if said["seconds"] is not None and _wait_for(folder / f"rank-{rank}") is None
    ]
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)
    if blind or unseen:
        apart = ", ".join(dict.fromkeys(hosts[rank] for rank in [*blind, *unseen]))
        return [
            error(
                "folder.not_shared",
                f"{folder.parent} of {hosts[0]} is another folder on {apart}: a new file was not seen within {LOOK_SECONDS:.0f} s",
                "the path lies on a disk of each host; checkpoints need one folder that all ranks write into",
                "Name a run folder on a file system that all hosts mount (df -T PATH on each).",
                hosts=apart.split(", "),
            )
        ]
    slowest = max((float(said["seconds"]) for said in answers.values()), default=0.0)
    text = f"{folder.parent}: a new file is seen by all hosts after {slowest:.1f} s"
    if slowest > LATE_SECONDS:
        return [
            warning(
                "folder.late",
                text,
                "the file system keeps what it knows of a folder for some time (NFS: actimeo)",
                "Mount it with a smaller actimeo, or take a parallel file system: starts and saves wait for it.",
            )
        ]
    return [fine("folder.shared", text)]


def _wait_for(file: Path) -> float | None:
    """Seconds until the file is there; None if it does not come."""
    began = time.monotonic()
    while time.monotonic() - began < LOOK_SECONDS:
        with contextlib.suppress(OSError):
            list(file.parent.iterdir())  # a fresh look at the folder: NFS remembers that a name was not there
            if file.exists():
                return time.monotonic() - began
        time.sleep(0.1)
    return None
