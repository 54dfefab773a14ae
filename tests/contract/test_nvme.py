"""NVMe offload: the same steps as in memory, bit for bit, and a continued run that is the run that was not stopped."""

import json
import os
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from ds_recipes.config.async_io import missing_for_async_io
from ds_recipes.config.plan import make_plan
from ds_recipes.engine.base import Engine
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World
from tests.contract.engines import Case, settings, train_steps
from tests.contract.oracle import global_batch, joined, llama
from tests.ranks.launch import run_ranks

if missing_for_async_io() is not None:
    pytest.skip("asynchronous I/O cannot be built on this machine", allow_module_level=True)

pytestmark = pytest.mark.slow  # of every day: ds_configs/zero3_nvme.json, in tests/ranks/test_ds_configs.py

ADAM = Case(optimizer="adamw", weight_decay=0.1, lrs=(1e-2,))
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
BUILD_SECONDS = 600  # the first start compiles the op


def wide() -> LlamaConfig:
    """Matrices whose halves are just above the megabyte from which DeepSpeed swaps, at odd places of their sub-group."""
    config = llama(False)
    config.intermediate_size = 9000
    return config


@dataclass(frozen=True)
class PartlyFrozen(ModelSource):
    """A source whose model's first block has matrices that do not train."""

    is_partly_frozen: bool = False

    def skeleton(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        model = super().skeleton(*args, **kwargs)
        if self.is_partly_frozen:
            model.model.layers[0].mlp.requires_grad_(False)
        return model


def zero(folder: str, optimizer: str, parameters: str, **keys: Any) -> str:
    """A JSON that offloads to these devices."""

    def section(device: str, **more: Any) -> dict[str, Any]:
        return {"device": device} | ({"nvme_path": folder, **more} if device == "nvme" else {})

    offload = {"offload_optimizer": section(optimizer), "offload_param": section(parameters, max_in_cpu=0)}
    return json.dumps(
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 2000, **offload, **keys}}
    )


class Kept:
    """A range reader over tensors in memory."""

    def __init__(
        self, tensors: dict[str, dict[str, torch.Tensor]], optimizer_step: int, missed_steps: dict[str, int]
    ) -> None:
        self.tensors = tensors
        self.optimizer_step = optimizer_step
        self.missed_steps = missed_steps

    def has(self, kind: str) -> bool:
        return kind in self.tensors

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self.tensors[kind][name].flatten()[start : start + out.numel()])


def kept(engine: Engine, world: World) -> Kept:
    """All ranges of all ranks."""
    tensors: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
    for shard in engine.shards():
        for kind in KINDS:
            values = getattr(shard, kind)
            if values is not None:
                tensors[kind][shard.name] = torch.cat(world.gather_tensor(values)).clone()
    return Kept(tensors, engine.optimizer_step, dict(engine.usage.missed))


def continued(world: World, cases: list[tuple[Case, bool]], tmp: str) -> list[dict[str, Any]]:
    """Four steps; then the last two again from what was kept after two, in an engine that has done other things."""
    reports = []
    for case, is_partly_frozen in cases:
        config = settings(case, Path(tmp))
        source = PartlyFrozen(wide(), None, 7, False, is_partly_frozen=is_partly_frozen)
        engine = create_engine(config, make_plan(config, world.size), source, world)
        engine.load_shards(source.initial_weights(world.device))
        whole = train_steps(engine, world, case, range(2))
        evaluated = [float(engine.evaluate(joined(global_batch(99, 2)))[0]) for _ in range(3)]
        middle = kept(engine, world)
        files = sum(len(names) for _, _, names in os.walk(tmp))
        whole += train_steps(engine, world, case, range(2, 4))
        engine.load_shards(middle)
        again = train_steps(engine, world, case, range(2, 4))
        description = engine.describe()
        engine.close()
        world.barrier("all ranks have removed their files")
        left = sum(len(names) for _, _, names in os.walk(Path(tmp) / "nvme"))
        reports.append(
            {"whole": whole, "again": again, "evaluated": evaluated, "files": files, "left": left} | description
        )
    return reports


NAMES = ("in memory", "optimizer", "parameters", "both", "both, pipelined", "frozen in memory", "frozen, both")
ON_DISK = tuple(name for name in NAMES if "in memory" not in name)


@cache
def seen() -> dict[str, dict[str, Any]]:
    """What rank 0 saw of each placement: one start for all."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "nvme"
        folder.mkdir()
        small = {"sub_group_size": 600_000}
        piped = json.loads(zero(str(folder), "nvme", "nvme", **small))
        piped["zero_optimization"]["offload_optimizer"] |= {"pipeline_read": True, "pipeline_write": True}
        texts = [
            zero("", "cpu", "cpu"),
            zero(str(folder), "nvme", "none"),
            zero(str(folder), "cpu", "nvme", stage3_max_reuse_distance=1_000_000_000),
            zero(str(folder), "nvme", "nvme"),
            json.dumps(piped),
            zero("", "cpu", "cpu"),
            zero(str(folder), "nvme", "nvme"),
        ]
        cases = [(replace(ADAM, ds=text), name.startswith("frozen")) for name, text in zip(NAMES, texts, strict=True)]
        return dict(zip(NAMES, run_ranks(continued, 2, cases, tmp, timeout=BUILD_SECONDS)[0], strict=True))


@pytest.mark.parametrize("name", ON_DISK)
def test_steps_are_those_of_offload_to_memory(name):
    """Unaligned gradients were read from files as whatever was in memory before: the first step was right, the rest not."""
    report, memory = seen()[name], seen()["frozen in memory" if name.startswith("frozen") else "in memory"]
    for mine, theirs in zip(report["whole"], memory["whole"], strict=True):
        assert mine["loss"] == theirs["loss"]
        assert mine["norm"] == pytest.approx(theirs["norm"], rel=1e-6)
    assert report["evaluated"] == memory["evaluated"]


@pytest.mark.parametrize("name", NAMES)
def test_a_continued_run_is_equal_bit_for_bit(name):
    report = seen()[name]
    assert report["again"] == report["whole"][2:]


@pytest.mark.parametrize("name", ON_DISK)
def test_state_lies_in_files_that_the_end_removes(name):
    report = seen()[name]
    assert report["files"] > 2, "nothing was swapped: the tests show less than they say"
    assert report["left"] == 0
    assert report["optimizer_device"] == ("nvme" if name != "parameters" else "cpu")
