"""Ranks of a launch that outlive their launcher: found by the launch's id in their environment, and ended.

A launcher that is killed leaves its ranks on its own and on other hosts. Those that still save are given time.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ds_recipes.cluster.ports import is_here
from ds_recipes.world.ancestors import ancestors

GRACE_SECONDS = 30.0
"""How long ranks may go on after their launcher: they notice by themselves that it or another rank is gone, and leave."""

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


def find_ranks(launch: str) -> list[int]:
    """Processes of this host that were started with `launch` in their environment, this one and those above it aside."""
    mark = f"DS_RECIPES_LAUNCH={launch}".encode()
    mine = {os.getpid(), *(process.pid for process in ancestors())}
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            is_zombie = not (entry / "cmdline").read_bytes()
            if int(entry.name) not in mine and not is_zombie and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end_ranks_here(launch: str, grace_seconds: float = GRACE_SECONDS) -> int:
    """Wait until no rank of `launch` is left on this host, then kill those that are. Returns how many it has killed."""
    deadline = time.monotonic() + grace_seconds
    while (left := find_ranks(launch)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(left)


def end_ranks(launch: str, hosts: Sequence[str], tool: Path, grace_seconds: float = GRACE_SECONDS) -> list[str]:
    """The same on all `hosts`, on others by `tool` through ssh. Returns a line for each host where it did something or failed."""
    here = [host for host in hosts if is_here(host)]
    others = {host: _through_ssh(host, launch, tool, grace_seconds) for host in hosts if host not in here}
    lines = []
    if here and (killed := end_ranks_here(launch, grace_seconds)):
        lines.append(f"{here[0]}: {killed} processes outlived their launcher and were killed")
    for host, process in others.items():
        said = (
            "there is no ssh here to look for ranks that are left"
            if process is None
            else process.communicate()[1].strip()
        )
        if said:
            lines.append(f"{host}: {said}")
    return lines


def _through_ssh(host: str, launch: str, tool: Path, grace_seconds: float) -> "subprocess.Popen[str] | None":
    words = [sys.executable, str(tool), "--end_ranks_here", launch, "--grace_seconds", str(grace_seconds)]
    if shutil.which("ssh") is None:
        return None
    return subprocess.Popen(
        [*SSH, host, shlex.join(words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
