"""Ranks that are started again in place: torchrun's --max-restarts, after any of them has failed. No torch here.

Its agent on each host ends the ranks there (SIGTERM, and SIGKILL after 30 s), waits for the other agents, and starts all ranks
anew, below the same launcher and with the same store. It knows no failure that is final, and each agent counts for itself
(torch/distributed/elastic/agent/server/api.py): TORCHELASTIC_RESTART_COUNT may differ between hosts.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping

from ds_recipes.errors import STOPPED_EARLY, ConfigError
from ds_recipes.world.ancestors import Process, ancestors
from ds_recipes.world.launcher_watch import LABELS
from ds_recipes.world.signals import first_signal

FINAL = {
    ConfigError.exit_status: f"status {ConfigError.exit_status}, which a further try would not change",
    STOPPED_EARLY: "the run was asked to stop",
}
"""Exit statuses after which nobody is to be started again, and why."""

FROM_TORCHRUN = ("SIGTERM", "SIGINT")
"""Signals that reach the ranks through torchrun, which then ends by itself."""

_agent: Process | None = None
"""The torchrun that may start this process's successor, or has started it as one."""

_speaks_for_host = False
"""True for one rank of each host, while its torchrun has a restart left."""


def are_possible(env: Mapping[str, str]) -> bool:
    """True below a torchrun that starts ranks again."""
    return env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def begin() -> None:
    """Find out who may start the ranks again. To be called before LOCAL_RANK is given another meaning (a GPU's number)."""
    global _agent, _speaks_for_host
    env = os.environ
    if are_possible(env):
        _agent = next((process for process in ancestors() if LABELS.get(process.name) == "torchrun"), None)
        is_last = env.get("TORCHELASTIC_RESTART_COUNT") == env["TORCHELASTIC_MAX_RESTARTS"]
        _speaks_for_host = env.get("LOCAL_RANK") == "0" and not is_last


def launch_start(started: float) -> float:
    """The `time.monotonic()` at which the launch began: torchrun's own start if it starts ranks again, else `started`."""
    if _agent is None:
        return started
    age_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - _agent.started / os.sysconf("SC_CLK_TCK")
    return min(started, time.monotonic() - age_seconds)


def forbid(status: int, say: Callable[[str], object]) -> None:
    """At the end of a process with `status`: end this host's torchrun if that status is final, or it would start all again.

    `say` is called with a line about it, once in the world.
    """
    if _agent is None or not _speaks_for_host or status not in FINAL or not _agent.is_running():
        return
    if status == STOPPED_EARLY and first_signal() in FROM_TORCHRUN:
        return
    if os.environ.get("GROUP_RANK", "0") == "0":
        say(f"torchrun (process {_agent.pid}) is ended, so that it does not start the ranks again: {FINAL[status]}.")
    with contextlib.suppress(OSError):
        os.kill(_agent.pid, signal.SIGTERM)
