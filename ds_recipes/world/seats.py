"""Who sits where: each rank's host and device and how it was found, as lines of a table that is printed once."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ds_recipes.world.group import World
from ds_recipes.world.resolve import Place


@dataclass(frozen=True)
class Seat:
    """One rank's place. `gpu` is the GPU as its host numbers it, before CUDA_VISIBLE_DEVICES; None on a CPU."""

    host: str
    gpu: str | None
    device: str
    source: str


def gather_seats(world: World, place: Place) -> list[Seat]:
    """Every rank's seat, by rank. Every rank must call it."""
    return world.gather(_seat(world, place, os.environ))


def seat_table(seats: Sequence[Seat]) -> list[str]:
    """A heading and a line for each stretch of ranks that share host, kind of device and launcher; one line for one rank."""
    if len(seats) == 1:
        return [f"one rank on {seats[0].host}: {_devices(seats)} ({seats[0].source})"]
    rows = [("ranks", "host", "device", "found by")]
    first = 0
    for rank in range(1, len(seats) + 1):
        if rank == len(seats) or _kind(seats[rank]) != _kind(seats[first]):
            here = seats[first:rank]
            ranks = str(first) if len(here) == 1 else f"{first}-{rank - 1}"
            rows.append((ranks, here[0].host, _devices(here), here[0].source))
            first = rank
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]


def visible_gpu(index: int, env: Mapping[str, str]) -> str:
    """What the host calls the GPU that this process knows by `index`: a number, or a name such as GPU-8d2a...

    Source: CUDA's programming guide, "CUDA Environment Variables".
    """
    visible = [name.strip() for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[index] if index < len(visible) else str(index)


def _seat(world: World, place: Place, env: Mapping[str, str]) -> Seat:
    host = world.hosts[world.rank]
    if world.device.type != "cuda":
        return Seat(host, None, "CPU", place.source)
    gpu = visible_gpu(world.device.index, env)
    return Seat(host, gpu, torch.cuda.get_device_name(world.device), place.source)


def _kind(seat: Seat) -> tuple[str, str, str]:
    return seat.host, seat.device, seat.source


def _devices(seats: Sequence[Seat]) -> str:
    gpus = [seat.gpu for seat in seats if seat.gpu is not None]
    return f"{seats[0].device}, GPU {' '.join(gpus)}" if gpus else seats[0].device
