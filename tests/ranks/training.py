"""Run the real train.py on several ranks, each forked from the server that has imported torch: a start in seconds."""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.ranks.launch import GRACE_SECONDS, fork_rank, wait_for


@dataclass(frozen=True)
class Ended:
    """How the ranks of a launch ended, by rank, and what they printed."""

    statuses: tuple[int | None, ...]
    outputs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.outputs)


def start_training(
    ranks: int,
    argv: Sequence[str],
    outputs: Path,
    env: Mapping[str, str] | None = None,
    program: Callable[[Sequence[str]], int] | None = None,
) -> list[ForkServerProcess]:
    """Start `train.py argv` on so many ranks, with the variables that a launcher would set.

    `program` is called in each rank instead of train.py.
    """
    outputs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        fork_rank(
            program or train_py,
            (tuple(argv),),
            outputs / f"rank{rank}.txt",
            address
            | {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            | dict(env or {}),
        )
        for rank in range(ranks)
    ]


def train(
    ranks: int,
    *argv: str,
    outputs: Path,
    timeout: float = 120,
    meanwhile: Callable[[list[ForkServerProcess]], Any] | None = None,
    env: Mapping[str, str] | None = None,
    program: Callable[[Sequence[str]], int] | None = None,
    grace: float = GRACE_SECONDS,
) -> Ended:
    """Run it to its end, or `grace` seconds longer than the first rank that fails.

    `meanwhile` is called with the ranks' processes once they have started.
    """
    processes = start_training(ranks, argv, outputs, env, program)
    if meanwhile is not None:
        meanwhile(processes)
    wait_for(processes, timeout, grace)
    files = [outputs / f"rank{rank}.txt" for rank in range(ranks)]
    texts = [file.read_text(errors="replace") if file.exists() else "" for file in files]
    for file in files:
        file.unlink(missing_ok=True)
    return Ended(tuple(process.exitcode for process in processes), tuple(texts))


def train_py(argv: Sequence[str]) -> int:
    """What one rank does."""
    import train as entry
    from ds_recipes.world.failure import run_guarded

    entry.STARTED = time.monotonic()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return run_guarded(entry.main, argv)


def metrics(run_folder: Path, key: str = "loss") -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl that have `key`, by step."""
    path = run_folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line for line in lines if key in line}


def until_step(run_folder: Path, step: int, timeout: float = 60) -> None:
    """Wait until a step is logged."""
    deadline = time.monotonic() + timeout
    while step not in metrics(run_folder):
        if time.monotonic() > deadline:
            raise TimeoutError(f"step {step} was not logged within {timeout} s")
        time.sleep(0.02)
