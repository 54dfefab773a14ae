"""The doctor from its command line to its exit status: alone, or as one of the ranks that a launcher has started."""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ds_recipes.cluster.doctor import folder, gpus, limits, links, network, settings, versions
from ds_recipes.cluster.doctor.checks import Check, Context, run_checks, run_one
from ds_recipes.cluster.doctor.facts import facts, tree_root
from ds_recipes.cluster.doctor.findings import Finding, error
from ds_recipes.cluster.doctor.report import Report, show
from ds_recipes.cluster.doctor.together import Own, as_guest, in_chair
from ds_recipes.config.values import path_argument
from ds_recipes.errors import ConfigError, WorldError
from ds_recipes.world.resolve import Place, is_speaker, resolve

DESCRIPTION = """Look at this machine, or at all machines of a job, and name what would keep a run from starting or slow it down.

    python tools/doctor.py                                         # this machine, alone
    python tools/doctor.py --config run.yaml --hostfile hostfile   # and the hosts of a hostfile, through ssh
    mpirun -np 16 -hostfile hostfile python tools/doctor.py --config run.yaml      # all ranks, and the links between them
    deepspeed --hostfile hostfile tools/doctor.py --config run.yaml                # the same; or torchrun, or srun

Further words are settings of train.py (with --config). Exit status: 2 if there is an error, else 0. docs/doctor.md has
every finding, and what to do about it.
"""
HOSTFILE_SECONDS = 600.0
SETTINGS_SECONDS = 30.0

LOCAL = (
    *settings.CHECKS[:2],
    *versions.CHECKS,
    *gpus.CHECKS,
    *links.CHECKS,
    *limits.CHECKS,
    *network.CHECKS,
    *folder.CHECKS,
    *settings.CHECKS[2:],
)


@dataclass(frozen=True)
class Asked:
    """The command line."""

    quick: bool
    json: str | None
    run_folder: Path | None
    hostfile: Path | None
    expected_world_size: int | None
    settings: tuple[str, ...]


def parse(argv: Sequence[str]) -> Asked:
    """Read the command line; a wrong one ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="the run file; its settings are checked too")
    parser.add_argument(
        "--run_folder", type=path_argument, metavar="DIR", help="the run folder (default: save_checkpoint_path)"
    )
    parser.add_argument("--save_checkpoint_path", metavar="DIR", help="the same, as train.py names it")
    parser.add_argument("--hostfile", type=path_argument, metavar="FILE", help="look at its hosts through ssh")
    parser.add_argument(
        "--expected_world_size", type=int, metavar="RANKS", help="an error with any other number of ranks"
    )
    parser.add_argument("--quick", action="store_true", help="without torch: no bandwidth, no step; some seconds")
    parser.add_argument("--json", metavar="FILE", help="write all of it there; - for the output, instead of the page")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    given, rest = parser.parse_known_args(list(argv))
    if rest and given.config is None:
        parser.error(f"{rest[0]}: settings of train.py need --config")
    words = [] if given.config is None else ["--config", given.config]
    named = given.run_folder or given.save_checkpoint_path
    chosen = None if named is None else Path(named)
    if words and chosen is not None:
        words += ["--save_checkpoint_path", str(chosen)]
    return Asked(given.quick, given.json, chosen, given.hostfile, given.expected_world_size, (*words, *rest))


def main(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> int:
    """Examine; print the report on rank 0. Returns the exit status, the same on all ranks."""
    started, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    asked = parse(argv)
    findings: list[Finding] = []
    try:
        place = resolve(env)
    except WorldError as problem:
        if not is_speaker(env):
            return problem.exit_status
        place = Place(0, 1, local_size=1)
        findings.append(
            error(
                "world.unclear",
                str(problem).splitlines()[0],
                "variables of two launchers, or of an earlier one, stand in the environment",
                " ".join(str(problem).splitlines()[1:])
                or "Unset RANK, WORLD_SIZE and MASTER_ADDR, or start in a fresh shell.",
            )
        )
    context = Context(
        env=env,
        place=place,
        host=socket.gethostname(),
        root=tree_root(),
        run_folder=asked.run_folder,
        hostfile=asked.hostfile,
        settings=asked.settings,
        expected_world_size=asked.expected_world_size,
    )
    own = Own(context, findings, facts(env, context.root))

    def finish(found: Sequence[Finding], hosts: Sequence[str]) -> int:
        seconds = time.monotonic() - began
        report = Report(found, hosts, own.context.place.source, started, seconds, time.time(), own.facts)
        publish(report, asked.json)
        return report.status

    if place.rank > 0:
        return as_guest(own, examine, finish, quick=asked.quick)
    return in_chair(own, examine, finish, quick=asked.quick)


def examine(own: Own) -> None:
    """Everything that one rank looks at by itself; fills `own.findings`, and the context's settings."""
    config, refused = read_settings(own.context)
    own.findings += refused
    if config is not None:
        run_folder = own.context.run_folder or Path(config.checkpoint.save_checkpoint_path)
        own.context = replace(own.context, config=config, run_folder=run_folder)
    own.findings += run_checks(LOCAL, own.context)
    if own.context.place.rank == 0:
        from ds_recipes.cluster.doctor import hostfile_hosts

        own.findings += run_one(Check("variables file", hostfile_hosts.variables_file), own.context, SETTINGS_SECONDS)
        own.findings += run_one(Check("hostfile", hostfile_hosts.hostfile), own.context, HOSTFILE_SECONDS)


def read_settings(context: Context) -> tuple[Any, list[Finding]]:
    """The settings of train.py, None where there are none or they are wrong."""
    if not context.settings:
        return None, []
    read: list[Any] = []

    def load(_: Context) -> list[Finding]:
        from ds_recipes.config.load import load_config

        try:
            read.append(load_config(list(context.settings)))
        except ConfigError as refused:
            return [
                error("settings.wrong", problem, "train.py would refuse this", "The message says what to change.")
                for problem in refused.problems
            ]
        return []

    found = run_one(Check("settings", load), context, SETTINGS_SECONDS)
    return (read[0] if read else None), found


def publish(report: Report, target: str | None) -> None:
    """Print the page, or write JSON."""
    text = json.dumps(report.to_json(), indent=2)
    if target == "-":
        print(text, flush=True)
        return
    show(report)
    if target is not None:
        Path(target).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
