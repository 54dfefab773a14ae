"""A launcher that is gone takes its ranks with it: nobody else would see them, end them, or hand on their exit status.

Each rank knows the launchers above it: those among its ancestors, and where one on this same machine reached it through
ssh (pdsh does so), those above that ssh. On another machine it knows the ssh session, of which the launcher holds the
other end. A shell is never one of them, so that logging off and nohup do no harm. No torch here.
"""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ds_recipes.errors import DsRecipesError, LauncherGone
from ds_recipes.world.ancestors import Process, ancestors
from ds_recipes.world.socket_owner import local_client

POLL_SECONDS = 0.5

PIPE_SECONDS = 0.2
"""A launcher that is killed closes its pipes a moment before it is gone."""

LABELS = {
    "deepspeed": "deepspeed",
    "deepspeed.pt": "deepspeed",
    "ds": "deepspeed",
    "deepspeed.launcher.runner": "deepspeed",
    "deepspeed.launcher.launch": "deepspeed's launch.py",
    "torchrun": "torchrun",
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "mpirun": "mpirun",
    "mpiexec": "mpiexec",
    "orterun": "mpirun",
    "prterun": "mpirun",
    "prted": "prted",
    "orted": "orted",
    "mpiexec.hydra": "mpiexec",
    "hydra_pmi_proxy": "hydra_pmi_proxy",
    "hydra_bstrap_proxy": "hydra_bstrap_proxy",
    "srun": "srun",
    "slurmstepd": "slurmstepd",
    "pdsh": "pdsh",
}
"""Programs that start ranks and see to them, by the name of their process, and what they are called in a message."""

HOST_PARTS = {"deepspeed's launch.py", "prted", "orted", "hydra_pmi_proxy", "hydra_bstrap_proxy"}
"""Those that a launcher elsewhere starts on each host."""

_REMOTE_COMMAND = re.compile(r"sshd(-session)?: \S+@notty\b")
"""The title of an sshd that runs a command without a terminal: a program asked for it, not somebody who logged in."""


class LauncherWatch:
    """The launchers above this process, and a thread that looks whether they are still there."""

    def __init__(self, above: Mapping[Process, str], end: Callable[[LauncherGone], None]) -> None:
        """`above` says what each is called. `end` is called once, in the thread, when one of them is gone."""
        self._above = dict(above)
        self._end = end
        if above:
            threading.Thread(target=self._look, name="launcher-watch", daemon=True).start()

    def gone(self) -> LauncherGone | None:
        """What to say of the first one that is gone; None while all are there."""
        for process, label in self._above.items():
            if not process.is_running():
                return LauncherGone(label, process.pid, socket.gethostname())
        return None

    def _look(self) -> None:
        while (error := self.gone()) is None:
            time.sleep(POLL_SECONDS)
        self._end(error)


_watch: LauncherWatch | None = None


def begin(end: Callable[[LauncherGone], None]) -> None:
    """Watch the launchers above this process from now on; `end(error)` is called, in a thread, when one is gone."""
    global _watch
    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    _watch = LauncherWatch(launchers_above(ancestors(), os.environ, hangs_up), end)


def gone() -> LauncherGone | None:
    """What to say of a launcher that is gone; None while all are there, or none is watched."""
    return _watch.gone() if _watch is not None else None


def cause_of(error: BaseException) -> BaseException:
    """`error`, or that the launcher is gone, where that may well be the cause: its pipes and its store go with it."""
    if isinstance(error, (DsRecipesError, KeyboardInterrupt, SystemExit)):
        return error
    if isinstance(error, OSError):
        time.sleep(PIPE_SECONDS)
    return gone() or error


def launchers_above(parents: Sequence[Process], env: Mapping[str, str], hangs_up: bool = True) -> dict[Process, str]:
    """The launchers among `parents` (nearest first) and beyond the ssh session that they are in, and what each is called.

    Without `hangs_up` (the signal SIGHUP is ignored, as nohup does) this process is meant to outlive an ssh session.
    """
    found = {process: LABELS[process.name] for process in parents if process.name in LABELS}
    session = next((process for process in parents if _REMOTE_COMMAND.match(" ".join(process.command))), None)
    if session is None or not hangs_up or not (found or "RANK" in env):
        return found
    client = local_client(env.get("SSH_CONNECTION", ""))
    beyond = {} if client is None else launchers_above(ancestors(client), {}, hangs_up=False)
    one_host_of_several = set(found.values()) <= HOST_PARTS or env.get("GROUP_WORLD_SIZE", "1") != "1"
    return found | ({session: "the ssh session"} if one_host_of_several else {}) | beyond
