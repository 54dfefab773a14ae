"""A process killed at any system call of a save leaves the old checkpoint, or the new one, whole; never neither.

The process counts its own calls that change the disk and kills itself at one of them, half way through a write.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_recipes.checkpoint.load import find_newest, remove_partials
from ds_recipes.world.group import solo
from tests.ranks.launch import fork_rank, wait_for
from tests.unit.checkpoint.flat_engine import save

CALLS = ("write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def save_and_die(folder: str, call_number: int) -> int:
    """Save step 2, keeping one checkpoint, and be killed before that call takes place. Returns the number of calls."""
    seen = 0

    def counted(original: Callable[..., Any], is_write: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call_number:
                if is_write:
                    original(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name), name == "write"))
    save(Path(folder), 2, keep_last=1)
    Path(folder, "calls").write_text(str(seen))
    return 0


def run_save(folder: Path, call_number: int) -> int | None:
    process = fork_rank(save_and_die, (str(folder), call_number), folder / "output.txt")
    assert wait_for([process], 30)
    return process.exitcode


def test_every_kill_point(tmp_path: Path) -> None:
    save(tmp_path / "counting", 1)
    assert run_save(tmp_path / "counting", -1) == 0
    calls = int((tmp_path / "counting" / "calls").read_text())
    assert calls > 20
    steps = []
    for number in range(1, calls + 1):
        folder = tmp_path / f"kill{number}"
        save(folder, 1)
        assert run_save(folder, number) == -signal.SIGKILL
        found = find_newest(folder, solo())
        assert found is not None, f"killed at call {number}: nothing is left"
        assert not found.skipped, f"killed at call {number}: {found.skipped}"
        steps.append(found.manifest.step)
        remove_partials(folder, solo())
        assert save(folder, 3).exists()
    assert steps == sorted(steps), "once published, a checkpoint stays"
    assert set(steps) == {1, 2}
