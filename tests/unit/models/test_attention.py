"""Rotary embeddings whose frequencies depend on the longest document of a micro-batch are told of."""

import pytest
from transformers import AutoConfig

from ds_recipes.models.attention import rope_note

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize("context_size, told", [(64, False), (65, True), (256, True)])
@pytest.mark.parametrize("model_type", ["phi3", "llama", "minicpm3"])
def test_longrope_is_told_of_beyond_its_original_context(model_type: str, context_size: int, told: bool) -> None:
    original = {"original_max_position_embeddings": 64}
    rope = {**LONG, **original}
    config = AutoConfig.for_model(model_type, **SMALL, **original, max_position_embeddings=256, rope_parameters=rope)
    note = rope_note(config, context_size)
    assert (note is not None) == told
    assert note is None or ("longrope" in note and "more than 64 tokens" in note)


def test_dynamic_scaling_is_told_of_and_fixed_ones_are_not() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    config = AutoConfig.for_model("llama", **SMALL, max_position_embeddings=256, rope_parameters=dynamic)
    assert "dynamic" in (rope_note(config, 128) or "")
    for rope_type in ("default", "linear", "yarn"):
        rope = {**dynamic, "rope_type": rope_type}
        assert rope_note(AutoConfig.for_model("qwen2", **SMALL, rope_parameters=rope), 1 << 20) is None
