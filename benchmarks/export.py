"""How long an export takes and how much memory, beside `cp` of the written bytes and DeepSpeed's `zero_to_fp32`.

    python benchmarks/export.py [--gigabytes 3] [--rounds 5]

Writes a Llama of that size in float32 (default: 0.3 GB) into a temporary folder (--folder), once as a checkpoint of ours and
once as a `global_step1` folder of DeepSpeed's stage 3 on two ranks, both without moments. Every round each side works in a
fresh process, in turns; imports do not count, the sides' own start does. All writes of ours are fsynced and the files of ours
are hashed on the way; DeepSpeed does neither. `cp` copies what our float32 export wrote, once as it is and once followed by
`sync` of the copies. Memory is RssAnon of /proc/self/status (what no file backs), sampled every 2 ms: what imports left, and
the peak above it. Needs about four times the model's size of disk, and exit status 1 says that a bound is broken:

- peak of our exports, imports included: at most 300 MB;
- median time of the float32 export of our checkpoint: at most 1.3 x `cp` with `sync`.
"""

import argparse
import collections
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoConfig

from benchmarks.shapes import llama_config
from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.whole import export
from ds_recipes.checkpoint.store import save_checkpoint
from ds_recipes.engine.base import Shard
from ds_recipes.engine.unused import Usage
from ds_recipes.models.skeleton import build_skeleton, parameter_shapes
from ds_recipes.world.group import solo

MB, GB = 10**6, 10**9
MOST_MB, MOST_OF_CP = 300, 1.3
DS_RANKS = 2
SIDES = {
    "ours": "our checkpoint, float32",
    "ours_bf16": "our checkpoint, bfloat16",
    "ours_ds": "DeepSpeed's folder, float32, ours",
    "zero_to_fp32": "DeepSpeed's folder, zero_to_fp32 (safetensors)",
    "cp": "cp",
    "cp_sync": "cp, then sync",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.3, help="size of the model in float32 (default: 0.3)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: the system's folder for temporary files)")
    parser.add_argument("--json", help="write the result to this file too")
    parser.add_argument(
        "--side", choices=SIDES, help=argparse.SUPPRESS
    )  # set for the processes that this program starts
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(work(arguments.side, Path(arguments.folder))))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        num_bytes = write_checkpoints(folder, arguments.gigabytes)
        results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                results[side].append(one_round(side, folder))
    return report(arguments, num_bytes, results)


class RandomModel:
    """What `save_checkpoint` asks of an engine: weights that are made when they are asked for."""

    optimizer_step = 1

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.usage = Usage(list(shapes))

    def shards(self) -> Iterator[Shard]:
        for number, (name, shape) in enumerate(self._shapes.items()):
            flat = random_values(number, torch.Size(shape).numel())
            yield Shard(name, shape, 0, flat.numel(), flat, None, None)

    def describe(self) -> dict[str, Any]:
        return {"parameters": "float32"}


def random_values(seed: int, numel: int) -> torch.Tensor:
    return torch.rand(numel, generator=torch.Generator().manual_seed(seed)) * 0.02


def write_checkpoints(folder: Path, gigabytes: float) -> int:
    """Write both forms of the same weights; returns the bytes of the weights."""
    config = llama_config("1.3b", 2048)
    if gigabytes < 1:
        config |= {"hidden_size": 1024, "intermediate_size": 2752}
    one_layer = 4 * (4 * config["hidden_size"] ** 2 + 3 * config["hidden_size"] * config["intermediate_size"])
    rest = 4 * 2 * config["vocab_size"] * config["hidden_size"]
    config["num_hidden_layers"] = max(1, round((gigabytes * GB - rest) / one_layer))
    (folder / "config.json").write_text(json.dumps(config))
    skeleton = build_skeleton(AutoConfig.from_pretrained(folder), torch.float32, "eager", torch.device("cpu"), False)
    shapes = parameter_shapes(skeleton)
    files = {"config.json": (folder / "config.json").read_bytes()}
    numels = [torch.Size(shape).numel() for shape in shapes.values()]
    probe = (torch.zeros((1, 1), dtype=torch.int64), torch.zeros((1, 1, 1)))
    engine: Any = RandomModel(shapes)
    save_checkpoint(
        folder / "run",
        1,
        engine,
        state={},
        files=files,
        probe=probe,
        tied={},
        world=solo(),
        save_optimizer=False,
        keep_last=None,
    )
    write_zero3(folder / "zero" / "global_step1", shapes, lambda number: random_values(number, numels[number]))
    shutil.copy(folder / "config.json", folder / "zero")
    return sum(4 * torch.Size(shape).numel() for shape in shapes.values())


def write_zero3(folder: Path, shapes: dict[str, tuple[int, ...]], values: Callable[[int], torch.Tensor]) -> None:
    """Files as DeepSpeed's stage 3 lays them out, a rank at a time; `values` gives the flat n-th parameter."""
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text(folder.name)
    lengths = {name: -(-torch.Size(shape).numel() // DS_RANKS) for name, shape in shapes.items()}
    for rank in range(DS_RANKS):
        flat = torch.empty(sum(lengths.values()))
        offset = 0
        for number, length in enumerate(lengths.values()):
            own = values(number)[rank * length : (rank + 1) * length]
            flat[offset : offset + own.numel()] = own
            offset += length
        optimizer = {
            "zero_stage": 3,
            "partition_count": DS_RANKS,
            "fp32_flat_groups": [flat],
            "optimizer_state_dict": {"state": {}, "param_groups": []},
        }
        states = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [collections.OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())],
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "shared_params": {},
            "dp_world_size": DS_RANKS,
            "global_steps": 1,
            "skipped_steps": 0,
            "ds_version": "0.19.8",
        }
        torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def one_round(side: str, folder: Path) -> dict[str, float]:
    """One side's work in a process of its own. What our float32 export wrote stays for `cp`."""
    os.sync()
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    for target in [folder / other for other in SIDES if other != "ours" or side == "cp_sync"]:
        shutil.rmtree(target / "out" if target.name == "zero" else target, ignore_errors=True)
    return result


def work(side: str, folder: Path) -> dict[str, float]:
    """Do one side's work here; seconds and memory."""
    out = folder / side
    zero, written = folder / "zero", folder / "ours"
    wanted = Wanted(load_check=False, max_shard_bytes=5 * GB)
    copy: Callable[[], object] = lambda: subprocess.run(["cp", "-r", written, out], check=True)  # noqa: E731
    if side == "zero_to_fp32":
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    def run() -> None:
        if side == "zero_to_fp32":
            convert_zero_checkpoint_to_fp32_state_dict(str(zero), str(out), safe_serialization=True)
        elif side == "ours_ds":
            export(zero / "global_step1", out, wanted)
        elif side in ("ours", "ours_bf16"):
            dtype = "bfloat16" if side == "ours_bf16" else "float32"
            export(folder / "run" / "iter_0000001", out, Wanted(dtype=dtype, load_check=False))
        else:
            copy()
            if side == "cp_sync":
                subprocess.run(["sync", *out.iterdir()], check=True)

    with Sampler() as sampler:
        started, cpu_before = time.perf_counter(), cpu_seconds()
        run()
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_before
    num_bytes = sum(path.stat().st_size for path in out.iterdir())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "bytes": num_bytes,
        "imports_mb": sampler.before / MB,
        "peak_mb": sampler.peak / MB,
    }


def cpu_seconds() -> float:
    """CPU time of this process's threads and of the programs that it has started: on a busy machine it says more than the clock."""
    return sum(os.times()[:4])


class Sampler:
    """Keeps the highest RssAnon of this process, in bytes, while it is entered."""

    def __init__(self) -> None:
        self.before = self.peak = rss_anon()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, rss_anon())

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._done.set()
        self._thread.join()


def rss_anon() -> int:
    """This process's resident memory that no file backs, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no line RssAnon: this benchmark needs Linux 4.5 or newer")


def report(arguments: argparse.Namespace, num_bytes: int, results: dict[str, list[dict[str, float]]]) -> int:
    """Print a table and a line of JSON; 1 if a bound is broken."""
    median = {side: statistics.median(row["seconds"] for row in rows) for side, rows in results.items()}
    cpu = {side: statistics.median(row["cpu_seconds"] for row in rows) for side, rows in results.items()}
    peak = {side: max(row["peak_mb"] for row in rows) for side, rows in results.items()}
    imports = {side: statistics.median(row["imports_mb"] for row in rows) for side, rows in results.items()}
    load = os.getloadavg()[0]
    print(
        f"{num_bytes / GB:.2f} GB of float32 weights, {arguments.rounds} rounds, medians; load average at the end {load:.1f}"
    )
    print(f"{'':>48} {'seconds':>8} {'/ cp':>6} {'/ cp+sync':>9} {'CPU s':>6} {'imports MB':>11} {'peak MB':>8}")
    for side, name in SIDES.items():
        ratios = f"{median[side] / median['cp']:6.2f} {median[side] / median['cp_sync']:9.2f}"
        memory = "" if side.startswith("cp") else f"{imports[side]:11.0f} {peak[side]:8.0f}"
        print(f"{name:>48} {median[side]:8.2f} {ratios} {cpu[side]:6.2f} {memory}")
    ours = [side for side in SIDES if side.startswith("ours")]
    within = max(peak[side] for side in ours) <= MOST_MB and median["ours"] <= MOST_OF_CP * median["cp_sync"]
    result = {
        "bytes": num_bytes,
        "within": within,
        "load": load,
        "seconds": median,
        "cpu_seconds": cpu,
        "peak_mb": peak,
        "imports_mb": imports,
    }
    print(json.dumps(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
