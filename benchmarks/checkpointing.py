"""What our activation checkpointing costs beside transformers' own, in one run.

    python benchmarks/checkpointing.py

One process trains one small Llama on this machine's CPU (`--device cuda` for a GPU) in forms that take turns, a forward
and a backward each, on the same rows from the same weights:

- `transformers`: `activation_checkpointing_enable(use_reentrant=False)`, one checkpoint a block;
- `ours`: one checkpoint a block;
- `ours_half`: half as many checkpoints as blocks; `ours_one`: a single one;
- `none`: without checkpointing.

Prints for each form the median over rounds of its time divided by transformers' time in the same round, with quartiles,
and its peak of bytes alive divided by transformers'. Peaks count storages that operations make, parameters and gradients
aside (`benchmarks/alive_bytes.py`), in a pass of its own. Exit status 1 if `ours` takes more than 1.02 of the time or 1.01
of the bytes.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.alive_bytes import AliveBytes
from ds_recipes.config.engine_settings import Checkpointing
from ds_recipes.engine.activations import install_checkpointing

PEER = "transformers"
ALLOWED_TIME, ALLOWED_BYTES = 1.02, 1.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="measured rounds, after two to warm up")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=256, help="tokens a row")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the result to this file too")
    arguments = parser.parse_args()
    checkpoints = {"ours": None, "ours_half": arguments.blocks // 2, "ours_one": 1}
    models = {name: make_model(arguments) for name in ("none", *checkpoints)}
    for name, number in checkpoints.items():
        install_checkpointing(models[name], Checkpointing(number, False, False, False, False), arguments.device)
    models[PEER] = make_model(arguments)
    models[PEER].activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 1000, (arguments.rows, arguments.context), device=arguments.device)
    seconds = time_rounds(models, ids, arguments.rounds)
    peaks = {name: peak_bytes(model, ids) for name, model in models.items()}
    result = {name: report(name, seconds, peaks) for name in ("ours", "ours_half", "ours_one", "none")}
    result[PEER] = {"seconds": median(seconds[PEER]), "peak_mib": peaks[PEER] / 2**20}
    print(f"{PEER}: {result[PEER]['seconds'] * 1000:.1f} ms, peak {result[PEER]['peak_mib']:.1f} MiB")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(result["ours"]["time_ratio"] > ALLOWED_TIME or result["ours"]["bytes_ratio"] > ALLOWED_BYTES)


def make_model(arguments: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 3,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).to(arguments.device).train()


def train(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model.zero_grad(set_to_none=False)
    model.model(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()
    if ids.is_cuda:
        torch.cuda.synchronize()


def time_rounds(models: dict[str, PreTrainedModel], ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each form in each round; the order turns, so that no form always follows the same one."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for number in range(-2, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            train(models[name], ids)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_bytes(model: PreTrainedModel, ids: torch.Tensor) -> int:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with AliveBytes([*model.parameters(), *model.buffers(), *gradients]) as alive:
        train(model, ids)
    return alive.most


def report(name: str, seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, float]:
    ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[PEER], strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    bytes_ratio = peaks[name] / peaks[PEER]
    print(f"{name} / {PEER}: time {middle:.3f} ({low:.3f} to {high:.3f}), peak of bytes alive {bytes_ratio:.3f}")
    return {"time_ratio": middle, "low": low, "high": high, "bytes_ratio": bytes_ratio}


if __name__ == "__main__":
    sys.exit(main())
