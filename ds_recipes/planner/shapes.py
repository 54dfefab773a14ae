"""Build a model's shapes from its config.json: what transformers would build, without transformers."""

from collections.abc import Iterator, Mapping
from typing import Any

from ds_recipes.errors import InputError
from ds_recipes.planner.architecture import Architecture, Block, Kernels, Parameter
from ds_recipes.planner.families import FAMILIES, SAME_AS, Family

SPELT_OUT = ("gelu_new", "gelu_fast", "quick_gelu")
"""Activations that transformers writes as single operations, each of which keeps its inputs."""

SECTIONS = ("text_config", "language_config")


def architecture_of(config: Mapping[str, Any], where: str, rows: int | None = None) -> Architecture:
    """The model that this config describes, its vocabulary padded to `rows` if that is given.

    Raises:
        InputError: a family that is not known here, or sizes that make no model.
    """
    text = text_model(config)
    name = SAME_AS.get(str(text.get("model_type")), str(text.get("model_type")))
    if name not in FAMILIES:
        raise InputError(
            f"{where}: models of type {text.get('model_type')!r} are not known to the planner, which knows "
            f"{', '.join(sorted(FAMILIES))}. Name a folder with the model's safetensors files (--model_name FOLDER): then "
            "the sizes are read from them."
        )
    return _Builder(FAMILIES[name], name, text, where, rows).build()


def text_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's own settings; what a model of several parts says at its root holds for them too."""
    for section in SECTIONS:
        inner = config.get(section)
        if isinstance(inner, dict) and str(config.get("model_type")) not in FAMILIES:
            outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
            return outer | inner | {"model_type": inner.get("model_type", config.get("model_type"))}
    return dict(config)


class _Builder:
    """Reads one family's config by the names that Llama's has."""

    def __init__(self, family: Family, name: str, config: Mapping[str, Any], where: str, rows: int | None) -> None:
        self._family, self._name, self._where = family, name, where
        self._values = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
        self._hidden = self._size("hidden_size")
        self._layers = self._size("num_hidden_layers")
        self._heads = self._size("num_attention_heads")
        self._head_size = int(self._values.get("head_dim") or self._hidden // self._heads)
        self._key_value_heads = self._groups()
        self._inner = int(self._get("intermediate_size") or 4 * self._hidden)
        self._vocabulary = max(self._size("vocab_size"), rows or 0)
        self._tied = bool(self._values.get("tie_word_embeddings"))

    def build(self) -> Architecture:
        return Architecture(
            family=self._name,
            vocabulary_size=self._vocabulary,
            hidden_size=self._hidden,
            heads=self._heads,
            key_value_heads=self._key_value_heads,
            head_size=self._head_size,
            embeddings=tuple(self._embeddings()),
            blocks=tuple(self._block(layer) for layer in range(self._layers)),
            last=tuple(self._last()),
            head=tuple(self._head()),
            kernels=self._kernels(),
        )

    def _get(self, name: str) -> Any:
        return self._values.get(self._family.keys.get(name, name))

    def _size(self, name: str) -> int:
        value = self._get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            key = self._family.keys.get(name, name)
            raise InputError(
                f"{self._where}: {key} is {value!r}, which is no size of a {self._name} model. Check the file."
            )
        return value

    def _flag(self, setting: bool | str) -> bool:
        return bool(self._values.get(setting)) if isinstance(setting, str) else setting

    def _groups(self) -> int:
        if self._name == "falcon" and not self._values["new_decoder_architecture"]:
            return 1 if self._values["multi_query"] else self._heads
        return int(self._get("num_key_value_heads") or self._heads)

    def _embeddings(self) -> Iterator[Parameter]:
        width = int(self._values.get("word_embed_proj_dim") or self._hidden)
        yield Parameter("embed_tokens", (self._vocabulary, width))
        if self._name == "gpt2":
            yield Parameter("positions", (self._size("n_positions"), self._hidden))
        if self._name == "opt":  # two rows more than positions (transformers, OPTLearnedPositionalEmbedding)
            yield Parameter("positions", (self._size("max_position_embeddings") + 2, self._hidden))
        if width != self._hidden:
            yield Parameter("project_in", (self._hidden, width))

    def _last(self) -> Iterator[Parameter]:
        is_opt = self._name == "opt"
        without = is_opt and (not self._values["do_layer_norm_before"] or self._values["_remove_final_layer_norm"])
        if self._family.final_norm and not without:
            yield from self._norm("norm")
        width = int(self._values.get("word_embed_proj_dim") or self._hidden)
        if width != self._hidden:
            yield Parameter("project_out", (width, self._hidden))

    def _head(self) -> Iterator[Parameter]:
        if not self._tied:
            width = int(self._values.get("word_embed_proj_dim") or self._hidden)
            yield Parameter("lm_head", (self._vocabulary, width))
        if self._family.head_bias:
            yield Parameter("lm_head.bias", (self._vocabulary,), is_bias=True)

    def _norm(self, name: str, width: int | None = None) -> tuple[Parameter, ...]:
        size = (width or self._hidden,)
        if self._family.norm == "free" or not self._values.get("layer_norm_elementwise_affine", True):
            return ()
        weight = Parameter(name, size)
        return (weight, Parameter(f"{name}.bias", size, is_bias=True)) if self._family.norm == "layer" else (weight,)

    def _linear(self, name: str, inside: int, outside: int, bias: bool) -> tuple[Parameter, ...]:
        weight = Parameter(name, (outside, inside))
        return (weight, Parameter(f"{name}.bias", (outside,), is_bias=True)) if bias else (weight,)

    def _block(self, layer: int) -> Block:
        norms = [self._norm(name) for name in self._norm_names()]
        experts = self._experts(layer)
        inner = int(self._values["moe_intermediate_size"]) if experts and self._has_own_expert_size else self._inner
        feed_forward = self._mixture(experts, inner) if experts else tuple(self._mlp())
        modules = [*norms[:1], *self._attention(), *norms[1:2], *feed_forward, *norms[2:]]
        return Block(
            modules=tuple(module for module in modules if module),
            window=self._window(layer),
            experts=experts,
            experts_per_token=int(self._values.get("num_experts_per_tok") or 0) if experts else 0,
            intermediate_size=inner,
        )

    def _norm_names(self) -> tuple[str, ...]:
        if self._name != "falcon" or not self._values["parallel_attn"]:
            return ("input_layernorm", "post_attention_layernorm") if self._name == "falcon" else self._family.norms
        lines = self._values["num_ln_in_parallel_attn"]
        two = self._values["new_decoder_architecture"] and lines in (None, 2)
        return ("ln_attn", "ln_mlp") if two else ("input_layernorm",)

    def _attention(self) -> Iterator[tuple[Parameter, ...]]:
        queries, keys = self._heads * self._head_size, self._key_value_heads * self._head_size
        bias = self._flag(self._family.qkv_bias)
        if self._family.fused_qkv:
            yield self._linear("qkv", self._hidden, queries + 2 * keys, bias)
        else:
            yield self._linear("q_proj", self._hidden, queries, bias)
            yield self._linear("k_proj", self._hidden, keys, bias)
            yield self._linear("v_proj", self._hidden, keys, bias)
        if self._family.qk_norm:
            by_head = self._family.qk_norm == "head"
            yield self._norm("q_norm", self._head_size if by_head else queries)
            yield self._norm("k_norm", self._head_size if by_head else keys)
        if self._values.get("qk_layernorm"):
            yield self._norm("q_layernorm", self._head_size)
            yield self._norm("k_layernorm", self._head_size)
        yield self._linear("o_proj", queries, self._hidden, self._flag(self._family.output_bias))

    def _mlp(self) -> Iterator[tuple[Parameter, ...]]:
        bias = self._flag(self._family.mlp_bias)
        if self._family.fused_gate_up:
            yield self._linear("gate_up_proj", self._hidden, 2 * self._inner, bias)
        elif self._family.gated:
            yield self._linear("gate_proj", self._hidden, self._inner, bias)
        if not self._family.fused_gate_up:
            yield self._linear("up_proj", self._hidden, self._inner, bias)
        yield self._linear("down_proj", self._inner, self._hidden, bias)

    @property
    def _has_own_expert_size(self) -> bool:
        return "moe_intermediate_size" in self._family.defaults

    def _experts(self, layer: int) -> int:
        if "num_local_experts" not in self._family.defaults:
            return 0
        number = int(self._values.get("num_experts") or self._values.get("num_local_experts") or 0)
        step = int(self._values.get("decoder_sparse_step") or 1)
        dense = layer in (self._values.get("mlp_only_layers") or ()) or (layer + 1) % step != 0
        return 0 if dense else number

    def _mixture(self, experts: int, inner: int) -> tuple[tuple[Parameter, ...], ...]:
        share = int(self._values["num_experts_per_tok"]) / experts
        router = Parameter("router", (experts, self._hidden))
        gate_up = Parameter("experts.gate_up_proj", (experts, 2 * inner, self._hidden), share)
        down = Parameter("experts.down_proj", (experts, self._hidden, inner), share)
        return ((router,), (gate_up, down))

    def _window(self, layer: int) -> int | None:
        window = self._values.get("sliding_window")
        kinds = self._values.get("layer_types")
        if self._values.get("use_sliding_window") is False or window is None:
            return None
        if isinstance(kinds, list) and layer < len(kinds):
            return int(window) if kinds[layer] == "sliding_attention" else None
        if self._name == "gemma2":
            return int(window) if layer % 2 == 0 else None
        if self._name == "gemma3_text":
            pattern = int(
                self._values.get("sliding_window_pattern") or self._values.get("_sliding_window_pattern") or 6
            )
            return int(window) if (layer + 1) % pattern else None
        if self._name == "qwen2" and layer < int(self._values.get("max_window_layers") or 28):
            return None
        if self._name == "qwen3" and layer < int(self._values.get("max_window_layers") or 28):
            return None
        return int(window)

    def _is_parallel(self) -> bool:
        given = {"gpt_neox": "use_parallel_residual", "falcon": "parallel_attn"}.get(self._name)
        return bool(self._values[given]) if given else self._family.parallel

    def _kernels(self) -> Kernels:
        dropouts = ("resid_pdrop", "residual_dropout", "hidden_dropout", "dropout")
        activation = str(self._values.get("hidden_activation") or self._get("hidden_act"))
        return Kernels(
            norm=self._family.norm,
            norms=2 if self._family.norm == "free" else len(self._norm_names()),
            qk_norm=self._family.qk_norm,
            mlp="gated" if self._family.gated else "plain",
            activation="relu" if activation == "relu" else "spelt out" if activation in SPELT_OUT else "one",
            parallel=self._is_parallel(),
            fused_qkv=self._family.fused_qkv,
            fused_gate_up=self._family.fused_gate_up,
            rotary=self._family.rotary and not self._values.get("alibi"),
            dropout=any(float(self._values.get(name) or 0.0) > 0 for name in dropouts),
            capped=bool(self._values.get("attn_logit_softcapping")),
        )
