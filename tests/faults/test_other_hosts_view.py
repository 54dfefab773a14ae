"""A save that is right where it was written and wrong on the server: another host finds it out before anything older goes."""

import ctypes
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.checkpoint.load import find_newest
from ds_recipes.checkpoint.manifest import MANIFEST
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.checkpoint.store import readers
from ds_recipes.engine.base import Shard
from ds_recipes.errors import SaveError
from ds_recipes.fsops import calls
from ds_recipes.world.group import World, solo
from tests.ranks.launch import run_ranks
from tests.unit.checkpoint.flat_engine import FlatEngine, publish, save, some_tensors

CLONE_NEWNS = 0x00020000
HOSTS = ("alpha", "beta")


def can_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=20))
def test_each_part_is_read_by_one_rank_of_another_host(hosts: list[str]) -> None:
    found = readers(hosts)
    if len(set(hosts)) == 1:
        assert found == list(range(len(hosts)))
        return
    assert all(hosts[reader] != hosts[rank] for rank, reader in enumerate(found))
    most = max(hosts.count(host) for host in hosts)
    least = min(hosts.count(host) for host in hosts)
    assert max(map(found.count, found)) <= -(-most // least)


class HalfEngine(FlatEngine):
    """One of two ranks: the first or the second half of each tensor."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], rank: int) -> None:
        super().__init__(tensors)
        self.rank = rank

    def shards(self) -> Iterator[Shard]:
        for one in super().shards():
            middle = one.length // 2
            start, stop = (0, middle) if self.rank == 0 else (middle, one.length)
            own = (kind[start:stop] for kind in (one.fp32, one.exp_avg, one.exp_avg_sq) if kind is not None)
            yield Shard(one.name, one.shape, start, stop - start, *own)


def publish_third(world: World, folder: str, damaged: str) -> tuple[str, list[str]]:
    """Rank 1, on `beta`, sees a file `damaged` of the third checkpoint otherwise than rank 0, on `alpha`."""
    world.hosts = HOSTS
    read: list[str] = []

    def note(call: calls.Call) -> None:
        if call.kind != "open" or call.path.parent.name != "iter_0000003":
            return
        if call.path.name not in read:
            read.append(call.path.name)
        if world.rank == 1 and call.path.name == damaged:
            look_otherwise(call.path)

    calls.interceptor = note
    try:
        publish(Path(folder), 3, Keep(last=2), HalfEngine(some_tensors(3), world.rank), world)
    except SaveError as error:
        return str(error), read
    finally:
        calls.interceptor = None
    return "", read


def look_otherwise(path: Path) -> None:
    """From now on this process alone sees other content there: in a mount namespace of its own."""
    other = path.parent.parent / "as_beta_sees_it"
    if other.exists():
        return
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    other.write_bytes(content)
    assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", str(other), str(path)], check=True)


@pytest.mark.skipif(not can_mount(), reason="a view of its own needs root and mount namespaces")
@pytest.mark.parametrize("damaged", ["rank-00000-of-00002.safetensors", "state.json", MANIFEST])
def test_the_other_hosts_damaged_view_keeps_the_older_checkpoints(tmp_path: Path, damaged: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (first, _), (second, _) = run_ranks(publish_third, 2, str(tmp_path), damaged, with_deepspeed=False)
    assert first == second and f"{damaged} is damaged" in first and "as beta reads it right after it was saved" in first
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    found = find_newest(tmp_path, solo())
    assert found is not None and found.manifest.step == 2 and not found.skipped


def test_on_two_hosts_each_reads_all_that_the_other_wrote_and_nothing_else(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (first, of_first), (second, of_second) = run_ranks(publish_third, 2, str(tmp_path), "none", with_deepspeed=False)
    assert first == second == ""
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    by_second = {path.name for path in (tmp_path / "iter_0000003").iterdir()} - {"rank-00001-of-00002.safetensors"}
    assert set(of_first) - {"state.json"} == {"rank-00001-of-00002.safetensors"}  # its own it asks for the loss
    assert set(of_second) == by_second
