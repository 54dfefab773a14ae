"""What the ranks of a world tell each other, on three ranks that share one start."""

import logging
import os
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from ds_recipes.errors import ConfigError, DsRecipesError, InputError, PeerFailure
from ds_recipes.world import channel
from ds_recipes.world.channel import wait_until
from ds_recipes.world.group import World, solo
from tests.ranks.launch import RanksFailed, run_ranks

RANKS = 3


def conversation(world: World) -> dict[str, Any]:
    """Every operation once, with arguments that differ from rank to rank."""
    rank = world.rank
    return {
        "sum": world.sum([rank, 2**52 // RANKS, 0.1 * rank]),
        "max": world.max([rank, -1.5 * rank]),
        "gather": world.gather({"rank": rank, "text": "x" * 10 * rank}),
        "arrays": world.gather_array(np.full((rank, 2), rank, dtype=np.int32)),
        "empty": world.gather_array(np.zeros((0,), dtype=np.float64)),
        "tensors": world.gather_tensor(torch.full((2 * rank,), float(rank))),
        "broadcast": world.broadcast(("from", rank)),
        "hosts": world.hosts,
        "environment": {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")},
        "checks": verdicts(world),
        "late": lateness(world),
        "shm_op": deepspeed_has_its_shared_memory_op(),
        "log_level": logging.getLogger("DeepSpeed").level,
        "warned": warned_by_deepspeed(),
        "stopping": stopping(world),
    }


def verdicts(world: World) -> dict[str, tuple[str, str]]:
    """What each kind of check raises here. A rank's own number is in its message."""

    def attempt(fn: Any) -> tuple[str, str]:
        try:
            return "returned", str(world.check("the files", fn))
        except Exception as error:
            return type(error).__name__, str(error)

    def refuse(ranks: tuple[int, ...], error: Exception) -> Any:
        def fn() -> int:
            if world.rank in ranks:
                raise error
            return world.rank

        return fn

    return {
        "none": attempt(refuse((), InputError("-"))),
        "one": attempt(refuse((1,), InputError("data.jsonl: missing"))),
        "all": attempt(refuse((0, 1, 2), InputError("data.jsonl: missing"))),
        "two different": attempt(refuse((0, 2), InputError(f"problem {world.rank}"))),
        "config": attempt(refuse((2,), ConfigError(["first", "second"]))),
        "a bug": attempt(refuse((1,), KeyError("hidden_size"))),
        "a bug and a refusal": attempt(refuse((0, 1), [InputError("no"), OSError("disk"), OSError("-")][world.rank])),
    }


def stopping(world: World) -> dict[str, Any]:
    """How a wish to stop, which rank 2 alone has, comes to the others, and what it does to checks."""

    def refuse() -> None:
        raise InputError("no")

    def attempt(fn: Any) -> tuple[str, str]:
        try:
            return "returned", str(world.check("the files", fn))
        except Exception as error:
            return type(error).__name__, str(error)

    before = world.heard_stop()
    world.heed(lambda: "signal SIGTERM" if world.rank == 2 else None)
    asked = attempt(lambda: "done")
    refused = attempt(lambda: refuse() if world.rank == 1 else None)
    assert channel.current is not None
    channel.current.wish = world.wish_to_stop
    heard = wait_until(lambda: world.heard_stop() is not None, 1.5)  # two polls, and some patience
    broken_off = attempt(lambda: [world.break_off_if_asked(), time.sleep(60)] if world.rank == 0 else None)
    world.heed(None)
    unheeded = attempt(world.break_off_if_asked)
    return {
        "heard": (before, heard and world.heard_stop()),
        "checks": {"asked": asked, "refused": refused, "broken off": broken_off, "unheeded": unheeded},
    }


def lateness(world: World) -> tuple[str, float] | None:
    """A barrier that rank 2 reaches too late, on a group that goes on to serve."""
    started = time.monotonic()
    if world.rank == 2:
        time.sleep(2.5)
    try:
        world.barrier("the publish", timeout_seconds=1)
    except PeerFailure as error:
        return str(error), time.monotonic() - started
    return None


def deepspeed_has_its_shared_memory_op() -> bool:
    import deepspeed

    return deepspeed.comm.comm.cdb.shm_comm_op is not None


def warned_by_deepspeed() -> list[str]:
    """FutureWarnings that come through: torch's for the collectives that DeepSpeed uses must not, others must."""
    import deepspeed

    with warnings.catch_warnings(record=True) as caught:
        out, part = torch.zeros(RANKS), torch.ones(1)
        deepspeed.comm.all_gather_into_tensor(out, part)
        warnings.warn("something else", FutureWarning, stacklevel=1)
    return [str(warning.message) for warning in caught]


@pytest.fixture(scope="module")
def heard() -> list[dict[str, Any]]:
    return run_ranks(conversation, RANKS)


def test_sums_and_maxima_keep_integers_exact(heard: list[dict[str, Any]]) -> None:
    for report in heard:
        assert report["sum"] == [3, 2**52 // RANKS * RANKS, pytest.approx(0.3)]
        assert [type(value) for value in report["sum"]] == [int, int, float]
        assert report["max"] == [2, 0.0]


def test_objects_arrays_and_tensors_arrive_by_rank(heard: list[dict[str, Any]]) -> None:
    for report in heard:
        assert [entry["rank"] for entry in report["gather"]] == [0, 1, 2]
        assert [array.tolist() for array in report["arrays"]] == [[], [[1, 1]], [[2, 2], [2, 2]]]
        assert [array.dtype for array in report["arrays"]] == [np.dtype(np.int32)] * RANKS
        assert [array.shape for array in report["arrays"]] == [(0, 2), (1, 2), (2, 2)]
        assert [array.size for array in report["empty"]] == [0, 0, 0]
        assert [tensor.tolist() for tensor in report["tensors"]] == [[], [1.0, 1.0], [2.0] * 4]
        assert report["broadcast"] == ("from", 0)
        assert len(set(report["hosts"])) == 1


def test_libraries_find_the_variables_of_their_launcher(heard: list[dict[str, Any]]) -> None:
    for rank, report in enumerate(heard):
        assert report["environment"] == {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank),
            "LOCAL_SIZE": "3",
        }


def test_deepspeed_needs_no_compiled_op_and_is_quiet(heard: list[dict[str, Any]]) -> None:
    assert [report["shm_op"] for report in heard] == [False] * RANKS
    assert [report["log_level"] for report in heard] == [logging.WARNING, logging.ERROR, logging.ERROR]
    assert [report["warned"] for report in heard] == [["something else"]] * RANKS


def test_a_check_succeeds_everywhere_or_fails_everywhere(heard: list[dict[str, Any]]) -> None:
    assert [report["checks"]["none"] for report in heard] == [("returned", "0"), ("returned", "1"), ("returned", "2")]
    for case, expected in {
        "one": ("InputError", "data.jsonl: missing (rank 1)"),
        "all": ("InputError", "data.jsonl: missing"),
        "two different": ("InputError", "problem 0 (rank 0)\nproblem 2 (rank 2)"),
        "config": ("ConfigError", "first\nsecond (rank 2)"),
    }.items():
        assert [report["checks"][case] for report in heard] == [expected] * RANKS, case


def test_a_bug_in_a_check_is_raised_where_it_is_and_reported_elsewhere(heard: list[dict[str, Any]]) -> None:
    elsewhere = ("PeerFailure", "Rank 1 failed in the files: KeyError: 'hidden_size'")
    assert [report["checks"]["a bug"] for report in heard] == [elsewhere, ("KeyError", "'hidden_size'"), elsewhere]
    elsewhere = ("PeerFailure", "Rank 1 failed in the files: OSError: disk")
    assert [report["checks"]["a bug and a refusal"] for report in heard] == [elsewhere, ("OSError", "disk"), elsewhere]


def test_a_wish_to_stop_is_heard_within_two_polls_and_ends_the_next_check(heard: list[dict[str, Any]]) -> None:
    line = "Stopped before the first step: signal SIGTERM, during the files. Nothing was trained; what was tokenised stays."
    for report in heard:
        assert report["stopping"]["heard"] == (None, "signal SIGTERM")
        assert report["stopping"]["checks"] == {
            "asked": ("StoppedEarly", line),
            "refused": ("InputError", "no (rank 1)"),
            "broken off": ("StoppedEarly", line),
            "unheeded": ("returned", "None"),
        }


def test_a_barrier_names_the_rank_that_is_late(heard: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        text, seconds = heard[rank]["late"]
        assert text.startswith("Rank 2 did not reach 'the publish' within 1 s")
        assert seconds < 2.4


def test_a_world_of_one_needs_no_group() -> None:
    world = solo()
    assert (world.rank, world.size) == (0, 1)
    assert world.sum([1, 2.5]) == [1, 2.5]
    assert world.max([3]) == [3]
    assert world.gather("a") == ["a"]
    assert world.broadcast("a") == "a"
    assert world.gather_array(np.arange(3))[0].tolist() == [0, 1, 2]
    assert world.gather_tensor(torch.arange(3))[0].tolist() == [0, 1, 2]
    assert world.check("the files", lambda: 7) == 7
    world.barrier("the end")
    world.close()
    with pytest.raises(InputError, match="missing"):
        world.check("the files", lambda: (_ for _ in ()).throw(InputError("missing")))


def test_a_world_of_one_can_have_a_group() -> None:
    assert run_ranks(total, 1) == [[1]]


def total(world: World) -> list[int]:
    return world.sum([torch.distributed.get_world_size()])


def stumble(world: World) -> None:
    if world.rank == 1:
        raise DsRecipesError("rank 1 stumbled")
    world.barrier("forever")


def test_the_harness_shows_every_ranks_traceback() -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(stumble, 2, with_deepspeed=False)
    assert "rank 1 stumbled" in str(caught.value)
    assert all("Traceback" in part for part in str(caught.value).split("---- rank")[1:])
    assert "did not reach" not in str(caught.value)  # its connection broke: no rank was late


def sleep(world: World) -> None:
    if world.rank == 1:
        time.sleep(60)


def test_the_harness_ends_ranks_at_the_time_limit_and_says_where_they_were() -> None:
    started = time.monotonic()
    with pytest.raises(RanksFailed, match="not done within 6 s") as caught:
        run_ranks(sleep, 2, with_deepspeed=False, timeout=6)
    assert time.monotonic() - started < 15
    assert "in sleep" in str(caught.value)
