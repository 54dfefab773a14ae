"""A tiny configuration of any causal language model that transformers has, for tests of all of them (tools/model_table.py).

A config class's own defaults are shrunk field by field: what a field measures is told from its name (`SIZES`). Lists with
one entry a layer keep each kind of layer that the default has. `OVERRIDES` holds what a name cannot tell.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY_SIZE = 320
POSITIONS = 128
LAYERS = 4
HEADS = 4

SIZES: tuple[tuple[str, Any], ...] = (
    (r"type_vocab_size|vocab_size_or_config_json_file", None),
    (r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY_SIZE),
    (r"hidden_size_per_layer_input|(.*_)?rank|time_step_rank|gated_norm_rank", 16),
    (
        r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|word_embed_proj_dim|lru_width|(input_|output_)?embedding_size",
        64,
    ),
    (
        r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|d_inner|dff|dim_ff|feed_forward_size|(.*_)?ffn_hidden_size|n_inner",
        96,
    ),
    (r"num_(hidden_|encoder_|decoder_)?layers|n_layers?|(en|de)coder_layers|num_blocks|num_hidden_layers", LAYERS),
    (
        r"(num_|n_)(.*_)?(kv|key_value|query_groups|key)_?(heads|groups)?(_.*)?|swa_num_key_value_heads|num_query_groups",
        2,
    ),
    (
        r"index_n_heads",
        32,
    ),  # scores are sums of ReLUs: with few heads many are 0, and a tie is broken by the row's length
    (r"(num_|n_|(en|de)coder_)?(.*_)?(attention_)?heads?|linear_num_value_heads", HEADS),
    (r"qk_nope_head_dim|qk_rope_head_dim|rotary_dim", 8),
    (r"(.*_)?(head_dim|d_head|head_size|dim_head|headdim)", 16),
    (r"(num_|n_)?(local_|routed_|moe_num_)?experts", 4),
    (r"(num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts)", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (
        r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|(.*_)?max_target_positions)",
        POSITIONS,
    ),
    (r"(.*sliding_window(_size)?|window_size|attention_window_size|local_attention|attention_chunk_size)", 16),
    (r"(.*_)?chunk_size|index_topk", 16),
    (r"(.*_)?(state_size|d_state)", 16),
    (r"(.*drop.*|.*jitter.*)", 0.0),
)
"""What a field of such a name becomes; None leaves it. The first that matches counts."""

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, **_MAMBA},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 8},
    "dots3_note_text": {
        "num_key_value_heads": HEADS,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
        "shared_experts_intermediate_size": 96,
        "per_layer_config": None,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "xlnet": {"n_head": HEADS, "d_head": 16},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}}},
    "gemma3n_text": {
        "intermediate_size": [96] * LAYERS,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "num_kv_shared_layers": 2,
    },
    "reformer": {
        "axial_pos_embds": False,  # axial positions train at one length of rows only
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "qwen4_exp_text": {
        "hc_lowrank": 16,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_top_k": 2},
    },
    "longcat_flash": {"zero_expert_num": 2, "num_hidden_layers": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 96},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "blt_global_transformer": {
        "hidden_size": 128,
        "head_dim": 32,
    },  # cross_attn_k times that of the encoder: no projection between them
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "blt_local_encoder": {"hidden_size_global": 128},
    "blt_local_decoder": {"hidden_size_global": 128},
    "xmod": {"default_language": "en_XX"},
}
"""What a class needs beside that, by type."""


def causal_types() -> list[str]:
    """The model types for which AutoModelForCausalLM of the installed transformers has a class."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PretrainedConfig:
    """The smallest configuration of this type that still has every kind of layer, without dropout."""
    return AutoConfig.for_model(model_type, **shrunk(CONFIG_MAPPING[model_type](), OVERRIDES.get(model_type, {})))


def shrunk(default: PretrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a config class that make it small; parts with a config of their own are shrunk alike."""
    settings: dict[str, Any] = {}
    layers = getattr(default, "num_hidden_layers", None)
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            settings[name] = shrunk(value, OVERRIDES.get(value.model_type, {})) | {"model_type": value.model_type}
        elif isinstance(value, list | tuple) and layers and len(value) == layers:
            settings[name] = _each_kind(list(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            size = _size(name)
            if size is not None and value:
                settings[name] = size
            elif name.endswith("token_id") and value >= VOCABULARY_SIZE:
                settings[name] = 3
    if hasattr(default, "is_decoder"):
        settings["is_decoder"] = True
    if vars(default).get(
        "kv_lora_rank"
    ):  # latent attention: no groups of heads, and positions have a part of each head
        settings |= {"num_key_value_heads": HEADS, "head_dim": settings["qk_rope_head_dim"]}
    settings |= {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    return {name: value for name, value in (settings | dict(overrides)).items() if value is not None}


def _size(name: str) -> Any:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def _each_kind(values: list[Any]) -> list[Any]:
    kinds = list(dict.fromkeys(value if isinstance(value, str | int | float) else str(value) for value in values))
    if len(kinds) > LAYERS or not all(isinstance(value, str) for value in values):
        return values[:LAYERS]
    return [kinds[index % len(kinds)] for index in range(LAYERS)]
