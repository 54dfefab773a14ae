"""A training job as a cluster is asked for it: hosts, time, environment, run file. `job_script.render` makes the script."""

import re
from dataclasses import dataclass, field

from ds_recipes.errors import ConfigError

MPIRUN, DEEPSPEED, TORCHRUN, SRUN = "mpirun", "deepspeed", "torchrun", "srun"
LAUNCHERS = (MPIRUN, DEEPSPEED, TORCHRUN, SRUN)


@dataclass(frozen=True)
class Cluster:
    """What is particular to a kind of cluster: the launchers that start ranks there, the usual one first, and defaults."""

    launchers: tuple[str, ...]
    file: str
    """Name of the script in launch/."""

    nodes: int = 1
    gpus_per_node: int = 8
    walltime_seconds: int | None = None
    queue: str | None = None
    group: str | None = None
    modules: tuple[str, ...] = ()
    hostfile: str | None = None

    @property
    def has_scheduler(self) -> bool:
        """False where the script itself is all that waits for the launch and starts the next one."""
        return self.walltime_seconds is not None


CLUSTERS = {
    "abci-pbs": Cluster(
        (MPIRUN, DEEPSPEED, TORCHRUN),
        "abci_pbs.sh",
        nodes=2,
        walltime_seconds=12 * 3600,
        queue="rt_HF",
        group="GROUP",
        modules=("python/3.12/3.12.9", "cuda/12.6/12.6.1", "cudnn/9.5/9.5.1", "nccl/2.23/2.23.4-1", "hpcx/2.20"),
    ),
    "abci-sge": Cluster(
        (MPIRUN, DEEPSPEED, TORCHRUN),
        "abci_sge.sh",
        nodes=2,
        gpus_per_node=4,
        walltime_seconds=12 * 3600,
        queue="rt_F",
        group="GROUP",
        modules=("cuda", "cudnn", "nccl", "hpcx"),
    ),
    "slurm": Cluster((SRUN, DEEPSPEED, TORCHRUN), "slurm.sh", nodes=2, walltime_seconds=12 * 3600),
    "mpirun": Cluster((MPIRUN,), "mpirun.sh"),
    "deepspeed-hostfile": Cluster((DEEPSPEED,), "deepspeed_hostfile.sh", nodes=2, hostfile="hostfile"),
    "torchrun": Cluster((TORCHRUN,), "torchrun.sh"),
}


@dataclass(frozen=True)
class Job:
    """A job of `nodes` hosts with `gpus_per_node` ranks each. Every field is written into the script, quoted for the shell.

    Raises:
        ConfigError: at its making, with every field that makes no sense for the cluster.
    """

    cluster: str
    launcher: str
    nodes: int
    gpus_per_node: int
    name: str = "ds_recipes"
    walltime_seconds: int | None = None
    lead_seconds: int = 300
    """How long before the end of `walltime_seconds` the ranks have saved and are gone."""

    group: str | None = None
    queue: str | None = None
    cpus_per_rank: int = 8
    """Cores for each rank, where the scheduler deals them out (SLURM)."""

    modules: tuple[str, ...] = ()
    activate: str = ".venv/bin/activate"
    exports: tuple[str, ...] = ()
    """Names of variables that ranks on other hosts get too, besides the usual ones (cluster/exports.py)."""

    hostfile: str | None = None
    config: str = "run.yaml"
    run_folder: str = "runs/my_run"
    arguments: tuple[str, ...] = field(default=())
    """Further flags of train.py."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError(problems)

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


def parse_walltime(text: str) -> int:
    """Seconds of `1-00:00:00` (days-hours:minutes:seconds), `12:00:00` or `45:00` (minutes:seconds).

    Raises:
        ConfigError: it is no such time.
    """
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?([0-5]?\d):([0-5]\d)", text)
    if match is None or not re.search(r"[1-9]", text):
        raise ConfigError(
            [
                f"{text!r} is not a time limit. Write hours:minutes:seconds or days-hours:minutes:seconds, such as 12:00:00."
            ]
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def walltime_text(seconds: int) -> str:
    """12:00:00 of 43200, as PBS, Grid Engine and SLURM take it."""
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _problems(job: Job) -> list[str]:
    cluster = CLUSTERS.get(job.cluster)
    if cluster is None:
        return [f"{job.cluster!r} is no cluster. Known: {', '.join(CLUSTERS)}."]
    problems = []
    if job.launcher not in cluster.launchers:
        problems.append(f"{job.cluster} starts ranks with {' or '.join(cluster.launchers)}, not with {job.launcher!r}.")
    if job.cpus_per_rank < 1:
        problems.append(f"{job.cpus_per_rank} cores for a rank are too few: give at least 1.")
    if job.nodes < 1 or job.gpus_per_node < 1:
        problems.append(f"{job.nodes} nodes of {job.gpus_per_node} GPUs are no world: give at least 1 of each.")
    if cluster.has_scheduler and job.walltime_seconds is None:
        problems.append(f"{job.cluster} needs a time limit: --walltime 12:00:00.")
    if job.walltime_seconds is not None and job.walltime_seconds <= job.lead_seconds:
        problems.append(
            f"The time limit of {job.walltime_seconds} s leaves nothing to train in: ranks leave {job.lead_seconds} s before it. "
            "Give more time, or --lead_seconds less."
        )
    if cluster.has_scheduler and job.hostfile is not None:
        problems.append(f"On {job.cluster} the scheduler names the hosts: leave --hostfile out.")
    if not cluster.has_scheduler and job.nodes > 1 and job.hostfile is None:
        problems.append(
            f"{job.nodes} nodes need --hostfile, a file with a line `host slots={job.gpus_per_node}` for each."
        )
    texts = (job.name, job.group, job.queue, job.config, job.run_folder, job.activate, job.hostfile)
    for text in (*texts, *job.modules, *job.exports, *job.arguments):
        if text is not None and re.search(r"[\x00-\x1f\x7f]", text):
            problems.append(f"{text!r} holds a line break or another control character, which no job script can carry.")
    for text in (job.name, job.group, job.queue):
        if text is not None and not re.fullmatch(r"[\w.+-]+", text, re.ASCII):
            problems.append(f"{text!r} cannot stand in a directive: use letters, digits, . _ + -.")
    problems += [
        f"{name!r} is no name of a variable." for name in job.exports if not re.fullmatch(r"[A-Za-z_]\w*", name)
    ]
    return problems
