"""The function `launch` of a job script: it starts train.py on all ranks, and is the process that is waited for.

prepare_launch.py has set HOSTFILE, NUM_HOSTS, NUM_RANKS, MASTER_ADDR, MASTER_PORT, LOG_FOLDER, EXPORTED (names of variables) and
TRAIN (train.py and its flags). Every rank's output goes to a file of its own in LOG_FOLDER.
"""

from ds_recipes.cluster.job import DEEPSPEED, MPIRUN, SRUN, TORCHRUN


def launch_function(launcher: str) -> str:
    """The shell function of a launcher."""
    return FUNCTIONS[launcher]


MPIRUN_LAUNCH = r"""
# Open MPI 4 and 5 name and place the files of --output-filename differently, and 5 shows nothing else: each rank redirects itself.
launch() {
    local name exports=()
    for name in "${EXPORTED[@]}"; do
        exports+=(-x "$name")
    done
    # shellcheck disable=SC2016 # expanded by the rank's shell
    exec mpirun -np "$NUM_RANKS" --hostfile "$HOSTFILE" --map-by slot --bind-to none "${exports[@]}" \
        bash -c 'exec "${@:2}" >"$1/rank-$OMPI_COMM_WORLD_RANK.log" 2>&1' rank "$LOG_FOLDER" "$PYTHON" "${TRAIN[@]}"
}
"""

DEEPSPEED_LAUNCH = r"""
# DeepSpeed reads the variables for other hosts from $DS_ENV_FILE. It asks ssh about a single host only to no end.
launch() {
    local options=()
    [ "$NUM_HOSTS" -gt 1 ] || options+=(--no_ssh_check)
    exec deepspeed --hostfile "$HOSTFILE" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
        --enable_each_rank_log "$LOG_FOLDER" "${options[@]}" "${TRAIN[@]}"
}
"""

SRUN_LAUNCH = r"""
launch() {
    exec srun --nodes "$NUM_HOSTS" --ntasks "$NUM_RANKS" --ntasks-per-node "$RANKS_PER_HOST" --kill-on-bad-exit=1 \
        --output "$LOG_FOLDER/rank-%t.log" "$PYTHON" -u "${TRAIN[@]}"
}
"""

TORCHRUN_LAUNCH = r"""
# A torchrun on each host, through ssh; they meet at the first host, which is told so: its name need not be its own name for itself.
launch() {
    local host is_first copies=() copy ended status=0
    local words=("$PYTHON" -m torch.distributed.run --nnodes "$NUM_HOSTS" --nproc_per_node "$RANKS_PER_HOST"
        --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_id "$DS_RECIPES_LAUNCH"
        --log_dir "$LOG_FOLDER" --redirects 3 --tee 3)
    if [ "$NUM_HOSTS" = 1 ] || [ -n "${LAUNCH_ID:-}" ]; then # LAUNCH_ID: a copy of this script is started on each host
        exec "${words[@]}" --rdzv_conf "is_host=$IS_FIRST_HOST" "${TRAIN[@]}"
    fi
    for host in "${HOSTS[@]}"; do
        is_first=0
        [ "$host" != "${HOSTS[0]}" ] || is_first=1
        # shellcheck disable=SC2029 # expanded here, quoted for the other shell
        ssh -o BatchMode=yes "$host" "cd $(printf %q "$PWD") && . $(printf %q "$ENVIRONMENT") &&
            exec $(printf '%q ' "${words[@]}" --rdzv_conf "is_host=$is_first" "${TRAIN[@]}")" </dev/null &
        copies+=($!)
    done
    for copy in "${copies[@]}"; do
        ended=0
        wait "$copy" || ended=$?
        [ "$ended" = 0 ] || status=$ended
    done
    return "$status"
}
"""

FUNCTIONS = {MPIRUN: MPIRUN_LAUNCH, DEEPSPEED: DEEPSPEED_LAUNCH, SRUN: SRUN_LAUNCH, TORCHRUN: TORCHRUN_LAUNCH}
