"""Who listens at a port, as far as /proc tells."""

import os
from pathlib import Path

from ds_recipes.world.ancestors import read_process

LISTENING = "0A"  # proc(5), /proc/net/tcp: the state's number, TCP_LISTEN


def describe_owner(port: int) -> str:
    """The process that listens there with its command line; of another user's only that it is one."""
    inodes = _inodes(port)
    if not inodes:
        return "a process outside of this container"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _holds(entry, inodes):
            process = read_process(int(entry.name))
            if process is not None:
                return f"process {process.pid} ({' '.join(process.command)[:120]})"
    return "a process of another user (ask the administrator: ss -ltnp)"


def _inodes(port: int) -> set[str]:
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{name}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(fields[9])
    return found


def _holds(entry: Path, inodes: set[str]) -> bool:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    try:
        return any(os.readlink(file) in wanted for file in (entry / "fd").iterdir())  # noqa: PTH115 - a link to no path
    except OSError:
        return False
