"""What ABCI 3.0 asks of a job besides PBS's own grammar, as docs.abci.ai/v3/en/job-execution states it (January 2026).

How its checks word a refusal is not published; the wording here is the stand-in's own.
"""

from tests.clusters.pbs_bin.grammar import Refused, Request, split_list

HOURS = 3600
DEFAULT_WALLTIME_SECONDS = 1 * HOURS
LONGEST_WALLTIME_SECONDS = 168 * HOURS
LARGEST_NODE_SECONDS = 21504 * HOURS
LARGEST_NODES = {"rt_HF": 128, "rt_HG": 1, "rt_HC": 1}
CORES = {"rt_HF": 192, "rt_HG": 16, "rt_HC": 32}
GPUS = {"rt_HF": 8, "rt_HG": 1, "rt_HC": 0}


def check(request: Request, groups: tuple[str, ...]) -> None:
    """The mandatory options, the group, the resource type and its limits.

    Raises:
        Refused: the job would not be taken.
    """
    queue = request.options.get("q")
    if queue is None:
        raise _refused("-q (the resource type) is missing")
    if queue not in LARGEST_NODES:
        raise Refused("qsub: Unknown queue\n", 15018)
    if "P" not in request.options:
        raise _refused("-P (the ABCI group) is missing")
    if request.options["P"] not in groups:
        raise _refused(f"the account is not in the group {request.options['P']}")
    if "select" not in request.resources:
        raise _refused("-l select (the number of nodes) is missing")
    nodes = len(request.chunks)
    if not 1 <= nodes <= LARGEST_NODES[queue]:
        raise _refused(f"{queue} is given on 1 to {LARGEST_NODES[queue]} nodes, not on {nodes}")
    walltime = walltime_seconds(request)
    if walltime > LONGEST_WALLTIME_SECONDS:
        raise _refused("the walltime exceeds 168:00:00")
    if nodes > 1 and walltime * nodes > LARGEST_NODE_SECONDS:
        raise _refused("walltime x nodes exceeds 21504 node hours")
    for item in split_list(request.options.get("v", "")):
        if item.startswith("USE_SSH=") and item not in ("USE_SSH=0", "USE_SSH=1", "USE_SSH=2"):
            raise _refused("USE_SSH is 0, 1 or 2")


def walltime_seconds(request: Request) -> int:
    """The job's limit; the default is an hour."""
    named = request.walltime_seconds
    return DEFAULT_WALLTIME_SECONDS if named is None else named


def can_ever_run(request: Request) -> bool:
    """False if some chunk wants more GPUs than its node has; PBS would leave the job queued for ever."""
    return all(chunk.get("ngpus", 0) <= GPUS[request.options["q"]] for chunk in request.chunks)


def _refused(why: str) -> Refused:
    return Refused(f"qsub: {why}\n", 1)
