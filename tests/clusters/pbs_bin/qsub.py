"""qsub: check the request, keep a copy of the script, start what runs the job; prints its identifier."""

import getpass
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from tests.clusters.pbs_bin import site
from tests.clusters.pbs_bin.cell import Cell, Job
from tests.clusters.pbs_bin.grammar import OPTIONS, USAGE, Refused, Request, read, variables

NOT_HERE = {"I": "interactive jobs", "J": "job arrays", "X": "interactive jobs", "u": "other users", "h": "holds"}
FROM_SUBMITTER = ("HOME", "LANG", "LOGNAME", "PATH", "MAIL", "SHELL", "TZ")


def main(words: list[str]) -> int:
    """qsub's status."""
    try:
        options, script = _script_of(words)
        name, text = _read(script)
        request = read(options, text)
        absent = [NOT_HERE[letter] for letter in NOT_HERE if letter in request.options]
        if absent or "depend" in request.attributes:
            raise Refused(f"qsub: this stand-in for PBS does no {(absent or ['dependencies'])[0]}\n", 1)
        cell = Cell.of_environment()
        site.check(request, tuple(cell.settings["groups"]))
        job = _queue(cell, request, name, text)
    except Refused as refused:
        sys.stderr.write(str(refused))
        return refused.status
    if "z" not in request.options:
        print(job.id)
    return 0


def _script_of(words: list[str]) -> tuple[list[str], str]:
    """The options, and the script: the last word, unless an option takes it."""
    position = 0
    while position < len(words) and words[position].startswith("-") and words[position] != "-":
        word = words[position]
        if word == "--":
            raise Refused("qsub: this stand-in for PBS runs scripts alone\n", 1)
        takes = next((index for index, letter in enumerate(word[1:], 1) if f"{letter}:" in OPTIONS), None)
        position += 2 if takes == len(word) - 1 else 1
    rest = words[position:]
    if len(rest) > 1:
        raise Refused(USAGE, 2)
    return words[:position], rest[0] if rest else "-"


def _read(script: str) -> tuple[str, str]:
    """The job's name where none is given, and the script's text."""
    if script == "-":
        return "STDIN", sys.stdin.read()
    path = Path(script)
    if not path.exists():
        raise Refused("qsub: script file:: No such file or directory\n", 1)
    if not path.is_file():
        raise Refused("qsub: script not a file\n", 1)
    return path.name, path.read_bytes().decode("utf-8", "surrogateescape")


def _queue(cell: Cell, request: Request, script_name: str, text: str) -> Job:
    queue, here = request.options["q"], Path.cwd()
    chunks = [{**chunk, "ncpus": site.CORES[queue]} for chunk in request.chunks]
    owner = getpass.getuser()
    passed = {f"PBS_O_{name}": os.environ[name] for name in FROM_SUBMITTER if name in os.environ}
    passed |= {"PBS_O_HOST": socket.gethostname(), "PBS_O_SYSTEM": os.uname().sysname}
    passed |= {"PBS_O_WORKDIR": os.environ.get("PWD", str(here)), "PBS_O_QUEUE": queue}
    if "V" in request.options:
        passed = dict(os.environ) | passed
    with cell.locked():
        number = cell.new_number()
        job = Job(
            number=number,
            name=request.options.get("N", script_name),
            owner=owner,
            queue=queue,
            project=request.options["P"],
            state="Q",
            walltime_seconds=site.walltime_seconds(request),
            chunks=chunks,
            variables=passed | variables(request.options.get("v", ""), dict(os.environ)),
            output_asked="",
            output="",
            error=None,
            umask=re.match("[0-7]*", request.attributes.get("umask", "077"))[0] or "0",  # type: ignore[index]
            working_folder=str(here),
            select=request.resources["select"],
            comment="" if site.can_ever_run(request) else "Can Never Run: Insufficient amount of resource: ngpus",
        )
        asked = request.options.get("o", f"{job.name}.o{number}").rpartition(":")[2]
        job.output_asked = str(here / asked)
        job.output, job.error = _files(cell, request, job)
        copy = cell.script(number)
        copy.write_bytes(text.encode("utf-8", "surrogateescape"))
        copy.chmod(0o700)
        cell.write(job)
    runner = subprocess.Popen(
        [sys.executable, "-m", "tests.clusters.pbs_bin.mom", str(number)],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(cell.folder / "mom_logs").open("ab"),
        start_new_session=True,
        env={name: os.environ[name] for name in ("PBS_CELL", "PYTHONPATH", "PATH")},
    )
    with cell.locked():
        job = cell.job(number)
        job.runner = runner.pid
        cell.write(job)
    return job


def _files(cell: Cell, request: Request, job: Job) -> tuple[str, str | None]:
    """Where output and error end up. `-k oed` writes there at once, `-k oe` leaves them in the home folder."""
    join, keep = request.options.get("j", "n"), request.options.get("k", "n")

    def file(letter: str, option: str, suffix: str) -> str:
        folder = cell.home if letter in keep and "d" not in keep else Path(job.working_folder)
        named = request.options.get(option) if not (letter in keep and "d" not in keep) else None
        path = folder / (named.rpartition(":")[2] if named else f"{job.name}.{letter}{job.number}")
        if path.is_dir():
            path /= f"{job.id}{suffix}"
        return f"{'direct:' if 'd' in keep and letter in keep else ''}{path}"

    output, error = file("o", "o", ".OU"), file("e", "e", ".ER")
    if join == "eo":
        return error, None
    return output, None if join == "oe" else error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
