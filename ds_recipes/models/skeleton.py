"""The model's structure: parameters without storage (on the meta device), buffers with their real values.

Every engine starts from a skeleton, gives it sharded storage of its own, and fills that from a range reader
(`models/sources.py`). So no rank ever holds the whole model.
"""

import copy
import re
import zlib
from collections.abc import Callable, Collection
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from ds_recipes.errors import InputError
from ds_recipes.models.parts import LANGUAGE, WHOLE, auto_class_of, keep_to_language, other_part_hint

RECOMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.(masked_bias|rotary_emb\.(cos|sin)_cached)$")
"""Tables in the files of older versions of transformers, which follow from the config."""


class NoSuchAttention(InputError):
    """The model cannot run with an attention implementation."""


def build_skeleton(
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str,
    device: torch.device,
    trust_remote_code: bool,
    part: str = WHOLE,
) -> PreTrainedModel:
    """Build a causal language model whose parameters are on the meta device and whose buffers are on `device`.

    Parameters and buffers have the dtypes that transformers gives them when it loads the model in `dtype`: some
    parameters stay in float32 (`kept_in_float32`), and so do most buffers. Rotary frequencies rounded to bfloat16 would
    move every position.

    With `part` LANGUAGE it is a model of text and images or sound, of which only the language model is trained; see
    `models/parts.py`.

    Raises:
        InputError: the model asks for something that is not supported, or leaves a buffer without a value that no
            checkpoint holds either.
    """
    if getattr(hf_config, "output_router_logits", False):
        raise InputError(
            "the model's config.json sets output_router_logits, which adds a loss for the router that is not supported; "
            "set it to false there"
        )
    auto_class = auto_class_of(hf_config, part)

    def make() -> PreTrainedModel:
        model: PreTrainedModel = auto_class.from_config(
            copy.deepcopy(hf_config),
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        return model

    try:
        with torch.device("meta"):
            model = make()
    except Exception as error:  # a class raises what it likes for settings that do not fit together
        if "attention implementation" in str(error):
            raise NoSuchAttention(
                f"models of type {hf_config.model_type} have no {attn_implementation} attention in transformers "
                f"{transformers.__version__}; pass --attn_implementation eager"
            ) from error
        raise InputError(_why_not_built(hf_config, error)) from error
    _keep_in_float32(model, dtype)
    place_buffers(model, device, make)
    if part == LANGUAGE:
        keep_to_language(model)
    return model


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give float32 to what transformers would load in it although the model's dtype is another one.

    transformers applies its `_keep_in_fp32_modules` when it loads a folder, and not when it builds from a config.
    """
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, _, _ = build_glob_alternation(list(plan))
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if pattern.search(f"{prefix}.{name}") and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        for name, buffer in module.named_buffers(recurse=False):
            if pattern.search(f"{prefix}.{name}") and buffer.is_floating_point():
                module._buffers[name] = buffer.float()


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> frozenset[str]:
    """Names of the parameters of a skeleton that are in float32 although it was built in `dtype`: routers, for example."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32 != dtype)


def kept_line(kept: Collection[str]) -> str | None:
    """How `kept_in_float32` is told: how many, and the ends of their names."""
    ends = sorted({".".join(name.split(".")[-2:]) for name in kept})
    return f"{len(kept)} parameters ({', '.join(ends[:3])}{', ...' if len(ends) > 3 else ''})" if kept else None


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong to the model's saved state, by name: a bias of the router, running statistics.

    Most buffers follow from the config, and a model leaves them out of its state_dict. A shared buffer comes once.
    """
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and not any(buffer is other for other in found.values()):
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _why_not_built(hf_config: PretrainedConfig, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
    return (
        f"transformers {transformers.__version__} cannot build a causal language model of type {hf_config.model_type}: "
        f"{kind}{reason}. {other_part_hint(hf_config) or 'Check its config.json.'}"
    )


def place_buffers(model: PreTrainedModel, device: torch.device, make: Callable[[], PreTrainedModel]) -> None:
    """Give every buffer its initial value on `device`.

    transformers builds models on the meta device itself and then lets `_init_weights` fill the buffers, so this does
    the same. A sentinel finds those that a model does not fill: they get the value of its constructor, out of a second
    model that `make` builds. One that is drawn at random is the same on every rank.

    Raises:
        InputError: a buffer that no checkpoint holds was left without a value.
    """
    unset: list[tuple[nn.Module, str, str]] = []
    for prefix, module in model.named_modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            meta = module._buffers[name]
            assert meta is not None
            module._buffers[name] = _filled_with_sentinel(meta, device)
        if names:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            ):
                torch.manual_seed(zlib.crc32(prefix.encode()))
                initialiser(model, prefix)(module)
        unset += [(module, prefix, name) for name in names if holds_sentinel(module._buffers[name])]
    if not unset:
        return
    whole = dict(_with_real_buffers(make).named_modules())
    for module, prefix, name in unset:
        own, made = module._buffers[name], whole[prefix]._buffers.get(name)
        assert own is not None
        if made is not None and not made.is_meta and made.shape == own.shape:
            own.copy_(made)
        elif name in module._non_persistent_buffers_set:
            raise InputError(
                f"{type(model).__name__} does not set its buffer {prefix}.{name} (transformers {transformers.__version__}), so "
                "it cannot be built without loading it whole"
            )


def _with_real_buffers(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model with each parameter moved to the meta device as soon as it is made: memory is that of the largest one."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)  # the same on every rank
            return make()
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


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
        if meta.is_floating_point() or meta.is_complex()
        else (False if meta.dtype == torch.bool else torch.iinfo(meta.dtype).min)
    )
    return torch.full(meta.shape, sentinel, dtype=meta.dtype, device=device)


def holds_sentinel(buffer: torch.Tensor | None) -> bool:
    """True for a buffer that `place_buffers` found no value for."""
    if buffer is None or buffer.numel() == 0:
        return False
    if buffer.is_floating_point() or buffer.is_complex():
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
