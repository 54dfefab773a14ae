"""The ssh client at the other end of an ssh session, where it runs on this same machine. No torch here.

A launcher that reaches every host through ssh, its own included, is no ancestor of the ranks even there. Sources: ssh(1)
(SSH_CONNECTION), proc_net_tcp in the kernel's documentation, proc(5) (/proc/PID/fd).
"""

import ipaddress
from pathlib import Path

from ds_recipes.world.ancestors import Process, read_process

_ESTABLISHED = "01"


def local_client(connection: str) -> Process | None:
    """The process that made the connection which SSH_CONNECTION describes; None if it is elsewhere, or cannot be seen."""
    try:
        client, client_port, server, server_port = connection.split()
        ours, theirs = _as_in_proc(client, client_port), _as_in_proc(server, server_port)
    except ValueError:
        return None
    socket_number = _socket_number(ours, theirs)
    return _owner(Path(f"socket:[{socket_number}]")) if socket_number is not None else None


def _as_in_proc(address: str, port: str) -> str:
    """As /proc/net/tcp writes it: words of four bytes as the machine's own numbers, in hexadecimal."""
    packed = ipaddress.ip_address(address.partition("%")[0]).packed
    words = [packed[start : start + 4][::-1].hex() for start in range(0, len(packed), 4)]
    return f"{''.join(words)}:{int(port):04x}".upper()


def _socket_number(local: str, remote: str) -> str | None:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[1:4] == [local, remote, _ESTABLISHED]:
                return fields[9]
    return None


def _owner(link: Path) -> Process | None:
    """The process that has this open. Other users' are not to be seen, and not ours to watch."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if any(file.readlink() == link for file in (entry / "fd").iterdir()):
                return read_process(int(entry.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return None
