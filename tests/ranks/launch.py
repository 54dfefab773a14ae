"""Run a function on several real ranks, and get back what each returned.

    def shares(world: World, factor: int) -> float:        # at module level, so that another process can import it
        return world.sum([factor * world.rank])[0]

    assert run_ranks(shares, 3, 10) == [30, 30, 30]

The function's first argument is a started `World` (gloo; DeepSpeed's communication is started too, unless
`with_deepspeed=False`, which saves about 3 s). Arguments and results are pickled, tensors and arrays included. The
ranks are fresh processes of `python -m tests.ranks.launch`, with one thread each, no GPU, no hub, and no launcher's
variables. A start costs 3 to 10 s on two busy cores, so let the tests of a file share one: return what several tests
look at from one function, and call it in a module-scoped fixture.

If any rank raises, dies or is late, all are ended and `RanksFailed` shows every rank's output, which holds its
traceback (after the time limit: where each thread was). The world is closed after the function; a rank must then end
with 0.
"""

import faulthandler
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 8
"""How long the other ranks may go on after one has failed: their own errors tell more."""

LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "OMPI_",
    "PMI_",
    "PMIX_",
    "MPI_",
    "SLURM_",
    "TORCHELASTIC_",
    "CROSS_",
)


class RanksFailed(AssertionError):
    """Some rank did not return. The text holds every rank's status and output."""


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 90,
    with_deepspeed: bool = True,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `function(world, *args)` on `ranks` ranks; return the results by rank.

    `timeout` is in seconds, the start included. `env` is added to the ranks' environment.

    Raises:
        RanksFailed: a rank raised, died, did not end with 0, or was not done in time.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        task = (function.__module__, function.__qualname__, args, with_deepspeed, timeout)
        (folder / "task.pkl").write_bytes(pickle.dumps(task))
        outputs = [(folder / f"output-{rank}.txt").open("wb") for rank in range(ranks)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks.launch", name, str(rank), str(ranks), str(server.port)],
                cwd=ROOT,
                env=rank_environment(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            in_time = _wait(processes, timeout)
        finally:
            end_all(processes)
            for output in outputs:
                output.close()
        if not in_time or any(process.returncode for process in processes):
            raise RanksFailed(_report(folder, processes, "" if in_time else f"not done within {timeout:.0f} s"))
        return [pickle.loads((folder / f"result-{rank}.pkl").read_bytes()) for rank in range(ranks)]


def rank_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without any launcher's variables, for ranks of a test; `env` is added."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    quiet = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return kept | quiet | {"PYTHONUNBUFFERED": "1"} | dict(env or {})


def end_all(processes: Sequence["subprocess.Popen[Any]"]) -> None:
    """Kill what still runs of the given process groups; each process must lead its own."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(processes: Sequence["subprocess.Popen[Any]"], timeout: float) -> bool:
    """Wait for all; after a failure only a little longer. False if the time limit was reached."""
    deadline, in_time = time.monotonic() + timeout, True
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            return not in_time
        if in_time and any(process.poll() for process in processes):
            deadline, in_time = min(deadline, time.monotonic() + GRACE_SECONDS), False
        time.sleep(0.05)
    return True


def _report(folder: Path, processes: Sequence["subprocess.Popen[Any]"], reason: str) -> str:
    parts = [reason]
    for rank, process in enumerate(processes):
        output = (folder / f"output-{rank}.txt").read_text(errors="replace")
        parts.append(f"---- rank {rank}: status {process.returncode}\n{output.rstrip()}")
    return "\n".join(parts)


def _be_a_rank(folder: Path, rank: int, size: int, port: int) -> None:
    module, qualname, args, with_deepspeed, timeout = pickle.loads((folder / "task.pkl").read_bytes())
    faulthandler.dump_traceback_later(max(timeout - 3, 1))
    try:
        function: Any = importlib.import_module(module)
        for part in qualname.split("."):
            function = getattr(function, part)
        from ds_recipes.world.group import start
        from ds_recipes.world.resolve import Place

        place = Place(rank, size, rank, size, "a test", "127.0.0.1", port, hosted=True)
        world = start(place, timeout_seconds=timeout, collective_timeout_seconds=timeout, with_deepspeed=with_deepspeed)
        (folder / f"result-{rank}.pkl").write_bytes(pickle.dumps(function(world, *args)))
        world.close()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    _be_a_rank(Path(sys.argv[1]), *map(int, sys.argv[2:]))
