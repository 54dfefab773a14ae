"""Run a function on several real ranks, and get back what each returned.

    def shares(world: World, factor: int) -> float:        # at module level, so that another process can import it
        return world.sum([factor * world.rank])[0]

    assert run_ranks(shares, 3, 10) == [30, 30, 30]

The function's first argument is a started `World` (gloo; DeepSpeed's communication is started too, unless
`with_deepspeed=False`). Arguments and results are pickled, tensors and arrays included. Each rank is a process of its
own with one thread, no GPU, no hub, and no launcher's variables. It is forked from a server that has imported torch,
DeepSpeed and transformers once for the whole test session, so only the first start is slow (10 s or more).

If any rank raises, dies or is late, all are ended and `RanksFailed` shows every rank's output, which holds its
traceback (after the time limit: where each thread was). The world is closed after the function.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

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
    "GROUP_",
    "CROSS_",
)
PRELOADED = ("torch", "numpy", "deepspeed", "transformers.models.llama.modeling_llama")


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

    `timeout` is in seconds, the start included. `env` is added to the ranks' environment (too late for variables that
    the preloaded packages read at import).

    Raises:
        RanksFailed: a rank raised, died, did not end with 0, or was not done in time.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        outputs = [folder / f"output-{rank}.txt" for rank in range(ranks)]
        results = [folder / f"result-{rank}.pkl" for rank in range(ranks)]
        processes = [
            fork_rank(_work, (function, args, rank, ranks, server.port, with_deepspeed, timeout, result), output, env)
            for rank, (output, result) in enumerate(zip(outputs, results, strict=True))
        ]
        in_time = wait_for(processes, timeout)
        if not in_time or any(process.exitcode for process in processes):
            reason = "a rank failed" if in_time else f"not done within {timeout:.0f} s, or after another rank's failure"
            raise RanksFailed("\n".join([reason, *map(_report, range(ranks), processes, outputs)]))
        return [pickle.loads(result.read_bytes()) for result in results]


def rank_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without any launcher's variables, for ranks of a test; `env` is added."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    one_thread = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    alone = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return kept | one_thread | alone | dict(env or {})


def fork_rank(
    target: Callable[..., Any], args: Sequence[Any], output: Path, env: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Start `sys.exit(target(*args))` in a process forked from the server, its output going to a file."""
    context = _server()
    process = context.Process(target=_in_process, args=(target, args, output, rank_environment(env)))
    process.start()
    return process


def wait_for(processes: Sequence[ForkServerProcess], timeout: float, grace: float = GRACE_SECONDS) -> bool:
    """Wait for all, after a failure only `grace` longer, then kill the rest. False if any had to be killed."""
    deadline, failed = time.monotonic() + timeout, False
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if not failed and any(process.exitcode for process in processes):
            deadline, failed = min(deadline, time.monotonic() + grace), True
        time.sleep(0.02)
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    return not late


def _server() -> ForkServerContext:
    """The process that ranks are forked from, started with a rank's environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    own = dict(os.environ)
    os.environ.update(rank_environment())
    try:
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(own)
    return context


def _in_process(target: Callable[..., Any], args: Sequence[Any], output: Path, env: Mapping[str, str]) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    sys.exit(target(*args))


def _work(
    function: Callable[..., Any],
    args: Sequence[Any],
    rank: int,
    size: int,
    port: int,
    with_deepspeed: bool,
    timeout: float,
    result: Path,
) -> None:
    faulthandler.dump_traceback_later(max(timeout - 2, 1), file=sys.__stderr__ or sys.stderr)
    try:
        from ds_recipes.world.group import start
        from ds_recipes.world.resolve import Place

        place = Place(rank, size, rank, size, "a test", "127.0.0.1", port, hosted=True)
        world = start(place, timeout_seconds=timeout, collective_timeout_seconds=timeout, with_deepspeed=with_deepspeed)
        result.write_bytes(pickle.dumps(function(world, *args)))
        world.close()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


def _report(rank: int, process: ForkServerProcess, output: Path) -> str:
    text = output.read_text(errors="replace").rstrip() if output.exists() else ""
    return f"---- rank {rank}: status {process.exitcode}\n{text}"
