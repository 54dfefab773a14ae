"""A rank that loads a model of real safetensors shards and saves it, and weighs its own memory on the way."""

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ds_recipes.checkpoint.rank_file import file_bytes, own_ranges
from ds_recipes.config.checkpoint_settings import CheckpointConfig
from ds_recipes.config.plan import make_plan
from ds_recipes.engine.base import Engine
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import find_model
from ds_recipes.models.skeleton import build_skeleton, parameter_shapes
from ds_recipes.training.saving import ModelRecord, Saving
from ds_recipes.training.state import TrainingState
from ds_recipes.training.trackers.group import Trackers
from ds_recipes.world.group import World
from tests.contract.engines import Case, build, settings
from tests.contract.oracle import VOCABULARY, global_batch, joined

DS = json.dumps(
    {
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 4_000_000,
            "reduce_bucket_size": 1_000_000,
        }
    }
)
"""A forward, which a save makes one of, keeps no more parameters whole than it computes with."""

SAVES = 2

M_MMAP_THRESHOLD = -3
MAPPED_BYTES = 128 << 10
"""What is larger the allocator gives back to the system as soon as it is free. By default it keeps more and more (malloc.h),
which would be counted where it was not taken, and hide what is taken out of it."""


def make_shards(folder: Path, layers: int, hidden_size: int = 384) -> Path:
    """A Llama in float32, 48 x hidden_size**2 bytes (7 MB) a layer, a file each, with values that tell one place from another."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": 8 * hidden_size // 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    skeleton = build_skeleton(AutoConfig.from_pretrained(folder), torch.float32, "eager", torch.device("cpu"), False)
    shapes = parameter_shapes(skeleton)
    file_of = {name: f"{'.'.join(name.split('.')[:3])}.safetensors" for name in shapes}
    for number, file in enumerate(sorted(set(file_of.values()))):
        torch.manual_seed(number)
        tensors = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items() if file_of[name] == file}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return folder


def grown(work: Callable[[], Any]) -> tuple[int, int]:
    """By how many bytes this process was larger at the peak of `work`, and is after it, than before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before, _status("VmRSS") - before


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def load_and_save(world: World, folder: str, engine_name: str, optimizer: str, saves: bool) -> dict[str, Any]:
    """Memory of loading from FOLDER/model; then, where asked for, after a step, of saves into FOLDER, streamed and beside it."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    build(world, Case(engine=engine_name), Path(folder)).close()  # what a first engine imports is not the model's
    engine, report = _loaded(world, Path(folder), engine_name, optimizer)
    if saves:
        report |= _saves(world, Path(folder) / f"{engine_name}-{optimizer}", engine)
    engine.close()
    return report


def _loaded(world: World, folder: Path, engine_name: str, optimizer: str) -> tuple[Engine, dict[str, Any]]:
    config = settings(Case(engine=engine_name, optimizer=optimizer, rows=world.size, ds=DS), folder)
    source = find_model(world, str(folder / "model"), None, seed=0, trust_remote_code=False)
    plan = make_plan(config, world.size)
    made: list[Engine] = []
    building = grown(lambda: made.append(create_engine(config, plan, source, world)))
    loading = grown(lambda: made[0].load_shards(source.initial_weights(world.device)))
    report = {"building": building, "loading": loading, "weights": 0, "wrong": []}
    for name in sorted(
        set(json.loads((folder / "model" / "model.safetensors.index.json").read_text())["weight_map"].values())
    ):
        tensors = load_file(folder / "model" / name)
        report["weights"] += sum(4 * tensor.numel() for tensor in tensors.values())
        for shard in made[0].shards():
            if shard.name in tensors:
                whole = tensors[shard.name].reshape(-1)
                if not torch.equal(shard.fp32, whole[shard.start : shard.start + shard.length]):
                    report["wrong"].append(shard.name)
    return made[0], report


def _saves(world: World, folder: Path, engine: Engine) -> dict[str, Any]:
    batch = joined(global_batch(world.rank, 1))
    engine.backward(batch, 1e-3)
    engine.update(1e-5)
    report: dict[str, Any] = {"state": file_bytes(own_ranges(engine.shards(), world, True))}
    step = 0
    for name, beside in (("streamed", False), ("beside", True)):
        saving = Saving(
            CheckpointConfig(async_save=beside, keep_last=2), folder, world, engine, Trackers([], None, 0),
            ModelRecord({}, {}, VOCABULARY), dict, f"test-{name}", lambda: None, None,
        )  # fmt: skip
        report[name] = []
        for _ in range(SAVES):
            step += 1

            def save(saving: Saving = saving, step: int = step) -> None:
                saving.save(TrainingState(step=step), None, must_succeed=False)
                saving.wait()

            report[name].append(grown(save))
    return report
