"""Places read from recorded environments, and the contradictions that are refused."""

import pytest

from ds_recipes.errors import WorldError
from ds_recipes.world.resolve import DEFAULT_PORT, Place, is_speaker, resolve

Env = dict[str, str]

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "43891",
    "TORCHELASTIC_RUN_ID": "168db2a5",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "2",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "prterun-vm-7498@1",
    "PRTE_LAUNCHED": "1",
}
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_MCA_orte_ess_num_procs": "8",
    "PMIX_RANK": "5",
    "PMIX_NAMESPACE": "3463249921",
}
MPICH = {
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "PMI_FD": "6",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "2",
}
INTEL_MPI = MPICH | {"MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "2", "I_MPI_MPIRUN": "mpirun", "PBS_JOBID": "77.pbs"}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_TASKS_PER_NODE": "2,3",
    "SLURM_STEP_TASKS_PER_NODE": "2,3",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_NODELIST": "gpu[006-009]",
}
SRUN_PMI2 = SRUN | {"PMI_RANK": "2", "PMI_SIZE": "5"}
SBATCH_SHELL = {"SLURM_JOB_ID": "1234", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
SALLOC_SHELL = SBATCH_SHELL | {"SLURM_STEP_ID": "4294967290"}
BY_HAND = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "5000",
}
SRUN_OF_MPIRUN = {  # Open MPI's daemon on the second host was started by srun, so SLURM's variables count hosts
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_STEP_NODELIST": "gpu008",
}
PER_NODE_SRUN = SRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}


def facts(place: Place) -> tuple[int, int, int, int | None, str, str | None]:
    return place.rank, place.size, place.local_rank, place.local_size, place.source, place.address


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, (0, 1, 0, 1, "a single process", "127.0.0.1")),
        (TORCHRUN, (3, 4, 1, 2, "torchrun", "node1")),
        (DEEPSPEED, (1, 2, 1, 2, "the deepspeed launcher", "127.0.0.1")),
        (OPEN_MPI_5, (1, 2, 1, 2, "Open MPI", "127.0.0.1")),
        (OPEN_MPI_4, (5, 8, 1, 4, "Open MPI", None)),
        (OPEN_MPI_4 | {"MASTER_ADDR": "node1"}, (5, 8, 1, 4, "Open MPI", "node1")),
        (MPICH, (2, 4, 0, 2, "MPICH or Intel MPI", None)),
        (INTEL_MPI, (2, 4, 2, 4, "MPICH or Intel MPI", "127.0.0.1")),
        (SRUN, (2, 5, 0, 3, "SLURM", "gpu007")),
        (SRUN | {"MASTER_ADDR": "gpu007-ib"}, (2, 5, 0, 3, "SLURM", "gpu007-ib")),
        (SRUN | {"PMIX_RANK": "2"}, (2, 5, 0, 3, "SLURM with PMIx", "gpu007")),
        (SRUN_PMI2, (2, 5, 0, 3, "MPICH or Intel MPI", "gpu007")),
        (SBATCH_SHELL, (0, 1, 0, 1, "a single process", "127.0.0.1")),
        (SALLOC_SHELL, (0, 1, 0, 1, "a single process", "127.0.0.1")),
        (BY_HAND, (1, 2, 1, None, "RANK and WORLD_SIZE", "node1")),
        # nested launchers that mean it
        (TORCHRUN | PER_NODE_SRUN, (3, 4, 1, 2, "torchrun", "node1")),
        (DEEPSPEED | SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (DEEPSPEED | OPEN_MPI_5 | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (OPEN_MPI_4 | SRUN_OF_MPIRUN, (5, 8, 1, 4, "Open MPI", None)),
        (OPEN_MPI_5 | SBATCH_SHELL, (1, 2, 1, 2, "Open MPI", "127.0.0.1")),
        (OPEN_MPI_5 | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1, 2, "Open MPI", "127.0.0.1")),
        (BY_HAND | SALLOC_SHELL, (1, 2, 1, None, "RANK and WORLD_SIZE", "node1")),
        (OPEN_MPI_5 | {"PMI_RANK": "0", "PMI_SIZE": "1"}, (1, 2, 1, 2, "Open MPI", "127.0.0.1")),
    ],
)
def test_recorded_environments(env: Env, expected: tuple[object, ...] | None) -> None:
    assert facts(resolve(env)) == (expected or (1, 2, 1, 2, "the deepspeed launcher", "127.0.0.1"))


@pytest.mark.parametrize(
    "env, words",
    [
        (OPEN_MPI_5 | {"RANK": "0", "WORLD_SIZE": "1"}, ("RANK=0 and WORLD_SIZE=1", "OMPI_COMM_WORLD_RANK=1")),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, ("RANK=0 and WORLD_SIZE=1", "SLURM_PROCID=2", "unset RANK")),
        (SRUN | {"RANK": "3", "WORLD_SIZE": "5"}, ("RANK=3", "SLURM_PROCID=2")),
        (OPEN_MPI_5 | {"PMI_RANK": "0", "PMI_SIZE": "2"}, ("OMPI_COMM_WORLD_RANK=1", "PMI_RANK=0")),
        (TORCHRUN | SRUN | {"GROUP_WORLD_SIZE": "1"}, ("SLURM_PROCID=2 and SLURM_STEP_NUM_TASKS=5", "--nnodes")),
        (DEEPSPEED | OPEN_MPI_5, ("Open MPI started 2 copies of the deepspeed launcher", "--hostfile")),
        ({"RANK": "0"}, ("RANK=0 is set, but WORLD_SIZE is not",)),
        ({"WORLD_SIZE": "4"}, ("WORLD_SIZE=4 is set, but RANK is not",)),
        (BY_HAND | {"RANK": "2"}, ("RANK=2 and WORLD_SIZE=2", "from 0 to 1")),
        (BY_HAND | {"RANK": "one"}, ("RANK='one' is not a whole number",)),
        (BY_HAND | {"WORLD_SIZE": "-2"}, ("WORLD_SIZE='-2'",)),
        (BY_HAND | {"MASTER_PORT": "http"}, ("MASTER_PORT='http'",)),
        ({k: v for k, v in BY_HAND.items() if k != "LOCAL_RANK"}, ("LOCAL_RANK",)),
        ({k: v for k, v in BY_HAND.items() if k != "MASTER_ADDR"}, ("MASTER_ADDR",)),
        ({k: v for k, v in MPICH.items() if k != "MPI_LOCALRANKID"}, ("PMI_RANK=2", "LOCAL_RANK")),
        (OPEN_MPI_4 | {"MASTER_ADDR": "localhost"}, ("MASTER_ADDR=localhost", "several hosts")),
        (TORCHRUN | {"MASTER_ADDR": "127.0.0.1"}, ("MASTER_ADDR=127.0.0.1", "several hosts")),
    ],
)
def test_contradictions_name_the_variables_and_their_values(env: Env, words: tuple[str, ...]) -> None:
    with pytest.raises(WorldError) as caught:
        resolve(env)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("env", [OPEN_MPI_4, OPEN_MPI_5, MPICH, INTEL_MPI, SRUN_PMI2, SRUN | {"PMIX_RANK": "2"}])
def test_use_mpi_accepts_every_mpi(env: Env) -> None:
    assert resolve(env, use_mpi=True).size > 1


@pytest.mark.parametrize("env, found", [({}, "no launcher's"), (TORCHRUN, "RANK=3"), (SRUN, "SLURM_PROCID=2")])
def test_use_mpi_refuses_other_launchers(env: Env, found: str) -> None:
    with pytest.raises(WorldError, match=r"--use_mpi asks for ranks from MPI") as caught:
        resolve(env, use_mpi=True)
    assert found in str(caught.value)


def test_the_expected_world_size_is_held() -> None:
    assert resolve(DEEPSPEED, expected_world_size=2).size == 2
    with pytest.raises(WorldError, match=r"--expected_world_size is 16, but the world has 2 .*deepspeed") as caught:
        resolve(DEEPSPEED, expected_world_size=16)
    assert "hostfile is missing" in str(caught.value)
    with pytest.raises(WorldError, match="but the world has 1 "):
        resolve({}, expected_world_size=2)


def test_torchruns_agent_serves_the_store() -> None:
    place = resolve(TORCHRUN)
    assert (place.hosted, place.port) == (True, 43891)
    assert not resolve(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).hosted
    assert not resolve(DEEPSPEED).hosted


def test_ports_differ_between_jobs_and_agree_within_one() -> None:
    def port(env: Env) -> int | None:
        return resolve(env).port

    assert port(OPEN_MPI_5) == port(OPEN_MPI_5 | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    assert port(OPEN_MPI_5) == port(OPEN_MPI_5 | {"PBS_JOBID": "77.pbs"})  # which may reach only the first host
    assert port(OPEN_MPI_5) != port(OPEN_MPI_5 | {"PMIX_NAMESPACE": "prterun-vm-7499@1"})
    assert port(SRUN) != port(SRUN | {"SLURM_STEP_ID": "1"})
    assert port(OPEN_MPI_5 | {"MASTER_PORT": "1234"}) == 1234
    lonely = MPICH | {"MPI_LOCALNRANKS": "4"}
    assert port(lonely) == DEFAULT_PORT
    assert port({}) is None and port({"MASTER_PORT": "1234"}) is None  # a world of one takes any free port


@pytest.mark.parametrize(
    "env, speaks",
    [
        ({}, True),
        (TORCHRUN, False),
        (TORCHRUN | {"RANK": "0"}, True),
        (TORCHRUN | PER_NODE_SRUN | {"RANK": "0"}, True),
        (DEEPSPEED | OPEN_MPI_5 | {"RANK": "0"}, True),
        (OPEN_MPI_5, False),
        (OPEN_MPI_5 | {"RANK": "0"}, False),  # a leftover: mpirun's own number decides
        (OPEN_MPI_5 | {"OMPI_COMM_WORLD_RANK": "0", "RANK": "1"}, True),
        (SRUN, False),
        (SRUN | {"SLURM_PROCID": "0"}, True),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, False),
        (SBATCH_SHELL | BY_HAND, False),
        ({"RANK": "garbage"}, True),
    ],
)
def test_one_rank_speaks_before_ranks_can_talk(env: Env, speaks: bool) -> None:
    assert is_speaker(env) is speaks


def test_resolving_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, ds_recipes.world.failure; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("expected", [1, 3, 5, 8])
def test_fewer_and_more_ranks_than_are_expected_are_refused(expected: int) -> None:
    env = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1"}
    with pytest.raises(WorldError, match=f"--expected_world_size is {expected}, but the world has 4"):
        resolve(env, expected_world_size=expected)
    assert resolve(env, expected_world_size=4).size == 4
