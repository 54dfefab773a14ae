"""Blocks that use parameters without the forward of a module of their own, computed again under ZeRO-3."""

import copy
import json
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World
from tests.contract.engines import Case, traced
from tests.contract.oracle import llama
from tests.contract.test_buffers import built, train
from tests.ranks.launch import run_ranks

GEMMA3N = AutoConfig.for_model(
    "gemma3n_text",
    vocab_size=331,
    vocab_size_per_layer_input=331,
    hidden_size=32,
    hidden_size_per_layer_input=8,
    intermediate_size=[48] * 3,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_kv_shared_layers=1,
    head_dim=8,
    laurel_rank=4,
    altup_num_inputs=2,
    activation_sparsity_pattern=[0.0] * 3,
    sliding_window=16,
    layer_types=["sliding_attention", "full_attention", "full_attention"],
    max_position_embeddings=64,
    pad_token_id=2,
)


class Scaled(nn.Module):
    """A module of which the block calls another method than forward, in front of an MLP."""

    def __init__(self, mlp: nn.Module, width: int, inside: bool) -> None:
        super().__init__()
        self.mlp = mlp
        self.inside = inside
        self.scale = nn.Parameter(torch.ones(width, device="meta"))

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(self.scaled(hidden) if self.inside else hidden)
        return out


@dataclass(frozen=True)
class Changed(ModelSource):
    """Llama with something else in each block."""

    how: str = ""

    def skeleton(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        model = super().skeleton(*args, **kwargs)
        for layer in model.model.layers:
            if self.how == "method":
                layer.extra = Scaled(nn.Identity(), model.config.hidden_size, inside=False)
                call_before(layer, lambda hidden, layer=layer: layer.extra.scaled(hidden) * 1.5)
            if self.how == "direct":
                layer.gain = nn.Parameter(torch.ones(model.config.hidden_size, device="meta"))
                call_before(layer, lambda hidden, layer=layer: hidden * layer.gain * 1.5)
        return model


def call_before(layer: nn.Module, change: Any) -> None:
    """Let the block's forward change its input first, with parameters of its own."""
    plain = layer.forward
    layer.forward = lambda hidden_states, *args, **kwargs: plain(change(hidden_states), *args, **kwargs)


CASES: dict[str, tuple[ModelSource, dict[str, Any]]] = {
    "gemma 3n": (ModelSource(GEMMA3N, None, 7, False), {}),
    "a method of a module": (Changed(llama(False), None, 7, False, how="method"), {}),
    "a parameter of the block": (Changed(llama(True), None, 7, False, how="direct"), {}),
    "the block is a leaf": (
        ModelSource(llama(False), None, 7, False),
        {
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "leaf_module": {"classes": ["transformers.models.llama.modeling_llama.LlamaDecoderLayer"]},
            }
        },
    ),
}


class OnesLast:
    """Initial weights, and ones for what a test has added."""

    optimizer_step = 0

    def __init__(self, source: ModelSource) -> None:
        self._reader = ModelSource(source.hf_config, None, 7, False).initial_weights(torch.device("cpu"))

    def has(self, kind: str) -> bool:
        return kind == "fp32"

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return dict(self._reader.buffers)

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        if name in self._reader.names:
            self._reader.read_into(kind, name, start, out)
        else:
            out.fill_(1.0)


def three_steps(world: World, source: ModelSource, case: Case, further: dict[str, Any], tmp: str) -> dict[str, Any]:
    engine = built(world, source, case, 3, tmp, json.dumps(further))
    engine.load_shards(OnesLast(source))
    steps = [train(engine, world, step, 331) for step in range(3)]
    gathered = [name for name, parameter in engine.model.named_parameters() if parameter.numel()]
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    engine.close()
    return {"steps": steps, "gathered": gathered, "weights": weights}


def each(world: World, tmp: str) -> dict[str, Any]:
    plain = Case(optimizer="adamw")
    reports = {}
    for name, (source, further) in CASES.items():
        for how, case, more in (
            ("kept", plain, {}),
            ("again", replace(plain, checkpointing=True), {}),
            (
                "in one segment",
                replace(plain, checkpointing=True),
                {"activation_checkpointing": {"number_checkpoints": 1}},
            ),
        ):
            reports[name, how] = traced(three_steps, world, copy.copy(source), case, further | more, tmp)
    return reports


@cache
def seen() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as tmp:
        found: dict[str, Any] = run_ranks(each, 2, tmp, timeout=300)[0]
    return found


@pytest.mark.parametrize("how", ["again", "in one segment"])
@pytest.mark.parametrize("name", CASES)
def test_computed_again_is_as_kept(name: str, how: str) -> None:
    kept, again = seen()[name, "kept"], seen()[name, how]
    assert "error" not in again, again["error"]
    assert again["steps"] == kept["steps"]
    assert all(torch.equal(again["weights"][key], tensor) for key, tensor in kept["weights"].items())


@pytest.mark.parametrize("name", CASES)
def test_nothing_stays_gathered(name: str) -> None:
    assert seen()[name, "again"]["gathered"] == seen()[name, "kept"]["gathered"]
    assert not [key for key in seen()[name, "again"]["gathered"] if ".layers." in key]
