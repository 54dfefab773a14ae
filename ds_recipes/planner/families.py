"""From a model's config.json to the shapes of its parameters, for the families of transformers that are known here.

Each family is a table of its traits and of the defaults of its config class. tests/unit/planner/test_families.py holds
every count, shape and default against transformers' own models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How a family's blocks are built. A bias is True, False, or the config's key that says so."""

    defaults: Values
    norm: str = "rms"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    qk_norm: str = ""
    gated: bool = True
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    rotary: bool = True
    parallel: bool = False
    final_norm: bool = True
    keys: Mapping[str, str] = field(default_factory=dict)
    """Names that differ from Llama's."""


def _llama(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    } | changes


_QWEN: dict[str, Any] = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
_GEMMA: dict[str, Any] = {
    "vocab_size": 256000,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
}
_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        _llama(attention_bias=False, mlp_bias=False),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "granite": Family(
        _llama(attention_bias=False, mlp_bias=False),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(_llama(intermediate_size=14336, num_key_value_heads=8, sliding_window=4096)),
    "mixtral": Family(
        _llama(
            intermediate_size=14336,
            num_key_value_heads=8,
            sliding_window=None,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
    ),
    "qwen2": Family(_llama(**_QWEN), qkv_bias=True),
    "qwen3": Family(
        _llama(**_QWEN, head_dim=128, attention_bias=False),
        qk_norm="head",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "qwen3_moe": Family(
        _llama(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=24,
            num_key_value_heads=4,
            attention_bias=False,
            moe_intermediate_size=768,
            num_local_experts=128,
            num_experts_per_tok=8,
            decoder_sparse_step=1,
            mlp_only_layers=(),
        ),
        qk_norm="head",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "gemma": Family(
        _llama(
            **(_GEMMA | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None}),
            hidden_size=3072,
            intermediate_size=24576,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
        ),
        norm="gemma",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "gemma2": Family(
        _llama(
            **_GEMMA,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            sliding_window=4096,
            attn_logit_softcapping=50.0,
        ),
        norm="gemma",
        norms=_FOUR_NORMS,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "gemma3_text": Family(
        _llama(
            **(_GEMMA | {"vocab_size": 262208}),
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            sliding_window=4096,
        ),
        norm="gemma",
        norms=_FOUR_NORMS,
        qk_norm="head",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "phi": Family(
        _llama(
            vocab_size=51200,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            hidden_act="gelu_new",
            resid_pdrop=0.0,
            qk_layernorm=False,
        ),
        norm="layer",
        norms=("input_layernorm",),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        parallel=True,
    ),
    "phi3": Family(
        _llama(vocab_size=32064, hidden_size=3072, intermediate_size=8192, sliding_window=None, resid_pdrop=0.0),
        fused_qkv=True,
        fused_gate_up=True,
    ),
    "olmo": Family(
        _llama(vocab_size=50304, attention_bias=False),
        norm="free",
        norms=(),
        final_norm=False,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "olmo2": Family(
        _llama(vocab_size=50304, attention_bias=False),
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        qk_norm="width",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "starcoder2": Family(
        _llama(
            vocab_size=49152,
            hidden_size=3072,
            intermediate_size=12288,
            num_hidden_layers=30,
            num_attention_heads=24,
            num_key_value_heads=2,
            hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            use_bias=True,
            sliding_window=None,
            residual_dropout=0.0,
        ),
        norm="layer",
        gated=False,
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
    ),
    "gpt_neox": Family(
        {
            "vocab_size": 50432,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "hidden_act": "gelu",
            "tie_word_embeddings": False,
            "attention_bias": True,
            "hidden_dropout": 0.0,
            "use_parallel_residual": True,
        },
        norm="layer",
        gated=False,
        fused_qkv=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias=True,
    ),
    "gpt2": Family(
        {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "resid_pdrop": 0.1,
        },
        norm="layer",
        gated=False,
        fused_qkv=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        rotary=False,
        keys={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "hidden_act": "activation_function",
        },
    ),
    "opt": Family(
        {
            "vocab_size": 50272,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "ffn_dim": 3072,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "word_embed_proj_dim": 768,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "activation_function": "relu",
            "tie_word_embeddings": True,
            "dropout": 0.1,
        },
        norm="layer",
        gated=False,
        qkv_bias="enable_bias",
        output_bias="enable_bias",
        mlp_bias="enable_bias",
        rotary=False,
        keys={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
    ),
    "falcon": Family(
        {
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "num_kv_heads": None,
            "num_ln_in_parallel_attn": None,
            "alibi": False,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "ffn_hidden_size": None,
            "activation": "gelu",
            "tie_word_embeddings": True,
            "hidden_dropout": 0.0,
        },
        norm="layer",
        gated=False,
        fused_qkv=True,
        qkv_bias="bias",
        output_bias="bias",
        mlp_bias="bias",
        keys={
            "intermediate_size": "ffn_hidden_size",
            "hidden_act": "activation",
            "num_key_value_heads": "num_kv_heads",
        },
    ),
}
"""By model_type."""

SAME_AS = {"gemma3": "gemma3_text"}
"""A model_type whose language model is another one's, in `text_config`."""
