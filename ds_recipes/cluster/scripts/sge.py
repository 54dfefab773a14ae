"""The script for Grid Engine as ABCI ran it until 2024: whole nodes of a type (rt_F, rt_AF), hosts in SGE_JOB_HOSTLIST.

Sources: qsub(1), queue_conf(5) and sge_pe(5) of Grid Engine 8.1.9. What it does was measured (docs/clusters/sge.md).
"""

from ds_recipes.cluster.job import Job, walltime_text
from ds_recipes.cluster.scripts import parts


def script(job: Job, command: str) -> str:
    """The whole script."""
    assert job.walltime_seconds is not None
    directives = f"""
# (1) Resources: nodes of a type (rt_F has 4 GPUs, rt_AF 8), time. The group stands on the qsub line.
#$ -N {job.name}
#$ -l {job.queue}={job.nodes}
#$ -l h_rt={walltime_text(job.walltime_seconds)}
#$ -notify
#$ -j y
#$ -o logs/
#$ -cwd
"""
    group = f"-g {job.group} " if job.group else ""
    return "".join(
        [
            parts.head(
                f"{job.nodes} nodes of a Grid Engine such as ABCI's, ranks started by {job.launcher}. Submit with",
                f"mkdir -p logs && qsub {group}launch/abci_sge.sh",
                command,
            ),
            directives,
            ELSEWHERE,
            parts.limits(job),
            parts.environment(job),
            REACHING_HOSTS,
            parts.run(job),
            RESUBMISSION,
            parts.machinery(job, ['--num_hosts "$GRANTED_HOSTS"']),
            parts.ENDING,
        ]
    )


ELSEWHERE = """\
# On another Grid Engine ask for hosts as its site does it: `-pe NAME SLOTS` instead of rt_F, perhaps `-q QUEUE`; qsub without -g.
"""

REACHING_HOSTS = """\
# mpirun starts ranks on other hosts through ssh. Where only Grid Engine may do that (Open MPI 5 and 4):
#     export PRTE_MCA_plm_ssh_agent="qrsh -inherit" OMPI_MCA_plm_rsh_agent="qrsh -inherit"
"""

RESUBMISSION = """
if ! GRANTED_HOSTS="$(printenv NHOSTS)"; then # those of the job, to which the list of hosts is held
    echo "This is no job of Grid Engine: submit this script with qsub." >&2
    exit 2
fi

# Status 99 makes Grid Engine queue the job again, under the same number and with its full time limit.
resubmit() {
    exit 99
}
"""
