"""Hostfiles, ports, and processes that a launcher has left behind."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_recipes.cluster.hostfile import HostSlots, read_hostfile, write_hostfile
from ds_recipes.cluster.leftovers import end_ranks, end_ranks_here, find_ranks
from ds_recipes.cluster.ports import choose_port, is_free, is_here
from ds_recipes.errors import WorldError
from ds_recipes.world.resolve import PORTS, derived_port

TOOL = Path(__file__).resolve().parents[3] / "tools" / "judge_launch.py"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_both_launchers_forms_are_read(tmp_path: Path) -> None:
    text = "# hosts\n\ngpu-01.site slots=8\n  gpu-02   slots=4 max_slots=8 # note\ngpu3\ngpu4:2\n10.0.0.5 slots=08\n"
    assert read_hostfile(write(tmp_path / "hosts", text)) == [
        HostSlots("gpu-01.site", 8), HostSlots("gpu-02", 4), HostSlots("gpu3"), HostSlots("gpu4", 2), HostSlots("10.0.0.5", 8),
    ]  # fmt: skip


def test_what_is_written_is_read_back_and_is_what_deepspeed_reads(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    hosts = [HostSlots("a", 8), HostSlots("b-1.c", 16)]
    write_hostfile(tmp_path / "hosts", hosts)
    assert read_hostfile(tmp_path / "hosts") == hosts
    assert dict(fetch_hostfile(str(tmp_path / "hosts"))) == {"a": 8, "b-1.c": 16}


def test_every_wrong_line_is_told(tmp_path: Path) -> None:
    text = "a slots=2\nb slots=\nc slots=0\na slots=2\nd 8\nslots=3\ne slots=2 slots=3\nf slots=-1\n"
    with pytest.raises(WorldError) as caught:
        read_hostfile(write(tmp_path / "hosts", text))
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0].rpartition(":")[2] for line in lines] == ["2", "3", "4", "5", "6", "7", "8"]
    assert "line 1 already" in lines[2]


@pytest.mark.parametrize("text", ["", "\n# nothing\n"])
def test_a_file_without_hosts_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="names no host"):
        read_hostfile(write(tmp_path / "hosts", text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="this machine alone"):
        read_hostfile(tmp_path / "none")


def test_a_port_is_the_jobs_own_and_free() -> None:
    assert choose_port("1.1", "elsewhere.invalid") == derived_port("1.1") in PORTS
    assert len({derived_port(f"{job}.1") for job in range(200)}) > 190
    with socket.socket() as other:
        job = next(f"{number}.x" for number in range(1000) if is_free(derived_port(f"{number}.x")))
        other.bind(("0.0.0.0", derived_port(job)))
        other.listen(1)
        assert not is_free(derived_port(job))
        chosen = choose_port(job, "localhost")
        assert chosen != derived_port(job)
        assert is_free(chosen)


def test_this_machine_is_known_by_its_names() -> None:
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1")  # a documentation address
    assert not is_here("no-such-host.invalid")


def test_ranks_that_are_left_are_ended_and_nothing_else_is(tmp_path: Path) -> None:
    mark = f"test-{os.getpid()}.1"
    stubborn = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"]
    left = subprocess.Popen(stubborn, env={**os.environ, "DS_RECIPES_LAUNCH": mark})
    other = subprocess.Popen(stubborn, env={**os.environ, "DS_RECIPES_LAUNCH": mark + "0"})
    try:
        deadline = time.monotonic() + 30
        while find_ranks(mark) != [left.pid]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lines = end_ranks(mark, ["localhost"], TOOL, grace_seconds=0.3)
        assert lines == ["localhost: 1 processes outlived their launcher and were killed"]
        assert left.wait(timeout=10) == -9
        assert other.poll() is None
        assert end_ranks_here(mark, grace_seconds=5) == 0  # at once: there is nothing to wait for
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


def test_a_host_that_cannot_be_reached_is_named() -> None:
    lines = end_ranks("none.1", ["no-such-host.invalid"], TOOL, grace_seconds=0.1)
    assert len(lines) == 1
    assert lines[0].startswith("no-such-host.invalid: ")
