"""Models of which transformers keeps trained parameters in float32: forward has them so, on every engine and stage."""

import copy
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ds_recipes.errors import ConfigError
from ds_recipes.models.load import ModelSource
from ds_recipes.models.skeleton import kept_in_float32
from ds_recipes.world.group import World
from tests.contract.engines import ENGINES, Case, traced
from tests.contract.oracle import Oracle, norm_of
from tests.contract.test_buffers import built, rows_of, train, train_save_and_go_on
from tests.ranks.launch import run_ranks
from tests.unit.models.tiny import MIXED, WITH_BUFFERS, tiny_model

CONFIGS = {**MIXED, **WITH_BUFFERS}
FAMILIES = ("ernie4_5_moe", "deepseek_v2", "olmo_hybrid", "hy_v3")
WHERE = {"zero3": ("deepspeed", 3), "zero2": ("deepspeed", 2), "zero1": ("deepspeed", 1), "fsdp": ("fsdp", 3)}
BOUND = 3e-2  # relative, of bfloat16 against plain transformers in bfloat16 on other kernels and other sums


def trained(world: World, source: ModelSource, case: Case, stage: int, tmp: str) -> dict[str, Any]:
    """Two steps, and what a forward has of each parameter: its dtype, and its value before the first."""
    engine = built(world, source, case, stage, tmp)
    engine.load_shards(source.initial_weights(world.device))
    seen: dict[str, tuple[torch.dtype, torch.Tensor]] = {}

    def look(path: str) -> Any:
        def hook(module: nn.Module, _: Any) -> None:
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.numel():
                    seen.setdefault(f"{path}.{key}", (parameter.dtype, parameter.detach().clone()))

        return hook

    for path, module in engine.model.named_modules():
        module.register_forward_pre_hook(look(path))
    steps = [train(engine, world, step, source.vocabulary_size) for step in range(2)]
    report = {"seen": seen, "steps": steps, "description": engine.describe()}
    engine.close()
    return report


def each(world: World, folders: dict[str, str], where: str, tmp: str) -> dict[str, Any]:
    engine, stage = WHERE[where]
    case = Case(engine=engine, precision="bf16", optimizer="adamw")
    reports = {}
    for family, folder in folders.items():
        source = ModelSource(copy.deepcopy(CONFIGS[family]), Path(folder), 7, False)
        reports[family] = traced(trained, world, source, case, stage, tmp)
        again = traced(train_save_and_go_on, world, source, case, stage, tmp)
        reports[family]["resumed"] = again
    source = ModelSource(copy.deepcopy(CONFIGS["deepseek_v2"]), Path(folders["deepseek_v2"]), 7, False)
    try:
        low = '{"bf16": {"enabled": "auto", "bf16_master_weights_and_grads": true, "bf16_optimizer_states": true}}'
        built(world, source, case, stage, tmp, low)
        reports["low masters"] = "built"
    except ConfigError as error:
        reports["low masters"] = str(error)
    return reports


@cache
def folders() -> tempfile.TemporaryDirectory[str]:
    tmp = tempfile.TemporaryDirectory()
    for family in FAMILIES:
        tiny_model(family).save_pretrained(Path(tmp.name) / family)
    return tmp


@cache
def reports(where: str) -> dict[str, Any]:
    chosen = {family: str(Path(folders().name) / family) for family in FAMILIES}
    found: dict[str, Any] = run_ranks(each, 2, chosen, where, folders().name, timeout=400)[0]
    return found


CASES = [
    pytest.param(where, family, marks=[pytest.mark.slow] if where in ("zero1", "zero2") else [])
    for where in WHERE
    for family in FAMILIES
]


@pytest.mark.parametrize("where, family", CASES)
def test_forward_has_what_plain_transformers_has(where: str, family: str) -> None:
    report = reports(where)[family]
    assert "error" not in report, report["error"]
    theirs = AutoModelForCausalLM.from_pretrained(Path(folders().name) / family, dtype=torch.bfloat16)
    kept = kept_in_float32(theirs, torch.bfloat16)
    assert kept and len(kept) < len(dict(theirs.named_parameters()))
    compared = set()
    for name, parameter in theirs.named_parameters():
        if name in report["seen"]:
            dtype, value = report["seen"][name]
            assert dtype == parameter.dtype and torch.equal(value, parameter), name
            compared.add(name)
    assert kept & compared
    assert report["description"]["parameters"] == "bfloat16"
    assert report["description"]["kept_in_float32"].startswith(f"{len(kept)} parameters (")


@pytest.mark.parametrize("where, family", CASES)
def test_loss_and_gradient_are_those_of_plain_transformers(where: str, family: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(Path(folders().name) / family, dtype=torch.bfloat16)
    oracle = Oracle(copy.deepcopy(theirs.config), {}, "sgd")
    oracle.model = theirs
    loss, gradients = oracle.gradients(rows_of(0, theirs.config.vocab_size))
    step = reports(where)[family]["steps"][0]
    assert step["loss"] == pytest.approx(loss, rel=BOUND / 10)
    assert step["norm"] == pytest.approx(norm_of(gradients), rel=BOUND)


@pytest.mark.parametrize("where, family", CASES)
def test_a_checkpoint_goes_on_bit_for_bit(where: str, family: str) -> None:
    report = reports(where)[family]["resumed"]
    assert "error" not in report, report["error"]
    assert report["again"] == report["steps"][2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engines_agree(family: str) -> None:
    one, other = (reports(where)[family]["steps"] for where in ("zero3", "fsdp"))
    for mine, theirs in zip(one, other, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=BOUND / 10)
        assert mine["norm"] == pytest.approx(theirs["norm"], rel=BOUND)


@pytest.mark.parametrize("where", [{"deepspeed": "zero3", "fsdp": "fsdp"}[engine] for engine in ENGINES])
def test_master_weights_of_less_are_refused_by_name(where: str) -> None:
    message = reports(where)["low masters"]
    assert "model.layers.1.mlp.gate.weight" in message and "master weights in" in message
