"""Load an exported model as anyone would, and say in JSON how it compares with what it was made from.

    python -P fresh_load.py REQUEST

REQUEST is JSON: `folder`, `dtype`, `trust_remote_code`, `tokenizer`, the folder of the original one if there is one, and
either `probe`, a file with token ids and the logits that the training engine computed for them, or `source`, a checkpoint of
another program, and `wanted`, how it is read. Run in a process of its own with plain transformers: nothing of ds_recipes is
imported before the model has computed its logits, so what passes here passes on a machine that has never seen it.
"""

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

PROBE_TOKENS = 16
PROBE_TEXTS = ("Hello world", " a  b\n\n\tc 1234.5", "東京で学ぶ。 été 🙂", "<s>[INST] x </s><|im_start|>user\n")


def compare(request: dict[str, Any]) -> dict[str, object]:
    """Keys that loading missed or did not know, and the largest difference of the logits with their own size."""
    folder, trust = request["folder"], request["trust_remote_code"]
    model, info = _class_of(folder, trust).from_pretrained(
        folder, dtype=getattr(torch, request["dtype"]), output_loading_info=True, trust_remote_code=trust
    )
    probe = load_file(request["probe"]) if request["probe"] else {"input_ids": _some_ids(model.get_input_embeddings())}
    logits = logits_of(_text_model(model), probe["input_ids"])  # [1, tokens, vocabulary]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model
    expected = probe["logits"] if "logits" in probe else _reference(request, probe["input_ids"])
    return {
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "difference": float((logits - expected).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "other_tokens": _other_tokens(folder, request["tokenizer"], trust) if request["tokenizer"] else [],
        "parameters": parameters,
    }


def logits_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The float32 logits for token ids [1, tokens] without a cache, which some models cannot make: [1, tokens, vocabulary].

    The config says so, not an argument: not every forward takes one.
    """
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids).logits.float()
    return logits


def _class_of(folder: str, trust: bool) -> Any:
    """The auto class of the model that config.json names: one of text, or one of text and images or sound."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    saved = set(config.architectures or ())
    is_text = saved & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    is_more = saved & set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values())
    return AutoModelForMultimodalLM if is_more and not is_text else AutoModelForCausalLM


def _text_model(model: Any) -> Any:
    """The part of the model that makes logits of text alone: the language model where that has the head (Llama 4)."""
    language, head = model.get_decoder(), model.get_output_embeddings()
    has_the_head = language is not head and head in language.modules()  # ModernBERT calls its head the decoder
    return language if has_the_head else model


def _other_tokens(folder: str, original: str, trust: bool) -> list[str]:
    """The texts of which the exported tokenizer makes other tokens than the original one."""
    exported, known = (AutoTokenizer.from_pretrained(place, trust_remote_code=trust) for place in (folder, original))
    return [text for text in PROBE_TEXTS if exported(text).input_ids != known(text).input_ids]


def _some_ids(embedding: torch.nn.Module) -> torch.Tensor:
    rows = embedding.get_parameter("weight").shape[0]
    return torch.randint(0, rows, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


def _reference(request: dict[str, Any], input_ids: torch.Tensor) -> torch.Tensor:
    from ds_recipes.checkpoint.export.reference import reference_logits

    return reference_logits(request["source"], request["wanted"], input_ids)


if __name__ == "__main__":
    print("\n" + json.dumps(compare(json.loads(sys.argv[1]))))
