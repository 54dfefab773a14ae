"""Uploads that break off: what has arrived is not sent again, and nobody sees half a model."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_recipes.world.channel import wait_until
from tests.e2e.hub_user import NAME, User, contents
from tests.e2e.launchers import environment
from tests.hub_store import hub_store
from tests.unit.checkpoint.test_hub import TOKEN, make_model


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    with hub_store(tokens={TOKEN: "write"}) as (address, store):
        yield User(tmp_path, address, store)


def kill_and_wait(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=20)


def test_after_a_kill_only_what_is_missing_is_sent(user: User, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", shards=4, words=60_000)
    running: list[subprocess.Popen[str]] = []

    def third_breaks_off(number: int) -> bool:
        while number >= 3 and len(user.store.stored) < 2:
            time.sleep(0.01)
        if number >= 3:
            kill_and_wait(running[0])
        return number >= 3

    user.store.on_put = third_breaks_off
    running.append(subprocess.Popen(user.words(model, "--branch", "b"), env=environment(user.env), text=True))
    assert running[0].wait(timeout=30) == -signal.SIGKILL
    arrived = list(user.store.stored)
    assert len(arrived) == 2 and not user.store.files(NAME, "b"), "half a model is visible to nobody"
    user.store.on_put = lambda number: False
    user.succeeds(model, "--branch", "b")
    assert user.store.files(NAME, "b") == contents(model)
    assert len(user.store.stored) == 4 and not set(arrived) & set(user.store.stored[2:])


def test_after_a_kill_whole_files_are_not_sent_again_with_xet(user: User, tmp_path: Path) -> None:
    """Random content, which does not compress, in files that are large for the hub.

    What may come again is the file under way, and the one that arrived when its sender could no longer note it.
    """
    model = make_model(tmp_path / "hf", shards=3)
    for number, path in enumerate(sorted(model.glob("*.safetensors"))):
        header = json.dumps(
            {f"w{number}": {"dtype": "U8", "shape": [11_000_000], "data_offsets": [0, 11_000_000]}}
        ).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + os.urandom(11_000_000))
    running: list[subprocess.Popen[str]] = []
    xorbs: list[str] = []

    def third_breaks_off(asked: str) -> None:
        xorbs.extend([asked] if "/v1/xorbs/" in asked else [])
        if len(xorbs) >= 3 and running[0].returncode is None:
            wait_until(lambda: len(user.store.objects) == 2, 20)
            kill_and_wait(running[0])

    user.store.on_ask = third_breaks_off
    env = {"HF_HUB_DISABLE_XET": "0"}
    running.append(subprocess.Popen(user.words(model), env=environment(user.env | env), text=True))
    assert running[0].wait(timeout=30) == -signal.SIGKILL
    assert len(user.store.objects) == 2 and not user.store.files(NAME, "main")
    before = user.store.xet.received_bytes
    user.succeeds(model, **env)
    assert user.store.files(NAME, "main") == contents(model)
    assert user.store.xet.received_bytes - before < 2 * 11_100_000


def test_a_dropped_connection_is_tried_again(user: User, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", words=60_000)
    user.store.on_put = lambda number: number == 1
    output = user.succeeds(model)
    assert "Retrying" in output and "0123456789abcdef" not in output, "the storage's signature stays out of logs"
    assert user.store.files(NAME, "main") == contents(model)


def test_an_interrupt_does_not_wait_for_files_on_their_way(user: User, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hang(number: int) -> bool:
        begun.set()
        return go_on.wait(20)

    user.store.on_put = hang
    process = subprocess.Popen(user.words(make_model(tmp_path / "hf")), env=environment(user.env), text=True)
    assert begun.wait(20)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 1
    go_on.set()
