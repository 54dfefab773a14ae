"""The variables of each launcher, read as it documents them. No torch here.

Sources: torchrun's documentation ("Environment Variables"), `deepspeed/launcher/launch.py`, Open MPI's mpirun(1)
("Environmental Variables"), MPICH's Hydra and Intel MPI (PMI_*, MPI_LOCALRANKID), srun(1) ("Output Environment
Variables").
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ds_recipes.errors import WorldError
from ds_recipes.world.allocation import expand_counts

TORCHRUN, DEEPSPEED, UNSIGNED = "torchrun", "the deepspeed launcher", "RANK and WORLD_SIZE"
OPEN_MPI, OTHER_MPI, SLURM_MPI, SLURM = "Open MPI", "MPICH or Intel MPI", "SLURM with PMIx", "SLURM"
MPI_NAMES = (OPEN_MPI, OTHER_MPI, SLURM_MPI)

_SLURM_OWN_STEPS = 0xFFFFFFF0
"""Step ids from here on are SLURM's own (batch script, interactive shell): no ranks were started there."""


@dataclass(frozen=True)
class Source:
    """One launcher's account of this process, and the variables that it stands in."""

    name: str
    rank_variable: str
    size_variable: str
    rank: int
    size: int
    local_rank: int | None = None
    local_size: int | None = None

    def __str__(self) -> str:
        return f"{self.rank_variable}={self.rank} and {self.size_variable}={self.size}"


def read_torch(env: Mapping[str, str]) -> Source | None:
    """RANK and WORLD_SIZE: signed by torchrun or DeepSpeed's launcher (which leaves CROSS_SIZE), or by nobody."""
    if not ("RANK" in env or "WORLD_SIZE" in env):
        return None
    name = TORCHRUN if "TORCHELASTIC_RUN_ID" in env else DEEPSPEED if "CROSS_SIZE" in env else UNSIGNED
    return _source(env, name, "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))


def read_open_mpi(env: Mapping[str, str]) -> Source | None:
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    prefix = "OMPI_COMM_WORLD_"
    return _source(env, OPEN_MPI, prefix + "RANK", prefix + "SIZE", prefix + "LOCAL_RANK", (prefix + "LOCAL_SIZE",))


def read_other_mpi(env: Mapping[str, str]) -> Source | None:
    """MPICH, Intel MPI and their relatives; srun with --mpi=pmi2 sets the same names and SLURM's local ones."""
    if "PMI_RANK" not in env:
        return None
    local = next((name for name in ("MPI_LOCALRANKID", "PMI_LOCAL_RANK") if name in env), "LOCAL_RANK")
    return _source(env, OTHER_MPI, "PMI_RANK", "PMI_SIZE", local, ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"))


def read_slurm(env: Mapping[str, str]) -> Source | None:
    """A task of an srun step. A shell of sbatch or salloc has a SLURM_PROCID too, but is no rank."""
    step = env.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in env or not step.isdigit() or int(step) >= _SLURM_OWN_STEPS:
        return None
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    name = SLURM_MPI if "PMIX_RANK" in env else SLURM
    source = _source(env, name, "SLURM_PROCID", size, "SLURM_LOCALID", ())
    return replace(source, local_size=_tasks_on_this_node(env))


def number(env: Mapping[str, str], name: str) -> int:
    """The whole number in variable `name`.

    Raises:
        WorldError: it is missing, or not a whole number.
    """
    text = env.get(name, "").strip()
    if not text.isdigit():
        raise WorldError(f"{name}={env[name]!r} is not a whole number." if name in env else f"{name} is not set.")
    return int(text)


def _source(
    env: Mapping[str, str], name: str, rank: str, size: str, local_rank: str, local_sizes: tuple[str, ...]
) -> Source:
    for present, missing in ((rank, size), (size, rank)):
        if missing not in env:
            raise WorldError(f"{present}={env[present]} is set, but {missing} is not. Set both or neither.")
    source = Source(
        name,
        rank,
        size,
        number(env, rank),
        number(env, size),
        number(env, local_rank) if local_rank in env else None,
        next((number(env, variable) for variable in local_sizes if variable in env), None),
    )
    if source.rank >= source.size:
        raise WorldError(f"{source} contradict each other: ranks count from 0 to {source.size - 1}.")
    return source


def _tasks_on_this_node(env: Mapping[str, str]) -> int | None:
    """This node's entry in SLURM's list of tasks a node."""
    counts = expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", ""))
    node = env.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None
