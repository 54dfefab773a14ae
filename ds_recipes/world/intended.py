"""Is this world the one that was meant? A run on one host of several looks like any other, and only takes longer.

DeepSpeed's launcher trains on its own host with a mere warning when its hostfile is missing, `srun` without `-N` and a
plain `python` use a part of their job, an MPI without its scheduler's support stays where it was started. No torch here.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from ds_recipes.errors import WorldError
from ds_recipes.world.allocation import read_allocation
from ds_recipes.world.ancestors import Process, ancestors
from ds_recipes.world.resolve import Place
from ds_recipes.world.sources import DEEPSPEED

LAUNCHER = ("deepspeed", "deepspeed.launcher.runner")
HOSTFILE_FLAGS = ("-H", "--hostfile")  # of deepspeed/launcher/runner.py


def check_intended(place: Place, env: Mapping[str, str], expected_world_size: int | None) -> None:
    """What can be told before the ranks have met.

    Raises:
        WorldError: see `check_all_hosts_used`; DeepSpeed's launcher was given a hostfile that does not exist.
    """
    if place.source == DEEPSPEED:
        _check_hostfile(ancestors())
    if place.local_size == place.size:
        check_all_hosts_used(place.size, 1, env, expected_world_size)


def check_all_hosts_used(
    num_ranks: int, num_hosts: int, env: Mapping[str, str], expected_world_size: int | None
) -> None:
    """Refuse a world on fewer hosts than the scheduler has given to this job, unless its size was asked for.

    Raises:
        WorldError: hosts of the job have no ranks and `expected_world_size` is None; the scheduler's list cannot be read.
    """
    if expected_world_size is not None:
        return
    allocation = read_allocation(env)
    if allocation is None or len(allocation.hosts) <= num_hosts:
        return
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    hosts = "1 host" if num_hosts == 1 else f"{num_hosts} hosts"
    raise WorldError(
        f"This {allocation.scheduler} job has {len(allocation.hosts)} hosts ({allocation.source}: "
        f"{_shortened(allocation.hosts)}), but the world is {ranks} on {hosts}.\n"
        f"Check the launcher's hostfile and its number of processes. If {hosts} is meant, say so: "
        f"--expected_world_size {num_ranks}."
    )


def _check_hostfile(above: Sequence[Process]) -> None:
    """Look at the hostfile that the deepspeed command above this process was given."""
    for process in above:
        if process.name in LAUNCHER and (name := _hostfile_of(process.command)) is not None:
            path = _folder_of(process) / name
            if not path.is_file():
                raise WorldError(
                    f"The hostfile {name} given to deepspeed does not exist ({path}). The launcher only warns of it and trains on "
                    "this host alone.\nGive the right file; for one host leave --hostfile out."
                )


def _hostfile_of(command: Sequence[str]) -> str | None:
    """The value of --hostfile among the launcher's own words, which end at the training script."""
    start = next((place for place, word in enumerate(command) if Path(word).name in LAUNCHER), len(command))
    found = None
    for word, following in pairwise([*command[start:], ""]):
        if word.endswith(".py") and not word.startswith("-"):
            break
        name, equals, value = word.partition("=")
        if name in HOSTFILE_FLAGS:
            found = value if equals else following
    return found


def _folder_of(process: Process) -> Path:
    try:
        return Path(f"/proc/{process.pid}/cwd").readlink()
    except OSError:  # another user's process
        return Path.cwd()


def _shortened(hosts: Sequence[str], shown: int = 4) -> str:
    more = f", and {len(hosts) - shown} more" if len(hosts) > shown else ""
    return ", ".join(hosts[:shown]) + more
