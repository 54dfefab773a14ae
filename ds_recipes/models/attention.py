"""Which attention implementation runs."""

from importlib.util import find_spec

import torch
from transformers import PretrainedConfig

from ds_recipes.config.schema import Config
from ds_recipes.errors import ConfigError
from ds_recipes.models.load import ModelSource


def choose_attention(config: Config, device: torch.device, source: ModelSource) -> str:
    """The attention implementation for this run: the one asked for, or the fastest present; eager for a model without sdpa.

    sdpa and eager compute the same, and transformers too takes eager for a model without sdpa.

    Raises:
        ConfigError: FlashAttention 2 was asked for and cannot run here.
    """
    present = find_spec("flash_attn") is not None
    flash_runs = device.type == "cuda" and config.run.precision != "fp32" and present
    asked = config.model.attn_implementation
    if asked == "flash_attention_2" and not flash_runs:
        raise ConfigError(
            [
                "--attn_implementation flash_attention_2 needs a GPU, bf16 and the flash-attn package (here: device "
                f"{device.type}, precision {config.run.precision}, the package is {'present' if present else 'missing'}). "
                "Use sdpa, or pip install 'ds-recipes[gpu]'."
            ]
        )
    if config.model.use_fast_kernels and flash_runs and source.has_attention("flash_attention_2"):
        return "flash_attention_2"
    return "eager" if asked == "sdpa" and not source.has_attention("sdpa") else asked


def rope_note(hf_config: PretrainedConfig, context_size: int) -> str | None:
    """What to know of rotary embeddings whose frequencies depend on the length of a row; None for others.

    transformers takes one length for a whole micro-batch, that of its longest document (`dynamic_rope_update`): short documents
    get the long ones' frequencies as soon as one of them is longer than the original context.
    """
    settings = hf_config.get_text_config()
    ropes = getattr(settings, "rope_parameters", None) or {}
    for rope in [ropes, *(part for part in ropes.values() if isinstance(part, dict))]:
        if rope.get("rope_type") not in ("longrope", "dynamic"):
            continue
        original = rope.get("original_max_position_embeddings") or getattr(
            settings, "original_max_position_embeddings", settings.max_position_embeddings
        )
        if context_size > original:
            return (
                f"this model's positions (rope_type {rope['rope_type']}) change with the longest document of a micro-batch, once "
                f"one has more than {original:,} tokens: shorter ones beside it are then learned with the long ones' frequencies. "
                f"Use --context_size {original} to keep the short ones', or train long documents apart from short ones."
            )
    return None
