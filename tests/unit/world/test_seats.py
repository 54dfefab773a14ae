"""The table of ranks: every rank is in exactly one line, and a GPU has the number that its host gives it."""

import pytest
import torch

from ds_recipes.errors import WorldError
from ds_recipes.world.group import World, _device
from ds_recipes.world.resolve import Place
from ds_recipes.world.seats import Seat, gather_seats, seat_table, visible_gpu
from tests.ranks.launch import run_ranks


def test_a_line_for_each_host_and_kind_of_device() -> None:
    seats = [Seat("node1", str(gpu), "NVIDIA H100", "Open MPI") for gpu in (0, 1, 2, 3)]
    seats += [Seat("node2", str(gpu), "NVIDIA H100", "Open MPI") for gpu in (4, 5)] + [
        Seat("node2", None, "CPU", "Open MPI")
    ]
    assert seat_table(seats) == [
        "ranks  host   device                    found by",
        "0-3    node1  NVIDIA H100, GPU 0 1 2 3  Open MPI",
        "4-5    node2  NVIDIA H100, GPU 4 5      Open MPI",
        "6      node2  CPU                       Open MPI",
    ]


def test_a_world_of_one_is_one_line() -> None:
    assert seat_table([Seat("node1", None, "CPU", "a single process")]) == ["one rank on node1: CPU (a single process)"]


@pytest.mark.parametrize(
    "visible, index, name",
    [
        (None, 3, "3"),
        ("", 1, "1"),
        ("6", 0, "6"),
        ("4,5,6,7", 2, "6"),
        ("GPU-8d2a,GPU-9e1b", 1, "GPU-9e1b"),
        ("0", 1, "1"),
    ],
)
def test_gpus_are_named_as_their_host_names_them(visible: str | None, index: int, name: str) -> None:
    assert visible_gpu(index, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == name


@pytest.mark.parametrize("visible, local_rank, index", [(8, 5, 5), (1, 5, 0), (4, 0, 0)])
def test_the_schedulers_binding_is_respected(
    visible: int, local_rank: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is shown one GPU takes it; one that is shown its host's takes the one of its local rank."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert _device(Place(local_rank, 8, local_rank)) == torch.device("cuda", index)


def test_fewer_gpus_than_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(WorldError, match=r"Local rank 2 on .* has no GPU: 2 are visible"):
        _device(Place(2, 4, 2))


def test_every_rank_sees_the_same_table() -> None:
    tables = run_ranks(_table, 2, with_deepspeed=False)
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2 and tables[0][1].startswith("0-1 ") and tables[0][1].endswith("by hand")


def _table(world: World) -> list[str]:
    return seat_table(gather_seats(world, Place(world.rank, world.size, world.rank, source="by hand")))
