"""The port at which the ranks of a job meet: derived from the job, and free on rank 0's host where that is this one."""

import errno
import socket

from ds_recipes.errors import WorldError
from ds_recipes.world.resolve import PORTS, derived_port

TRIES = 200


def choose_port(job: str, host: str) -> int:
    """A port for `job` that nothing listens at on `host`. Whether that is so is seen only where `host` is this one.

    Raises:
        WorldError: no port that was tried is free.
    """
    first = PORTS.index(derived_port(job))
    here = is_here(host)
    for further in range(TRIES):
        port = PORTS[(first + further) % len(PORTS)]
        if not here or is_free(port):
            return port
    raise WorldError(
        f"None of the ports {PORTS[first]} and {TRIES - 1} after it is free on {host}, where rank 0 would listen."
    )


def is_here(host: str) -> bool:
    """True if `host` is a name or an address of this machine: its address can be bound to."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False


def is_free(port: int) -> bool:
    """True if this machine can listen at `port` on all of its addresses, as the store of the ranks will."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET, socket.SOCK_STREAM) as probe:
        if probe.family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
