"""Before NVMe offload starts: DeepSpeed's asynchronous I/O, a folder of this rank's own, and buffers that suffice."""

import os
import re
import shutil
import socket
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.cpp_extension import _get_build_directory

from ds_recipes.config.async_io import missing_for_async_io
from ds_recipes.errors import ConfigError
from ds_recipes.world.group import World

OFFLOADS = ("offload_optimizer", "offload_param")
FOLDER = "ds_recipes-{host}-{pid}"  # under nvme_path
ALIGNMENT = 1024  # bytes that DeepSpeed aligns to, for each thread of intra_op_parallelism
TRIED_BYTES = 1 << 20
LONGEST_BUILD_SECONDS = 900
STATE_BUFFERS = 4  # of a sub-group: master weights, two moments, gradients
LEAST_PARAMETER_BUFFERS = 5  # DeepSpeed's own default
LEAST_BUFFER_ELEMENTS = 1 << 20


def nvme_sections(zero: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sections of zero_optimization that offload to NVMe, by name."""
    for name in OFFLOADS:
        section = zero.get(name) or {}
        if section.get("device") == "nvme":
            yield name, section


def prepare_nvme(ds_json: dict[str, Any], model: nn.Module, world: World) -> dict[str, Any]:
    """Get asynchronous I/O ready and complete the JSON: this rank's own folder, and buffers for this model.

    DeepSpeed names its files by rank alone, so two runs with one nvme_path would write into each other's.

    Raises:
        ConfigError: asynchronous I/O cannot be built here, or the folder cannot be used.
    """
    zero = ds_json.get("zero_optimization", {})
    sections = dict(nvme_sections(zero))
    if not sections:
        return ds_json
    threads = int((ds_json.get("aio") or {}).get("intra_op_parallelism", 1))
    world.check("asynchronous I/O", _load_async_io)
    folders = world.check(
        "nvme_path", lambda: {name: _own_folder(name, section, threads) for name, section in sections.items()}
    )
    world.check("space at nvme_path", lambda: _check_space(folders, model, world))
    completed: dict[str, Any] = dict(zero)
    for name, folder in folders.items():
        completed[name] = sections[name] | {"nvme_path": str(folder)}
    if "offload_optimizer" in sections:
        completed["offload_optimizer"] = _with_state_buffers(completed["offload_optimizer"])
    if "offload_param" in sections:
        distance = int(completed.setdefault("stage3_max_reuse_distance", 0))
        completed["offload_param"] = _with_parameter_buffers(completed["offload_param"], model, world.size, distance)
    return ds_json | {"zero_optimization": completed}


def remove_own_folders(zero: Mapping[str, Any]) -> None:
    """Delete what this rank has written below nvme_path: a run's checkpoints hold all of it."""
    for _, section in nvme_sections(zero):
        shutil.rmtree(section["nvme_path"], ignore_errors=True)


def _load_async_io() -> None:
    missing = missing_for_async_io()
    if missing:
        raise ConfigError([missing])
    from deepspeed.ops.op_builder import AsyncIOBuilder

    for op in ("pin_memory", "async_io"):
        _refuse_left_lock(Path(_get_build_directory(op, verbose=False)) / "lock")
    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # a compiler's, a linker's, a missing CUDA_HOME: whatever it is, the run needs the op
        reason = next((line for line in str(error).splitlines() if "error" in line.lower()), str(error).split("\n")[0])
        raise ConfigError(
            [
                f"NVMe offload needs DeepSpeed's asynchronous I/O, which does not build here: {reason.strip()}. "
                'See all of it with: python -c "from deepspeed.ops.op_builder import AsyncIOBuilder as B; '
                'B().load(verbose=True)"'
            ]
        ) from error


def _refuse_left_lock(lock: Path) -> None:
    """torch waits for ever for the lock of a build that was killed."""
    if lock.exists() and time.time() - lock.stat().st_mtime > LONGEST_BUILD_SECONDS:
        raise ConfigError(
            [f"{lock} is left of a build that was killed, and torch would wait for it for ever: remove its folder."]
        )


def _own_folder(name: str, section: Mapping[str, Any], threads: int) -> Path:
    given = section.get("nvme_path")
    where = f"zero_optimization.{name}.nvme_path: {given} on {socket.gethostname()}"
    if not given or not Path(given).is_dir():
        raise ConfigError([f"{where} is no folder. Name one on a local NVMe disk of every host, as a job's $TMPDIR."])
    _remove_left_folders(Path(given))
    folder = Path(given) / FOLDER.format(host=socket.gethostname(), pid=os.getpid())
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError([f"{where}: {error.strerror}"]) from error
    if not _direct_io_works(folder / "trial", threads):
        advice = "a folder on another disk" + (' or, in "aio", "intra_op_parallelism": 4' if threads % 4 else "")
        raise ConfigError([f"{where}: what is written there with direct I/O is not what is read back; try {advice}."])
    return folder


def _direct_io_works(path: Path, threads: int) -> bool:
    """Write and read as DeepSpeed will, at an address that is only as aligned as its own: no error of these reaches it."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle = AsyncIOBuilder().load(verbose=False).aio_handle(
        block_size=TRIED_BYTES, queue_depth=8, single_submit=False, overlap_events=True, intra_op_parallelism=threads
    )  # fmt: skip
    step = ALIGNMENT * threads
    space = handle.new_cpu_locked_tensor(2 * (TRIED_BYTES + 2 * step), torch.empty(1, dtype=torch.uint8))
    out, back = (half[step : 2 * step + TRIED_BYTES] for half in space.view(2, -1))
    out.copy_(torch.arange(out.numel()) % 251)
    back.zero_()
    try:
        handle.async_pwrite(out, str(path), 0)
        handle.wait()
        if not path.exists() or path.stat().st_size != out.numel():
            return False
        handle.async_pread(back, str(path), 0)
        handle.wait()
        return torch.equal(out, back)
    finally:
        path.unlink(missing_ok=True)
        handle.free_cpu_locked_tensor(space)


def _remove_left_folders(path: Path) -> None:
    """Delete what processes of this host have left that are no more: a killed run cannot do it itself."""
    own = re.compile(re.escape(FOLDER.format(host=socket.gethostname(), pid="")) + r"(\d+)")
    for folder in path.iterdir():
        match = own.fullmatch(folder.name)
        if match and Path("/proc/self").exists() and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _check_space(folders: Mapping[str, Path], model: nn.Module, world: World) -> None:
    """Compare what all ranks of this host will write with the space of the disk."""
    numel = sum(parameter.numel() for parameter in model.parameters())
    itemsize = next(model.parameters()).dtype.itemsize
    bytes_of = {"offload_optimizer": 4 * (STATE_BUFFERS - 1) * numel, "offload_param": itemsize * numel}
    ranks_here = world.hosts.count(world.hosts[world.rank])
    for name, folder in folders.items():
        shared = sum(bytes_of[other] for other, path in folders.items() if path.stat().st_dev == folder.stat().st_dev)
        needed, free = shared * ranks_here // world.size, shutil.disk_usage(folder).free
        if needed > free:
            raise ConfigError(
                [
                    f"zero_optimization.{name}.nvme_path: {folder.parent} on {socket.gethostname()} has {free / 1e9:.1f} GB "
                    f"free, and the {ranks_here} ranks of this host would write {needed / 1e9:.1f} GB. Make room, or name "
                    "another disk."
                ]
            )


def _with_state_buffers(section: dict[str, Any]) -> dict[str, Any]:
    """Enough buffers for the sub-group in use, for the next one that is read ahead, and for the last that is written.

    `fast_init` is a quicker way to first values, which `load_shards` replaces anyway, and asks for larger buffers.
    """
    at_once = 1 + bool(section.get("pipeline_read")) + bool(section.get("pipeline_write"))
    count = max(int(section.get("buffer_count", 0)), STATE_BUFFERS * at_once)
    return section | {"buffer_count": count, "fast_init": False}


def _with_parameter_buffers(
    section: dict[str, Any], model: nn.Module, ranks: int, reuse_distance: int
) -> dict[str, Any]:
    """Buffers as large as the largest slice of a parameter, and as many as there are parameters in use at once.

    These are a module's, or a whole leaf's, and those that DeepSpeed keeps because they come up again so soon.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    in_module = max(
        len(list(module.parameters(recurse=getattr(module, "_z3_leaf", False)))) for module in model.modules()
    )
    count = max(in_module + _most_within(sizes, reuse_distance) + 1, LEAST_PARAMETER_BUFFERS)
    size = max(-(-max(sizes) // ranks), LEAST_BUFFER_ELEMENTS)
    return section | {
        "buffer_size": max(int(section.get("buffer_size", 0)), size),
        "buffer_count": max(int(section.get("buffer_count", 0)), count),
    }


def _most_within(sizes: list[int], distance: int) -> int:
    """The largest number of parameters in a row that begin within `distance` elements of the first."""
    starts = [0, *accumulate(sizes)]
    return max(
        bisect_left(starts, starts[first] + distance, lo=first, hi=len(sizes)) - first for first in range(len(sizes))
    )
