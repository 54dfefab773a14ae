"""What a job script needs before it starts the ranks: hosts, an address and a port, files, and the launch's own id.

All of it lies in `RUN/jobs/JOB/`, with a folder of logs for each launch of the job. No torch here.
"""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ds_recipes.cluster import deepspeed_env
from ds_recipes.cluster.exports import exported_names, without_secrets
from ds_recipes.cluster.hostfile import HostSlots, read_hostfile, write_hostfile
from ds_recipes.cluster.job import DEEPSPEED, MPIRUN, SRUN, TORCHRUN
from ds_recipes.cluster.judge import launches_of
from ds_recipes.cluster.ports import choose_port, is_here
from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.errors import ConfigError, WorldError
from ds_recipes.fsops.durable import make_folders
from ds_recipes.world.allocation import read_allocation
from ds_recipes.world.resolve import derived_port
from ds_recipes.world.socket_owner import describe_owner

HERE = "localhost"
LAUNCH_VARIABLE = "DS_RECIPES_LAUNCH"
RANK_0_LOGS = {MPIRUN: "rank-0.log", SRUN: "rank-0.log", DEEPSPEED: "*_rank0.log", TORCHRUN: ""}
"""Name of rank 0's log, where the launcher shows it nowhere else."""


@dataclass(frozen=True)
class Request:
    """What the job script knows."""

    run_folder: Path
    config: str
    launcher: str
    ranks_per_host: int
    num_hosts: int | None = None
    hostfile: str | None = None
    walltime_seconds: int | None = None
    lead_seconds: int = 300
    elapsed_seconds: int = 0
    export: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    launch_id: str = ""
    """Given where each host runs its own copy of the script: all of them must come to the same id and port."""


@dataclass(frozen=True)
class Prepared:
    """What the job script gets: words for the shell, variables for the ranks, and lines for its log."""

    shell: Mapping[str, str | Sequence[str]]
    variables: Mapping[str, str]
    notes: tuple[str, ...]

    def assignments(self) -> str:
        """Shell that sets all of it: a script evaluates it."""
        lines = [
            f"{name}={shlex.quote(value)}" if isinstance(value, str) else f"{name}=({shlex.join(value)})"
            for name, value in self.shell.items()
        ]
        return "\n".join([*lines, *(f"export {name}={shlex.quote(value)}" for name, value in self.variables.items())])


def prepare(request: Request, env: Mapping[str, str], folder: Path) -> Prepared:
    """Make the files of a launch that is about to start in `folder`, from the environment of the job script.

    Raises:
        ConfigError: the settings do not fit the number of ranks, there is no time, or a file of variables is wrong.
        WorldError: the hosts are not those that were planned, or cannot be found out.
    """
    hosts, job, source = _hosts(request, env)
    ranks = len(hosts) * request.ranks_per_host
    train = ["train.py", "--config", request.config, "--save_checkpoint_path", str(request.run_folder)]
    train += ["--expected_world_size", str(ranks), *_stop_flags(request), *request.arguments]
    check_batch(train[1:], ranks)
    _check_words(request, hosts, folder)
    job_folder = (request.run_folder / "jobs" / re.sub(r"[^\w.-]", "_", job)).absolute()
    launch, logs = _new_launch(request, job_folder)
    hostfile = (logs if request.launch_id else job_folder) / "hostfile"
    write_hostfile(hostfile, [HostSlots(host, request.ranks_per_host) for host in hosts])
    address = "127.0.0.1" if len(hosts) == 1 else hosts[0]
    port, taken = derived_port(launch), []
    if not request.launch_id and (chosen := choose_port(launch, hosts[0])) != port:
        taken = [f"port {port} of {hosts[0]} is in use by {describe_owner(port)}; rank 0 takes another"]
        port = chosen
    variables = {LAUNCH_VARIABLE: launch, "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    names = exported_names({**env, **variables}, request.export)
    variables |= _files_of_variables(request, {**env, **variables}, names, len(hosts), folder, logs)
    shell: dict[str, str | Sequence[str]] = {
        "NUM_HOSTS": str(len(hosts)),
        "NUM_RANKS": str(ranks),
        "HOSTS": hosts,
        "IS_FIRST_HOST": str(int(is_here(hosts[0]))),
        "HOSTFILE": str(hostfile),
        "LOG_FOLDER": str(logs),
        "RANK_0_LOG": RANK_0_LOGS[request.launcher],
        "ENVIRONMENT": str(logs / "environment.sh"),
        "EXPORTED": names,
        "TRAIN": train,
    }
    where = f"{len(hosts)} host{'s' * (len(hosts) > 1)} ({', '.join(hosts)}; from {source})"
    return Prepared(
        shell,
        variables,
        (
            *taken,
            f"launch {launch}: {ranks} ranks on {where}, rank 0 at {address}:{port}",
            f"logs of the ranks: {logs}",
        ),
    )


def check_batch(flags: Sequence[str], ranks: int) -> None:
    """Read the settings from train.py's flags, and lay the batch out over the ranks as it will.

    Raises:
        ConfigError: with every wrong setting; or the global batch is too small for so many ranks.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            config = load_config(flags)
    except SystemExit:
        raise ConfigError(
            ["With these flags train.py only prints something, and no job has to be queued for that."]
        ) from None
    try:
        make_plan(config, ranks)
    except ConfigError as error:
        wanted, rows = config.run.global_batch_size, config.run.batch_size_training * ranks
        if wanted is not None and wanted < rows:
            what = "Global batch size is too small for the number of GPUs"  # the words of Kotoba-Recipes' job scripts
            raise ConfigError([f"{what}: {line}" for line in error.problems]) from error
        raise


def _hosts(request: Request, env: Mapping[str, str]) -> tuple[list[str], str, str]:
    """The hosts, the job's id, and where the hosts were read."""
    allocation = read_allocation(env)
    own_id = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    job = request.launch_id or (allocation.job_id.split(".")[0] if allocation else own_id)
    if request.hostfile:
        found = read_hostfile(request.hostfile)
        short = [
            f"{item.host} (slots={item.slots})"
            for item in found
            if item.slots is not None and item.slots < request.ranks_per_host
        ]
        if short:
            raise WorldError(
                f"{request.hostfile} has fewer slots than {request.ranks_per_host} ranks a host for: {', '.join(short)}.\n"
                "Set RANKS_PER_HOST to what every host has."
            )
        hosts, source = [item.host for item in found], request.hostfile
    elif allocation:
        hosts, source = list(allocation.hosts), allocation.source
    else:
        hosts, source = [HERE], "this machine, as there is no hostfile"
    if request.num_hosts is not None and len(hosts) != request.num_hosts:
        raise WorldError(
            f"{request.num_hosts} hosts are planned, but {source} gives {len(hosts)}: {', '.join(hosts)}.\n"
            "Set NODES to the number that is meant, and name the file of hosts."
        )
    return hosts, job, source


def _stop_flags(request: Request) -> list[str]:
    """Leave before the time limit, unless the user's own flags say when."""
    if request.walltime_seconds is None or "--stop_after" in request.arguments:
        return []
    left = request.walltime_seconds - request.lead_seconds - request.elapsed_seconds
    if left <= 0:
        raise ConfigError(
            [
                f"There is no time to train: the limit is {request.walltime_seconds} s, {request.lead_seconds} s of it are kept "
                f"for saving, and {request.elapsed_seconds} s are over. Ask for more time, or set LEAD_SECONDS to less."
            ]
        )
    return ["--stop_after", f"{left}s"]


def _check_words(request: Request, hosts: Sequence[str], folder: Path) -> None:
    """DeepSpeed's launcher pastes folder and flags unquoted into a line for the shell of other hosts.

    Source: `PDSHRunner.get_cmd` in launcher/multinode_runner.py of DeepSpeed 0.19; words with spaces alone get quotes.
    """
    if request.launcher != DEEPSPEED or len(hosts) == 1:
        return
    wrong = [
        word
        for word in (str(folder), request.config, str(request.run_folder))
        if not deepspeed_env.PLAIN.fullmatch(word)
    ]
    wrong += [word for word in request.arguments if not re.fullmatch(r"[\w@%+=:,./ -]*", word)]
    if wrong:
        raise ConfigError(
            [
                f"DeepSpeed's launcher hands {word!r} to a shell on every host without quotes: it would arrive as something "
                "else. Use names of letters, digits and . _ - / only, or another launcher."
                for word in wrong
            ]
        )


def _new_launch(request: Request, job_folder: Path) -> tuple[str, Path]:
    """The id of this launch and its new folder of logs: a job that is queued again keeps its id, so launches are counted."""
    make_folders(job_folder)
    if request.launch_id:
        if request.launch_id in launches_of(request.run_folder):
            raise ConfigError(
                [
                    f"{request.run_folder / 'run.json'} has a launch {request.launch_id} already. Each one needs a new LAUNCH_ID."
                ]
            )
        logs = job_folder / f"logs-{os.uname().nodename}"
        logs.mkdir(exist_ok=True)
        return request.launch_id, logs
    attempt = 1
    while True:
        logs = job_folder / f"logs-{attempt}"
        try:
            logs.mkdir()
        except FileExistsError:
            attempt += 1
            continue
        return f"{job_folder.name}.{attempt}", logs


def _files_of_variables(
    request: Request, env: Mapping[str, str], names: Sequence[str], num_hosts: int, folder: Path, logs: Path
) -> dict[str, str]:
    """Write what carries variables to other hosts, for the user's eyes alone. Returns variables that name such files."""
    if num_hosts == 1 or request.launch_id or request.launcher not in (DEEPSPEED, TORCHRUN):
        return {}
    chosen = {name: env[name] for name in without_secrets(names, request.export)}
    if request.launcher == TORCHRUN:
        _write_private(
            logs / "environment.sh", "".join(f"export {name}={shlex.quote(text)}\n" for name, text in chosen.items())
        )
        return {}
    existing: dict[str, str] = {}
    for path in deepspeed_env.files_read(env, folder):
        existing |= deepspeed_env.read_lines(path)
    existing.pop(LAUNCH_VARIABLE, None)
    _write_private(logs / "deepspeed_env", deepspeed_env.text_of(chosen, existing))
    return {deepspeed_env.FILE_VARIABLE: str(logs / "deepspeed_env")}


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(text, encoding="utf-8")
