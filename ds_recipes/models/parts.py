"""Models of text and images or sound: which class holds the whole of one, and how its language model is trained alone.

The whole model is built, so that checkpoints and exports hold all of it under its own names. What is neither the language
model nor its output head is frozen: no optimizer state, no decay, the values of the files.
"""

import inspect
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from ds_recipes.errors import InputError

WHOLE, LANGUAGE = "whole", "language"

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What turns images and sound into a model's input; kept as it is beside the weights."""


def auto_class_of(hf_config: PretrainedConfig, part: str) -> Any:
    """The auto class that builds the model of which `part` is trained.

    Raises:
        InputError: the language model alone is asked for of a model that is nothing else.
    """
    if part == WHOLE:
        return AutoModelForCausalLM
    if hf_config.model_type not in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        raise InputError(
            f"--model_part language: models of type {hf_config.model_type} have no other part. Leave it out."
        )
    return AutoModelForMultimodalLM


def part_saved(hf_config: PretrainedConfig) -> str:
    """Which part a saved model was trained as: its config names the class that wrote it."""
    whole = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(hf_config.model_type)
    saved = hf_config.architectures or ()
    is_other_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type) != whole
    return LANGUAGE if whole in saved and is_other_class else WHOLE


def other_part_hint(hf_config: PretrainedConfig) -> str | None:
    """What to do with a model of text and something else; None for one of text alone."""
    if hf_config.model_type not in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        return None
    return (
        f"Models of type {hf_config.model_type} are more than a language model: train that alone, and keep the rest as it "
        "is in all that is saved, with --model_part language."
    )


def keep_to_language(model: PreTrainedModel) -> None:
    """Freeze what is neither the language model nor its head, and let a call of the model be one with text alone.

    Raises:
        InputError: transformers does not say where the language model is.
    """
    language, head = model.get_decoder(), model.get_output_embeddings()
    if language is None or language is model or head is None:
        raise InputError(
            f"--model_part language: transformers does not tell which part of {type(model).__name__} is the language model"
        )
    trained = {id(parameter) for module in (language, head) for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    # Llama 4's own forward needs images; its language model has the head itself.
    forward = language.forward if head in language.modules() else model.forward
    rows = 4 if any(hasattr(module, "mrope_section") for module in language.modules()) else 0

    def text_forward(_: nn.Module, *args: Any, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if rows and position_ids is not None and position_ids.ndim == 2:
            # One row for documents' borders, three for the axes of mRoPE, which are equal in text.
            position_ids = position_ids[None].expand(rows, *position_ids.shape)
        return forward(*args, position_ids=position_ids, **kwargs)

    own = inspect.signature(forward)
    given = [inspect.Parameter("_", inspect.Parameter.POSITIONAL_ONLY), *own.parameters.values()]
    text_forward.__signature__ = own.replace(parameters=given)  # type: ignore[attr-defined]
    model.forward = MethodType(text_forward, model)
