"""What a batch system has given to this job: its hosts, read from the variables and files that it leaves. No torch here.

Sources: sbatch(1) ("Output Environment Variables"), pbs_job(7) of PBS Professional ($PBS_NODEFILE), sge_pe(5)
($PE_HOSTFILE: host, slots, queue and processors a line), and ABCI's SGE_JOB_HOSTLIST (a file with a host a line).
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.errors import WorldError

SLURM, PBS, GRID_ENGINE = "SLURM", "PBS", "Grid Engine"


@dataclass(frozen=True)
class Allocation:
    """A job's hosts in the scheduler's order, each once.

    `slots` says how often the scheduler named each host: cores, tasks or chunks, as the job asked for them. It is no number
    of GPUs.
    """

    scheduler: str
    job_id: str
    hosts: tuple[str, ...]
    slots: tuple[int, ...]
    source: str
    """The variable that the hosts were read from, for messages."""


def read_allocation(env: Mapping[str, str]) -> Allocation | None:
    """The allocation that this process runs in; None outside of a job.

    Raises:
        WorldError: the scheduler's file of hosts is missing, empty or not as documented.
    """
    return _slurm(env) or _pbs(env) or _grid_engine(env)


def expand_hosts(nodelist: str) -> list[str]:
    """The hosts of a SLURM list: `gpu[003-004,9],login1` gives gpu003, gpu004, gpu9 and login1.

    Raises:
        WorldError: it is no such list.
    """
    items = re.findall(r"(?:[^\[,]|\[[^\]]*\])+", nodelist)  # commas within brackets separate numbers
    if ",".join(items) != nodelist:
        raise WorldError(f"{nodelist!r} is no list of hosts as SLURM writes them.")
    return [host for item in items for host in _expand(item)]


def expand_counts(text: str) -> list[int]:
    """The entries of SLURM's list of tasks a node: `2(x3),1` gives 2, 2, 2 and 1."""
    counts: list[int] = []
    for tasks, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(repeat or 1)
    return counts


def _expand(item: str) -> list[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([^\]]*)\](.*)", item)
    if match is None:
        if not re.fullmatch(r"[\w.:-]+", item):
            raise WorldError(f"{item!r} is no host name of a SLURM list.")
        return [item]
    before, ranges, after = match.groups()
    numbers: list[str] = []
    for part in ranges.split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if span is None:
            raise WorldError(f"{part!r} in the SLURM list {item!r} is no number and no range.")
        first, last = span[1], span[2] or span[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [before + number + rest for number in numbers for rest in (_expand(after) if after else [""])]


def _slurm(env: Mapping[str, str]) -> Allocation | None:
    nodelist = env.get("SLURM_JOB_NODELIST")
    if not nodelist or "SLURM_JOB_ID" not in env:
        return None
    hosts = expand_hosts(nodelist)
    tasks = expand_counts(env.get("SLURM_TASKS_PER_NODE", ""))
    slots = tasks if len(tasks) == len(hosts) else [1] * len(hosts)
    return Allocation(SLURM, env["SLURM_JOB_ID"], tuple(hosts), tuple(slots), "SLURM_JOB_NODELIST")


def _pbs(env: Mapping[str, str]) -> Allocation | None:
    if not (env.get("PBS_JOBID") and env.get("PBS_NODEFILE")):
        return None
    counts = Counter(line.split()[0] for line in _lines(env, "PBS_NODEFILE"))
    return Allocation(PBS, env["PBS_JOBID"], tuple(counts), tuple(counts.values()), "PBS_NODEFILE")


def _grid_engine(env: Mapping[str, str]) -> Allocation | None:
    variable = next((name for name in ("SGE_JOB_HOSTLIST", "PE_HOSTFILE") if env.get(name)), None)
    if not env.get("JOB_ID"):
        return None
    if variable is None:  # a job without a parallel environment, or a task that qrsh started on another host of one
        host = env.get("HOSTNAME") if "SGE_TASK_ID" in env else None
        return Allocation(GRID_ENGINE, env["JOB_ID"], (host,), (1,), "HOSTNAME") if host else None
    counts: Counter[str] = Counter()
    for line in _lines(env, variable):
        host, *rest = line.split()
        counts[host] += int(rest[0]) if rest and rest[0].isdigit() else 1
    return Allocation(GRID_ENGINE, env["JOB_ID"], tuple(counts), tuple(counts.values()), variable)


def _lines(env: Mapping[str, str], variable: str) -> list[str]:
    """The lines of the file that a variable names, without blank ones."""
    path = Path(env[variable])
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise WorldError(
            f"{variable}={path} cannot be read: {error.strerror}. It lists the hosts of this job."
        ) from error
    if not lines:
        raise WorldError(f"{variable}={path} names no host.")
    return lines
