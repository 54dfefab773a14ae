"""Print a linter's report: plain lines, with colours on a terminal."""

import sys
from collections.abc import Sequence

from ds_recipes.config.lint.memory import BILLION, GIB, Memory
from ds_recipes.config.lint.report import ERROR, NOTE, UNSUPPORTED, WARNING, Line, Report

COLOURS = {ERROR: "31;1", UNSUPPORTED: "35", WARNING: "33", NOTE: "2"}
PLACES = (("device", "on the device"), ("host", "in host memory"), ("nvme", "on NVMe"))


def show(report: Report, levels: Sequence[str], is_first: bool = True) -> None:
    """Print a report, grouped by level; its last line is the verdict."""
    if not is_first:
        print()
    for level in levels:
        lines = sorted(report.of(level), key=lambda line: (line.line or 0, line.key))
        if lines:
            print(_coloured(f"{level}:", COLOURS[level]))
            for line in lines:
                print(f"  {where(report.path, line)}: {line}")
    if report.batch:
        print(f"step: {report.batch}")
    if report.memory:
        print("\n".join(memory_lines(report.memory)))
    print(_coloured(report.verdict, COLOURS[ERROR] if report.of(ERROR) else "32"))


def where(path: str, line: Line) -> str:
    """file:line, or the file alone."""
    return f"{path}:{line.line}" if line.line else path


def memory_lines(memory: Memory) -> list[str]:
    """A small table: bytes a parameter on one rank, with GiB for 1e9 parameters in the last row."""
    places = [(name, title) for name, title in PLACES if name == "device" or memory.total(name)]
    ranks = f"{memory.world} rank{'s' * (memory.world != 1)}"
    width = max(len(share.what) for share in memory.shares) + 2
    lines = [f"memory a rank, bytes a parameter with Adam on {ranks} (activations and buffers come on top):"]
    lines.append(" " * (width + 2) + "".join(f"{title:>16}" for _, title in places))
    for share in memory.shares:
        lines.append(f"  {share.what:<{width}}" + "".join(f"{_number(getattr(share, name)):>16}" for name, _ in places))
    totals = [memory.total(name) for name, _ in places]
    lines.append(f"  {'together':<{width}}" + "".join(f"{_number(total):>16}" for total in totals))
    gib = [f"{total * BILLION / GIB:.2f} GiB" for total in totals]
    lines.append(f"  {'1e9 parameters':<{width}}" + "".join(f"{each:>16}" for each in gib))
    return lines + [f"  {advice}" for advice in memory.advice]


def _number(value: float) -> str:
    return f"{value:.3g}" if value else "-"


def _coloured(text: str, colour: str) -> str:
    return f"\033[{colour}m{text}\033[0m" if sys.stdout.isatty() else text
