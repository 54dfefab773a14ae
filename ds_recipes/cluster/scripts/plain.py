"""The scripts without a scheduler: mpirun, DeepSpeed's launcher and torchrun, on this machine or on the hosts of a hostfile."""

import shlex

from ds_recipes.cluster.job import CLUSTERS, TORCHRUN, Job
from ds_recipes.cluster.scripts import parts

EACH_HOST = """\
# Without ssh between the hosts: start this script on each of them, with the same new word as id: LAUNCH_ID=run7 bash ...
LAUNCH_ID="${LAUNCH_ID:-}"
"""


def script(job: Job, command: str) -> str:
    """The whole script."""
    file = CLUSTERS[job.cluster].file
    hosts = "this machine" if job.nodes == 1 and not job.hostfile else "the hosts of a hostfile"
    limits = f"""
# (1) Hosts: how many, and the file that names them, a line `HOST slots=RANKS` for each. Without a file: this machine.
NODES={job.nodes}
HOSTS_FROM={shlex.quote(job.hostfile or "")}
"""
    host_options = ['--num_hosts "$NODES" --hostfile "$HOSTS_FROM"']
    if job.launcher == TORCHRUN:
        limits += EACH_HOST
        host_options.append('--launch_id "$LAUNCH_ID"')
    return "".join(
        [
            parts.head(f"Ranks on {hosts}, started by {job.launcher}. Start it with", f"bash launch/{file}", command),
            limits,
            parts.limits(job),
            parts.environment(job),
            parts.run(job),
            parts.machinery(job, host_options),
            parts.LOOP,
        ]
    )
