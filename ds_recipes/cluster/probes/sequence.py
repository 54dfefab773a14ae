"""The probes in their order: what torch and DeepSpeed say of themselves, the meeting, the links, one step."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_recipes.cluster.probes.bandwidth import measure_all
from ds_recipes.cluster.probes.installed import about_deepspeed, about_torch
from ds_recipes.cluster.probes.zero3_step import take_step
from ds_recipes.world.group import start
from ds_recipes.world.resolve import resolve

START_SECONDS = 120.0
"""Some hosts have torch in their file cache and some have not, so they come to the meeting a minute or more apart."""

COLLECTIVE_SECONDS = 60.0


def run_all(tell: Callable[[str, Any], None], enter: Callable[[str], None]) -> None:
    """Every rank must call it. `tell` reports a result, `enter` the phase that comes next."""
    tell("torch", about_torch())
    tell("deepspeed", about_deepspeed())
    enter("start")
    world = start(resolve(os.environ), START_SECONDS, collective_timeout_seconds=COLLECTIVE_SECONDS)
    if world.size > 1:
        enter("bandwidth")
        world.doing("measuring the bandwidth")
        tell("bandwidth", [row.to_json() for row in measure_all(world)])
    enter("step")
    world.doing("the ZeRO-3 step")
    tell("step", take_step(world))
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tell("process", {"open_files": len(list(Path("/proc/self/fd").iterdir())), "peak_bytes": peak_kib * 1024})
    enter("end")
    world.close()
