"""A real SLURM of two nodes on this machine, for tests: munged, slurmctld and two slurmd, started as root in about a second.

    with start_slurm() as slurm:
        job = slurm.submit(script)
        assert slurm.wait_for(job, "COMPLETED")["ExitCode"] == "0:0"

Each slurmd runs in namespaces of its own (process ids, host name, mounts), so that a node has a name that resolves, sees
only its own processes, and takes all of them with it when it is ended. Network and files are this machine's. Each node
says that it has four cores and two GPUs (device files that nothing opens).

Everything lies in one temporary folder. All daemons end with the process that has started them, also when that is
killed; the next start removes the folder that is left then. Needs Debian's slurm-wlm and munge (22.05, with `slurmd -N`).
"""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.world.ancestors import read_process
from tests.e2e.launchers import environment

SKIP_REASON = "SLURM needs root and slurm-wlm, munge"
NODES = ("node1", "node2")
PREFIX = "ds-recipes-slurm-"
START_SECONDS = 30.0
KILL_WAIT_SECONDS = 10
"""Between the SIGTERM and the SIGKILL to a job that is cancelled, or at its time limit."""

ENDED_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
JobRequeue=1
KillWait={kill_wait}
MailProg=/bin/true
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def can_start() -> bool:
    """True as root where the daemons and the tools that start them are installed."""
    programs = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "setpriv")
    return os.geteuid() == 0 and all(shutil.which(name, path=_path()) for name in programs)


@dataclass(frozen=True)
class Slurm:
    """A running cluster; `env` is what a user's shell has on its login node."""

    folder: Path
    env: dict[str, str]

    def run(self, *words: str, timeout: float = 60) -> str:
        """What a command of SLURM prints; it must end with 0."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, (
            f"{' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}"
        )
        return done.stdout

    def submit(self, script: Path, *options: str) -> str:
        """Hand in a job; returns its id."""
        return self.run("sbatch", "--parsable", *options, str(script)).strip()

    def describe(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState, Reason, ExitCode, Restarts."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, *states: str, timeout: float = 240) -> dict[str, str]:
        """Wait until the job is in one of these states; fails if it ends in another one."""
        deadline = time.monotonic() + timeout
        while (found := self.describe(job))["JobState"] not in states:
            late = time.monotonic() > deadline
            if late or found["JobState"] in ENDED_STATES:
                raise AssertionError(f"job {job} is not {' or '.join(states)}, but: {found}\n{self.logs(job)}")
            time.sleep(0.2)
        return found

    def hurry(self, job: str, timeout: float = 60) -> None:
        """Start a requeued job soon: SLURM would let it wait two minutes for the nodes to be cleaned.

        Not within the second in which slurmd revoked the job's credential: it takes a new one of that second for revoked too.
        """
        time.sleep(2.5)
        deadline = time.monotonic() + timeout
        while self.describe(job)["JobState"] == "PENDING":
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            late = time.monotonic() > deadline
            assert not late, (
                f"job {job} does not start: {self.describe(job)}\n{self.run('sinfo', '--list-reasons')}\n{self.logs(job)}"
            )
            time.sleep(0.5)

    def processes(self, job: str, word: str = "") -> list[int]:
        """The running processes of a job on all nodes, by this machine's numbers, that have `word` in their command."""
        return [pid for pid in _with_environment(f"SLURM_JOB_ID={job}", self.env_entry) if word in _command(pid)]

    def all_processes(self) -> list[int]:
        """Everything of this cluster that runs: daemons, jobs, commands."""
        return _with_environment(self.env_entry)

    def wait_until_gone(self, job: str, word: str = "", timeout: float = 15) -> None:
        """Fails if processes of the job are left after so many seconds."""
        deadline = time.monotonic() + timeout
        while left := self.processes(job, word):
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job} has left {[(pid, _command(pid)) for pid in left]}\n{self.logs(job)}")
            time.sleep(0.1)

    @property
    def env_entry(self) -> str:
        """What only the processes of this cluster have in their environment."""
        return f"SLURM_CONF={self.env['SLURM_CONF']}"

    def logs(self, job: str | None = None) -> str:
        """The ends of the daemons' logs, and of the job's output if it is still known."""
        files = sorted(self.folder.glob("*.log"))
        if job is not None:
            with contextlib.suppress(AssertionError, KeyError):
                files.append(Path(self.describe(job)["StdOut"]))
        return "\n".join(f"---- {file}\n{_tail(file)}" for file in files if file.is_file())


@contextlib.contextmanager
def start_slurm() -> Iterator[Slurm]:
    """A cluster that takes jobs; it is ended, and its files removed, at the end of the block.

    Raises:
        AssertionError: it was not ready in time; the text holds the ends of the daemons' logs.
    """
    remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    me = read_process(os.getpid())
    assert me is not None
    (folder / "owner").write_text(f"{me.pid} {me.started}")
    folder.chmod(0o755)
    env = {**environment(), "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    slurm = Slurm(folder, env)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _write_configuration(folder)
        _start_daemons(slurm, daemons)
        yield slurm
    finally:
        _end(slurm, daemons)


def remove_leftovers() -> None:
    """End and remove clusters whose owner was killed; those of a running process stay."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            pid, started = map(int, (folder / "owner").read_text().split())
            owner = read_process(pid)
            if owner is None or owner.started != started or not owner.is_running():
                _end(Slurm(folder, {"SLURM_CONF": str(folder / "slurm.conf")}), [])


def _write_configuration(folder: Path) -> None:
    ports = _free_ports(1 + len(NODES))
    nodes = [
        f"NodeName={node} NodeAddr={_address(node)} NodeHostname={node} Port={port} CPUs=4 RealMemory=4000 Gres=gpu:2"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    host = socket.gethostname().split(".")[0]
    text = CONFIGURATION.format(
        host=host, port=ports[0], folder=folder, nodes="\n".join(nodes), kill_wait=KILL_WAIT_SECONDS
    )
    (folder / "slurm.conf").write_text(text)
    for number in range(2):  # SLURM sets CUDA_VISIBLE_DEVICES for device files alone; these are /dev/null
        os.mknod(folder / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={folder}/nvidia[0-1]\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    hosts = Path("/etc/hosts").read_text() + "".join(f"{_address(node)} {node}\n" for node in NODES)
    (folder / "hosts").write_text(hosts)
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool-{node}").mkdir()


def _start_daemons(slurm: Slurm, daemons: list[subprocess.Popen[bytes]]) -> None:
    folder = slurm.folder
    files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    munged = ["munged", "--foreground", *(f"--{option}={folder / name}" for option, name in files.items())]
    daemons.append(_daemon(slurm, "munged", munged))
    _until(slurm, daemons, lambda: (folder / "munge.sock").exists())
    daemons.append(_daemon(slurm, "slurmctld", ["slurmctld", "-D"]))
    for node in NODES:
        daemons.append(_daemon(slurm, f"slurmd-{node}", _node(folder, node)))
    _until(slurm, daemons, lambda: _idle_nodes(slurm) == len(NODES))


def _node(folder: Path, node: str) -> list[str]:
    """slurmd as on a host of its own. The shell above it is the node's process 1, and so collects what has no parent."""
    inside = f"hostname {node}; mount --bind {folder}/hosts /etc/hosts; mount -t tmpfs shm /dev/shm; slurmd -D -N {node} & wait"
    return ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", inside]


def _daemon(slurm: Slurm, name: str, words: Sequence[str]) -> "subprocess.Popen[bytes]":
    """A program that ends with this process, however that ends."""
    with (slurm.folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *words],
            env=slurm.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _idle_nodes(slurm: Slurm) -> int:
    words = ["sinfo", "--noheader", "--Node", "--format=%T"]
    done = subprocess.run(words, env=slurm.env, capture_output=True, text=True, check=False)
    return done.stdout.split().count("idle")


def _until(slurm: Slurm, daemons: "Sequence[subprocess.Popen[bytes]]", ready: "Callable[[], bool]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
        if ended or time.monotonic() > deadline:
            raise AssertionError(f"SLURM did not start; ended: {ended}\n{slurm.logs()}")
        time.sleep(0.05)


def _end(slurm: Slurm, daemons: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Kill whatever has this cluster's configuration in its environment, and remove its files."""
    deadline = time.monotonic() + START_SECONDS
    while left := slurm.all_processes():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"processes of SLURM cannot be killed: {left}"
        time.sleep(0.05)
    for daemon in daemons:
        daemon.wait()
    shutil.rmtree(slurm.folder)


def _with_environment(*entries: str) -> list[int]:
    """The running processes that have all these NAME=value in their environment."""
    wanted, found = {entry.encode() for entry in entries}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return [pid for pid in found if (process := read_process(pid)) is not None and process.is_running()]


def _command(pid: int) -> str:
    process = read_process(pid)
    return "" if process is None else " ".join(process.command)


def _address(node: str) -> str:
    """Every address of 127/8 is this machine's, without any setting up."""
    return f"127.0.77.{NODES.index(node) + 1}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for taken in sockets:
            taken.bind(("127.0.0.1", 0))
        return [taken.getsockname()[1] for taken in sockets]


def _path() -> str:
    """This environment's programs first, the daemons' folder, which is not on every user's path, last."""
    return f"{environment()['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


def _tail(file: Path, lines: int = 30) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
