"""Ranks that torchrun starts again: when the launch began, who may tell torchrun to end, and which meeting is whose."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from ds_recipes.errors import STOPPED_EARLY
from ds_recipes.world import restarts
from ds_recipes.world.ancestors import Process, read_process
from ds_recipes.world.rendezvous import next_meeting

FIRST_TRY = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}


@pytest.fixture
def agent() -> "Iterator[subprocess.Popen[bytes]]":
    """What stands for torchrun."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def begin(monkeypatch: pytest.MonkeyPatch, agent: "subprocess.Popen[bytes]", **env: str) -> None:
    """As a rank of `agent` with the variables of a first try, changed by `env`."""
    found = read_process(agent.pid)
    assert found is not None
    torchrun = Process(found.pid, found.parent, found.started, ("torchrun", "train.py"), found.state)
    monkeypatch.setattr(restarts, "ancestors", lambda: [torchrun])
    for name in ("_agent", "_speaks_for_host"):
        monkeypatch.setattr(restarts, name, getattr(restarts, name))
    monkeypatch.setattr(restarts, "first_signal", lambda: None)
    for name, value in (FIRST_TRY | env).items():
        monkeypatch.setenv(name, value)
    restarts.begin()


@pytest.mark.parametrize(
    ("status", "env", "heard", "ends"),
    [
        (2, {}, None, True),
        (2, {}, "SIGTERM", True),  # torchrun is about to start the ranks again: another one of them has left before
        (STOPPED_EARLY, {}, None, True),
        (STOPPED_EARLY, {}, "SIGUSR1", True),
        (STOPPED_EARLY, {}, "SIGTERM", False),
        (STOPPED_EARLY, {"TORCHELASTIC_RESTART_COUNT": "2"}, None, True),
        (STOPPED_EARLY, {"TORCHELASTIC_RESTART_COUNT": "3"}, None, False),
        (STOPPED_EARLY, {"LOCAL_RANK": "1"}, None, False),
        (STOPPED_EARLY, {"TORCHELASTIC_MAX_RESTARTS": "0"}, None, False),
        (0, {}, None, False),
        (1, {}, None, False),
        (137, {}, None, False),
    ],
)
def test_one_rank_of_a_host_ends_torchrun_after_a_final_status(
    monkeypatch: pytest.MonkeyPatch,
    agent: "subprocess.Popen[bytes]",
    status: int,
    env: dict[str, str],
    heard: str | None,
    ends: bool,
) -> None:
    begin(monkeypatch, agent, **env)
    monkeypatch.setattr(restarts, "first_signal", lambda: heard)
    said: list[str] = []
    restarts.forbid(status, said.append)
    if ends:
        assert agent.wait(10) == -signal.SIGTERM
        assert len(said) == 1 and f"torchrun (process {agent.pid}) is ended" in said[0]
        restarts.forbid(status, said.append)  # it is gone, and its number may be another's
        assert len(said) == 1
    else:
        time.sleep(0.1)
        assert agent.poll() is None and not said


def test_on_other_hosts_it_is_done_without_a_word(
    monkeypatch: pytest.MonkeyPatch, agent: "subprocess.Popen[bytes]"
) -> None:
    begin(monkeypatch, agent, GROUP_RANK="1")
    said: list[str] = []
    restarts.forbid(2, said.append)
    assert agent.wait(10) == -signal.SIGTERM and not said


def test_the_launch_began_with_torchrun_and_not_with_the_last_try(
    monkeypatch: pytest.MonkeyPatch, agent: "subprocess.Popen[bytes]"
) -> None:
    time.sleep(1)
    now = time.monotonic()
    begin(monkeypatch, agent, TORCHELASTIC_MAX_RESTARTS="0")
    assert restarts.launch_start(now) == now
    begin(monkeypatch, agent, TORCHELASTIC_RESTART_COUNT="1")
    assert now - 60 < restarts.launch_start(now) < now - 0.9
    assert restarts.launch_start(now - 100) == now - 100


def test_ranks_that_are_started_together_meet_whoever_was_there_before() -> None:
    store = HashStore()
    assert [next_meeting(store, rank) for rank in (0, 1, 2)] == [0, 0, 0]
    assert [next_meeting(store, rank) for rank in (2, 0, 1)] == [1, 1, 1]  # all were killed
    assert [next_meeting(store, rank) for rank in (1, 0)] == [2, 2]  # rank 2 is killed before it comes
    store.set("2/failure/failure", "rank 0 has missed it")
    assert [next_meeting(store, rank) for rank in (2, 1, 0)] == [3, 3, 3]
