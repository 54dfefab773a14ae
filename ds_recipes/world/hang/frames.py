"""Where a thread is, read from its Python frames: it waits in a collective, or works in some part of the run."""

import linecache
import sys
from dataclasses import dataclass
from functools import cache
from types import FrameType

WAIT = "waiting"
PYTHON = "other Python"

COLLECTIVES = (
    "/torch/distributed/distributed_c10d.py",
    "/torch/distributed/_functional_collectives.py",
    "/torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py",
    "/torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py",
    "/deepspeed/comm/",
    "/deepspeed/runtime/comm/",
)
"""Files whose frames are in a collective, as of torch 2.13 and DeepSpeed 0.19."""

WAITS = (("/deepspeed/runtime/", "wait"), ("/torch/cuda/", "synchronize"))
"""Functions by a part of their file's path: for a collective that was begun before, or for the device."""

WAITING_CALLS = (".wait(", ".synchronize(", ".item(", ".tolist(", ".cpu(")
"""In the line of an innermost frame: it calls C, which waits for a collective that was begun, or for the device."""

WAITING_FILES = ("/torch/", "/deepspeed/", "/ds_recipes/engine/", "/ds_recipes/training/", "/ds_recipes/world/")
"""Where those calls are on tensors and collectives."""

PARTS = (
    ("/ds_recipes/engine/", ("backward", "evaluate", "logits"), "forward and backward"),
    ("/ds_recipes/engine/", ("update",), "the optimizer's step"),
    ("/ds_recipes/data/", (), "loading data"),
    ("/ds_recipes/checkpoint/", (), "saving"),
    ("/ds_recipes/training/saving.py", (), "saving"),
    ("/ds_recipes/training/trackers/", (), "logging"),
)
"""(part of a file's path, its functions or all, what they do). Of nested ones the innermost counts."""

MOST_FRAMES = 150


@dataclass(frozen=True)
class Where:
    """What a thread is in, and the function that says so: "all_reduce (deepspeed/comm/comm.py:514)", or empty."""

    part: str
    detail: str = ""

    @property
    def waits(self) -> bool:
        """True in a collective, or while the device is waited for."""
        return self.part == WAIT


_known: dict[tuple[str, str], str | None] = {}
"""Parts by file and function. A code object is no key: it equals one of another file that has the same instructions."""


def where_is(frame: FrameType | None) -> Where:
    """What the thread with this innermost frame is in."""
    if frame is not None and _calls_a_wait(frame.f_code.co_filename, frame.f_lineno):
        return _wait_in(frame)
    for _ in range(MOST_FRAMES):
        if frame is None:
            break
        code = frame.f_code
        place = code.co_filename, code.co_name
        if place not in _known:
            _known[place] = _part_of(*place)
        part = _known[place]
        if part is not None:
            return _wait_in(frame) if part == WAIT else Where(part)
        frame = frame.f_back
    return Where(PYTHON)


def main_frame(main_thread: int) -> FrameType | None:
    """The innermost frame of the main thread, as it is now."""
    return sys._current_frames().get(main_thread)


def _wait_in(frame: FrameType) -> Where:
    return Where(WAIT, f"{frame.f_code.co_name} ({_short(frame.f_code.co_filename)}:{frame.f_lineno})")


@cache
def _calls_a_wait(path: str, line: int | None) -> bool:
    """Some instructions belong to no line."""
    if line is None:
        return False
    return any(part in path for part in WAITING_FILES) and any(
        call in linecache.getline(path, line) for call in WAITING_CALLS
    )


def _part_of(path: str, name: str) -> str | None:
    if any(part in path for part in COLLECTIVES) or any(part in path and name == own for part, own in WAITS):
        return WAIT
    return next((what for part, names, what in PARTS if part in path and (not names or name in names)), None)


def _short(path: str) -> str:
    return "/".join(path.rsplit("/", 3)[1:])
