"""What a block keeps for backward: planned against the tensors that a real block of transformers keeps."""

import gc
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_recipes.models.loss_head import CHUNK_ELEMENTS
from ds_recipes.planner import activations
from ds_recipes.planner.activations import Batch, block_bytes
from ds_recipes.planner.families import FAMILIES
from ds_recipes.planner.shapes import architecture_of
from tests.ranks.tensor_bytes import TensorBytes
from tests.unit.planner.models import small

ROWS, CONTEXT = 2, 64
LAYERS = {"gpt2": "n_layer"}
EVERY_DAY = ("llama",)
WITHOUT_SDPA = ("gemma2",)
EXACT, CLOSE = 0.005, 0.04
CLOSE_ONLY = ("mixtral", "qwen3_moe", "falcon")
"""Mixtures route unevenly, and Falcon's one head of keys runs in torch's plain attention."""


def kept_after_forward(family: str, layers: int, dtype: torch.dtype, attention: str) -> int:
    """Bytes of activations that wait for backward."""
    config = AutoConfig.for_model(family, **small(family, **{LAYERS.get(family, "num_hidden_layers"): layers}))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()
    input_ids = torch.randint(0, 90, (ROWS, CONTEXT))
    positions = torch.cat([torch.arange(CONTEXT // 2), torch.arange(CONTEXT // 2)]).repeat(ROWS, 1)
    with TensorBytes() as counted:
        for parameter in model.parameters():
            parameter.detach()
        before = counted.now
        states = model.base_model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state
        gc.collect()
        kept = counted.now - before
        del states
    return kept


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "family", [family if family in EVERY_DAY else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_block_keeps_what_is_planned(family: str, dtype: torch.dtype, attention: str) -> None:
    """The difference that a third block makes."""
    if attention == "sdpa" and family in WITHOUT_SDPA:
        attention = "eager"  # transformers refuses sdpa for it, and so does the engine
    real = kept_after_forward(family, 3, dtype, attention) - kept_after_forward(family, 2, dtype, attention)
    values: dict[str, Any] = {"model_type": family, **small(family)}
    model = architecture_of(values, family)
    batch = Batch(ROWS, CONTEXT, dtype.itemsize, attention, "cpu")
    assert block_bytes(model, model.blocks[-1], batch) == pytest.approx(
        real, rel=CLOSE if family in CLOSE_ONLY else EXACT
    )


def test_chunks_of_the_loss_head_are_those_of_the_loss_head() -> None:
    assert activations.CHUNK_ELEMENTS == CHUNK_ELEMENTS
