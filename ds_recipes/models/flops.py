"""How many floating-point operations a token costs, for model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).

Counted from a model's skeleton (full shapes, no storage), before an engine takes it. Work that activation
checkpointing does twice is not counted: utilisation is about the model's own arithmetic.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN_NAMES = ("num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts", "num_selected_experts")
WITHOUT_ATTENTION = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp")


@dataclass(frozen=True)
class ModelFlops:
    """A model's matrix products: `matmul_parameters` used by each token, and the attention layers with their windows.

    `attention_width` is heads x head size, which is the hidden size in most models. A window of None sees the whole
    document; a number is how many tokens a token sees at most, itself among them.
    """

    matmul_parameters: int
    attention_width: float
    attention_windows: tuple[int | None, ...]  # one an attention layer

    def per_token(self, context_size: int) -> float:
        """Flops to train one token: 6 x matmul parameters + 12 x layers x width x context; behind the metric `mfu`."""
        return 6.0 * self.matmul_parameters + 12.0 * len(self.attention_windows) * self.attention_width * context_size

    def of_documents(self, lengths: Iterable[int]) -> float:
        """Flops to train on documents of these many tokens, attention counted only where causality and the documents'
        borders leave it; behind `mfu_causal`. The sum over the documents, not a token's share.
        """
        parameter_flops, pairs = 0.0, 0
        for length in lengths:
            parameter_flops += 6.0 * self.matmul_parameters * length
            pairs += sum(attention_pairs(length, window) for window in self.attention_windows)
        return parameter_flops + 12.0 * self.attention_width * pairs


def attention_pairs(length: int, window: int | None) -> int:
    """Number of (query, key) pairs that causal attention computes in a document of `length` tokens."""
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def count_flops(skeleton: PreTrainedModel) -> ModelFlops:
    """Count a causal language model's matrix products from its skeleton.

    An embedding is a lookup and costs nothing; the head is counted once, tied or not. Of a mixture's experts those that
    a token is sent to are counted. What is frozen, such as a tower for images, is left out: text does not come by there.
    """
    config: PretrainedConfig = skeleton.config.get_text_config()
    return ModelFlops(
        matmul_parameters=round(sum(_used_parameters(skeleton, config))),
        attention_width=_attention_width(config),
        attention_windows=tuple(_attention_windows(config)),
    )


def _used_parameters(skeleton: nn.Module, config: PretrainedConfig) -> Iterator[float]:
    """Each weight matrix's number of elements; an expert's times the share of tokens that it gets."""
    num_experts, experts_per_token = _first(config, EXPERTS_NAMES), _first(config, EXPERTS_PER_TOKEN_NAMES)
    share = experts_per_token / num_experts if num_experts and experts_per_token else 1.0
    for module_name, module in skeleton.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            assert parameter.numel() > 0, (
                f"{module_name}.{name} is empty: count flops before an engine shards the model"
            )
            in_experts = "experts" in module_name.split(".")
            stacked_bias = in_experts and name.endswith("bias")
            if parameter.dim() >= 2 and not stacked_bias and parameter.requires_grad:
                yield prod(parameter.shape) * (share if in_experts else 1.0)


def _attention_width(config: PretrainedConfig) -> float:
    """Heads x head size, 0 without attention, the mean of layers that differ (Gemma 4)."""
    counted = getattr(config, "num_hidden_layers", None)  # BLT's has none, and its per_layer_config then no length
    layers = list(getattr(config, "per_layer_config", None) or ()) if counted else []
    widths = [_width_of_layer(layer) for layer in layers] or [_width_of_layer(config)]
    return sum(widths) / len(widths)


def _width_of_layer(config: PretrainedConfig) -> float:
    """Where keys and values differ in size (DeepSeek) their mean counts."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0.0
    head_size = getattr(config, "head_dim", None) or config.hidden_size / heads
    key_size = getattr(config, "qk_head_dim", None) or head_size
    value_size = getattr(config, "v_head_dim", None) or head_size
    return float(heads * (key_size + value_size) / 2)


def _attention_windows(config: PretrainedConfig) -> Iterator[int | None]:
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        yield from [window] * (getattr(config, "num_hidden_layers", None) or 0)
        return
    windows = {"sliding_attention": window, "chunked_attention": getattr(config, "attention_chunk_size", None)}
    for layer_type in layer_types:
        if layer_type not in WITHOUT_ATTENTION:
            yield windows.get(layer_type)


def _first(config: PretrainedConfig, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None))), None)
