"""The model's structure: parameters without storage (on the meta device), buffers with their real values.

Every engine starts from a skeleton, gives it sharded storage of its own, and fills that from a range reader
(`models/sources.py`). So no rank ever holds the whole model.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ds_recipes.errors import InputError

RECOMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.(masked_bias|rotary_emb\.(cos|sin)_cached)$")
"""Tables in the files of older versions of transformers, which follow from the config."""


def build_skeleton(
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str,
    device: torch.device,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Build a causal language model whose parameters are on the meta device and whose buffers are on `device`.

    Buffers keep their own dtype: rotary frequencies rounded to bfloat16 would move every position.

    Raises:
        InputError: the model asks for something that is not supported, or leaves a buffer without a value.
    """
    if getattr(hf_config, "output_router_logits", False):
        raise InputError(
            "the model's config.json sets output_router_logits, which adds a loss for the router that is not supported; "
            "set it to false there"
        )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a class raises what it likes for settings that do not fit together
        raise InputError(_why_not_built(hf_config, attn_implementation, error)) from error
    _refuse_saved_buffers(model)
    place_buffers(model, device)
    return model


def _refuse_saved_buffers(model: PreTrainedModel) -> None:
    saved = model.state_dict().keys()
    names = [name for name, _ in model.named_buffers() if name in saved]
    if names:
        raise InputError(
            f"models of type {model.config.model_type} keep values beside their parameters that a checkpoint would lose "
            f"({names[0]}{', ...' if len(names) > 1 else ''}); such models are not supported"
        )


def _why_not_built(hf_config: PretrainedConfig, attn_implementation: str, error: Exception) -> str:
    if "attention implementation" in str(error):
        return (
            f"models of type {hf_config.model_type} have no {attn_implementation} attention in transformers "
            f"{transformers.__version__}; pass --attn_implementation eager"
        )
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
    return (
        f"transformers {transformers.__version__} cannot build a causal language model of type {hf_config.model_type}: "
        f"{kind}{reason}. Check its config.json."
    )


def place_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give every buffer its initial value on `device`.

    transformers builds models on the meta device itself and then lets `_init_weights` fill the buffers, so this does
    the same. A sentinel finds those that a model does not fill.

    Raises:
        InputError: a buffer that no checkpoint holds was left without a value.
    """
    for prefix, module in model.named_modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            meta = module._buffers[name]
            assert meta is not None
            module._buffers[name] = _filled_with_sentinel(meta, device)
        if names:
            with torch.no_grad():
                initialiser(model, prefix)(module)
        for name in names:
            full_name = f"{prefix}.{name}" if prefix else name
            if _holds_sentinel(module._buffers[name]):
                raise InputError(
                    f"{type(model).__name__} does not set its buffer {full_name} in _init_weights "
                    f"(transformers {transformers.__version__}), so it cannot be built without loading it whole"
                )


def initialiser(model: PreTrainedModel, path: str) -> Callable[[nn.Module], None]:
    """`_init_weights` of the innermost transformers model around the module at `path`: the one that transformers calls."""
    owner = model
    module: nn.Module = model
    for part in path.split(".") if path else ():
        module = module.get_submodule(part)
        owner = module if isinstance(module, PreTrainedModel) else owner
    return owner._init_weights


def _filled_with_sentinel(meta: torch.Tensor, device: torch.device) -> torch.Tensor:
    sentinel = (
        float("nan")
        if meta.is_floating_point()
        else (False if meta.dtype == torch.bool else torch.iinfo(meta.dtype).min)
    )
    return torch.full(meta.shape, sentinel, dtype=meta.dtype, device=device)


def _holds_sentinel(buffer: torch.Tensor | None) -> bool:
    if buffer is None or buffer.numel() == 0:
        return False
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    return buffer.dtype != torch.bool and bool((buffer == torch.iinfo(buffer.dtype).min).all())


def parameter_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Full shape of each parameter by its canonical name; a tied parameter appears once. Call it on a skeleton."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def left_out_by_transformers(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether transformers, loading this model, leaves a tensor of the files out that the model does not have.

    Those are the model's own `_keys_to_ignore_on_load_unexpected`, and tables that follow from the config and that older
    versions saved: rotary frequencies, position ids, masks.
    """
    own: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    patterns = re.compile("|".join(f"(?:{pattern})" for pattern in [*RECOMPUTED, *own]))
    return lambda name: patterns.search(name) is not None


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Map each further name of a shared parameter to its canonical one, for example lm_head.weight to the embedding."""
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: canonical[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if canonical[id(parameter)] != name
    }
