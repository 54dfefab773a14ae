"""Train random weights on packed random tokens on one GPU: tokens per second, MFU and memory.

    python benchmarks/gpu_train.py --shape 1.3b --context 4096

Needs nothing but this folder and a Python with torch, deepspeed and transformers. The engine, the loss and the model
are those of train.py; there is no data pipeline, no logging and no saving, so this is what they can reach at best.
`mfu` is tokens per second x flops a token (6 x matmul parameters + 12 x layers x hidden x context) / the GPU's peak;
`mfu_causal` counts attention only where causality and the documents' borders leave it. The shape `tiny` also runs
without a GPU, as a test of this script. A shape whose optimizer state does not fit the GPU keeps it in host memory and
steps there: a line says so first, and `optimizer_device` in the result. It then takes all rows of a step at once, since
every micro-step would carry the gradients to the host and back. A host without room for that is refused at once.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.shapes import SHAPES, llama_config, random_rows
from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config
from ds_recipes.engine.create import create_engine
from ds_recipes.models.flops import count_flops
from ds_recipes.models.load import ModelSource, find_model
from ds_recipes.models.skeleton import parameter_shapes
from ds_recipes.training.meter import peak_flops, peak_memory_gib
from ds_recipes.world.group import World, start
from ds_recipes.world.resolve import Place

DEFAULT_ROWS = {"tiny": 16, "1.3b": 8, "llama2-7b": 4}
WARM_UP_STEPS = 3
STATE_BYTES = 18  # a parameter: bf16 weight, float32 master, two moments and gradient
STATE_SHARE = 0.9  # of the GPU's memory that these may take; llama2-7b needs 121 GB
HOST_BYTES = 18  # a parameter, offloaded: master, two moments, gradient (pinned: rounded up to a power of two)
MICRO_STEPS = 2
GB = 1e9
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    arguments = parse_arguments()
    if not torch.cuda.is_available() and arguments.shape != "tiny":
        sys.exit(f"--shape {arguments.shape} needs a GPU, and torch finds none. --shape tiny runs without.")
    world = start(Place(0, 1, local_size=1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(llama_config(arguments.shape, arguments.context)))
        source = find_model(world, None, str(path), seed=0, trust_remote_code=False)
    result = measure(arguments, source, world)
    report(result)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    world.close()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.3b")
    parser.add_argument("--context", type=int, default=4096, help="tokens a row")
    parser.add_argument("--rows", type=int, help="rows a micro-step; default: by shape")
    parser.add_argument(
        "--micro_steps", type=int, help=f"micro-steps an optimizer step; default: {MICRO_STEPS}; offloaded: 1"
    )
    parser.add_argument("--shortest", type=int, default=256, help="shortest document, tokens; the context: one a row")
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to measure")
    parser.add_argument("--steps", type=int, default=50, help="at most so many measured steps")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--no_activation_checkpointing", action="store_true")
    parser.add_argument("--json", help="write the result to this file too")
    return parser.parse_args()


def make_config(arguments: argparse.Namespace, offload: bool) -> Config:
    """The settings that train.py would have, with the fastest attention that is installed."""
    unused = [*("--model_config", "-", "--tokenizer_name", "-", "--train_data", "-", "--save_checkpoint_path", "-")]
    ds_config = ROOT / "ds_configs" / ("zero3_offload.json" if offload else "zero3.json")
    micro_steps = arguments.micro_steps or (1 if offload else MICRO_STEPS)
    rows = DEFAULT_ROWS[arguments.shape] * (MICRO_STEPS if offload else 1)
    settings = {
        "use_fast_kernels": True,
        "context_size": arguments.context,
        "precision": arguments.precision,
        "batch_size_training": arguments.rows or rows,
        "gradient_accumulation_steps": micro_steps,
        "max_steps": WARM_UP_STEPS + arguments.steps,
        "activation_checkpointing": not arguments.no_activation_checkpointing,
        "ds_config": ds_config,
    }
    return load_config([*unused, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))])


def needs_offload(num_parameters: int, device: torch.device) -> bool:
    """True if weights, gradients and optimizer state would leave no room for activations on this GPU; says so."""
    if device.type == "cpu":
        return False
    on_gpu, memory = num_parameters * STATE_BYTES, torch.cuda.get_device_properties(device).total_memory
    if on_gpu <= STATE_SHARE * memory:
        return False
    on_host, free = num_parameters * HOST_BYTES, available_host_bytes()
    if free is not None and on_host > free:
        sys.exit(
            f"weights, gradients and optimizer state take {on_gpu / GB:.0f} GB and the GPU has {memory / GB:.0f}; on the "
            f"host they would take {on_host / GB:.0f} GB, and {free / GB:.0f} are free there. Choose a smaller shape."
        )
    print(
        f"weights, gradients and optimizer state take {on_gpu / GB:.0f} GB and the GPU has {memory / GB:.0f}: the "
        f"optimizer is offloaded to the host ({on_host / GB:.0f} GB there)",
        flush=True,
    )
    return True


def available_host_bytes() -> int | None:
    """Host memory that is free, or its control group's limit if that is less; None where Linux does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()))
    return free


def measure(arguments: argparse.Namespace, source: ModelSource, world: World) -> dict[str, Any]:
    """Build the engine and time optimizer steps; the medians and how they follow."""
    started = time.monotonic()
    skeleton = source.skeleton(torch.float32, "eager", torch.device("cpu"))
    flops, parameters = count_flops(skeleton), sum(map(math.prod, parameter_shapes(skeleton).values()))
    config = make_config(arguments, needs_offload(parameters, world.device))
    plan = make_plan(config, world.size)
    engine = create_engine(config, plan, source, world)
    engine.load_shards(source.initial_weights(world.device))
    start_seconds = time.monotonic() - started
    generator = torch.Generator().manual_seed(0)
    vocabulary_size = SHAPES[arguments.shape]["vocab_size"]
    seconds, losses, causal_flops = [], [], []
    while len(seconds) < WARM_UP_STEPS + arguments.steps:
        drawn = [
            random_rows(plan.rows_per_rank, plan.context_size, vocabulary_size, arguments.shortest, generator)
            for _ in range(plan.micro_steps)
        ]
        targets = sum(batch.num_target_tokens for batch, _ in drawn)
        before = time.monotonic()
        loss_sums = [engine.backward(batch, scale=1 / targets) for batch, _ in drawn]
        result = engine.update(lr=1e-4)  # reads the gradient norm, so the GPU is done
        seconds.append(time.monotonic() - before)
        losses.append(float(torch.stack(loss_sums).sum()) / targets)
        causal_flops.append(sum(flops.of_documents(lengths) for _, lengths in drawn))
        assert result.applied, "a gradient was not finite"
        if len(seconds) > WARM_UP_STEPS and sum(seconds[WARM_UP_STEPS:]) > arguments.seconds:
            break
    step_seconds = median(seconds[WARM_UP_STEPS:])
    device_name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    peak = peak_flops(device_name, arguments.precision)
    tokens_per_sec = plan.tokens_per_step / step_seconds
    return {
        "device": device_name or "CPU",
        "torch": torch.__version__,
        "shape": arguments.shape,
        "parameters": parameters,
        "precision": arguments.precision,
        "optimizer_device": engine.describe()["optimizer_device"],
        "attention": engine.describe()["attention"],
        "activation_checkpointing": config.run.activation_checkpointing,
        "context_size": plan.context_size,
        "rows_per_step": plan.global_rows,
        "measured_steps": len(seconds) - WARM_UP_STEPS,
        "start_seconds": start_seconds,
        "first_step_seconds": seconds[0],
        "step_seconds": step_seconds,
        "tokens_per_sec": tokens_per_sec,
        "mfu": peak and tokens_per_sec * flops.per_token(plan.context_size) / peak,
        "mfu_causal": peak and median(causal_flops[WARM_UP_STEPS:]) / step_seconds / peak,
        "peak_memory_gib": peak_memory_gib(world.device),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def report(result: dict[str, Any]) -> None:
    """A table for people, then one line of JSON."""
    for name, value in result.items():
        print(f"{name:26} {value:.4g}" if isinstance(value, float) else f"{name:26} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
