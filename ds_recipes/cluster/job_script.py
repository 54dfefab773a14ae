"""The job script of a Job: one for every kind of cluster, from the same parts."""

import dataclasses
import shlex
from collections.abc import Callable

from ds_recipes.cluster.job import CLUSTERS, Job, walltime_text
from ds_recipes.cluster.scripts import pbs, plain, sge, slurm

SCRIPTS: dict[str, Callable[[Job, str], str]] = {
    "abci-pbs": pbs.script,
    "abci-sge": sge.script,
    "slurm": slurm.script,
    "mpirun": plain.script,
    "deepspeed-hostfile": plain.script,
    "torchrun": plain.script,
}


def default_job(cluster: str) -> Job:
    """The job whose script lies in launch/."""
    usual = CLUSTERS[cluster]
    return Job(
        cluster=cluster,
        launcher=usual.launchers[0],
        nodes=usual.nodes,
        gpus_per_node=usual.gpus_per_node,
        walltime_seconds=usual.walltime_seconds,
        queue=usual.queue,
        group=usual.group,
        modules=usual.modules,
        hostfile=usual.hostfile,
    )


def render(job: Job) -> str:
    """The whole script, ready to be submitted or edited."""
    return SCRIPTS[job.cluster](job, render_command(job))


def render_command(job: Job) -> str:
    """The command that prints this script: it stands in the script's head."""
    usual = default_job(job.cluster)
    words = ["python", "tools/render_job.py", "--cluster", job.cluster]
    for item in dataclasses.fields(Job):
        value = getattr(job, item.name)
        if item.name == "cluster" or value == getattr(usual, item.name):
            continue
        if item.name == "walltime_seconds":
            words += ["--walltime", walltime_text(value)]
        elif item.name == "arguments":
            words += ["--", *value]
        elif isinstance(value, tuple):
            words += [f"--{item.name}", ",".join(value)]
        else:
            words += [f"--{item.name}", "" if value is None else str(value)]
    return shlex.join(words)
