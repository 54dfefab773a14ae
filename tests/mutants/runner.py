"""Running tests in a copy of the tree, in a process forked from one that has imported what is large."""

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.house.tree import ROOT

CAUGHT, ALIVE, DOES_NOT_RUN, TOO_LONG = "caught", "alive", "does not run", "takes too long"
LIMIT_SECONDS = 300.0
PYTEST = ("-x", "-q", "-n", "0", "-m", "not slow and not gpu", "-p", "no:cacheprovider", "--hypothesis-seed=0")
TESTS_FAILED, NOT_STARTED = 1, 70
"""Statuses of pytest, which ends with 0 if all passed and with others if it could not run them, and of ours."""

PRELOADED = ("torch", "pytest", "hypothesis", "transformers", "deepspeed", "numpy")


@dataclass(frozen=True)
class Result:
    """What became of a run of tests."""

    status: int | None  # pytest's; None: it took too long
    output: str
    seconds: float

    @property
    def verdict(self) -> str:
        if self.status is None:  # a hang of the fault's, or a slow machine: nobody can tell
            return TOO_LONG
        return {TESTS_FAILED: CAUGHT, 0: ALIVE}.get(self.status, DOES_NOT_RUN)


def run_in(folder: Path, tests: Sequence[str]) -> Result:
    """Run tests in a copy, in a process that is forked from one which has imported what is large."""
    log = folder / ".output-of-tests"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    started = time.monotonic()
    process = context.Process(target=run_tests, args=(str(folder), [*PYTEST, *tests], str(log)))
    process.start()
    process.join(LIMIT_SECONDS)
    status = process.exitcode
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what a broken test has left, too
    process.join()
    return Result(status, log.read_text(errors="replace") if log.exists() else "", time.monotonic() - started)


def run_tests(folder: str, arguments: Sequence[str], log: str) -> None:
    """In the forked process: end with pytest's status; with another one if it cannot even be started."""
    status = NOT_STARTED
    try:
        status = _pytest_in(folder, arguments, log)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def _pytest_in(folder: str, arguments: Sequence[str], log: str) -> int:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    for name in [one for one in sys.modules if one.split(".")[0] in ("tests", "ds_recipes")]:
        del sys.modules[name]
    sys.path[:] = [folder, *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    import pytest

    found = importlib.util.find_spec("ds_recipes")
    assert found is not None and Path(str(found.origin)).is_relative_to(folder), found
    return int(pytest.main(list(arguments)))
