"""Who has a port: found with process, command and user, or only with the user where that is all that may be seen."""

import getpass
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ds_recipes.world.rendezvous import offer_address
from ds_recipes.world.socket_owner import describe_owner, find_owner

NOBODY = 65534


@contextmanager
def listener() -> Iterator[tuple[int, int]]:
    """The number of a process that listens, and its port."""
    listen = (
        "import socket, sys; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", listen], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.pid, int(process.stdout.readline())
    process.communicate()


def test_a_listener_is_named_with_process_command_and_user() -> None:
    with listener() as (pid, port):
        found = describe_owner(port)
    assert found.startswith(f"process {pid} ({sys.executable} -c import socket"), found
    assert found.endswith(f" of user {getpass.getuser()}")
    assert find_owner(port) is None and "cannot be seen" in describe_owner(port)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's port needs root to become one")
def test_of_another_users_listener_only_the_user_is_named() -> None:
    with listener() as (_, port):
        found, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.setuid(NOBODY)
            os.write(told, describe_owner(port).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(found, 1000).decode() == "a process of user root (as that user, or root: ss -ltnp)"


def test_another_port_is_offered_with_the_owner_of_the_one_that_was_wanted(capfd: pytest.CaptureFixture[str]) -> None:
    with listener() as (pid, port):
        _, offered = offer_address(port)
        assert offered != port
        line = f"Port {port} of {socket.gethostname()} is in use by process {pid} ("
        shown = capfd.readouterr().err
        assert shown.startswith(line) and f"the ranks meet at port {offered}." in shown
    assert offer_address(port)[1] == port and not capfd.readouterr().err
