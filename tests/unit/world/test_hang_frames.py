"""Where a thread is, read from frames of files that only have the right names; and NCCL's variables."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from ds_recipes.world.hang.frames import PYTHON, WAIT, where_is
from ds_recipes.world.hang.nccl import PREFIX, nccl_settings, prepare_nccl

SITE = "/venv/lib/python3/site-packages"


def function(path: str, name: str, calls: Callable[[], FrameType]) -> Callable[[], FrameType]:
    """A function of this name in a file of this name, which returns what `calls` does."""
    scope: dict[str, Callable[[], FrameType]] = {"calls": calls}
    exec(compile(f"def {name}():\n    return calls()\n", path, "exec"), scope)
    return scope[name]


def frame_in(*places: tuple[str, str]) -> FrameType:
    """The innermost frame of calls through these (file, function), the outermost first."""
    innermost: Callable[[], FrameType] = sys._getframe
    for path, name in reversed(places):
        innermost = function(path, name, innermost)
    return innermost()


LOOP = ("/here/ds_recipes/training/loop.py", "_train")
BACKWARD = ("/here/ds_recipes/engine/zero3/step.py", "backward")


@pytest.mark.parametrize(
    ("places", "part"),
    [
        ([LOOP], PYTHON),
        ([LOOP, BACKWARD, (f"{SITE}/torch/nn/modules/linear.py", "forward")], "forward and backward"),
        ([LOOP, ("/here/ds_recipes/engine/fsdp2/step.py", "update")], "the optimizer's step"),
        ([LOOP, ("/here/ds_recipes/data/stream.py", "take"), ("/here/threading.py", "wait")], "loading data"),
        ([LOOP, ("/here/ds_recipes/training/saving.py", "save"), ("/here/ds_recipes/engine/zero3/step.py", "shards")], "saving"),
        ([LOOP, BACKWARD, (f"{SITE}/deepspeed/comm/comm.py", "all_reduce")], WAIT),
        ([LOOP, BACKWARD, (f"{SITE}/deepspeed/runtime/zero/partition_parameters.py", "wait")], WAIT),
        ([LOOP, ("/here/ds_recipes/world/group.py", "sum"), (f"{SITE}/torch/distributed/distributed_c10d.py", "all_reduce")], WAIT),
        ([LOOP, (f"{SITE}/torch/cuda/streams.py", "synchronize")], WAIT),
        ([LOOP, BACKWARD, (f"{SITE}/torch/distributed/tensor/_dispatch.py", "dispatch")], "forward and backward"),
    ],
)  # fmt: skip
def test_the_innermost_frame_that_says_something_counts(places: list[tuple[str, str]], part: str) -> None:
    where = where_is(frame_in(*places))
    assert where.part == part
    assert where.waits == (part == WAIT)
    if where.waits:
        assert places[-1][1] in where.detail and Path(places[-1][0]).name in where.detail
    assert where_is(None).part == PYTHON


def test_a_call_of_c_that_waits_is_seen_by_its_line(tmp_path: Path) -> None:
    """DeepSpeed waits for a handle of C++ in the middle of functions that do other things too."""
    folder = tmp_path / "deepspeed"
    folder.mkdir()
    for line, waits in (("return    handle.wait()", True), ("return handle.begin()", False)):
        file = folder / f"{waits}.py"
        file.write_text(f"def gather(handle):\n    {line}\n")
        scope: dict[str, Callable[[Any], FrameType]] = {}
        exec(compile(file.read_text(), str(file), "exec"), scope)
        handle = SimpleNamespace(wait=partial(sys._getframe), begin=partial(sys._getframe))
        assert where_is(scope["gather"](handle)).waits == waits


def test_nccl_records_and_writes_into_the_run_folder_and_waits_longer_than_the_monitor(tmp_path: Path) -> None:
    env: dict[str, str] = {}
    prepare_nccl(env, tmp_path, 1920.0)
    assert env == nccl_settings(tmp_path, 1920.0)
    assert env["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/{PREFIX}"
    assert env["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "1920"
    assert int(env["TORCH_FR_BUFFER_SIZE"]) > 0 and env["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"


def test_what_the_user_has_set_stays_under_either_name(tmp_path: Path) -> None:
    own = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
        "TORCH_FR_DUMP_TEMP_FILE": "/own/rank",
        "NCCL_ASYNC_ERROR_HANDLING": "0",
    }
    env = dict(own)
    prepare_nccl(env, tmp_path, 60.0)
    assert env.items() >= own.items()
    assert not env.keys() & {
        "TORCH_FR_BUFFER_SIZE",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    }


def test_the_names_are_those_that_this_torch_reads() -> None:
    import torch

    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    text = "".join((headers / name).read_text() for name in ("ProcessGroupNCCL.hpp", "FlightRecorder.hpp"))
    names = [name for name in nccl_settings(Path("x"), 1.0) if name != "TORCH_FR_DUMP_TEMP_FILE"]  # read in a .cpp file
    assert [name for name in names if f'"{name}"' not in text] == []
