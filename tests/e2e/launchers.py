"""The real launchers as subprocesses: torchrun, deepspeed, mpirun, and plain python."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.ranks.launch import rank_environment

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = ("torchrun", "deepspeed", "mpirun")


@dataclass(frozen=True)
class Ended:
    """The launcher's status and everything that it and its ranks printed."""

    status: int
    output: str


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a rank of a test sees, with this environment's programs first."""
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    chosen = rank_environment({"PATH": path, "PYTHONPATH": str(ROOT), **dict(env or {})})
    chosen.pop("CUDA_VISIBLE_DEVICES")  # the deepspeed launcher sets it itself
    return chosen


def command(launcher: str, ranks: int, program: Path, *arguments: str, options: Sequence[str] = ()) -> list[str]:
    """How a user would start `program` on so many ranks of this machine. `options` are the launcher's own."""
    script = [str(program), *arguments]
    if launcher == "torchrun":
        return ["torchrun", "--nproc_per_node", str(ranks), "--master_port", free_port(), *options, *script]
    if launcher == "deepspeed":
        return ["deepspeed", "--num_gpus", str(ranks), "--master_port", free_port(), *options, *script]
    if launcher == "mpirun":
        words = ["mpirun", "-np", str(ranks), "--allow-run-as-root", "--oversubscribe", *options]
        return [*words, sys.executable, *script]
    assert launcher == "python" and ranks == 1 and not options
    return [sys.executable, *script]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def begin(words: list[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start a command in a process group of its own; all that it prints is to be read from its `stdout`."""
    return subprocess.Popen(
        words,
        env=environment(env),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def run(words: list[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 240) -> Ended:
    """Run a command to its end; after the time limit its whole process group is killed, and the test fails."""
    process = begin(words, env, cwd)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{' '.join(words)} was not done within {timeout} s:\n{output}") from None
    return Ended(process.returncode, output)
