"""Host memory, and what the kernel, the batch system or a container allow a rank."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from ds_recipes.cluster.doctor.checks import Check, Context
from ds_recipes.cluster.doctor.findings import Finding, counted, error, fine, warning

GIB = 2**30
RANK_GIB = 2.0
"""Room for a rank and its libraries; the trial run measures what a tiny model needs (`process`), more with CUDA."""

OPEN_FILES_A_RANK = 8
OPEN_FILES = 256
"""Ten times what the trial run of two ranks holds open (`process`): a run has data files, workers and trackers as well."""

SHM_BYTES = 512 * 2**20
"""NCCL and data loaders share memory there; containers give 64 MB unless told (`--shm-size`)."""


def memory(context: Context) -> Iterator[Finding]:
    """Memory that this host, or the control group of the job, still has."""
    meminfo = _meminfo()
    total, available = meminfo["MemTotal"] / GIB, meminfo["MemAvailable"] / GIB
    text, cause = f"{total:.0f} GiB of memory, {available:.0f} GiB available", "other programs, or a small host"
    limit = _cgroup("memory.max", "memory.limit_in_bytes", "memory")
    if limit is not None and limit / GIB < total:
        used = _cgroup("memory.current", "memory.usage_in_bytes", "memory") or 0
        left = (limit - used) / GIB
        text += f"; the job's control group allows {limit / GIB:.1f} GiB, {left:.1f} GiB of it are left"
        if left < available:
            available, cause = left, "the batch system's or the container's memory limit (cgroup)"
    ranks = context.place.local_size or 1
    if available < RANK_GIB * ranks:
        yield warning(
            "memory.low",
            f"{text}, for {counted(ranks, 'rank')}",
            cause,
            "Ask the batch system for more memory, or use fewer ranks on a host: a rank needs about 2 GiB before the model.",
            available_gib=available,
        )
    else:
        yield fine("memory", text, available_gib=available)
    swap = meminfo.get("SwapTotal", 0), meminfo.get("SwapFree", 0)
    if swap[0] and swap[1] < swap[0] / 2:
        yield warning(
            "memory.swapping",
            f"{(swap[0] - swap[1]) / GIB:.1f} of {swap[0] / GIB:.1f} GiB of swap are in use",
            "more memory was asked for than the host has; what is swapped out is a thousand times slower",
            "End what else runs on this host, or ask for a host of your own.",
        )
    killed = _killed_for_memory()
    if killed:
        yield warning(
            "memory.killed",
            f"the kernel has killed processes of this control group for want of memory, {killed} so far",
            "the job, or one before it in the same group, ran into its memory limit",
            "Ask for more memory; loading takes most: fewer ranks on a host, or a model in safetensors files.",
        )


def shared_memory(context: Context) -> Iterator[Finding]:
    """/dev/shm."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield error(
            "shm.missing",
            "there is no /dev/shm on this host",
            "a container without it",
            "Start the container with --shm-size=8g, or mount a tmpfs there.",
        )
        return
    stat = os.statvfs(folder)
    size, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    text = f"/dev/shm has {size / GIB:.2f} GiB, {free / GIB:.2f} GiB free"
    if free < SHM_BYTES:
        small = size < SHM_BYTES
        yield warning(
            "shm.small",
            text,
            "a container's default of 64 MB" if small else "files of other jobs, or of killed ones, lie there",
            "Start the container with --shm-size=8g (or --ipc=host)."
            if small
            else "Remove old files: ls -la /dev/shm.",
            free_bytes=free,
        )
    elif context.first_on_host:
        yield fine("shm", text, free_bytes=free)


def limits(context: Context) -> Iterator[Finding]:
    """ulimit of this rank: it may be another one under the launcher than in the shell."""
    problems = [*_open_files(context), *_processes(), *_address_space(), *_file_size(), *_locked_memory(), *_stack()]
    yield from problems
    if not problems:
        names = {
            "-n": (resource.RLIMIT_NOFILE, 1),
            "-u": (resource.RLIMIT_NPROC, 1),
            "-l": (resource.RLIMIT_MEMLOCK, 1024),
        }
        shown = ", ".join(f"{flag} {_shown(kind, unit)}" for flag, (kind, unit) in names.items())
        yield fine("limits", f"ulimit: {shown}, no limit of file size (-f) and address space (-v)")


def _open_files(context: Context) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES + OPEN_FILES_A_RANK * context.place.size
    if soft != resource.RLIM_INFINITY and soft < needed:
        yield error(
            "limits.open_files",
            f"only {soft} files may be open at a time (ulimit -n); {counted(context.place.size, 'rank')} may need {needed}",
            "a low limit of the shell, of the container or of the batch system's daemon",
            f"Put 'ulimit -n {min(hard, 65536) if hard >= needed else 65536}' before the launcher in the job script"
            + ("." if hard >= needed or hard < 0 else f"; above the hard limit of {hard} only the administrator can."),
            soft=soft,
            needed=needed,
        )


def _processes() -> Iterator[Finding]:
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    least = _cgroup("pids.max", "pids.max", "pids")
    used = _cgroup("pids.current", "pids.current", "pids") or 0
    allowed = min(
        [value for value in (soft, None if least is None else least - used) if value is not None and value >= 0] or [-1]
    )
    if 0 <= allowed < 1024:
        yield warning(
            "limits.processes",
            f"only {allowed} processes and threads may be started (ulimit -u, or pids.max of the control group)",
            "a low limit of the batch system or of the container; each rank starts dozens of threads",
            "Raise it ('ulimit -u', docker --pids-limit), or set OMP_NUM_THREADS to a small number.",
            allowed=allowed,
        )


def _address_space() -> Iterator[Finding]:
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        yield warning(
            "limits.address_space",
            f"the address space is limited to {soft / GIB:.1f} GiB (ulimit -v)",
            "a batch system that limits memory by address space (Grid Engine's h_vmem does)",
            "Ask for more (-l h_vmem=...) or 'ulimit -v unlimited': CUDA reserves far more address space than memory.",
            soft_bytes=soft,
        )


def _file_size() -> Iterator[Finding]:
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if soft != resource.RLIM_INFINITY:
        yield error(
            "limits.file_size",
            f"no file may grow above {soft / 2**20:.0f} MiB (ulimit -f)",
            "a limit of the shell or of the batch system; a checkpoint has files of many GB",
            "Put 'ulimit -f unlimited' before the launcher, or ask the administrator.",
            soft_bytes=soft,
        )


def _locked_memory() -> Iterator[Finding]:
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    adapters = Path("/sys/class/infiniband")
    if soft != resource.RLIM_INFINITY and soft < GIB and adapters.is_dir() and any(adapters.iterdir()):
        yield warning(
            "limits.locked_memory",
            f"only {soft / 2**20:.0f} MiB of memory may be locked (ulimit -l), and there is InfiniBand here",
            "a low limit of the batch system's daemon or of the container",
            "Set it to unlimited (limits.conf, docker --ulimit memlock=-1): NCCL registers its buffers with the adapter.",
            soft_bytes=soft,
        )


def _stack() -> Iterator[Finding]:
    soft = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if soft != resource.RLIM_INFINITY and soft < 2**20:
        yield warning(
            "limits.stack",
            f"the stack is limited to {soft // 1024} KiB (ulimit -s)",
            "a low limit of the shell; threads take their stack's size from it",
            "Put 'ulimit -s 8192' before the launcher.",
        )


def cores(context: Context) -> Iterator[Finding]:
    """Cores that this rank may use, against the threads that it would start."""
    mine, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    ranks = context.place.local_size or 1
    share = max(there // ranks, 1)
    threads = context.env.get("OMP_NUM_THREADS", "")
    if mine * 4 < share * 3 and share > 1:
        yield warning(
            "cores.bound",
            f"this rank may use {mine} of the host's {there} cores, its share among {counted(ranks, 'rank')} would be {share}",
            "the launcher binds each rank to a core (mpirun's default), or the batch system gave few",
            "mpirun --bind-to none (or --map-by slot:PE=N); ask the batch system for more cores. Data is read by them.",
            cores=mine,
        )
    elif ranks > 1 and not threads:
        yield warning(
            "cores.threads",
            f"OMP_NUM_THREADS is not set, so each of {ranks} ranks starts {mine} threads on {there} cores",
            "nothing set it: torchrun does, mpirun and srun do not",
            f"Set OMP_NUM_THREADS={max(mine // ranks, 1)} in the job script, and pass it on (mpirun -x OMP_NUM_THREADS).",
        )
    elif threads.isdigit() and int(threads) * ranks > there * 2:
        yield warning(
            "cores.threads",
            f"OMP_NUM_THREADS={threads} in each of {ranks} ranks makes {int(threads) * ranks} threads on {there} cores",
            "the variable was meant for one rank on a host",
            f"Set OMP_NUM_THREADS={share}.",
        )
    else:
        yield fine("cores", f"{mine} of {there} cores may be used, OMP_NUM_THREADS={threads or 'not set'}")


def _shown(kind: int, unit: int) -> str:
    """A limit as ulimit prints it."""
    soft = resource.getrlimit(kind)[0]
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft // unit)


def _meminfo() -> dict[str, int]:
    """Bytes by name."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}


def _cgroup_folders(controller: str) -> list[Path]:
    """The control groups of this process, from its own up to the root; version 2, or 1 for this controller."""
    own: list[Path] = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        number, controllers, path = line.split(":", 2)
        base = Path("/sys/fs/cgroup") / ("" if number == "0" else controllers)
        if number == "0" or controller in controllers.split(","):
            folder = base / path.lstrip("/")
            own += [folder, *[parent for parent in folder.parents if parent.is_relative_to(base)]]
    return own


def _cgroup(name: str, old_name: str, controller: str) -> int | None:
    """The least value of a control file up to the root; None without any, and for "max"."""
    values = []
    for folder in _cgroup_folders(controller):
        for file in (folder / name, folder / old_name):
            if file.is_file() and (text := file.read_text(encoding="ascii").strip()).isdigit():
                values.append(int(text))
                break
    return min(values, default=None)


def _killed_for_memory() -> int:
    for folder in _cgroup_folders("memory")[:1]:
        file = folder / "memory.events"
        if file.is_file():
            events = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
            return int(events.get("oom_kill", 0))
    return 0


CHECKS = (
    Check("memory", memory, "host"),
    Check("shared memory", shared_memory, "host"),
    Check("limits", limits),
    Check("cores", cores),
)
