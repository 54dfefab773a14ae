"""What differs between ranks although it should not: packages, code, Python, variables, clocks, hosts."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_recipes.cluster.doctor.facts import code_hash
from ds_recipes.cluster.doctor.findings import Finding, counted, error, fine, warning
from ds_recipes.world.allocation import Allocation
from ds_recipes.world.channel import name_ranks

SHOWN = 6
MATTER = (
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "datasets",
    "pyarrow",
    "accelerate",
    "peft",
    "triton",
    "flash-attn",
    "liger-kernel",
    "mpi4py",
    "ds-recipes",
    "huggingface-hub",
)
"""Another version of these on one rank is an error; of any other package a warning."""

SKEW_WARNING_SECONDS = 1.0
SKEW_ERROR_SECONDS = 60.0


@dataclass(frozen=True)
class Member:
    """One rank as the comparison sees it, or a host of a hostfile (`rank` is None). `clock_seconds` is how far its clock is
    ahead of rank 0's."""

    rank: int | None
    host: str
    facts: Mapping[str, Any]
    clock_seconds: float = 0.0
    clock_error_seconds: float = 0.0


def compare(members: Sequence[Member]) -> list[Finding]:
    """Findings about the job as a whole; each names the ranks and hosts that stand apart."""
    if len(members) < 2:
        return []
    return [*_packages(members), *_code(members), *_python(members), *_variables(members), *clocks(members)]


def _packages(members: Sequence[Member]) -> Iterator[Finding]:
    names = sorted({name for member in members for name in member.facts["packages"]})
    differing = False
    for name in names:
        groups = _groups(members, lambda member, name=name: member.facts["packages"].get(name, "missing"))
        if len(groups) == 1:
            continue
        differing = True
        make = error if name in MATTER else warning
        yield make(
            "ranks.package",
            f"{name} is not the same on all ranks: {_told(groups)}",
            "another environment is active on some hosts, or one was changed while it was copied",
            "Activate the same environment on every host (in the job script, before the launcher), or install it again there.",
            package=name,
            versions={
                value: [member.rank if member.rank is not None else member.host for member in group]
                for value, group in groups.items()
            },
        )
    if not differing:
        yield fine("ranks.packages", f"the same {len(names)} packages on all {_these(members)}")


def _code(members: Sequence[Member]) -> Iterator[Finding]:
    groups = _groups(members, lambda member: code_hash(member.facts["code"]))
    if len(groups) == 1:
        yield fine("ranks.code", f"the same code on all {_these(members)} (hash {next(iter(groups))})")
        return
    codes = [group[0].facts["code"] for group in groups.values()]
    files = sorted({name for code in codes for name in code if len({other.get(name) for other in codes}) > 1})
    files = files or sorted(set().union(*codes))
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    folders = ", ".join(sorted({str(group[0].facts["root"]) for group in groups.values()}))
    yield error(
        "ranks.code",
        f"the code is not the same on all ranks: {_told(groups)}; it differs in {', '.join(files[:SHOWN])}{more}",
        f"a repository of its own on some hosts ({folders}), of another state",
        "Use one repository on a file system that all hosts share, or bring them to the same commit.",
        files=files,
    )


def _python(members: Sequence[Member]) -> Iterator[Finding]:
    groups = _groups(members, lambda member: member.facts["python"])
    if len(groups) > 1:
        versions = {value.split()[0] for value in groups}
        make = error if len(versions) > 1 else warning
        yield make(
            "ranks.python",
            f"not the same Python on all ranks: {_told(groups)}",
            "the environment is not active on some hosts, so that another Python comes first on their PATH",
            "Give the launcher the full path of Python, or pass PATH on (mpirun -x PATH).",
        )


def _variables(members: Sequence[Member]) -> Iterator[Finding]:
    names = sorted({name for member in members for name in member.facts["variables"]})
    differing = False
    for name in names:
        groups = _groups(members, lambda member, name=name: member.facts["variables"].get(name, "(not set)"))
        if len(groups) == 1:
            continue
        differing = True
        yield warning(
            "ranks.variable",
            f"{name} is not the same on all ranks: {_told(groups)}",
            "the launcher does not pass it on to all hosts, or a host's shell start-up files set it",
            f"Pass it on: mpirun -x {name}, srun --export=ALL, or a line in .deepspeed_env; or unset it everywhere.",
            variable=name,
        )
    if not differing:
        yield fine(
            "ranks.variables",
            f"{len(names)} variables of NCCL, gloo, CUDA and the libraries are the same on all {_these(members)}",
        )


def clocks(members: Sequence[Member]) -> Iterator[Finding]:
    """How far the hosts' clocks are from rank 0's."""
    hosts = {member.host: member for member in reversed(members)}
    if len(hosts) < 2:
        return
    apart = max(hosts.values(), key=lambda member: abs(member.clock_seconds))
    for member in hosts.values():
        skew = abs(member.clock_seconds)
        if skew > SKEW_WARNING_SECONDS:
            make = error if skew > SKEW_ERROR_SECONDS else warning
            side = "ahead of" if member.clock_seconds > 0 else "behind"
            yield make(
                "clock.skew",
                f"the clock of {member.host} is {skew:.1f} s {side} that of rank 0's host",
                "its time service (chrony, ntpd) does not run, or has no server in reach",
                "Start it (chronyc tracking). Times in logs and of files cannot be compared meanwhile; certificates may fail.",
                skew_seconds=member.clock_seconds,
            )
    if abs(apart.clock_seconds) <= SKEW_WARNING_SECONDS:
        bound = max(member.clock_error_seconds for member in hosts.values())
        yield fine(
            "clock", f"clocks agree to {abs(apart.clock_seconds) * 1000:.1f} ms (measured to {bound * 1000:.1f} ms)"
        )


def hosts_used(members: Sequence[Member], allocation: Allocation | None, source: str) -> list[Finding]:
    """Hosts that the batch system has given to the job, and no rank runs on."""
    if allocation is None:
        return []
    used = {_short(member.host) for member in members}
    idle = [host for host in allocation.hosts if _short(host) not in used]
    if not idle:
        return [fine("job.hosts_used", f"ranks run on the job's {counted(len(allocation.hosts), 'host')}")]
    return [
        error(
            "job.hosts_idle",
            f"the job has {len(allocation.hosts)} hosts ({allocation.source}), and no rank runs on {', '.join(idle[:SHOWN])}",
            f"{source} was not told of them: a hostfile that is missing or short makes it run on this host alone",
            "Give the launcher the job's hosts (the scripts in launch/ do), and --expected_world_size to train.py.",
            idle=idle,
        )
    ]


def _short(host: str) -> str:
    return host.split(".")[0].lower()


def _these(members: Sequence[Member]) -> str:
    return counted(len(members), "host" if members[0].rank is None else "rank")


def _groups(members: Sequence[Member], value_of: Any) -> dict[str, list[Member]]:
    """Members by value, the most common value first."""
    values = [value_of(member) for member in members]
    return {
        value: [member for member, own in zip(members, values, strict=True) if own == value]
        for value, _ in Counter(values).most_common()
    }


def _told(groups: Mapping[str, Sequence[Member]]) -> str:
    """Which value stands where; the small groups with their ranks and hosts."""
    parts = []
    for value, group in list(groups.items())[:SHOWN]:
        hosts = list(dict.fromkeys(member.host for member in group))
        on = f" on {', '.join(hosts[:3])}{' ...' if len(hosts) > 3 else ''}"
        ranks = [member.rank for member in group if member.rank is not None]
        parts.append(f"{value} ({(name_ranks(ranks) + on if ranks else on.strip())})")
    return "; ".join(parts)
