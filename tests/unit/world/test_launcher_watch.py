"""A rank leaves when its launcher is killed, whatever it is doing, and stays when somebody else is gone."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_recipes.world.ancestors import Process, ancestors, read_process
from ds_recipes.world.launcher_watch import launchers_above
from ds_recipes.world.socket_owner import local_client
from tests.e2e.launchers import ROOT

RANK = """
import sys, time
from ds_recipes.world import failure
failure.MEETING_SECONDS = 0.2
def main(argv):
    print("begun", flush=True)
    time.sleep(float(argv[0]))
    print("done", flush=True)
    return 0
sys.exit(failure.run_guarded(main, sys.argv[1:]))
"""
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"


class Started:
    """A rank below parents of one's choice. Its output is in a file, as no parent must be needed to read it."""

    def __init__(self, folder: Path, *parents: str, seconds: float = 60) -> None:
        (folder / "rank.py").write_text(RANK)
        for name in ("mpirun", "wrapper"):
            (folder / name).write_text(LAUNCHER)
        self._output = folder / "output"
        words = [sys.executable, str(folder / "rank.py"), str(seconds)]
        for parent in reversed(parents):
            words = (
                [sys.executable, str(folder / parent), *words] if parent != "sh" else ["sh", "-c", _background(words)]
            )
        with self._output.open("wb") as file:
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            self.top = subprocess.Popen(words, stdout=file, stderr=file, env=env, start_new_session=True)
        self.wait_for("begun", 20)

    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def ranks(self) -> list[int]:
        """Numbers of the processes of its session that are the rank."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            process = read_process(int(entry.name))
            if process is not None and process.name == "rank.py" and process.is_running() and self._is_ours(process):
                found.append(process.pid)
        return found

    def _is_ours(self, process: Process) -> bool:
        return str(self._output.parent) in process.command[1]

    def end(self) -> None:
        for pid in [self.top.pid, *self.ranks()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.top.wait()


def _background(words: list[str]) -> str:
    return " ".join(f"'{word}'" for word in words) + " &"


@pytest.mark.parametrize("parents", [("mpirun",), ("mpirun", "wrapper")])
def test_a_rank_that_sleeps_leaves_when_its_launcher_is_killed(tmp_path: Path, parents: tuple[str, ...]) -> None:
    """The ranks have not met, and the main thread does not come back to Python."""
    started = Started(tmp_path, *parents)
    try:
        started.top.kill()
        started.top.wait()
        started.wait_for(f"The launcher mpirun (process {started.top.pid} on {socket.gethostname()}) is gone", 10)
        deadline = time.monotonic() + 5
        while started.ranks():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert started.output().count("is gone") == 1 and "done" not in started.output()
    finally:
        started.end()


@pytest.mark.parametrize("parents", [("sh",), ("wrapper",), ("sh", "mpirun"), ("mpirun",)])
def test_no_alarm_when_a_shell_or_a_wrapper_ends(tmp_path: Path, parents: tuple[str, ...]) -> None:
    started = Started(tmp_path, *parents, seconds=2)
    try:
        if parents == ("wrapper",):
            started.top.kill()
        started.wait_for("done", 20)
        assert "gone" not in started.output()
    finally:
        started.end()


def process(pid: int, *command: str) -> Process:
    return Process(pid, pid + 1, 0, command, "S")


PYTHON = "/usr/bin/python3.11"
RUNNER = process(1, PYTHON, "/venv/bin/deepspeed", "--hostfile", "hosts", "train.py")
LAUNCH_PY = process(2, PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "train.py")
TORCHRUN = process(3, PYTHON, "/venv/bin/torchrun", "--nnodes", "2", "train.py")
BY_MODULE = process(4, PYTHON, "-m", "torch.distributed.run", "train.py")
PRTERUN = process(5, "prterun", "-np", "2", "python", "train.py")
PRTED = process(6, "/opt/openmpi/bin/prted", "--prtemca", "ess")
STEPD = process(7, "slurmstepd: [123.0]")
SHELL = process(8, "/bin/bash", "-c", "cd run; python -m deepspeed.launcher.launch")
LOGIN = process(9, "-bash")
SESSION = process(10, "sshd: someone@notty")
NEW_SESSION = process(11, "sshd-session: someone@notty")
TERMINAL = process(12, "sshd: someone@pts/0")
LISTENER = process(13, "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups")


@pytest.mark.parametrize(
    ("parents", "env", "watched"),
    [
        ([LAUNCH_PY, RUNNER, LOGIN, TERMINAL, LISTENER], {}, [LAUNCH_PY, RUNNER]),
        ([LAUNCH_PY, RUNNER, SHELL, SESSION, LISTENER], {}, [LAUNCH_PY, RUNNER]),
        ([LAUNCH_PY, SHELL, SESSION, LISTENER], {}, [LAUNCH_PY, SESSION]),
        ([LAUNCH_PY, SHELL, NEW_SESSION, LISTENER], {}, [LAUNCH_PY, NEW_SESSION]),
        ([TORCHRUN, LOGIN, TERMINAL, LISTENER], {"GROUP_WORLD_SIZE": "2"}, [TORCHRUN]),
        ([TORCHRUN, SHELL, SESSION, LISTENER], {"GROUP_WORLD_SIZE": "2"}, [TORCHRUN, SESSION]),
        ([BY_MODULE, SHELL, SESSION, LISTENER], {"GROUP_WORLD_SIZE": "1"}, [BY_MODULE]),
        ([PRTERUN, STEPD], {}, [PRTERUN, STEPD]),
        ([PRTED, SESSION, LISTENER], {}, [PRTED, SESSION]),
        ([PRTED], {}, [PRTED]),
        ([SHELL, SESSION, LISTENER], {}, []),  # plain python, started over ssh
        ([SHELL, SESSION, LISTENER], {"RANK": "1"}, [SESSION]),
        ([SHELL, LOGIN, TERMINAL, LISTENER], {"RANK": "1"}, []),
    ],
)
def test_which_processes_are_watched(parents: list[Process], env: dict[str, str], watched: list[Process]) -> None:
    assert list(launchers_above(parents, env)) == watched
    with_nohup = launchers_above(parents, env, hangs_up=False)
    assert list(with_nohup) == [process for process in watched if process not in (SESSION, NEW_SESSION)]


def can_listen(address: str) -> bool:
    try:
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("address", filter(can_listen, ["127.0.0.1", "::1"]))
def test_the_client_of_a_connection_is_found_where_it_is_on_this_machine(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as server:
        port = server.getsockname()[1]
        connect = f"import socket, sys; s = socket.create_connection(('{address}', {port})); sys.stdin.read()"
        client = subprocess.Popen([sys.executable, "-c", connect], stdin=subprocess.PIPE)
        with server.accept()[0] as accepted:
            client_port = accepted.getpeername()[1]
            found = local_client(f"{address} {client_port} {address} {port}")
            assert found is not None and found.pid == client.pid
            assert os.getpid() in [parent.pid for parent in ancestors(found)]
        client.communicate()
    assert local_client(f"{address} {client_port} {address} {port}") is None


@pytest.mark.parametrize("connection", ["", "192.0.2.7 50000 192.0.2.8 22", "nonsense", "a b c d"])
def test_a_client_elsewhere_is_none(connection: str) -> None:
    assert local_client(connection) is None
