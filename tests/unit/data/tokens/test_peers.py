"""Ranks find out who shares their folder; long work beside short talk ends for all at once."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.data.tokens import peers as peers_module
from ds_recipes.data.tokens.peers import _connected, find_peers
from ds_recipes.errors import InputError
from ds_recipes.world.together import work_together
from tests.unit.data.made import on_ranks


@pytest.mark.parametrize("folders", ["a", "aaa", "ab", "abab", "abca", "aabbb"])
def test_peers_are_those_with_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: str) -> None:
    monkeypatch.setattr(peers_module, "LOOK_SECONDS", 0.3)
    for name in folders:
        (tmp_path / name).mkdir(exist_ok=True)
    found = on_ranks(len(folders), lambda world: find_peers(world, tmp_path / folders[world.rank]))
    for rank, peers in enumerate(found):
        assert peers.ranks == tuple(other for other, name in enumerate(folders) if name == folders[rank])
        assert peers.ranks[peers.index] == rank
        assert peers.is_leader == (rank == peers.ranks[0])
    assert not list(tmp_path.rglob(".meeting-*"))


@pytest.mark.parametrize(
    "lowest_seen, groups",
    [([0, 0, 0], [0, 0, 0]), ([0, 1, 2], [0, 1, 2]), ([0, 1, 0, 1], [0, 1, 0, 1]), ([0, 0, 1, 2], [0, 0, 0, 0])],
)
def test_who_is_seen_late_is_a_peer_too(lowest_seen: list[int], groups: list[int]) -> None:
    assert _connected(lowest_seen) == groups


def test_all_hear_all_until_the_slowest_has_ended() -> None:
    def run(world: Any) -> tuple[str, list[Any], int]:
        heard: list[Any] = []
        state = {"done": 0}

        def work() -> str:
            for _ in range(1 + 3 * world.rank):
                time.sleep(0.05)
                state["done"] += 1
            return f"result {world.rank}"

        result = work_together(world, "work", work, lambda: state["done"], heard.append, lambda: None)
        return result, heard[-1], len(heard)

    outcomes = on_ranks(3, run)
    assert [result for result, _, _ in outcomes] == ["result 0", "result 1", "result 2"]
    assert len({length for _, _, length in outcomes}) == 1
    for _, last, _ in outcomes:
        assert [word.report for word in last] == [1, 4, 7]
        assert all(word.ended and not word.failed for word in last)


def test_an_error_on_one_rank_is_heard_by_all_while_they_work() -> None:
    def run(world: Any) -> None:
        stop = threading.Event()

        def work() -> None:
            if world.rank == 1:
                raise InputError("a.jsonl:7: is wrong")
            assert stop.wait(20)

        def hear(words: list[Any]) -> None:
            if any(word.failed for word in words):
                stop.set()

        work_together(world, "work", work, lambda: None, hear, stop.set)

    errors = on_ranks(3, run)
    assert [str(error) for error in errors] == ["a.jsonl:7: is wrong"] * 3


def test_who_leaves_gives_up_its_work() -> None:
    given_up = threading.Event()

    def run(world: Any) -> None:
        def hear(_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work_together(world, "work", lambda: given_up.wait(20), lambda: None, hear, given_up.set)

    on_ranks(1, run)
    assert given_up.is_set()
