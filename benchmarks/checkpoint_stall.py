"""How long training stands still for a checkpoint, and how long it takes until the checkpoint is durable.

    python benchmarks/checkpoint_stall.py --gigabytes 0.5

Starts 2 ranks (gloo, CPU). Each holds so many GB of a Llama's master weights and moments under ZeRO-3, filled with random
values. In each round four sides save this same state, in turns, on the same disk:

- `ours`: `checkpoint/saver.py`, one copy into memory that is reused, then a thread that writes, hashes and publishes;
- `deepspeed`: the engine's own `save_checkpoint`;
- `dcp`: `torch.distributed.checkpoint.save` of each rank's ranges as tensors;
- `dcp_async`: its `async_save`, whose staging copies to the host as well.

`stall` is the time until the call returns, `total` until the files are durable. `save_checkpoint` does not sync its files:
the benchmark does it, and counts it. The slowest rank counts. Nothing is trained meanwhile. The first round is shown apart;
the memory for our copy is taken before it, as a run does during its first steps. Prints medians and quartiles of the other
rounds, and a line of JSON. Exit status 1 if the stall is above 0.1 s a GB and also above 0.15 of `deepspeed`'s, or if the total
is above the least of the other sides. It needs about 3.5 times the state in host memory: 21 GB for 3 GB on each of 2 ranks.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoConfig

from benchmarks.shapes import llama_config
from ds_recipes.checkpoint.contents import Contents, capture
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.checkpoint.saver import Saver
from ds_recipes.checkpoint.store import Store
from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config, DataConfig, RunConfig
from ds_recipes.engine.base import Engine
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World, start
from ds_recipes.world.resolve import resolve

GB = 1e9
STALL_SECONDS_A_GB = 0.1
STALL_SHARE = 0.15
CONTEXT = 512
TIME_LIMIT_SECONDS = 3600
KINDS = ("fp32", "exp_avg", "exp_avg_sq")

Timed = tuple[float, float]
"""Seconds of a save: until the call returned, and until it was durable."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--gigabytes", type=float, default=0.5, help="state of one rank: 12 bytes a parameter of its own"
    )
    parser.add_argument("--rounds", type=int, default=6, help="saves of each side, the first one apart")
    parser.add_argument("--folder", help="where to write, on the disk that is asked about; default: a temporary folder")
    parser.add_argument("--json", help="write the result to this file too")
    parser.add_argument("--rank_folder", help=argparse.SUPPRESS)  # set for the ranks that this program starts
    arguments = parser.parse_args()
    if arguments.rank_folder:
        return measure_on_this_rank(arguments, Path(arguments.rank_folder))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(arguments.ranks)]
        command = [*launcher, __file__, *sys.argv[1:], "--rank_folder", name]
        with (folder / "log.txt").open("w") as log:
            try:
                subprocess.run(command, check=True, timeout=TIME_LIMIT_SECONDS, env=environment, stdout=log, stderr=log)
            except subprocess.CalledProcessError:
                sys.exit((folder / "log.txt").read_text())
        result = json.loads((folder / "result.json").read_text())
    return report(arguments, result)


def measure_on_this_rank(arguments: argparse.Namespace, folder: Path) -> int:
    """Time every side in turns, and let rank 0 write what was measured."""
    world = start(resolve(os.environ))
    engine = make_engine(arguments.gigabytes, world)
    sides = make_sides(engine, world)
    timed: dict[str, list[Timed]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name, save in sides.items():
            target = folder / f"{name}-{number}"
            if world.rank == 0:
                target.mkdir()
                os.sync()
            world.barrier("a side")
            timed[name].append(tuple(world.max(save(target, number + 1))))  # type: ignore[arg-type]
            world.barrier("a side")
            if world.rank == 0:
                shutil.rmtree(target)
    bytes_each = sum(4 * shard.length * len(KINDS) for shard in engine.shards())
    if world.rank == 0:
        (folder / "result.json").write_text(json.dumps({"timed": timed, "gigabytes": bytes_each / GB}))
    engine.close()
    world.close()
    return 0


def make_engine(gigabytes: float, world: World) -> Engine:
    """ZeRO-3 of a Llama whose masters and moments take about so many GB on each rank, random values in them."""
    shape = llama_config("1.3b", CONTEXT) | {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2816}
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    one_layer, rest = 4 * hidden**2 + 3 * hidden * inner, 2 * shape["vocab_size"] * hidden
    wanted = gigabytes * GB * world.size / 12
    shape["num_hidden_layers"] = max(1, round((wanted - rest) / one_layer))
    run = RunConfig(precision="bf16", max_steps=1, batch_size_training=1)
    config = Config(run=run, data=DataConfig(context_size=CONTEXT))
    source = ModelSource(AutoConfig.for_model(**shape), None, 0, False)
    engine = create_engine(config, make_plan(config, world.size), source, world)
    generator = torch.Generator().manual_seed(world.rank)
    for shard in engine.shards():
        for kind in KINDS:
            getattr(shard, kind).uniform_(generator=generator)
    return engine


def make_sides(engine: Engine, world: World) -> dict[str, Callable[[Path, int], Timed]]:
    """What saves the engine's state into a folder, each way; every rank calls it."""
    side = world.companion()
    saver = Saver(Store(Path(), side, "benchmark", Keep()), side, save_optimizer=True, say=print)
    saver.prepare(engine)
    taker = saver._memory_taker
    assert taker is not None, "there is no memory for a copy"
    taker.join()  # a run trains meanwhile

    def ours(folder: Path, step: int) -> Timed:
        started = time.monotonic()
        saver._store = Store(folder, side, "benchmark", Keep())  # a folder of its own, that can be deleted
        saver.begin(contents_of(engine, step), engine, in_background=True)
        stall = time.monotonic() - started
        saver.outcome()
        return stall, time.monotonic() - started

    def deepspeed(folder: Path, step: int) -> Timed:
        started = time.monotonic()
        engine._deepspeed.save_checkpoint(str(folder), tag=f"step{step}")  # type: ignore[attr-defined]
        stall = time.monotonic() - started
        make_durable(folder, world)
        return stall, time.monotonic() - started

    def dcp_save(folder: Path, step: int) -> Timed:
        started = time.monotonic()
        dcp.save(tensors_of(engine, world.rank), checkpoint_id=folder)
        stall = time.monotonic() - started
        return stall, stall

    def dcp_async(folder: Path, step: int) -> Timed:
        started = time.monotonic()
        future: Any = dcp.async_save(tensors_of(engine, world.rank), checkpoint_id=folder)
        stall = time.monotonic() - started
        done: Future[Any] = future if isinstance(future, Future) else future.upload_completion
        done.result()
        return stall, time.monotonic() - started

    return {"ours": ours, "deepspeed": deepspeed, "dcp": dcp_save, "dcp_async": dcp_async}


def contents_of(engine: Engine, step: int) -> Contents:
    probe = (torch.zeros((1, 2), dtype=torch.int64), torch.zeros((1, 2, 3)))
    return capture(engine, step, {"step": step}, {}, probe, {})


def tensors_of(engine: Engine, rank: int) -> dict[str, torch.Tensor]:
    """This rank's ranges under names of its own: what has one name on all ranks is saved once."""
    return {
        f"{kind}/{shard.name}/{rank}": getattr(shard, kind)
        for shard in engine.shards()
        for kind in KINDS
        if shard.length
    }


def make_durable(folder: Path, world: World) -> None:
    """Sync the files that this rank wrote: each has its rank in its name."""
    for path in folder.rglob("*"):
        if path.is_file() and (f"rank_{world.rank}_" in path.name or (world.rank == 0 and "rank" not in path.name)):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def report(arguments: argparse.Namespace, result: dict[str, Any]) -> int:
    """Print a table and a line of JSON; 1 if a bound is broken."""
    timed, gigabytes = result["timed"], result["gigabytes"]
    print(f"{gigabytes:.2f} GB a rank, {arguments.ranks} ranks, {arguments.rounds - 1} rounds after the first; seconds")
    print(f"{'':10} {'stall':>7} {'quartiles':>17} {'first':>7} {'total':>7} {'quartiles':>17}")
    medians = {}
    for name, rounds in timed.items():
        (first, _), *rest = rounds
        stalls, totals = [stall for stall, _ in rest], [total for _, total in rest]
        medians[name] = {"stall": median(stalls), "total": median(totals), "first_stall": first}
        print(
            f"{name:10} {median(stalls):7.3f} {spread(stalls):>17} {first:7.3f} {median(totals):7.3f} {spread(totals):>17}"
        )
    ours, theirs = medians["ours"], [side for name, side in medians.items() if name != "ours"]
    share = ours["stall"] / medians["deepspeed"]["stall"]
    total_ratio = ours["total"] / min(side["total"] for side in theirs)
    within = (ours["stall"] <= STALL_SECONDS_A_GB * gigabytes or share <= STALL_SHARE) and total_ratio <= 1
    summary = {
        "stall_of_deepspeeds": share,
        "stall_seconds_a_gb": ours["stall"] / gigabytes,
        "total_of_the_best": total_ratio,
        "within": within,
        "gigabytes": gigabytes,
        "medians": medians,
    }
    print(json.dumps(summary))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(summary | {"timed": timed}, indent=2) + "\n")
    return int(not within)


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return ""
    low, _, high = quantiles(values, n=4)
    return f"{low:.3f} to {high:.3f}"


if __name__ == "__main__":
    sys.exit(main())
