"""The end of a run that fails: the error is shown exactly once, and every rank leaves within seconds, non-zero.

Before the ranks have met, rank 0 shows the error and ends at once; the others wait in silence for their launcher, and
one that is still there afterwards carries its error to the meeting. After that, see `channel.py`.
"""

import contextlib
import faulthandler
import os
import time
from collections.abc import Callable, Sequence

from ds_recipes.errors import DsRecipesError, LauncherGone, StartError, StoppedEarly
from ds_recipes.world import channel, launcher_watch, restarts
from ds_recipes.world.device_errors import device_error
from ds_recipes.world.resolve import is_speaker, resolve
from ds_recipes.world.signals import first_signal

SILENT_SECONDS = 4.0
"""How long other ranks wait for the launcher to end them, after an error that rank 0 shows before ranks can talk."""

CARRY_SECONDS = 30.0
"""How long a rank that has an error which rank 0 may not have tries to reach it."""


MEETING_SECONDS = 6.0
"""How long ranks whose launcher is gone wait for the line to the others, which those on other hosts hear of it through."""


def run_guarded(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run `main(argv)` and return the exit status; see to the end of all ranks if it raises.

    Status: main's own (0, or 75 for stopped early); 2 or 1 as the error's class says; 130 after an interrupt; 1 for any
    other exception. With ranks that have met, a failing process ends here, through `os._exit`: a broken process group
    aborts when the interpreter takes it down.
    """
    # A peer that is gone makes torch's store print a C++ stack on every rank; the message here says who it was.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # without a stderr of its own
        faulthandler.enable()  # a signal that kills at once (SIGBUS, SIGSEGV) leaves the stacks
    launcher_watch.begin(_leave_without_launcher)
    restarts.begin()
    try:
        status = _run(main, argv)
    except BaseException as error:
        cause = device_error(error) or launcher_watch.cause_of(error)
        if channel.current is not None:
            channel.current.fail(cause)
        if isinstance(error, SystemExit):  # --help
            raise
        status = _fail_alone(cause)
    restarts.forbid(status, channel.show)
    return status


def _run(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    try:
        status = main(argv)
    except SystemExit as left:
        if left.code or channel.current is None:
            raise
        status = 0
    if channel.current is not None and channel.current.leave is not None:
        channel.current.leave()
    return status


def _fail_alone(error: BaseException) -> int:
    """End this process before the ranks have met."""
    status = channel.exit_status(error)
    if isinstance(error, LauncherGone):
        channel.show_once_a_host(channel.describe(error))
        return status
    if is_speaker(os.environ):
        channel.show(channel.describe(error))
        return status
    if not isinstance(error, StoppedEarly) and _is_ended_within(SILENT_SECONDS):
        return status
    if not isinstance(error, (StartError, StoppedEarly)):
        _carry(error)
    channel.show_once_a_host(channel.describe(error))
    return status


def _is_ended_within(seconds: float) -> bool:
    """True as soon as a signal comes, or has come: the launcher ends this process, since rank 0 has told the error."""
    deadline = time.monotonic() + seconds
    while first_signal() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return first_signal() is not None


def _carry(error: BaseException) -> None:
    """Meet rank 0 with the error in hand. Returns only if there is no meeting."""
    from ds_recipes.world.rendezvous import Patience, connect  # imports torch

    try:
        _, line = connect(resolve(os.environ), CARRY_SECONDS, Patience(first_signal))
    except DsRecipesError:
        return
    line.fail(error)


def _leave_without_launcher(error: LauncherGone) -> None:
    """End this process, in the launcher watch's thread, whatever the main thread is doing."""
    channel.wait_until(lambda: channel.current is not None, MEETING_SECONDS)
    if channel.current is not None:
        channel.current.fail(error)
    os._exit(_fail_alone(error))
