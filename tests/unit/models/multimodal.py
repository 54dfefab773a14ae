"""Tiny models of text and images, with random weights and a processor's file beside them, for tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "embed_dim": 16}
LLAMA4_VISION = {
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
}


def _mrope(*section: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}}


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({}, {}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model"}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral"}),
    "qwen2_5_vl": (_mrope(1, 1, 2), QWEN_VISION),
    "qwen3_vl": (_mrope(2, 1, 1), {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}),
    "llama4": (
        {"num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
        LLAMA4_VISION,
    ),
    "internvl": ({"model_type": "qwen2"}, {"image_size": [28, 28], "patch_size": [14, 14]}),
}
"""What the text's and the tower's config have beside the common entries, by the model's type."""


def config_of(model_type: str, vocab_size: int) -> PretrainedConfig:
    text, vision = SETTINGS[model_type]
    make: Callable[..., PretrainedConfig] = AutoConfig.for_model
    return make(model_type, text_config={**TEXT, "vocab_size": vocab_size, **text}, vision_config={**VISION, **vision})


def save(model_type: str, folder: Path, vocab_size: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Write a model whose every parameter is random, and a file of its processor."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForMultimodalLM.from_config(config_of(model_type, vocab_size), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05 + (parameter if parameter.dim() == 1 else 0))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": model_type}))
    return model.eval()
