"""Environments that real launchers gave to their ranks (`environments/`): all ranks agree, whatever scheduler is around."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.errors import WorldError
from ds_recipes.world.resolve import Place, is_speaker, resolve
from ds_recipes.world.sources import MPI_NAMES

FOLDER = Path(__file__).parent / "environments"
RECORDINGS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}

SOURCES = {
    "deepspeed": "the deepspeed launcher",
    "intel_mpi": "MPICH or Intel MPI",
    "mpich": "MPICH or Intel MPI",
    "open_mpi_4": "Open MPI",
    "open_mpi_5": "Open MPI",
    "torchrun": "torchrun",
}

AROUND: dict[str, dict[str, str]] = {
    "alone": {},
    "PBS": {
        "PBS_JOBID": "7123.pbs1",
        "PBS_JOBNAME": "run",
        "PBS_ENVIRONMENT": "PBS_BATCH",
        "PBS_TASKNUM": "1",
        "NCPUS": "192",
    },
    "Grid Engine": {"JOB_ID": "88", "NHOSTS": "1", "NSLOTS": "3", "SGE_TASK_ID": "undefined", "RESTARTED": "0"},
    "sbatch": {
        "SLURM_JOB_ID": "55",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_NTASKS": "3",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_TASKS_PER_NODE": "3",
    },
}
"""Variables of the scheduler's job that the launcher was started in; mpirun passes its own shell's on to local ranks."""


def envs(recording: str, around: str) -> list[dict[str, str]]:
    ranks: list[dict[str, str]] = RECORDINGS[recording]["ranks"]
    return [AROUND[around] | env for env in ranks]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("recording", SOURCES)
def test_ranks_of_one_host_agree(recording: str, around: str) -> None:
    places = [resolve(env) for env in envs(recording, around)]
    assert sorted(place.rank for place in places) == [0, 1, 2]
    assert sorted(place.local_rank for place in places) == [0, 1, 2]
    assert shared(places) == {(3, 3, SOURCES[recording], "127.0.0.1", places[0].port)}
    assert places[0].port is not None
    assert sum(is_speaker(env) for env in envs(recording, around)) == 1


@pytest.mark.parametrize("recording", SOURCES)
def test_use_mpi_and_the_expected_size_hold(recording: str) -> None:
    for env in envs(recording, "alone"):
        assert resolve(env, expected_world_size=3).size == 3
        with pytest.raises(WorldError, match="--expected_world_size is 4"):
            resolve(env, expected_world_size=4)
        if SOURCES[recording] in MPI_NAMES:
            assert resolve(env, use_mpi=True).size == 3
        else:
            with pytest.raises(WorldError, match="--use_mpi asks for ranks from MPI"):
                resolve(env, use_mpi=True)


@pytest.mark.parametrize("recording", SOURCES)
def test_a_leftover_of_another_launcher_is_refused(recording: str) -> None:
    """RANK and WORLD_SIZE of a shell would make every process a world of its own."""
    if recording in ("torchrun", "deepspeed"):
        return
    for env in envs(recording, "alone"):
        with pytest.raises(WorldError, match="Two launchers disagree"):
            resolve(env | {"RANK": "0", "WORLD_SIZE": "1"})


IN_JOBS = {
    "pbs_intel_mpi": ("MPICH or Intel MPI", "127.0.0.1"),
    "pbs_mpich": ("MPICH or Intel MPI", "127.0.0.1"),
    "pbs_open_mpi_4": ("Open MPI", "127.0.0.1"),
    "pbs_open_mpi_5": ("Open MPI", "127.0.0.1"),
    "sge_pe": ("Open MPI", "127.0.0.1"),
    "sge_rt_f": ("Open MPI", None),  # agreed on over MPI
    "slurm_deepspeed": ("SLURM", "node1"),  # the launcher has srun start the ranks
    "slurm_open_mpi_5": ("Open MPI", None),
    "slurm_srun": ("SLURM", "node1"),
    "slurm_srun_gpu_a_task": ("SLURM", "node1"),
    "slurm_srun_pmi2": ("MPICH or Intel MPI", "node1"),
    "slurm_torchrun": ("torchrun", "node1"),
}
"""Recorded in jobs of schedulers; those of SLURM and sge_rt_f on two hosts."""


@pytest.mark.parametrize("recording", IN_JOBS)
def test_ranks_in_a_job_agree(recording: str) -> None:
    places = [resolve(env) for env in envs(recording, "alone")]
    size = len(places)
    assert sorted(place.rank for place in places) == list(range(size))
    here = places[0].local_size
    assert here is not None and [place.local_rank for place in places] == [rank % here for rank in range(size)]
    assert shared(places) == {(size, here, *IN_JOBS[recording], places[0].port)}
    assert sum(is_speaker(env) for env in envs(recording, "alone")) == 1


def test_every_recording_is_used() -> None:
    assert set(RECORDINGS) == set(SOURCES) | set(IN_JOBS)


def test_two_jobs_on_one_host_do_not_meet() -> None:
    """A port follows from the job's id where there is one."""
    for recording in ("pbs_mpich", "pbs_intel_mpi", "sge_pe"):
        env = envs(recording, "alone")[0]
        other = env | {
            name: f"9{value}" for name, value in env.items() if name in ("PBS_JOBID", "JOB_ID", "PMIX_NAMESPACE")
        }
        assert resolve(env).port != resolve(other).port


def shared(places: list[Place]) -> set[tuple[Any, ...]]:
    return {(place.size, place.local_size, place.source, place.address, place.port) for place in places}
