"""What transformers 4 looks for in a model's folder, beside what transformers 5 writes there.

transformers 5 writes the positions' settings as `rope_parameters`, the precision as `dtype` and its own class names into
tokenizer_config.json. transformers 4, and programs that read the files themselves, know other names, and take their
defaults without a word where these are missing: a rope base of 10000 without scaling, for one.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import PretrainedConfig

THETA, FACTOR, PARAMETERS, SCALING = "rope_theta", "partial_rotary_factor", "rope_parameters", "rope_scaling"
FULL, SLIDING = "full_attention", "sliding_attention"

OTHER_NAMES = {
    "gpt_neox": {THETA: "rotary_emb_base", FACTOR: "rotary_pct"},
    "gpt_neox_japanese": {THETA: "rotary_emb_base", FACTOR: "rotary_pct"},
    "modernbert": {THETA: "global_rope_theta"},
    "modernbert-decoder": {THETA: "global_rope_theta"},
}
"""What transformers 4 calls the settings of models where it has names of their own for them."""

SLIDING_THETA = {
    "gemma3_text": "rope_local_base_freq",
    "gemma3n_text": "rope_local_base_freq",
    "modernbert": "local_rope_theta",
    "modernbert-decoder": "local_rope_theta",
}
"""The base of layers with a sliding window, where it is a setting of its own."""

THREE_FIELDS = ("phi3", "phi4_multimodal")
"""Models whose transformers 4 config demands exactly `type`, `short_factor` and `long_factor` as `rope_scaling`."""

TOKENIZER_CONFIG, TOKENIZER_JSON = "tokenizer_config.json", "tokenizer.json"

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""Reads tokenizer.json as it is, in transformers 4 and 5."""

NEW_CLASSES = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend")
"""Tokenizer classes that transformers 4 does not have."""

REBUILT_CLASSES = ("Llama", "CodeLlama", "Gemma", "GPTNeoX", "Cohere")
"""Classes that put their own idea of BOS and EOS in the place of tokenizer.json's, unless two settings say otherwise."""

OF_ONE_MACHINE = ("is_local", "local_files_only", "name_or_path", "tokenizer_file")


ONLY_BY_5 = (
    "transformers 4 has no names for this model's rope settings: only transformers 5 computes the same from this folder"
)


def portable_config(config: PretrainedConfig, python_files: Collection[str]) -> tuple[dict[str, Any], str | None]:
    """The content of config.json with transformers 4's names beside those of transformers 5, and what to tell the user.

    `python_files` are those that lie in the folder; what `auto_map` names and is not there is left out. Where the older
    names would make transformers 5 read another config, they are left out.
    """
    plain: dict[str, Any] = json.loads(config.to_json_string())
    _keep_local_code(plain, python_files)
    both = _with_old_names(plain)
    read_again = _read_again(type(config), both)
    same = all(read_again.get(key) == value for key, value in plain.items() if key != "auto_map")
    return (both if same else plain), (None if same and _has_names_in_4(plain) else ONLY_BY_5)


def _read_again(kind: type[PretrainedConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 makes of the settings; nothing where it refuses them (Gemma 4's two ropes and one older name)."""
    try:
        found: dict[str, Any] = json.loads(kind.from_dict(json.loads(json.dumps(settings))).to_json_string())
    except (KeyError, ValueError, TypeError, AttributeError, StrictDataclassError):
        return {}
    return found


def _has_names_in_4(settings: Mapping[str, Any]) -> bool:
    """False where layers with a sliding window have a rope of their own, beyond what transformers 4 has a setting for."""
    rope = settings.get(PARAMETERS)
    parts = all(_has_names_in_4(value) for value in settings.values() if isinstance(value, dict))
    if not isinstance(rope, dict) or not isinstance(rope.get(SLIDING), dict) or not isinstance(rope.get(FULL), dict):
        return parts
    sliding, full = rope[SLIDING], rope[FULL]
    own_base = settings.get("model_type") in SLIDING_THETA or sliding.get(THETA) == full.get(THETA)
    return parts and own_base and sliding.get("rope_type", "default") == "default"


def _with_old_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and, in every part of them (a multimodal config has several), the older names."""
    found = {key: _with_old_names(value) if isinstance(value, dict) else value for key, value in settings.items()}
    if isinstance(settings.get("dtype"), str):
        found["torch_dtype"] = settings["dtype"]
    rope = settings.get(PARAMETERS)
    if isinstance(rope, dict) and rope:
        found[PARAMETERS] = rope
        found |= {key: value for key, value in _old_rope(rope, settings).items() if key not in settings}
    return found


def _old_rope(rope: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and the like for `rope_parameters`, which may be one set or one for each kind of layer."""
    model_type = str(settings.get("model_type"))
    names = OTHER_NAMES.get(model_type, {})
    nested = rope.get(FULL)
    full: Mapping[str, Any] = nested if isinstance(nested, dict) else rope
    sliding = rope.get(SLIDING)
    found: dict[str, Any] = {}
    for key in (THETA, FACTOR):
        if full.get(key) is not None:
            found[names.get(key, key)] = full[key]
    if isinstance(sliding, dict) and model_type in SLIDING_THETA:
        found[SLIDING_THETA[model_type]] = sliding.get(THETA)
    kind = full.get("rope_type", full.get("type", "default"))
    scaling = {key: value for key, value in full.items() if key not in (THETA, FACTOR) and not isinstance(value, dict)}
    if model_type in THREE_FIELDS and kind != "default":
        scaling = {"type": kind, "short_factor": full.get("short_factor"), "long_factor": full.get("long_factor")}
    is_plain = kind == "default" and scaling.keys() <= {"rope_type", "type"}
    return found | {SCALING: None if is_plain else scaling}


def _keep_local_code(settings: dict[str, Any], python_files: Collection[str]) -> None:
    """Leave out what `auto_map` names and is not there, and the hub's repository before what is."""
    given = settings.get("auto_map")
    if not isinstance(given, dict):
        return
    found = {key: _local(reference, python_files) for key, reference in given.items()}
    kept = {key: reference for key, reference in found.items() if reference is not None}
    settings.pop("auto_map")
    if kept:
        settings["auto_map"] = kept


def _local(reference: Any, python_files: Collection[str]) -> Any:
    """A class as "module.Class", or the pair of a slow and a fast tokenizer's; None if a module is not there."""
    if isinstance(reference, list | tuple):
        pair = [None if one is None else _local(one, python_files) for one in reference]
        return pair if any(pair) else None
    own = str(reference).rpartition("--")[2]
    return own if f"{own.split('.')[0]}.py" in python_files else None


def portable_tokenizer_config(
    written: bytes, tokenizer_json: bytes | None, python_files: Collection[str], source_class: str | None = None
) -> bytes:
    """tokenizer_config.json as transformers 4 and 5 read it, and to the same tokens.

    Args:
        written: as transformers 5 wrote it.
        tokenizer_json: the tokenizer itself; None if there is no such file.
        source_class: what the folder that the tokenizer was read from calls its class.
    """
    settings: dict[str, Any] = json.loads(written)
    for key in OF_ONE_MACHINE:
        settings.pop(key, None)
    _keep_local_code(settings, python_files)
    settings["tokenizer_class"] = _class_for_both(str(settings.get("tokenizer_class")), source_class)
    if settings["tokenizer_class"] == TOKENIZER_CLASS:
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(settings.get("extra_special_tokens"), list):  # transformers 4 takes a mapping only, for other things
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if tokenizer_json is not None:
        content = json.loads(tokenizer_json)
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in content.get("added_tokens", ())
        }
        if _base(settings["tokenizer_class"]) in REBUILT_CLASSES:
            settings |= _added_at_ends(tokenizer_json, settings)
    return (json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _class_for_both(written: str, source: str | None) -> str:
    """The source's own class if transformers 5 kept to it, else one that takes the tokens from tokenizer.json as they are."""
    if source is not None and source not in NEW_CLASSES and _base(source) == _base(written):
        return source
    return TOKENIZER_CLASS if written in (*NEW_CLASSES, "None", "") else written


def _base(name: str) -> str:
    return name.removesuffix("Fast").removesuffix("Tokenizer")


def _added_at_ends(tokenizer_json: bytes, settings: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the tokenizer puts BOS before and EOS behind a text, as settings of its class."""
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    ids = tokenizer.encode("a").ids
    bos, eos = (tokenizer.token_to_id(_text(settings.get(key))) for key in ("bos_token", "eos_token"))
    return {
        "add_bos_token": bos is not None and ids[:1] == [bos],
        "add_eos_token": eos is not None and len(ids) > 1 and ids[-1] == eos,
    }


def _text(token: Any) -> str:
    return str(token.get("content") if isinstance(token, dict) else token)
