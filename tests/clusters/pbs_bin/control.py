"""qstat, qdel and qsig, by the name that the program is called by."""

import getopt
import signal
import socket
import sys
from collections.abc import Sequence

from tests.clusters.pbs_bin import cell as known
from tests.clusters.pbs_bin.cell import Cell, Job, signal_number, signal_session


def main(program: str, words: Sequence[str]) -> int:
    """The program's status: 0, or the lowest eight bits of the last error's number."""
    cell = Cell.of_environment()
    try:
        pairs, identifiers = getopt.gnu_getopt(list(words), {"qstat": "fxH", "qdel": "W:x", "qsig": "s:"}[program])
    except getopt.GetoptError as error:
        sys.stderr.write(f"{program}: invalid option -- '{error.opt}'\n")
        return 2
    options = dict(pairs)
    if program == "qstat":
        return _qstat(cell, options, identifiers)
    if not identifiers:
        sys.stderr.write(f"usage: {program} job_identifier...\n")
        return 2
    failed = 0
    for identifier in identifiers:
        job = cell.find(identifier)
        number = known.UNKNOWN_JOB if job is None else _act(program, cell, job, options)
        if number:
            text = {
                known.UNKNOWN_JOB: "Unknown Job Id",
                known.JOB_FINISHED: "Job has finished",
                known.BAD_STATE: "Request invalid for state of job",
                known.UNKNOWN_SIGNAL: "Unknown/illegal signal name",
            }[number]
            whom = "" if program == "qsig" and number == known.JOB_FINISHED else f" {_whole(identifier)}"
            sys.stderr.write(f"{program}: {text}{whom}\n")
            failed = number
    return failed & 0xFF


def _act(program: str, cell: Cell, job: Job, options: dict[str, str]) -> int:
    if job.state == "F":
        return known.JOB_FINISHED
    return _qsig(job, options.get("-s", "SIGTERM")) if program == "qsig" else _qdel(cell, job, options)


def _qsig(job: Job, name: str) -> int:
    """The signal to every process of the job's session, the login shell included."""
    number = signal_number(name)
    if number is None:
        return known.UNKNOWN_SIGNAL
    if job.state != "R" or job.session is None:
        return known.BAD_STATE
    signal_session(job.session, number)
    return 0


def _qdel(cell: Cell, job: Job, options: dict[str, str]) -> int:
    """A queued job is gone; a running one is sent SIGTERM, and SIGKILL after kill_delay (at once with -W force)."""
    if job.state == "Q":
        cell.change(job.number, state="F", deleted=True)
        return 0
    if job.state != "R" or job.session is None:
        return known.BAD_STATE
    forced = options.get("-W") == "force"
    cell.change(job.number, deleted=True)
    signal_session(job.session, signal.SIGKILL if forced else signal.SIGTERM)
    return 0


def _qstat(cell: Cell, options: dict[str, str], identifiers: list[str]) -> int:
    history, failed, chosen = "-x" in options or "-H" in options, 0, []
    for identifier in identifiers:
        job = cell.find(identifier)
        if job is None:
            failed = known.UNKNOWN_JOB
            sys.stderr.write(f"qstat: Unknown Job Id {_whole(identifier)}\n")
        elif job.state == "F" and not history:
            failed = known.JOB_FINISHED
            hint = "use -x or -H to obtain historical job information"
            sys.stderr.write(f"qstat: {job.id} Job has finished, {hint}\n")
        else:
            chosen.append(job)
    if not identifiers:
        chosen = [job for job in cell.jobs() if history or job.state != "F"]
    if "-f" in options:
        print("".join(map(_full, chosen)), end="")
    elif chosen:
        print(f"{'Job id':<21}  {'Name':<16} {'User':<16}  {'Time Use':>8} S Queue")
        print(f"{'-' * 21}  {'-' * 16} {'-' * 16}  {'-' * 8} - -----")
        for job in chosen:
            print(f"{job.id:<21}  {job.name[:16]:<16} {job.owner[:16]:<16}  {'00:00:00':>8} {job.state} {job.queue}")
    return failed & 0xFF


def _whole(identifier: str) -> str:
    """The identifier with its server, which may be left out."""
    return identifier if "." in identifier else f"{identifier}.{known.SERVER}"


def _full(job: Job) -> str:
    """`qstat -f`, without the folding of long lines; only what the stand-in knows."""
    hours, rest = divmod(job.walltime_seconds, 3600)
    fields = {
        "Job_Name": job.name,
        "Job_Owner": job.owner,
        "job_state": job.state,
        "queue": job.queue,
        "Join_Path": "n" if job.error is not None else "oe",
        "exec_host": "+".join(
            f"{host}/0*{chunk.get('ncpus', 1)}" for host, chunk in zip(job.hosts, job.chunks, strict=False)
        ),
        "Output_Path": f"{socket.gethostname()}:{job.output_asked}",
        "Resource_List.select": job.select,
        "Resource_List.walltime": f"{hours:02}:{rest // 60:02}:{rest % 60:02}",
        "session_id": job.session,
        "Variable_List": ",".join(f"{name}={value}" for name, value in job.variables.items()),
        "comment": job.comment,
        "Exit_status": job.exit_status,
        "project": job.project,
    }
    lines = [f"    {name} = {value}\n" for name, value in fields.items() if value not in (None, "")]
    return f"Job Id: {job.id}\n{''.join(lines)}\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
