"""Tiny models of several families, with random weights, for tests."""

import torch
from transformers import (
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


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model in float32 with eager weights (not a skeleton), in eval mode."""
    torch.manual_seed(seed)
    attention = "eager" if family == "gemma2" else "sdpa"  # transformers has no sdpa for Gemma 2
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no bias or norm hides behind its initial 0 or 1
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()
