"""The script for SLURM: ranks by srun, by DeepSpeed's launcher over srun, or by a torchrun on each node.

Sources: sbatch(1), srun(1), scontrol(1); `SlurmRunner` in launcher/multinode_runner.py of DeepSpeed 0.19. What they leave open
was tried on SLURM 22.05 (tests/clusters/test_slurm.py).
"""

import dataclasses

from ds_recipes.cluster.job import DEEPSPEED, SRUN, TORCHRUN, Job, walltime_text
from ds_recipes.cluster.scripts import parts


def script(job: Job, command: str) -> str:
    """The whole script."""
    what = f"{job.nodes} node{'s' * (job.nodes > 1)} of SLURM, ranks started by {job.launcher}. Submit with"
    as_srun = dataclasses.replace(job, launcher=SRUN)  # its files and its environment are what all launchers here need
    return "".join(
        [
            parts.head(what, "sbatch launch/slurm.sh", command),
            _directives(job),
            parts.limits(job),
            PLACED,
            parts.environment(job),
            parts.run(job),
            RESUBMIT,
            parts.machinery(as_srun, launch=STEPS + LAUNCH[job.launcher]),
            parts.ENDING,
        ]
    )


def _directives(job: Job) -> str:
    assert job.walltime_seconds is not None
    optional = {"account": job.group, "partition": job.queue}
    settings = {
        "job-name": job.name,
        **{name: value or f"{name.upper()}" for name, value in optional.items()},
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus_per_node,
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": job.cpus_per_rank,
        "time": walltime_text(job.walltime_seconds),
        "signal": f"B:USR1@{job.lead_seconds}",
        "requeue": None,
        "open-mode": "append",
    }
    lines = [
        "",
        "# (1) Resources: nodes, GPUs and cores, time; remove a # where the cluster asks for account or partition.",
    ]
    for name, value in settings.items():
        off = "#" if name in optional and not optional[name] else ""
        lines.append(f"{off}#SBATCH --{name}" + ("" if value is None else f"={value}"))
    return "\n".join([*lines, ""])


PLACED = """\
RANKS_PER_HOST="${SLURM_NTASKS_PER_NODE:-$RANKS_PER_HOST}" # flags given to sbatch count more than the directives
"""

RESUBMIT = r"""
if [ -z "${SLURM_JOB_ID:-}" ]; then # srun would ask for a job of its own, and one host would be taken for all
    echo "This is no job of SLURM: submit it with sbatch, or run it within salloc." >&2
    exit 2
fi

resubmit() {
    trap "" TERM # SLURM ends this script as it takes the job back into its queue
    if scontrol requeue "$SLURM_JOB_ID"; then
        echo "$(date '+%F %T') job $SLURM_JOB_ID is queued again, and goes on from its checkpoint in some minutes" >&2
    else
        echo "SLURM refuses to queue job $SLURM_JOB_ID again (--no-requeue, JobRequeue=0, or no batch job)." >&2
        echo "Submit this script again: it goes on from the checkpoint in $RUN." >&2
    fi
}
"""

STEPS = r"""
# An srun that is killed leaves its ranks running, on all nodes: SLURM ends them, after some time to save in. The step has the
# launch's id for a name; others of the job are somebody's at work.
end_step() {
    local signal deadline step
    for signal in TERM KILL; do
        deadline=$((SECONDS + 6))
        while [ "$SECONDS" -lt "$deadline" ]; do
            step="$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format="%i %j" |
                awk -v launch="$DS_RECIPES_LAUNCH" '$2 == launch { print $1 }')"
            [ -n "$step" ] || return 0
            if [ -n "$signal" ]; then
                echo "ranks go on without their launcher (step $step): SIG$signal" >&2
                scancel --signal="$signal" "$step"
                signal=""
            fi
            sleep 0.5
        done
    done
}
"""

LAUNCH = {
    SRUN: r"""
# --mpi=none: ranks meet at MASTER_ADDR, so that a broken PMIx plugin does no harm. srun does not take --cpus-per-task over from
# sbatch (since 22.05), and no variables at all if the job was submitted with --export=NONE.
launch() {
    trap : TERM # SLURM sends it to this shell too; srun hears it as well, and is waited for
    srun --nodes="$NUM_HOSTS" --ntasks="$NUM_RANKS" --ntasks-per-node="$RANKS_PER_HOST" --kill-on-bad-exit=1 --mpi=none \
        --job-name="$DS_RECIPES_LAUNCH" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --export=ALL \
        --output="$LOG_FOLDER/rank-%t.log" "$PYTHON" -u "${TRAIN[@]}"
    local status=$?
    end_step
    return "$status"
}
""",
    DEEPSPEED: r"""
# DeepSpeed's launcher makes one srun of it. It looks for hosts through ssh unless it is told not to, and ends with 0 if
# its srun is killed: judge_launch.py knows better. Its flags have no place for blanks other than in quotes.
launch() {
    trap : TERM # SLURM sends it to this shell too; srun hears it as well, and is waited for
    local options
    printf -v options '%q ' --ntasks-per-node="$RANKS_PER_HOST" --nodes="$NUM_HOSTS" --kill-on-bad-exit=1 --mpi=none \
        --job-name="$DS_RECIPES_LAUNCH" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --output="$LOG_FOLDER/rank-%t.log"
    deepspeed --launcher slurm --hostfile "$HOSTFILE" --no_ssh_check --force_multi --master_addr "$MASTER_ADDR" \
        --master_port "$MASTER_PORT" --launcher_args "$options" "${TRAIN[@]}"
    local status=$?
    end_step
    return "$status"
}
""",
    TORCHRUN: r"""
# A torchrun on each node. They meet at rank 0's host, and hide every status but 0 behind 1: judge_launch.py knows better.
launch() {
    trap : TERM # SLURM sends it to this shell too; srun hears it as well, and is waited for
    srun --nodes="$NUM_HOSTS" --ntasks="$NUM_HOSTS" --ntasks-per-node=1 --kill-on-bad-exit=1 --mpi=none --export=ALL \
        --job-name="$DS_RECIPES_LAUNCH" --cpus-per-task="$((${SLURM_CPUS_PER_TASK:-1} * RANKS_PER_HOST))" \
        --output="$LOG_FOLDER/rank-%t.log" "$PYTHON" -m torch.distributed.run \
        --nnodes "$NUM_HOSTS" --nproc_per_node "$RANKS_PER_HOST" \
        --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_id "$DS_RECIPES_LAUNCH" \
        --log_dir "$LOG_FOLDER" --redirects 3 --tee 3 "${TRAIN[@]}"
    local status=$?
    end_step
    return "$status"
}
""",
}
"""The function `launch` by launcher; it waits for its srun and then ends what that has left."""
