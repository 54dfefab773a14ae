"""Tiny models of several families, with random weights, for tests."""

import copy

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from ds_recipes.models.skeleton import saved_buffers

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_COMMON, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_COMMON, head_dim=8),
    "gemma2": Gemma2Config(
        **_COMMON, head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=None, sliding_window=64
    ),
    "cohere": CohereConfig(**_COMMON, logit_scale=0.25),
    "granite": GraniteConfig(**_COMMON, logits_scaling=4.0),
    "phi": PhiConfig(**_COMMON),
    "mixtral": MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "gpt_neox": GPTNeoXConfig(**{key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
}

_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
_ONE_GROUP = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_MAMBA = {"mamba_d_state": 8, "num_hidden_layers": 4}

WITH_BUFFERS: dict[str, PretrainedConfig] = {
    "deepseek_v3": AutoConfig.for_model("deepseek_v3", **_COMMON | _ROUTED | _ONE_GROUP | _LATENT),
    "glm4_moe": AutoConfig.for_model(
        "glm4_moe", **_COMMON, **_ROUTED, **_ONE_GROUP, head_dim=8, partial_rotary_factor=0.5
    ),
    "minimax_m2": AutoConfig.for_model("minimax_m2", **_COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "minimax": AutoConfig.for_model(
        "minimax",
        **_COMMON,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        block_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2_moe": AutoConfig.for_model(
        "lfm2_moe",
        **_COMMON,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"],
        conv_L_cache=3,
    ),
    "gemma4_text": AutoConfig.for_model(
        "gemma4_text",
        **_COMMON,
        head_dim=8,
        global_head_dim=8,
        sliding_window=16,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "apertus": AutoConfig.for_model("apertus", **_COMMON),
    "deepseek_v4": AutoConfig.for_model("deepseek_v4", **_COMMON),
}
"""Models whose saved state has buffers: biases of routers, scales, tables; one is renamed in its files."""

MIXED: dict[str, PretrainedConfig] = {
    "ernie4_5_moe": AutoConfig.for_model(
        "ernie4_5_moe",
        **_COMMON,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=24,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "deepseek_v2": AutoConfig.for_model(
        "deepseek_v2", **_COMMON | _ROUTED | _ONE_GROUP | _LATENT | {"head_dim": 4}, topk_method="greedy"
    ),
    "flint": AutoConfig.for_model(
        "flint", **_COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8
    ),
    "hy_v3": AutoConfig.for_model(
        "hy_v3", **_COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8
    ),
    "olmo_hybrid": AutoConfig.for_model("olmo_hybrid", **_COMMON),
    "xlnet": AutoConfig.for_model("xlnet", vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "gpt_oss": AutoConfig.for_model(
        "gpt_oss",
        **_COMMON,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "jamba": AutoConfig.for_model(
        "jamba",
        **_COMMON | _MAMBA,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "zamba2": AutoConfig.for_model(
        "zamba2",
        **_COMMON | _MAMBA,
        mamba_ngroups=1,
        n_mamba_heads=4,
        mamba_headdim=16,
        mamba_expand=2,
        chunk_size=16,
        num_mem_blocks=1,
        use_mem_rope=True,
        layer_types=["mamba", "hybrid"] * 2,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model in float32 with eager weights (not a skeleton), in eval mode."""
    torch.manual_seed(seed)
    hf_config = copy.deepcopy(({**CONFIGS, **WITH_BUFFERS, **MIXED})[family])
    attention = {"gemma2": "eager"}.get(family, "sdpa" if family in CONFIGS else None)  # Gemma 2 has no sdpa there
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no bias or norm hides behind its initial 0 or 1
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in saved_buffers(model).items():
            if name.endswith("tid2eid"):
                buffer.copy_(torch.randint(0, 4, buffer.shape))
            elif "decay" not in name and "slope" not in name:
                buffer.add_(torch.randn_like(buffer) * 0.3)
    return model.eval()
