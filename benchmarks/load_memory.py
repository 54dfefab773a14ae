"""How much host memory each rank needs to load a model from safetensors files, beyond what it keeps.

    python benchmarks/load_memory.py --ranks 2 --gigabytes 1

Makes a model folder of that size in float32 (a Llama with random weights, several files), loads it on so many ranks the
way train.py does, and samples each rank's anonymous memory (/proc/self/smaps_rollup: not the files it maps). Memory is
counted above what the imports took. Two bounds, and exit status 1 if one is broken:

- peak <= the rank's persistent tensors + 300 MB;
- peak <= what is still resident after loading + 300 MB: stricter, since moments of zeros are not resident yet.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from benchmarks.shapes import llama_config
from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config, DataConfig, RunConfig
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import find_model
from ds_recipes.models.skeleton import build_skeleton, parameter_shapes
from ds_recipes.world.group import start
from ds_recipes.world.resolve import resolve

MB = 1_000_000
ALLOWED_MB = 300
SAMPLE_SECONDS = 0.005
CONTEXT = 2048
TIME_LIMIT_SECONDS = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the model in float32, 0.7 at least")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="what it is trained in")
    parser.add_argument("--json", help="write the result to this file too")
    parser.add_argument("--rank_folder", help=argparse.SUPPRESS)  # set for the ranks that this program starts
    arguments = parser.parse_args()
    if arguments.rank_folder:
        return load_on_this_rank(Path(arguments.rank_folder), arguments.precision)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", arguments.gigabytes)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(arguments.ranks)]
        command = [*launcher, __file__, "--rank_folder", name, "--precision", arguments.precision]
        subprocess.run(command, check=True, timeout=TIME_LIMIT_SECONDS, env=os.environ | {"OMP_NUM_THREADS": "1"})
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(arguments.ranks)]
    return report(arguments, ranks)


def make_model(folder: Path, gigabytes: float) -> None:
    """Save a Llama of about this many GB in float32, a file a layer, without holding more than one."""
    config = llama_config("1.3b", CONTEXT)
    one_layer = 4 * (4 * config["hidden_size"] ** 2 + 3 * config["hidden_size"] * config["intermediate_size"])
    rest = 4 * 2 * config["vocab_size"] * config["hidden_size"]
    config["num_hidden_layers"] = max(1, round((gigabytes * 1e9 - rest) / one_layer))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    skeleton = build_skeleton(AutoConfig.from_pretrained(folder), torch.float32, "eager", torch.device("cpu"), False)
    shapes = parameter_shapes(skeleton)
    file_of = {name: f"{'.'.join(name.split('.')[:3])}.safetensors" for name in shapes}
    for file in sorted(set(file_of.values())):
        tensors = {name: torch.rand(shape) * 0.02 for name, shape in shapes.items() if file_of[name] == file}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def load_on_this_rank(folder: Path, precision: str) -> int:
    """Load the model as train.py does, and write this rank's numbers to a file in `folder`."""
    import ds_recipes.engine.zero3.step  # noqa: F401 - deepspeed belongs to the imports

    before = anonymous_bytes()
    with Sampler() as sampler:
        world = start(resolve(os.environ))
        run = RunConfig(precision=precision, max_steps=1, batch_size_training=1)
        config = Config(run=run, data=DataConfig(context_size=CONTEXT))
        source = find_model(world, str(folder / "model"), None, seed=0, trust_remote_code=False)
        engine = create_engine(config, make_plan(config, world.size), source, world)
        engine.load_shards(source.initial_weights(world.device))
        gc.collect()
    result = {
        "rank": world.rank,
        "imports_mb": before / MB,
        "peak_mb": (sampler.peak - before) / MB,
        "persistent_mb": sum(storage_sizes()) / MB,
        "resident_after_mb": (anonymous_bytes() - before) / MB,
    }
    (folder / f"rank{world.rank}.json").write_text(json.dumps(result))
    engine.close()
    world.close()
    return 0


class Sampler:
    """Keeps the highest anonymous memory of this process, in bytes, while it is entered."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_bytes())

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()


def anonymous_bytes() -> int:
    """This process's memory that no file backs, in bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Anonymous: this benchmark needs Linux 4.14 or newer")


def storage_sizes() -> Iterator[int]:
    """Bytes of every tensor storage in host memory that is alive, each once."""
    seen = set()
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage.nbytes()


def report(arguments: argparse.Namespace, ranks: list[dict[str, float]]) -> int:
    """Print a table and a line of JSON; 1 if a rank broke a bound."""
    print(f"{'rank':>4} {'imports':>10} {'persistent':>11} {'after load':>11} {'peak':>10} {'over kept':>10}   (MB)")
    broken = False
    for rank in ranks:
        over = rank["peak_mb"] - min(rank["persistent_mb"], rank["resident_after_mb"])
        broken = broken or over > ALLOWED_MB
        print(
            f"{rank['rank']:>4} {rank['imports_mb']:10.0f} {rank['persistent_mb']:11.0f} "
            f"{rank['resident_after_mb']:11.0f} {rank['peak_mb']:10.0f} {over:10.0f}"
        )
    result = {"gigabytes": arguments.gigabytes, "precision": arguments.precision, "within": not broken, "ranks": ranks}
    print(json.dumps(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
