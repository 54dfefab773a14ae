"""Which rank of how many this process is, read from what its launcher put into the environment. No torch here.

Launchers nest. torchrun and DeepSpeed's launcher start the ranks of one host each and are themselves started by
ssh, srun or mpirun, whose variables then count hosts. mpirun starts its helpers with srun inside a SLURM allocation,
so there SLURM's variables count hosts too. Hence the innermost launcher decides: one of a single host, then MPI, then
SLURM. RANK and WORLD_SIZE that no launcher has signed must agree with the others: left over from a shell, they would
make every process a world of its own.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from ds_recipes.errors import WorldError
from ds_recipes.world.allocation import expand_hosts
from ds_recipes.world.sources import (
    DEEPSPEED,
    MPI_NAMES,
    OPEN_MPI,
    TORCHRUN,
    UNSIGNED,
    Source,
    number,
    read_open_mpi,
    read_other_mpi,
    read_slurm,
    read_torch,
)

DEFAULT_PORT = 29500
PORTS = range(20000, 29000)
"""Ports that are derived from a job's id: above the reserved ones, below Linux's ephemeral ones (32768)."""

_LOOPBACK = ("localhost", "127.", "::1")


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks of the run.

    `local_rank` and `local_size` count the ranks of this host; `local_size` is None where the launcher does not say.
    Rank 0 listens at `address`:`port`. An `address` of None is still to be agreed on through mpi4py; with a `port` of
    None rank 0 takes any free one. `hosted` says that the launcher itself serves the store there (torchrun's agent
    does). `source` names the launcher for messages.
    """

    rank: int
    size: int
    local_rank: int = 0
    local_size: int | None = None
    source: str = "a single process"
    address: str | None = "127.0.0.1"
    port: int | None = None
    hosted: bool = False


def resolve(env: Mapping[str, str], use_mpi: bool = False, expected_world_size: int | None = None) -> Place:
    """Read this process's place from its launcher's variables in `env`; without any it is a world of one.

    Raises:
        WorldError: variables are missing, are not numbers, or contradict each other; `use_mpi` is set and the ranks do
            not come from MPI; the world does not have `expected_world_size` ranks.
    """
    chosen = _choose(env)
    if use_mpi and (chosen is None or chosen.name not in MPI_NAMES):
        found = "holds no launcher's variables" if chosen is None else f"holds {chosen} from {chosen.name}"
        raise WorldError(
            "--use_mpi asks for ranks from MPI (OMPI_COMM_WORLD_RANK, PMI_RANK or, under srun, PMIX_RANK), "
            f"but the environment {found}.\n"
            "Start with mpirun or mpiexec, or leave --use_mpi out: other launchers are recognised without a flag."
        )
    place = Place(0, 1, local_size=1) if chosen is None else _place(env, chosen)
    if expected_world_size is not None and place.size != expected_world_size:
        raise WorldError(
            f"--expected_world_size is {expected_world_size}, but the world has {place.size} (from {place.source}).\n"
            "Check the hostfile and the number of processes given to the launcher: "
            "DeepSpeed's launcher trains on this machine alone when its hostfile is missing."
        )
    return place


def is_speaker(env: Mapping[str, str]) -> bool:
    """True on the rank 0 that shows an error met before ranks can talk to each other.

    Never raises: the error may be that `env` contradicts itself. MPI and SLURM number each process that they start,
    whereas an unsigned RANK may be a leftover, so it is looked at last.
    """
    names = ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK"]
    if "TORCHELASTIC_RUN_ID" in env or "CROSS_SIZE" in env:
        names.insert(0, "RANK")
    elif env.get("SLURM_STEP_ID", "").isdigit():
        names.insert(2, "SLURM_PROCID")
    rank = next((env[name] for name in names if name in env), "0")
    return not rank.strip().isdigit() or int(rank) == 0


def _choose(env: Mapping[str, str]) -> Source | None:
    """The innermost launcher's account, after comparing it with those around it."""
    torch, outer = read_torch(env), _choose_outer(env)
    if torch is None:
        return outer
    if outer is None or outer.size == 1:  # a world of one around us is just the shell that we were started from
        return torch
    if torch.name == UNSIGNED:
        _must_agree(torch, outer)
        return outer
    hosts = number(env, "GROUP_WORLD_SIZE" if torch.name == TORCHRUN else "CROSS_SIZE")
    if hosts == 1:
        raise WorldError(
            f"{outer.name} started {outer.size} copies of {torch.name} ({outer}), and each made a world of its own "
            f"({torch.size_variable}={torch.size} on one host).\n"
            + (
                "Give torchrun --nnodes and --rdzv_endpoint, so that the copies join, or start a single one."
                if torch.name == TORCHRUN
                else "Start a single `deepspeed --hostfile ...`: it reaches the other hosts by itself."
            )
        )
    return torch


def _choose_outer(env: Mapping[str, str]) -> Source | None:
    """MPI's or SLURM's account. SLURM's own PMI_* (srun --mpi=pmi2) say the same as its SLURM_*."""
    open_mpi, other_mpi, slurm = read_open_mpi(env), read_other_mpi(env), read_slurm(env)
    if open_mpi and other_mpi and other_mpi.size > 1 and _same_in_slurm(env, other_mpi) is None:
        _must_agree(open_mpi, other_mpi)
    return open_mpi or other_mpi or slurm


def _same_in_slurm(env: Mapping[str, str], source: Source) -> Source | None:
    """SLURM's account where srun itself started this rank, not just a helper of mpirun's."""
    slurm = read_slurm(env) if source.name != OPEN_MPI else None
    return slurm if slurm and (slurm.rank, slurm.size) == (source.rank, source.size) else None


def _must_agree(one: Source, other: Source) -> None:
    if (one.rank, one.size) != (other.rank, other.size):
        raise WorldError(
            f"Two launchers disagree: {one.name} says {one}, {other.name} says {other}.\n"
            f"Unset those of the one that did not start this run (unset {one.rank_variable} {one.size_variable})."
        )


def _place(env: Mapping[str, str], chosen: Source) -> Place:
    local_rank, local_size = _locals(env, chosen)
    address, port = _address(env, chosen, local_size)
    return Place(
        rank=chosen.rank,
        size=chosen.size,
        local_rank=local_rank,
        local_size=local_size,
        source=chosen.name,
        address=address,
        port=port,
        hosted=chosen.name == TORCHRUN and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _locals(env: Mapping[str, str], chosen: Source) -> tuple[int, int | None]:
    """Local rank and size; what MPI under srun leaves out is in SLURM's variables."""
    local_rank, local_size = chosen.local_rank, chosen.local_size
    slurm = _same_in_slurm(env, chosen)
    if slurm is not None:
        local_rank = slurm.local_rank if local_rank is None else local_rank
        local_size = slurm.local_size if local_size is None else local_size
    if chosen.size == 1:
        return local_rank or 0, 1
    if local_rank is None:
        raise WorldError(
            f"{chosen} are set ({chosen.name}), but nothing says which rank of its host this is, "
            "and so which GPU it uses. Set LOCAL_RANK for each process."
        )
    return local_rank, local_size


def _address(env: Mapping[str, str], chosen: Source, local_size: int | None) -> tuple[str | None, int | None]:
    """Where rank 0 listens. Without a variable for it: this host if it has all ranks, else SLURM's first one."""
    several_hosts = local_size != chosen.size
    address: str | None = env.get("MASTER_ADDR") or None
    if address and several_hosts and local_size is not None and address.startswith(_LOOPBACK):
        raise WorldError(
            f"MASTER_ADDR={address} means this host itself, but the {chosen.size} ranks are on several hosts "
            f"({local_size} here). Set it to the name or address of rank 0's host."
        )
    port = number(env, "MASTER_PORT") if env.get("MASTER_PORT") else None
    if chosen.size == 1:
        return address or "127.0.0.1", port if chosen.name in (TORCHRUN, DEEPSPEED) else None
    if address is None and not several_hosts:
        address = "127.0.0.1"
    if address is None and _same_in_slurm(env, chosen) is not None:
        address = next(iter(expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))), None)
    if address is None and chosen.name not in MPI_NAMES:
        raise WorldError(f"{chosen} are set ({chosen.name}), but MASTER_ADDR is not: set it to rank 0's host.")
    if address is None:
        return None, port
    return address, port or _job_port(env)


def _job_port(env: Mapping[str, str]) -> int:
    """The same port on all ranks of a job, most likely another one for another job on the same host.

    Only the first id found counts: schedulers' variables do not reach every host under every mpirun, MPI's own do.
    """
    slurm = f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID')}" if "SLURM_JOB_ID" in env else None
    ids = (env.get("PMIX_NAMESPACE"), slurm, env.get("PBS_JOBID"), env.get("JOB_ID"), env.get("LSB_JOBID"))
    job = next((value for value in ids if value), None)
    return DEFAULT_PORT if job is None else derived_port(job)


def derived_port(job: str) -> int:
    """The port that follows from a job's id alone, the same on every host."""
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]
