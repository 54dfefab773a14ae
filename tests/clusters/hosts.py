"""Two hosts on this machine: network namespaces joined by a bridge, with a host name, an address and an sshd each.

    with two_hosts(tmp_path) as (first, second):
        process = first.begin(["deepspeed", "--hostfile", "hostfile", "train.py"], cwd=tmp_path, output=tmp_path / "out")

They share this machine's files, as clusters share a file system, and its process numbers, which real hosts do not. Each
reaches the other by name over ssh with a key made for the test. Nobody's own ssh files are read or written: the system's
ssh folder is another one inside. Needs root, for the namespaces; source: ip-netns(8), namespaces(7), sshd_config(5).
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.launchers import environment

PREFIX = "dsr"
NAMES = ("alpha", "beta")
INTERFACE = "eth0"
START_SECONDS = 20.0
NEEDED = ("pdsh", "sshd", "ssh", "ssh-keygen", "ip", "nsenter", "unshare", "mpirun")
SSHD_CONFIG = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
UseDNS no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PidFile none
MaxStartups 100
SetEnv {variables}
"""
SSH_CONFIG = """
IdentityFile {folder}/user_key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


@dataclass(frozen=True)
class Host:
    """One of the two. `sshd` is also what keeps its namespaces alive."""

    name: str
    address: str
    namespace: str
    sshd: "subprocess.Popen[bytes]"

    def begin(
        self, words: Sequence[str], cwd: Path, output: Path, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command here, as a user who is logged in would; its process is the command itself."""
        inside = ["nsenter", f"--target={self.sshd.pid}", "--net", "--uts", "--mount", "--"]
        change = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd)]  # nsenter's own way leaves the folder unreachable
        with output.open("ab") as file:
            return subprocess.Popen(
                [*inside, *change, *words],
                env=environment(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> dict[int, str]:
        """What runs here, by number, besides the sshd that waits for connections."""
        return {pid: command for pid, command in processes_in(self.namespace).items() if pid != self.sshd.pid}


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts, `alpha` and `beta`. At the end whatever still runs in them is killed, and nothing of them stays."""
    remove_leftovers()
    _make_keys(folder)
    try:
        _run("ip", "link", "add", _bridge(), "type", "bridge")
        _run("ip", "link", "set", _bridge(), "up")
        first, second = (_start_host(folder, number) for number in (1, 2))
        yield first, second
    finally:
        _remove(os.getpid())


def remove_leftovers() -> None:
    """Remove the hosts of test sessions that were killed: their names hold the number of a process that is gone."""
    links = re.findall(rf"\b{PREFIX}(\d+)\b", _run("ip", "-brief", "link", "show", "type", "bridge"))
    for owner in {*_owners(Path("/run/netns")), *_owners(Path("/etc/netns")), *map(int, links)}:
        if not Path(f"/proc/{owner}").exists():
            _remove(owner)


def processes_in(namespace: str) -> dict[int, str]:
    """Processes whose network is this namespace, by number, with their commands."""
    try:
        wanted = Path("/run/netns", namespace).stat().st_ino
    except FileNotFoundError:
        return {}
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "ns" / "net").stat().st_ino == wanted and (command := (entry / "cmdline").read_bytes()):
                found[int(entry.name)] = command.decode(errors="replace").replace("\0", " ")
        except OSError:  # ended meanwhile
            continue
    return found


def _can_make_hosts() -> bool:
    if os.geteuid() != 0 or not all(shutil.which(name, path=environment()["PATH"]) for name in NEEDED):
        return False
    return subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True).returncode == 0


needs_two_hosts = pytest.mark.skipif(not _can_make_hosts(), reason="two hosts need root and pdsh, sshd, ip")


def _start_host(folder: Path, number: int) -> Host:
    name, namespace = NAMES[number - 1], f"{_bridge()}-{number}"
    _run("ip", "netns", "add", namespace)
    outer = f"{_bridge()}v{number}"
    _run("ip", "link", "add", outer, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
    _run("ip", "link", "set", outer, "master", _bridge(), "up")
    _run("ip", "-n", namespace, "address", "add", f"{_address(number)}/24", "dev", INTERFACE)
    for link in ("lo", INTERFACE):
        _run("ip", "-n", namespace, "link", "set", link, "up")
    etc = Path("/etc/netns", namespace)  # what lies here is put over /etc inside
    (etc / "ssh").mkdir(parents=True)
    (etc / "ssh" / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    names = [f"{_address(other)} {NAMES[other - 1]}\n" for other in (1, 2)]
    (etc / "hosts").write_text("".join(["127.0.0.1 localhost\n", *names]))
    return Host(name, _address(number), namespace, _start_sshd(folder, name, namespace, _address(number)))


def _start_sshd(folder: Path, name: str, namespace: str, address: str) -> "subprocess.Popen[bytes]":
    kept = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "DS_ACCELERATOR")
    env = environment()
    config = folder / f"sshd_config-{name}"
    home = folder / "home"  # whose .bashrc is nobody's
    home.mkdir(exist_ok=True)
    variables = {"HOME": str(home), **{key: env[key] for key in kept}}
    config.write_text(
        SSHD_CONFIG.format(folder=folder, variables=" ".join(f'"{key}={value}"' for key, value in variables.items()))
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # where it locks itself up before a user is known
    start = 'hostname "$0" && exec "$(command -v sshd)" -D -e -f "$1"'
    log = (folder / f"sshd-{name}.log").open("wb")
    with log:
        sshd = subprocess.Popen(
            ["ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", start, name, str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    listens = ["ip", "netns", "exec", namespace, "bash", "-c", f": </dev/tcp/{address}/22"]
    while subprocess.run(listens, capture_output=True).returncode:
        assert sshd.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
        time.sleep(0.05)
    return sshd


def _make_keys(folder: Path) -> None:
    for name in ("host_key", "user_key"):
        (folder / name).unlink(missing_ok=True)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))


def _remove(owner: int) -> None:
    """End what runs in a session's namespaces, and remove them with all that belongs to them."""
    for number in (1, 2):
        namespace = f"{PREFIX}{owner}-{number}"
        while left := processes_in(namespace):  # one may have started another meanwhile
            for pid in left:
                _kill(pid)
            time.sleep(0.02)
        if Path("/run/netns", namespace).exists():
            _run("ip", "netns", "delete", namespace)
        shutil.rmtree(Path("/etc/netns", namespace), ignore_errors=True)
    for _, link in socket.if_nameindex():  # the kernel takes minutes to remove them with their namespace
        if re.fullmatch(rf"{PREFIX}{owner}(v\d)?", link):
            subprocess.run(["ip", "link", "delete", link], capture_output=True)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _owners(folder: Path) -> set[int]:
    names = [entry.name for entry in folder.glob(f"{PREFIX}*-*")] if folder.is_dir() else []
    return {int(match[1]) for name in names if (match := re.fullmatch(rf"{PREFIX}(\d+)-\d", name))}


def _bridge() -> str:
    return f"{PREFIX}{os.getpid()}"


def _address(number: int) -> str:
    return f"10.77.0.{number}"


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
