"""torch's own watch over NCCL: what it records, where it writes that to, and how long it waits.

Names and defaults are those of torch 2.11 to 2.13 (`ProcessGroupNCCL.hpp`, `FlightRecorder.hpp`). Where two names mean
the same, torch takes the newer one, so nothing is set that the user has set under either.
"""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

PREFIX = "nccl_rank_"
"""Of the flight recorder's files; the rank's number follows, as torch's tool for reading them expects it."""

ALIASES = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "NCCL_ASYNC_ERROR_HANDLING",
}
"""Newer name and older one."""


def nccl_settings(folder: Path, timeout_seconds: float) -> dict[str, str]:
    """Variables by name: the flight recorder writes into `folder`, and NCCL gives up after `timeout_seconds`."""
    return {
        "TORCH_FR_BUFFER_SIZE": "2000",  # collectives that are remembered; 0 turns the recorder off
        "TORCH_FR_DUMP_TEMP_FILE": str(folder / PREFIX),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # a collective that failed ends the process, without a clean-up that may hang
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(round(timeout_seconds)),
    }


def prepare_nccl(env: MutableMapping[str, str], folder: Path, timeout_seconds: float) -> None:
    """Set what the user has not set. Before the process group starts."""
    for name, value in nccl_settings(folder, timeout_seconds).items():
        if not _is_set(env, name):
            env[name] = value


def write_flight_record(folder: Path, rank: int) -> None:
    """Write down NCCL's latest collectives on this rank; nothing where there is no NCCL."""
    from torch import _C, distributed

    read = getattr(_C._distributed_c10d, "_dump_nccl_trace", None)  # in builds with NCCL only
    if read is None or os.environ.get("TORCH_FR_BUFFER_SIZE") == "0" or not distributed.is_initialized():
        return
    if distributed.get_backend() == "nccl":
        (folder / f"{PREFIX}{rank}").write_bytes(read())


def _is_set(env: Mapping[str, str], name: str) -> bool:
    return name in env or ALIASES.get(name) in env
