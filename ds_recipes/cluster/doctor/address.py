"""Rank 0's address, agreed on through MPI in a process of its own, where the launcher's variables do not tell it."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ds_recipes.cluster.doctor.commands import ask
from ds_recipes.cluster.doctor.findings import Finding, error
from ds_recipes.world.resolve import Place

AGREE_SECONDS = 120.0
"""The process imports torch, as a run's own start does."""


def agreed(place: Place, env: Mapping[str, str], root: Path) -> tuple[Place, Finding | None]:
    """The place with address and port, or with what kept the ranks from agreeing. Every rank must call it."""
    path = ":".join([str(root), *filter(None, [env.get("PYTHONPATH")])])
    words = [sys.executable, "-P", "-m", "ds_recipes.cluster.probes.address"]
    answer = ask(words, AGREE_SECONDS, env={**env, "PYTHONPATH": path})
    if answer.good:
        address, port = json.loads(answer.output.splitlines()[-1])
        return replace(place, address=address, port=port), None
    return place, error(
        "mpi.address",
        f"the ranks are on several hosts, and nothing says where rank 0 is: {answer.reason}",
        "MASTER_ADDR is not set, and mpi4py is missing or was built for another MPI than this mpirun",
        "Set MASTER_ADDR to the first host (mpirun -x MASTER_ADDR=...), or install mpi4py with this MPI's mpicc.",
    )
