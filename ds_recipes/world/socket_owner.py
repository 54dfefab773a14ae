"""Which process of this machine has a TCP socket, as far as /proc tells. No torch here.

Sources: proc_net_tcp in the kernel's documentation, proc(5) (/proc/PID/fd), ssh(1) (SSH_CONNECTION).
"""

import ipaddress
import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.world.ancestors import Process, read_process

ESTABLISHED, TIME_WAIT, LISTENING = "01", "06", "0A"
SHOWN_CHARACTERS = 120


@dataclass(frozen=True)
class _Socket:
    """One line of /proc/net/tcp. Addresses are as it writes them."""

    local: str
    remote: str
    state: str
    user: int
    inode: str


def local_client(connection: str) -> Process | None:
    """The process that made the connection which SSH_CONNECTION describes; None if it is elsewhere, or cannot be seen.

    A launcher that reaches every host through ssh, its own included, is no ancestor of the ranks even there.
    """
    try:
        client, client_port, server, server_port = connection.split()
        ends = (_as_in_proc(client, client_port), _as_in_proc(server, server_port), ESTABLISHED)
    except ValueError:
        return None
    found = next((one for one in _sockets() if (one.local, one.remote, one.state) == ends), None)
    return _process_with(found) if found is not None else None


def describe_owner(port: int) -> str:
    """Who uses this port of this machine: process, command and user, as far as they may be seen."""
    return find_owner(port) or "a process that cannot be seen from here"


def find_owner(port: int) -> str | None:
    """As `describe_owner`; None if nobody is seen to use it."""
    at_port = [one for one in _sockets() if int(one.local.rpartition(":")[2], 16) == port and one.state != TIME_WAIT]
    if not at_port:
        return None
    owner = min(at_port, key=lambda one: one.state != LISTENING)
    process, user = _process_with(owner), f"user {_user_name(owner.user)}"
    if process is not None:
        return f"process {process.pid} ({' '.join(process.command)[:SHOWN_CHARACTERS]}) of {user}"
    if os.geteuid() in (0, owner.user):
        return f"a process of {user} outside of this container"
    return f"a process of {user} (as that user, or root: ss -ltnp)"


def _as_in_proc(address: str, port: str) -> str:
    """As /proc/net/tcp writes it: words of four bytes as the machine's own numbers, in hexadecimal."""
    packed = ipaddress.ip_address(address.partition("%")[0]).packed
    words = [packed[start : start + 4][::-1].hex() for start in range(0, len(packed), 4)]
    return f"{''.join(words)}:{int(port):04x}".upper()


def _sockets() -> Iterator[_Socket]:
    """Those of this network namespace, whoever's they are."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            yield _Socket(fields[1], fields[2], fields[3], int(fields[7]), fields[9])


def _process_with(wanted: _Socket) -> Process | None:
    """The process that has this open. Other users' are not to be seen."""
    link = Path(f"socket:[{wanted.inode}]")
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if any(file.readlink() == link for file in (entry / "fd").iterdir()):
                return read_process(int(entry.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return None


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
