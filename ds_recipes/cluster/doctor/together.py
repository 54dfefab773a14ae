"""The doctors of all ranks: rank 0 in the chair collects, compares and decides, the others answer."""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ds_recipes.cluster.doctor import shared_folder
from ds_recipes.cluster.doctor.address import agreed
from ds_recipes.cluster.doctor.checks import ALL_SECONDS, Context
from ds_recipes.cluster.doctor.compare import Member, compare, hosts_used
from ds_recipes.cluster.doctor.findings import ERROR, Finding, counted, error, from_json, merge, warning
from ds_recipes.cluster.doctor.meeting import JOIN_SECONDS, Chair, Guest, MeetingLost
from ds_recipes.cluster.doctor.probe import PHASE_SECONDS, run_probe
from ds_recipes.cluster.doctor.probe_findings import probe_findings
from ds_recipes.errors import WorldError
from ds_recipes.world.allocation import read_allocation
from ds_recipes.world.channel import name_ranks

BLOCKING = (
    "interface.missing",
    "interface.loopback",
    "interface.down",
    "master.address",
    "name.loopback",
    "name.unknown",
    "port.in_use",
    "ranks.silent",
    "shm.missing",
    "limits.open_files",
    "gpu.too_few",
    "world.unclear",
)
"""Errors with which the ranks cannot meet: a trial would only wait for its time limit."""

NEEDED = (
    "torch",
    "deepspeed",
    "transformers",
    "numpy",
    "safetensors",
    "huggingface-hub",
    "xxhash",
    "hjson",
    "pyyaml",
    "packaging",
)
"""Packages without which the probes cannot start."""

T = TypeVar("T")


@dataclass
class Own:
    """What this rank has found."""

    context: Context
    findings: list[Finding]
    facts: Mapping[str, Any]

    def to_json(self, clock: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
        """As it is told to rank 0."""
        return {
            "host": self.context.host,
            "first": self.context.first_on_host,
            "findings": [finding.to_json() for finding in self.findings],
            "facts": dict(self.facts),
            "clock": list(clock),
        }


Examine = Callable[[Own], None]
Finish = Callable[[Sequence[Finding], Sequence[str]], int]


def in_chair(own: Own, examine: Examine, finish: Finish, quick: bool) -> int:
    """Rank 0: returns the exit status, and has told it to the others."""
    _agree(own)
    place = own.context.place
    try:
        chair = Chair(place, _job(own.context))
    except MeetingLost as problem:
        own.findings.append(
            error(
                "doctor.port",
                f"the doctors cannot meet: {problem}",
                "ports of other jobs",
                "Set MASTER_PORT to another number.",
            )
        )
        own.context = replace(own.context, place=replace(place, size=1))
        chair = Chair(own.context.place, "")
    examine(own)
    reports = chair.collect(own.to_json(), ALL_SECONDS + JOIN_SECONDS)
    hosts = [reports[rank]["host"] if rank in reports else "?" for rank in range(place.size)]
    findings = merge(finding for rank, report in reports.items() for finding in _of(report, rank))
    findings += _silent(place.size, reports, reports, own.context)
    findings += _compared(own.context, reports)
    findings += _shared(own.context, chair, reports, hosts)
    blocking = _blocking(findings)
    try_out = not quick and not blocking
    chair.tell({"probe": try_out})
    if try_out:
        _say(
            f"doctor: looked at {counted(len(hosts), 'rank')}; now a trial run with torch, which takes a minute where it is new"
        )
        mine = run_probe(own.context.env, own.context.root).to_json()
        results = chair.collect(mine, sum(PHASE_SECONDS.values()))
        findings += _silent(place.size, results, reports, own.context)
        findings += merge(probe_findings(results, hosts, _num_gpus(findings), _link(findings, hosts)))
    elif blocking:
        findings.append(
            warning(
                "probe.skipped",
                "bandwidth and the ZeRO-3 step were not tried",
                f"they cannot work with: {', '.join(blocking)}",
                "Mend these errors, then run the doctor again.",
            )
        )
    status = finish(findings, hosts)
    chair.tell({"status": status})
    return status


def as_guest(own: Own, examine: Examine, finish: Finish, quick: bool) -> int:
    """Any other rank: returns the exit status that rank 0 tells."""
    _agree(own)
    place = own.context.place
    try:
        if place.address is None:
            raise MeetingLost("nothing says where rank 0 is")
        guest = Guest(place, _job(own.context))
        examine(own)
        guest.collect(own.to_json((guest.clock_seconds, guest.clock_error_seconds)), 0)
        path = guest.tell(None)["shared"]
        if path is not None:
            if own.context.first_on_host:
                empty = {"seconds": None, "problem": "it hangs"}
                said = _within(2 * shared_folder.LOOK_SECONDS, lambda: shared_folder.answer(path, place.rank), empty)
                guest.collect(said, 0)
            else:
                guest.collect(None, 0)
        if guest.tell(None)["probe"]:
            guest.collect(run_probe(own.context.env, own.context.root).to_json(), 0)
        return int(guest.tell(None)["status"])
    except MeetingLost as problem:
        return _without_rank_zero(own, examine, finish, problem)


def _without_rank_zero(own: Own, examine: Examine, finish: Finish, problem: MeetingLost) -> int:
    """Rank 0 does not hear of it, so one rank of this host tells what it has found."""
    if not own.context.first_on_host:
        return 2
    if not own.findings:
        examine(own)
    place = own.context.place
    lost = error(
        "ranks.lost",
        f"rank {place.rank} cannot reach rank 0's doctor at {place.address}: {problem}",
        "rank 0 has ended or never started, MASTER_ADDR is another host's, or a firewall is in between",
        "Look at rank 0's output, at the findings on names and interfaces, and at the firewall (ports 20000 to 29000).",
    )
    print(f"--- from {own.context.host}, rank {place.rank}:", file=sys.stderr, flush=True)
    return finish([*own.findings, lost], [own.context.host])


def _agree(own: Own) -> None:
    """Find rank 0's address through MPI, where no variable tells it; later processes get it as MASTER_ADDR."""
    context = own.context
    if context.place.address is not None:
        return
    place, problem = agreed(context.place, context.env, context.root)
    if problem is not None:
        own.findings.append(problem)
        if place.rank == 0:
            place = replace(place, size=1)
    env = (
        {**context.env, "MASTER_ADDR": str(place.address), "MASTER_PORT": str(place.port)}
        if problem is None
        else context.env
    )
    own.context = replace(context, place=place, env=env)


def _job(context: Context) -> str:
    return context.env.get("DS_RECIPES_LAUNCH", "")


def _of(report: Mapping[str, Any], rank: int) -> list[Finding]:
    """A rank's findings with its name; a finding that names hosts already keeps them."""
    found = map(from_json, report["findings"])
    return [finding if finding.hosts else finding.found_by(rank, report["host"]) for finding in found]


def _silent(size: int, answered: Mapping[int, Any], reports: Mapping[int, Any], context: Context) -> list[Finding]:
    """Ranks that have not `answered`; `reports` say where the others are."""
    missing = [rank for rank in range(size) if rank not in answered]
    if not missing:
        return []
    where = ", ".join(sorted({report["host"] for report in reports.values()}))
    return [
        error(
            "ranks.silent",
            f"{name_ranks(missing)} did not report; those who did are on {where}",
            f"their host was not started, cannot reach {context.place.address}, or has no such Python or repository",
            "Look for their own messages in the launcher's output; try ssh to that host, and 'doctor.py --hostfile'.",
            missing=missing,
        )
    ]


def _compared(context: Context, reports: Mapping[int, Any]) -> list[Finding]:
    members = [
        Member(rank, report["host"], report["facts"], *map(float, report["clock"])) for rank, report in reports.items()
    ]
    try:
        allocation = read_allocation(context.env)
    except WorldError:
        allocation = None  # `network.other_names` tells of it
    return [*compare(members), *(hosts_used(members, allocation, context.place.source) if not context.alone else [])]


def _shared(context: Context, chair: Chair, reports: Mapping[int, Any], hosts: Sequence[str]) -> list[Finding]:
    """Whether the run folder is the same on all hosts, which takes two of them."""
    several = len(set(hosts)) > 1 and context.run_folder is not None
    path = None
    if several:
        assert context.run_folder is not None
        path = _within(shared_folder.LOOK_SECONDS, lambda: shared_folder.begin(context.run_folder), None)  # type: ignore[arg-type]
    chair.tell({"shared": path})
    if path is None:
        return []
    said = chair.collect(None, 3 * shared_folder.LOOK_SECONDS)
    answers = {rank: value for rank, value in said.items() if value is not None and hosts[rank] != hosts[0]}
    by_rank = dict(enumerate(hosts))
    return _within(4 * shared_folder.LOOK_SECONDS, lambda: shared_folder.verdict(path, answers, by_rank), [])


def _blocking(findings: Sequence[Finding]) -> list[str]:
    names = [
        finding.name
        for finding in findings
        if finding.level == ERROR
        and (finding.name in BLOCKING or (finding.name == "package.missing" and finding.data.get("package") in NEEDED))
    ]
    return list(dict.fromkeys(names))


def _num_gpus(findings: Sequence[Finding]) -> dict[str, int]:
    return {host: int(one.data["count"]) for one in findings if one.name == "gpu" for host in one.hosts}


def _link(findings: Sequence[Finding], hosts: Sequence[str]) -> tuple[str, float] | None:
    """The kind of link that the largest all-reduce has to cross, and its rate; None on CPUs, or where it is not known."""
    if not _num_gpus(findings):
        return None
    name = "links.infiniband" if len(set(hosts)) > 1 else "gpu.links"
    known = [
        (str(one.data["kind"]), float(one.data["rated_gb_per_second"]))
        for one in findings
        if one.name == name and one.data["rated_gb_per_second"]
    ]
    return min(known, key=lambda one: one[1], default=None)


def _say(line: str) -> None:
    """Tell a user who waits at a terminal how far it is."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def _within(seconds: float, work: Callable[[], T], otherwise: T) -> T:
    """What `work` returns, or `otherwise` if it takes too long: a file server that is down must not hold the doctor."""
    result: list[T] = []
    thread = threading.Thread(target=lambda: result.append(work()), name="doctor: shared folder", daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else otherwise
