"""The hosts of a hostfile, looked at from the one that is to launch: reached by ssh as the launchers do, without questions."""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.cluster.deepspeed_env import files_read, problems_of
from ds_recipes.cluster.doctor.checks import Context
from ds_recipes.cluster.doctor.commands import Answer, ask
from ds_recipes.cluster.doctor.compare import Member, compare
from ds_recipes.cluster.doctor.findings import Finding, counted, error, fine, from_json, warning
from ds_recipes.cluster.doctor.network import addresses_of
from ds_recipes.cluster.hostfile import HostSlots, read_hostfile
from ds_recipes.errors import ConfigError, WorldError

CONNECT_SECONDS = 8
HOST_SECONDS = 60.0
AT_A_TIME = 16
NO_FOLDER, NO_PYTHON, NO_CODE = 91, 92, 93
"""Exit statuses of the line that is run on a host."""


@dataclass(frozen=True)
class _Seen:
    """What one host answered. `member` is None where it did not come to compare anything."""

    findings: list[Finding]
    member: Member | None = None


def variables_file(context: Context) -> Iterator[Finding]:
    """The .deepspeed_env that DeepSpeed's launcher would read when it is started in this folder."""
    paths = files_read(context.env, Path.cwd())
    for path in paths:
        for problem in _problems_of(path):
            make = error if context.hostfile is not None else warning
            yield make(
                "deepspeed_env.line",
                problem,
                "the launcher splits every line at its first '=' and checks nothing; it reads the file for several hosts only",
                "Write one NAME=VALUE a line, and nothing else. tools/prepare_launch.py writes such a file.",
            )
    if paths:
        yield fine("deepspeed_env", f"DeepSpeed's launcher reads {', '.join(map(str, paths))} for several hosts")


def _problems_of(path: Path) -> Sequence[str]:
    try:
        return problems_of(path)
    except ConfigError as unreadable:
        return unreadable.problems


def hostfile(context: Context) -> Iterator[Finding]:
    """The file, its names, and each host through ssh."""
    path = context.hostfile
    if path is None:
        return
    try:
        hosts = read_hostfile(path)
    except WorldError as problem:
        missing = not path.exists()
        yield error(
            "hostfile.missing" if missing else "hostfile.wrong",
            str(problem).splitlines()[0] if missing else str(problem),
            "a wrong path; DeepSpeed's launcher would only warn, and train on this machine alone"
            if missing
            else "a typing error",
            "Name the file with a line 'host slots=N' for each host."
            if missing
            else "One line 'host slots=N' a host; the launchers disagree about anything else.",
        )
        return
    yield fine(
        "hostfile", f"{path}: {counted(len(hosts), 'host')}, {counted(sum(host.slots or 1 for host in hosts), 'rank')}"
    )
    yield from _for_deepspeed(path, hosts, context)
    if shutil.which("ssh", path=context.env.get("PATH")) is None:
        yield error(
            "ssh.missing",
            "there is no ssh on the PATH of this host",
            "no ssh client is installed here",
            "Install it (openssh-client): the launchers reach the other hosts through it.",
        )
        return
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        seen = list(pool.map(lambda host: _look_at(host.host, context), hosts))
    for one in seen:
        yield from one.findings
    members = [one.member for one in seen if one.member is not None]
    yield from compare(members)
    if members:
        yield fine("hosts", f"{len(members)} of {counted(len(hosts), 'host')} of {path} answered through ssh")


def _for_deepspeed(path: Path, hosts: list[HostSlots], context: Context) -> Iterator[Finding]:
    without = [host.host for host in hosts if host.slots is None]
    if without:
        yield warning(
            "hostfile.slots",
            f"{path}: no slots= for {', '.join(without)}",
            "mpirun takes such a line as one slot, DeepSpeed's launcher refuses it",
            "Write 'host slots=N' with the number of GPUs.",
        )
    if shutil.which("pdsh", path=context.env.get("PATH")) is None:
        yield warning(
            "pdsh.missing",
            "there is no pdsh on the PATH of this host",
            "it is not installed here; deepspeed --hostfile starts the hosts with it",
            "Install pdsh, or start with mpirun -hostfile or torchrun, which do not need it.",
        )


def _look_at(host: str, context: Context) -> _Seen:
    if not addresses_of(host):
        return _Seen([_named(host, _unknown(host))])
    answer = ask(["ssh", *_options(context.env), host, _line(context)], HOST_SECONDS)
    received = time.time()
    refused = _refusal(host, answer, context)
    if refused is not None:
        return _Seen([_named(host, refused)])
    report = json.loads(answer.output[answer.output.index("{") :])
    findings = [_named(host, from_json(value)) for value in report["findings"]]
    return _Seen(findings, Member(None, host, report["facts"], report["ended"] - received, 0.5))


def _options(env: Mapping[str, str]) -> list[str]:
    """Never a question; and what pdsh is told for its ssh."""
    quiet = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", "-o", "LogLevel=ERROR"]
    return [*quiet, *shlex.split(env.get("PDSH_SSH_ARGS_APPEND", ""))]


def _line(context: Context) -> str:
    """What is run on a host: a doctor of its own, with the same Python and the same code, for that host alone."""
    folder, code, python = Path.cwd(), context.root / "ds_recipes/cluster/doctor/run.py", sys.executable
    words = [python, "-P", "-m", "ds_recipes.cluster.doctor.run", "--quick", "--json", "-"]
    if context.run_folder is not None:
        words += ["--run_folder", str(context.run_folder.absolute())]
    tests = [
        f"cd {shlex.quote(str(folder))} 2>/dev/null || exit {NO_FOLDER}",
        f"test -x {shlex.quote(python)} || exit {NO_PYTHON}",
        f"test -f {shlex.quote(str(code))} || exit {NO_CODE}",
    ]
    line = "; ".join([*tests, f"PYTHONPATH={shlex.quote(str(context.root))} exec {shlex.join(words)}"])
    return f"sh -c {shlex.quote(line)}"  # whatever the user's own shell is there


def _refusal(host: str, answer: Answer, context: Context) -> Finding | None:
    missing = {NO_FOLDER: Path.cwd(), NO_PYTHON: Path(sys.executable), NO_CODE: context.root / "ds_recipes"}
    if answer.status in missing:
        return error(
            "host.python" if answer.status == NO_PYTHON else "host.repository",
            f"{host} has no {missing[answer.status]}",
            "the environment or the repository lies on a disk of this host alone",
            "Put it on a file system that all hosts share, or install it at the same path on every host.",
            path=str(missing[answer.status]),
        )
    if answer.status in (0, 2) and "{" in answer.output:
        return None
    if answer.status == 255 or answer.status is None:
        return error("ssh.refused", f"ssh {host}: {answer.reason}", *_why(answer.reason))
    return error(
        "host.doctor",
        f"the doctor does not run on {host} (status {answer.status}): {answer.reason}",
        "Python, or this code, is damaged there, or is of another version",
        f"Try it: ssh {host} {sys.executable} -c 'import ds_recipes'.",
    )


def _why(reason: str) -> tuple[str, str]:
    """Cause and advice for what ssh says."""
    if "Host key" in reason:
        return (
            "its key is not in known_hosts, or has changed",
            "Log in once by hand and accept it (ssh-keyscan for many hosts).",
        )
    if "Permission denied" in reason:
        return (
            "no key of yours is accepted there without a password",
            "Make a key without passphrase (ssh-keygen) and add it to authorized_keys; on ABCI ask for USE_SSH=1.",
        )
    if "refused" in reason:
        return "no sshd listens there at this port", "Start sshd there, or name its port (Port in ~/.ssh/config)."
    return (
        "the host is down, a firewall is in between, or the name leads to another machine",
        "Try 'ssh -v HOST true' until it works without a question; leave the host out meanwhile (--exclude).",
    )


def _unknown(host: str) -> Finding:
    return error(
        "hostfile.unknown_host",
        f"{host} leads to no address on this host",
        "a misspelt name in the hostfile, or one that is neither in /etc/hosts nor known to the name server",
        f"Correct it; 'getent hosts {host}' must answer.",
        host=host,
    )


def _named(host: str, finding: Finding) -> Finding:
    return Finding(**{**finding.__dict__, "ranks": (), "hosts": (host,)})
