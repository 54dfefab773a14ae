"""The launchers as users start them, on one host or on two of two ranks each, and what they leave behind when killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.world.ancestors import read_process
from tests.clusters.hosts import INTERFACE, Host
from tests.e2e.launchers import ROOT, command, environment

RANKS_PER_HOST = 2
PORT = "29400"
"""Free: nothing else listens in the hosts' own networks, and a test's launches come one after the other."""

MARK = "LAUNCH_OF_A_TEST"
"""Variable by which the processes of a launch on this machine are found, whoever their parent has become."""


@dataclass(frozen=True)
class Launched:
    """A launch that is running: its launchers (torchrun needs one on each host), and whatever belongs to it."""

    folder: Path
    launchers: Sequence["subprocess.Popen[bytes]"]
    processes: Callable[[], Mapping[int, str]]
    """Every process of the launch that is still there, by number, with its command."""

    def output(self) -> str:
        """All that it printed."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("output-*")))

    def find(self, name: str, *words: str) -> int:
        """The number of the one process of this name whose command holds all `words`."""
        found = [
            pid
            for pid, text in self.processes().items()
            if (process := read_process(pid)) is not None
            and process.name == name
            and all(word in text for word in words)
        ]
        assert len(found) == 1, (name, words, self.processes())
        return found[0]

    def find_rank(self, rank: int) -> int:
        names = {f"RANK={rank}", f"OMPI_COMM_WORLD_RANK={rank}"}
        found = [pid for pid in self.processes() if names & set(_variables(pid))]
        assert len(found) == 1, (rank, self.processes())
        return found[0]

    def seconds_until_gone(self, limit_seconds: float) -> float:
        """Wait until no process is left; the launchers' statuses are known then.

        Raises:
            AssertionError: some are left after `limit_seconds`.
        """
        started = time.monotonic()
        while left := self.processes():
            for launcher in self.launchers:
                launcher.poll()
            assert time.monotonic() < started + limit_seconds, f"left: {left}\n{self.output()}"
            time.sleep(0.05)
        for launcher in self.launchers:
            launcher.wait(limit_seconds)
        return time.monotonic() - started

    def statuses(self) -> list[int | None]:
        """The launchers' exit statuses; minus the signal's number for one that was killed."""
        return [launcher.poll() for launcher in self.launchers]

    def kill(self) -> None:
        """End whatever is left, at the end of a test."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def on_one_host(
    launcher: str,
    folder: Path,
    program: Path,
    *argv: str,
    before: Sequence[str] = (),
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Launched:
    """Start `program` with two ranks on this machine; the words `before` stand before the launcher's, `options` after."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output-all").open("wb") as file:
        process = subprocess.Popen(
            [*before, *command(launcher, RANKS_PER_HOST, program, *argv, options=options)],
            env=environment({MARK: str(folder), **dict(env or {})}),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Launched(folder, [process], lambda: _marked(str(folder)))


def on_two_hosts(
    launcher: str,
    hosts: Sequence[Host],
    folder: Path,
    program: Path,
    *argv: str,
    options: Sequence[str] = (),
    before: Sequence[str] = (),
) -> Launched:
    """Start `program` with four ranks, from `folder` on the first host. `options` are torchrun's own; the words `before` stand
    before the launcher's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots={RANKS_PER_HOST}\n" for host in hosts))
    script = [str(program), *argv]
    if launcher == "torchrun":
        nodes = ["--nnodes", str(len(hosts)), "--nproc_per_node", str(RANKS_PER_HOST)]
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{hosts[0].name}:{PORT}", "--rdzv_id", folder.name]
        interface = {"GLOO_SOCKET_IFNAME": INTERFACE}
        words = [*before, "torchrun", *nodes, *meeting, *options, *script]
        started = [host.begin(words, folder, folder / f"output-{host.name}", interface) for host in hosts]
    else:
        if launcher == "mpirun":
            words = ["mpirun", "-hostfile", str(hostfile), "-np", str(RANKS_PER_HOST * len(hosts))]
            words += ["--allow-run-as-root", "-x", f"GLOO_SOCKET_IFNAME={INTERFACE}", sys.executable, *script]
        else:
            (folder / ".deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\n")
            words = ["deepspeed", "--hostfile", str(hostfile), "--master_port", PORT, *script]
        started = [hosts[0].begin([*before, *words], folder, folder / f"output-{hosts[0].name}")]
    return Launched(folder, started, lambda: {pid: text for host in hosts for pid, text in host.processes().items()})


def _marked(value: str) -> dict[int, str]:
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if f"{MARK}={value}" in _variables(int(entry.name)):
            try:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:  # ended meanwhile
                continue
    return found


def _variables(pid: int) -> list[str]:
    """The environment that a process was started with; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
