"""Small models of every family that the planner knows, as transformers' config classes take them."""

from typing import Any

from ds_recipes.planner.families import FAMILIES

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "pad_token_id": 0,
}
WITHOUT_GROUPS = {name: value for name, value in SMALL.items() if name not in ("num_key_value_heads", "head_dim")}
MIXTURE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

OWN: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 96,
        "n_embd": 96,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": 256,
        **dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0),
    },
    "opt": {
        "vocab_size": 96,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "ffn_dim": 256,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 96,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    "gpt_neox": WITHOUT_GROUPS,
    "falcon": {**WITHOUT_GROUPS, "ffn_hidden_size": 256},
    "mixtral": {**SMALL, **MIXTURE},
    "qwen3_moe": {**SMALL, **MIXTURE, "moe_intermediate_size": 128},
}
OWN["falcon"].pop("intermediate_size")


def small(family: str, **changes: Any) -> dict[str, Any]:
    """A small model's settings."""
    return {**OWN.get(family, SMALL), **changes}


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, small(family, tie_word_embeddings=tied)) for family in FAMILIES for tied in (True, False)),
    ("llama", small("llama", attention_bias=True, mlp_bias=True)),
    ("llama", small("llama", num_key_value_heads=4)),
    ("phi", small("phi", qk_layernorm=True)),
    ("falcon", small("falcon", new_decoder_architecture=True, num_kv_heads=2, bias=True)),
    ("falcon", small("falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)),
    ("falcon", small("falcon", parallel_attn=False, multi_query=False, alibi=True)),
    ("opt", small("opt", word_embed_proj_dim=48, do_layer_norm_before=False)),
    ("gpt_neox", small("gpt_neox", attention_bias=False, use_parallel_residual=False)),
    ("gpt2", small("gpt2", n_inner=None)),
    ("qwen3_moe", small("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[1])),
]
"""Family and settings: every family tied and untied, and what else changes shapes."""
