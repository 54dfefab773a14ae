"""The run's own settings, if they are given: what train.py would refuse, and what it would look for on the hub."""

from collections.abc import Iterator
from importlib.util import find_spec

from ds_recipes.cluster.doctor.checks import Check, Context
from ds_recipes.cluster.doctor.findings import Finding, counted, error, fine, warning
from ds_recipes.errors import ConfigError


def settings(context: Context) -> Iterator[Finding]:
    """The checks that train.py makes before it imports torch, on this host."""
    if context.config is None:
        return
    from ds_recipes.config.check import check_inputs
    from ds_recipes.config.plan import make_plan

    problems = check_inputs(context.config)
    if context.first_on_host and context.place.rank == 0 and not context.alone:
        try:
            make_plan(context.config, context.place.size)
        except ConfigError as refused:
            problems += refused.problems
    for problem in problems:
        yield error(
            "settings.wrong",
            problem,
            "train.py would refuse this on this host",
            "The message says what to change; a path that is there on one host only is not shared.",
        )
    if not problems:
        yield fine("settings", "the settings and the files that they name are accepted")


def hub(context: Context) -> Iterator[Finding]:
    """Whether the hub is in reach, and whether this run needs it."""
    if find_spec("huggingface_hub") is None:
        return
    from ds_recipes.hub_probe import ensure_hub_reachable_or_offline

    names = _hub_names(context)
    reachable = ensure_hub_reachable_or_offline()
    missing = [] if reachable else [name for name in names if not _in_cache(name)]
    if missing:
        offline = context.env.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        yield error(
            "hub.unreachable",
            f"{', '.join(missing)}: neither a folder here nor in the hub's cache, and the hub cannot be reached",
            "HF_HUB_OFFLINE is set" if offline else "this host has no way out, or needs a proxy (https_proxy)",
            "Fetch it where there is network (hf download NAME) with the same HF_HOME, or name a folder.",
        )
    elif reachable:
        yield fine("hub", "the hub answers")
    else:
        yield fine("hub", "the hub cannot be reached; what the run needs must be folders, or in the cache")


def _hub_names(context: Context) -> list[str]:
    if context.config is None:
        return []
    from ds_recipes.config.model_check import is_folder_name

    model = context.config.model
    return [name for name in (model.model_name, model.tokenizer_name) if name and not is_folder_name(name)]


def _in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "tokenizer_config.json", "tokenizer.json")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def world(context: Context) -> Iterator[Finding]:
    """The number of ranks against the one that is expected."""
    place = context.place
    configured = context.config.run.expected_world_size if context.config is not None else None
    expected = context.expected_world_size or configured
    if expected is not None and expected != place.size:
        yield error(
            "world.size",
            f"{expected} ranks are expected, and there are {place.size} (from {place.source})",
            "the hostfile is missing or short, or the launcher was told another number of processes; "
            "DeepSpeed's launcher runs on this machine alone when its hostfile is missing",
            "Check --hostfile and the number of processes; start this doctor with the very launcher line of the job.",
            expected=expected,
            found=place.size,
        )
    else:
        yield fine("world", f"{counted(place.size, 'rank')}, from {place.source}")


def batch_job(context: Context) -> Iterator[Finding]:
    """A launch that was given one host, or more than the batch system has given."""
    from ds_recipes.world.allocation import read_allocation

    allocation = read_allocation(context.env)
    if allocation is None:
        yield fine("job", "not inside a job of SLURM, PBS or Grid Engine")
        return
    text = f"{allocation.scheduler} job {allocation.job_id}: {counted(len(allocation.hosts), 'host')}"
    if context.alone and len(allocation.hosts) > 1:
        yield warning(
            "job.alone",
            f"{text}, of which this doctor sees one",
            "it was started without a launcher",
            "Start it as the job starts train.py (mpirun, srun, deepspeed): then it looks at every host, and between them.",
        )
    else:
        yield fine("job", text)


CHECKS = (
    Check("world", world, "job"),
    Check("job", batch_job, "job"),
    Check("settings", settings, "host"),
    Check("hub", hub, "host"),
)
