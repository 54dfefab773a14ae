"""The report: for people a page with the worst at its end, for programs JSON."""

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_recipes.cluster.doctor.findings import ERROR, FINE, WARNING, Finding, counted, has_errors, worst_last
from ds_recipes.world.channel import name_ranks

NAME_WIDTH = 20
LEAST_WIDTH, MOST_WIDTH = 70, 130
SHOWN_HOSTS = 4
STYLES = {FINE: "green", WARNING: "yellow", ERROR: "bold red", "title": "bold", "": ""}

Line = Sequence[tuple[str, str]]
"""Pieces of a line: style and text."""


@dataclass(frozen=True)
class Report:
    """All that was found. `hosts` are the ranks' host names, by rank; `facts` those of rank 0."""

    findings: Sequence[Finding]
    hosts: Sequence[str]
    source: str
    started: str
    seconds: float
    ended: float  # seconds since the epoch, for whoever compares clocks
    facts: Mapping[str, Any]

    @property
    def all_hosts(self) -> set[str]:
        """Those of the ranks, and those of a hostfile."""
        return {*self.hosts, *(host for finding in self.findings for host in finding.hosts)}

    @property
    def status(self) -> int:
        """Exit status: 2 if a run would not start or would fail."""
        return 2 if has_errors(self.findings) else 0

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {
            "status": self.status,
            "started": self.started,
            "seconds": round(self.seconds, 2),
            "ended": self.ended,
            "source": self.source,
            "hosts": list(self.hosts),
            "facts": dict(self.facts),
            "findings": [finding.to_json() for finding in worst_last(self.findings)],
        }


def show(report: Report) -> None:
    """Print the page, in colours where the output has any."""
    width = min(max(shutil.get_terminal_size((110, 24)).columns, LEAST_WIDTH), MOST_WIDTH)
    page = list(lines(report, width))
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:  # one of the packages whose absence the page tells of
        print("\n".join("".join(text for _, text in line) for line in page), flush=True)
        return
    console = Console(width=width, highlight=False, soft_wrap=True)
    for line in page:
        console.print(Text.assemble(*((text, STYLES[style]) for style, text in line)))


def lines(report: Report, width: int) -> Iterator[Line]:
    """The page, line by line, each at most `width` wide where words allow it."""
    counts = {level: [one for one in report.findings if one.level == level] for level in (FINE, WARNING, ERROR)}
    hosts = list(dict.fromkeys(report.hosts))
    where = f"{counted(len(report.hosts), 'rank')} on {counted(len(hosts), 'host')} ({_listed(hosts)})"
    yield [("title", f"doctor: {where}, from {report.source}; {report.seconds:.0f} s")]
    for finding in counts[FINE]:
        yield from _short(finding, report, width)
    for finding in report.findings:
        if "rows" in finding.data:
            yield from bandwidth_table(finding.data["rows"])
    for level in (WARNING, ERROR):
        for finding in counts[level]:
            yield from _long(finding, report, width)
    worst = ERROR if counts[ERROR] else WARNING if counts[WARNING] else FINE
    told = ", ".join(counted(len(counts[level]), level) for level in (ERROR, WARNING))
    yield [("", "")]
    yield [(worst, f"{len(counts[FINE])} fine, {told}; exit status {report.status}")]


def bandwidth_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    """A line a size: time and bus bandwidth of both collectives."""
    sizes = list(dict.fromkeys(row["num_bytes"] for row in rows))
    yield [("", "")]
    yield [("title", f"{'bytes':>12}{'all-reduce ms':>16}{'bus GB/s':>11}{'all-gather ms':>16}{'bus GB/s':>11}")]
    for size in sizes:
        cells = [f"{size:>12}"]
        for name in ("all-reduce", "all-gather"):
            row = next(row for row in rows if row["num_bytes"] == size and row["collective"] == name)
            cells.append(f"{row['seconds'] * 1000:>16.3f}{row['bus_gb_per_second']:>11.3f}")
        yield [("", "".join(cells))]


def _short(finding: Finding, report: Report, width: int) -> Iterator[Line]:
    """A fine one: its name and its text; who found it only where others have found something else."""
    apart = bool(finding.hosts) and not set(report.hosts) <= set(finding.hosts)
    text = f"{finding.text}  [{_whose(finding)}]" if apart else finding.text
    folded = textwrap.wrap(text, width - NAME_WIDTH - 4, break_long_words=False, break_on_hyphens=False) or [""]
    for number, part in enumerate(folded):
        yield [(FINE, f"  {finding.name if number == 0 else '':<{NAME_WIDTH}}  "), ("", part)]


def _long(finding: Finding, report: Report, width: int) -> Iterator[Line]:
    """A warning or an error, with cause and advice."""
    whose = _whose(finding) if len(report.hosts) > 1 or len(report.all_hosts) > 1 else ""
    yield [("", "")]
    yield [(finding.level, f"{finding.level.upper()}  {finding.name}"), ("", f"  ({whose})" if whose else "")]
    for label, text in (("", finding.text), ("cause: ", finding.cause), ("to do: ", finding.advice)):
        for number, line in enumerate(text.splitlines()):
            indent = "  " + " " * len(label)
            folded = textwrap.wrap(
                line,
                width,
                initial_indent="  " + label if number == 0 else indent,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
            yield from ([("", part)] for part in folded)


def _whose(finding: Finding) -> str:
    ranks = name_ranks(list(finding.ranks)) if finding.ranks else ""
    return " on ".join(part for part in (ranks, _listed(finding.hosts)) if part)


def _listed(hosts: Sequence[str]) -> str:
    more = f" and {len(hosts) - SHOWN_HOSTS} more" if len(hosts) > SHOWN_HOSTS else ""
    return ", ".join(hosts[:SHOWN_HOSTS]) + more
