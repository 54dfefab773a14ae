"""A checkpoint that is written beside training holds the state of its step, takes memory once, and never fails in silence."""

import json
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from ds_recipes.checkpoint import host_memory, saver, snapshot
from ds_recipes.checkpoint.files import why_damaged
from ds_recipes.checkpoint.manifest import read_manifest
from ds_recipes.checkpoint.rank_file import KINDS, OwnRange, Streamed, own_ranges
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.checkpoint.saver import Saver
from ds_recipes.checkpoint.snapshot import Snapshot
from ds_recipes.checkpoint.store import Store
from ds_recipes.engine.base import Shard
from ds_recipes.errors import SaveError, TrainingError
from ds_recipes.fsops import calls
from ds_recipes.world.group import solo
from tests.unit.checkpoint.flat_engine import FlatEngine, contents, some_tensors


class LiveEngine(FlatEngine):
    """One whose shards are the tensors themselves, so that training in place changes what they show."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.moments = {name: (torch.rand(t.numel()), torch.rand(t.numel())) for name, t in tensors.items()}

    def shards(self) -> Any:
        for name, tensor in self.tensors.items():
            yield Shard(name, tuple(tensor.shape), 0, tensor.numel(), tensor.view(-1), *self.moments[name])

    def train(self) -> None:
        for shard in self.shards():
            for kind in KINDS:
                getattr(shard, kind).add_(1)


@pytest.fixture(autouse=True)
def no_interceptor():
    yield
    calls.interceptor = None


def saver_of(folder: Path, said: list[str] | None = None) -> Saver:
    world = solo()
    lines = said if said is not None else []
    return Saver(Store(folder, world, "test-1", Keep()), world, save_optimizer=True, say=lines.append)


def ranges_of(engine: FlatEngine) -> tuple[OwnRange, ...]:
    return own_ranges(engine.shards(), solo(), save_optimizer=True)


def file_bytes(part: Any, folder: Path) -> bytes:
    folder.mkdir()
    (name,) = part.write(folder).files
    return (folder / name).read_bytes()


@pytest.mark.parametrize("chunk", [1, 3, 16, 1 << 20])
def test_a_snapshot_is_the_shards_bit_for_bit_and_stays_so(tmp_path: Path, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(snapshot, "CHUNK_VALUES", chunk)
    engine = LiveEngine(some_tensors())
    copy = Snapshot(ranges_of(engine), pinned=False)
    copy.take(engine)
    direct = file_bytes(Streamed(engine, ranges_of(engine)), tmp_path / "direct")
    engine.train()
    assert file_bytes(copy, tmp_path / "copy") == direct
    assert len(direct) == copy.num_bytes
    copy.take(engine)
    assert file_bytes(copy, tmp_path / "later") != direct


def test_twenty_saves_take_the_memory_of_one(tmp_path: Path) -> None:
    engine = LiveEngine({f"w{number}": torch.rand(500, 500) for number in range(4)})
    copy = Snapshot(ranges_of(engine), pinned=False)
    places, resident = set(), []
    for number in range(20):
        copy.take(engine)
        copy.write(_made(tmp_path / str(number)))
        places.add(tuple(piece.data_ptr() for piece in copy._chunks))
        resident.append(_anonymous_bytes())
        engine.train()
    assert len(places) == 1
    assert max(resident[2:]) - resident[2] < 4 << 20, "of 12 MB a save"


def test_parts_are_the_header_and_the_bytes_of_one_kind(tmp_path: Path) -> None:
    """The recipe of docs/checkpoints.md, followed by hand."""
    engine = LiveEngine(some_tensors())
    copy = Snapshot(ranges_of(engine), pinned=False)
    copy.take(engine)
    ((name, record),) = copy.write(_made(tmp_path / "x")).files.items()
    raw = (tmp_path / "x" / name).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    table.pop("__metadata__")
    for kind in KINDS:
        spans = [entry["data_offsets"] for key, entry in table.items() if key.startswith(f"{kind}/")]
        own = b"".join(raw[8 + length + begin : 8 + length + end] for begin, end in sorted(spans))
        assert record.parts[kind] == xxhash.xxh3_128_hexdigest(raw[: 8 + length] + own)
    assert record.xxh3_128 == xxhash.xxh3_128_hexdigest(raw)


def test_training_goes_on_while_it_is_written_and_the_files_hold_the_step_of_the_save(tmp_path: Path) -> None:
    engine, at_write, go_on = LiveEngine(some_tensors()), threading.Event(), threading.Event()
    expected = file_bytes(Streamed(engine, ranges_of(engine)), tmp_path / "expected")

    def hold(call: calls.Call) -> None:
        if call.kind == "write" and "rank-" in call.path.name:
            at_write.set()
            assert go_on.wait(10)

    under_test = saver_of(tmp_path / "run")
    calls.interceptor = hold
    state = {"position": [5]}
    under_test.begin(contents(engine, 1, state), engine, in_background=True)
    assert at_write.wait(10) and under_test.is_busy
    engine.train()
    engine.optimizer_step = 99
    state["position"][0] = 6
    assert not list((tmp_path / "run").glob("iter_*")), "nothing is published yet"
    go_on.set()
    saved = under_test.outcome()
    assert saved is not None and not under_test.is_busy and under_test.outcome() is None
    path = saved.published.path
    assert (path / "rank-00000-of-00001.safetensors").read_bytes() == expected
    manifest = read_manifest(path)
    assert manifest.optimizer_step == 7 and json.loads((path / "state.json").read_text())["position"] == [5]
    assert all(why_damaged(path / name, record) is None for name, record in manifest.files.items())


def test_no_second_one_begins_before_the_first_is_heard_of(tmp_path: Path) -> None:
    engine = LiveEngine(some_tensors())
    under_test = saver_of(tmp_path)
    under_test.begin(contents(engine, 1), engine, in_background=True)
    with pytest.raises(AssertionError):
        under_test.begin(contents(engine, 2), engine, in_background=True)
    under_test.outcome()


@pytest.mark.parametrize("in_background", [True, False])
def test_what_goes_wrong_in_the_writer_is_raised_where_its_end_is_heard_of(tmp_path: Path, in_background: bool) -> None:
    def fail(call: calls.Call) -> None:
        if call.kind == "fsync":
            raise OSError(28, "No space left on device", str(call.path))

    engine, under_test = LiveEngine(some_tensors()), saver_of(tmp_path)
    calls.interceptor = fail
    under_test.begin(contents(engine, 1), engine, in_background)
    with pytest.raises(SaveError, match=r"rank-00000.*No space left"):
        under_test.outcome()
    calls.interceptor = None
    under_test.begin(contents(engine, 1), engine, in_background)
    assert under_test.outcome() is not None


@pytest.mark.parametrize("end", [SystemExit, MemoryError, None])
def test_a_writer_that_dies_is_noticed(tmp_path: Path, monkeypatch, end: type[BaseException] | None) -> None:
    engine, under_test = LiveEngine(some_tensors()), saver_of(tmp_path)
    if end is None:
        monkeypatch.setattr(Saver, "_write", lambda *_: None)  # a thread that ends without a word
    else:
        monkeypatch.setattr(Store, "publish", _raising(end))
    under_test.begin(contents(engine, 1), engine, in_background=True)
    with pytest.raises(MemoryError if end is MemoryError else TrainingError):
        under_test.outcome()


def test_without_memory_it_is_said_once_and_training_waits(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(saver, "available_bytes", lambda: 1500)
    said: list[str] = []
    engine, under_test = LiveEngine(some_tensors()), saver_of(tmp_path, said)
    for step in (1, 2):
        under_test.begin(contents(engine, step), engine, in_background=True)
        assert not under_test.is_busy
        saved = under_test.outcome()
        assert saved is not None and saved.published.path.exists()
    assert len(said) == 1 and "training waits while checkpoints are written" in said[0]


def test_memory_that_cannot_be_taken_is_done_without(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(saver, "Snapshot", refuse)
    said: list[str] = []
    engine, under_test = LiveEngine(some_tensors()), saver_of(tmp_path, said)
    for step in (1, 2):
        under_test.prepare(engine)
        under_test.begin(contents(engine, step), engine, in_background=True)
        saved = under_test.outcome()
        assert saved is not None and saved.published.path.exists()
    assert len(said) == 1 and "could not be taken" in said[0]


def test_memory_is_taken_ahead_and_only_once(tmp_path: Path, monkeypatch) -> None:
    made: list[Snapshot] = []
    monkeypatch.setattr(saver, "Snapshot", lambda *args, **kwargs: made.append(Snapshot(*args, **kwargs)) or made[-1])
    engine, under_test = LiveEngine(some_tensors()), saver_of(tmp_path)
    for step in range(1, 4):
        under_test.prepare(engine)
        under_test.begin(contents(engine, step), engine, in_background=True)
        assert under_test.outcome() is not None
    assert len(made) == 1


def test_memory_is_what_the_kernel_says_or_what_the_control_groups_leave(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    (tmp_path / "own").write_text("0::/job/step\n")
    for name, value in (("MEMORY_INFO", "meminfo"), ("OWN_GROUP", "own"), ("GROUPS", "groups")):
        monkeypatch.setattr(host_memory, name, tmp_path / value)
    assert host_memory.available_bytes() == 5000 * 1024
    for group, most, used, cache in (("job/step", "max", 0, 0), ("job", "3000000", 2500000, 400000)):
        folder = tmp_path / "groups" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    assert host_memory.available_bytes() == 900_000
    (tmp_path / "meminfo").unlink()
    assert host_memory.available_bytes() == 0


def _raising(kind: type[BaseException]) -> Any:
    def publish(*_: Any) -> None:
        time.sleep(0.01)
        raise kind("on purpose")

    return publish


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def test_the_memory_of_a_host_is_shared_by_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "available_bytes", lambda: 10_000)
    said: list[str] = []
    one = saver_of(tmp_path, said)
    for hosts, has_room in ((("a",), True), (("a", "b"), True), (("a", "a"), False), (("a", "b", "a"), False)):
        one._world.hosts = hosts
        assert one._has_room(4_500) is has_room, hosts
    assert len(said) == 2 and "0.0 GB that are free for each rank of this host" in said[0]
