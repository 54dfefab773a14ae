"""All-reduce and all-gather between the ranks, by size, as nccl-tests define their bandwidths.

Source of the definitions: nccl-tests, doc/PERFORMANCE.md. `S` is the size of the whole array (of an all-gather, what each rank
has at the end). Algorithm bandwidth is S / time; bus bandwidth multiplies it by 2 (n - 1) / n for an all-reduce and by
(n - 1) / n for an all-gather, so that it can be held against a link's rate for any number of ranks.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_recipes.world.group import World

CPU_SIZES = (2**10, 2**14, 2**18, 2**22, 2**25)
GPU_SIZES = (2**10, 2**14, 2**18, 2**22, 2**26, 2**28, 2**30)
SECONDS_A_SIZE = 0.25
MOST_REPETITIONS = 50


@dataclass(frozen=True)
class Row:
    """One size of one collective: mean time of a call over the slowest rank, and bandwidths in 1e9 bytes a second."""

    collective: str
    num_bytes: int
    seconds: float
    algorithm_gb_per_second: float
    bus_gb_per_second: float
    right: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_all(world: World) -> list[Row]:
    """Both collectives, each size. Every rank must call it, and gets the same rows."""
    sizes = GPU_SIZES if world.device.type == "cuda" else CPU_SIZES
    return [_measure(world, collective, size) for collective in ("all-reduce", "all-gather") for size in sizes]


def _measure(world: World, collective: str, num_bytes: int) -> Row:
    share = num_bytes // 4 // world.size
    count = share * world.size
    whole = torch.empty(count, device=world.device)  # [count] float32
    mine = torch.empty(share, device=world.device)  # [share]

    def call() -> None:
        if collective == "all-reduce":
            dist.all_reduce(whole)
        else:
            dist.all_gather_into_tensor(whole, mine)

    whole.fill_(world.rank + 1.0)
    mine.fill_(world.rank + 1.0)
    right = _is_right(world, collective, whole, call)
    whole.zero_()  # sums of many calls would overflow
    first = _timed(world, call, 1)
    (repetitions,) = world.max([min(max(int(SECONDS_A_SIZE / max(first, 1e-6)), 1), MOST_REPETITIONS)])
    seconds = _timed(world, call, repetitions)
    (slowest, wrong) = world.max([seconds, 0.0 if right else 1.0])
    algorithm = 4 * count / slowest / 1e9
    factor = (2 if collective == "all-reduce" else 1) * (world.size - 1) / world.size
    return Row(collective, 4 * count, slowest, algorithm, algorithm * factor, wrong == 0.0)


def _is_right(world: World, collective: str, whole: torch.Tensor, call: Any) -> bool:
    call()
    if collective == "all-reduce":
        return bool((whole == world.size * (world.size + 1) / 2).all())
    expected = torch.arange(1, world.size + 1, device=world.device, dtype=torch.float32)
    return bool((whole.view(world.size, -1) == expected[:, None]).all())


def _timed(world: World, call: Any, repetitions: int) -> float:
    """Mean seconds of a call on this rank, begun together."""
    world.sum([0])
    began = time.monotonic()
    for _ in range(repetitions):
        call()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.monotonic() - began) / repetitions
