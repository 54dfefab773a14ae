"""Checks of a model's folder or config file that need no torch: what it is, and whether its weights can be trained."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_recipes.config.missing import similar, where_given
from ds_recipes.config.schema import Config

QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Where AutoGPTQ, AutoAWQ and NVIDIA's ModelOpt keep what other programs write into config.json."""

QUANTISED_SECTIONS = ("quantization_config", "compression_config", "quantization")
"""Sections of a config.json: transformers' name, that of older compressed-tensors, and MLX's."""

LOADS_DEQUANTISED = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "metal": "MetalConfig",
    "mxfp4": "Mxfp4Config",
    "mxfp8": "FineGrainedFP8Config",
}
"""Methods that transformers undoes while it loads, and the class that asks for it."""

DEQUANTISES = ("bitsandbytes", "higgs")
"""Methods that transformers undoes in a model that it has loaded."""

GPTQMODEL = ("auto-round", "awq", "gptq")
"""Methods that GPTQModel undoes in the files."""


def check_model(config: Config) -> Iterator[str]:
    """What is wrong with the model's folder or its config file, a line each. Hub models are not looked for."""
    name = "model_name" if config.model.model_name is not None else "model_config"
    text = config.model.model_name or config.model.model_config or ""
    where = where_given(config, name, text)
    if name == "model_name" and not is_folder_name(text):
        return
    path = Path(text) / "config.json" if Path(text).is_dir() else Path(text)
    if not path.exists():
        if Path(text).is_dir():
            yield f"{where}: {other_kind(Path(text)) or f'no config.json in this folder{similar(path)}'}"
        else:
            yield f"{where}: there is no such {'folder' if name == 'model_name' else 'file'}{similar(path)}"
        return
    if name == "model_name" and path.is_file() and path.name != "config.json":
        yield f"{where}: is a file; name the folder with config.json and safetensors files"
        return
    try:
        shape = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"{where}: {path} cannot be read as JSON: {error}"
        return
    quantised = quantised_weights(shape, path)
    if quantised is not None:
        yield f"{where}: {quantised}"
    if name == "model_name":
        yield from (f"{where}: {problem}" for problem in other_weights(shape, path))
    yield from _context(config, shape, path)


def is_folder_name(name: str) -> bool:
    """True if a model or tokenizer name means a folder here, False if it is a hub id such as owner/name."""
    return Path(name).is_dir() or name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/")


def other_kind(folder: Path) -> str | None:
    """What a folder without config.json holds instead of a model, and how it becomes one; None if nothing is known."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = _base_of(adapter)
        return (
            f"holds an adapter (adapter_config.json) for {base or 'another model'}, not a model. Merge it once: python -c "
            f'"from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; '
            f"M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged'); "
            f"T.from_pretrained('{base or 'BASE_MODEL'}').save_pretrained('{folder}-merged')\""
        )
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        return (
            f"holds a model for llama.cpp ({gguf[0].name}), mostly with quantised weights. Train the model that it was made "
            "from; its model card names it."
        )
    return None


def _base_of(adapter_config: Path) -> str | None:
    try:
        base = json.loads(adapter_config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return str(base) if base else None


def other_weights(shape: Any, path: Path) -> Iterator[str]:
    """Why transformers would load other weights than those beside `path`, a config.json that holds `shape`."""
    adapter = path.with_name("adapter_config.json")
    if path.name == "config.json" and adapter.is_file():
        yield (
            f"{path.parent}: holds a model and an adapter ({adapter.name}) for {_base_of(adapter) or 'another one'}, and "
            "transformers would load that one with the adapter in it. Move the adapter's files away to train the model that "
            "lies there, or merge the two first."
        )
    named = shape.get("transformers_weights") if isinstance(shape, Mapping) else None
    if named:
        yield (
            f"{path}: names its weights' file (transformers_weights: {named}), which is not read here. Name it "
            "model.safetensors, and delete that entry."
        )


def quantised_weights(shape: Any, path: Path) -> str | None:
    """Why the weights that `path`, a config.json, describes cannot be trained, and how to undo it; None if they are plain.

    `shape` is what the file holds. Codes of a quantised weight are numbers too: read as weights they would be trained.
    """
    found = _quantised(shape)
    if found is None:
        found = next(
            (
                (name, section)
                for name in QUANTISED_FILES
                if path.name == "config.json" and (section := _other_file(path.with_name(name))) is not None
            ),
            None,
        )
    if found is None:
        return None
    where, section = found
    method = _method(section)
    return (
        f"{path.with_name(where) if where in QUANTISED_FILES else path}: the model's weights are quantised ({where}: {method}), "
        f"and training needs them in bfloat16, float16 or float32. {_remedy(method, path)} If they have been dequantised "
        f"already, delete {where}."
    )


def _quantised(shape: Any, above: str = "") -> tuple[str, Mapping[str, Any]] | None:
    """The first section that says how weights are quantised, wherever a composite model has it, and its dotted name."""
    if not isinstance(shape, Mapping):
        return None
    for name in QUANTISED_SECTIONS:
        section = shape.get(name)
        if isinstance(section, Mapping) and section and (name != "quantization" or "bits" in section):
            return f"{above}{name}", section
    nested = (_quantised(value, f"{above}{name}.") for name, value in shape.items() if isinstance(value, Mapping))
    return next((found for found in nested if found is not None), None)


def _other_file(path: Path) -> Mapping[str, Any] | None:
    try:
        section = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if path.name == "hf_quant_config.json" and isinstance(
        section, Mapping
    ):  # of the cache alone if there is no algorithm
        section = section.get("quantization")
        return section if isinstance(section, Mapping) and section.get("quant_algo") else None
    return section if isinstance(section, Mapping) and section else None


def _method(section: Mapping[str, Any]) -> str:
    """The method by the name that transformers has for it, else what the section says of itself."""
    if section.get("load_in_4bit") or section.get("_load_in_4bit"):
        return "bitsandbytes, 4 bit"
    if section.get("load_in_8bit") or section.get("_load_in_8bit"):
        return "bitsandbytes, 8 bit"
    if section.get("quant_method"):
        return str(section["quant_method"])
    if section.get("quant_algo"):
        return f"ModelOpt, {section['quant_algo']}"
    if "w_bit" in section:
        return f"awq, {section['w_bit']} bit"
    if "damp_percent" in section:
        return f"gptq, {section.get('bits')} bit"
    if "bits" in section:
        return f"{section.get('mode', 'MLX')}, {section['bits']} bit"
    return "a method without a name"


def _remedy(method: str, path: Path) -> str:
    kind, folder = method.split(",")[0].lower(), path.parent
    load, undo = "", ""
    if kind in LOADS_DEQUANTISED:
        load = f", quantization_config=t.{LOADS_DEQUANTISED[kind]}(dequantize=True)"
    elif kind in DEQUANTISES:
        undo = ".dequantize()"
    elif kind in GPTQMODEL:
        return (
            "Train the model that it was made from (its model card names it), or undo it once with GPTQModel: python -c "
            f"\"from gptqmodel.utils.model_dequant import dequantize_model; dequantize_model('{folder}', '{folder}-bf16')\""
        )
    elif kind == "bitnet":
        return "Train the model's bf16 weights, which are published beside it."
    else:
        return "transformers cannot undo this method: train the model that it was made from (its model card names it)."
    return (
        f"Dequantise them once: python -c \"import transformers as t; t.AutoModelForCausalLM.from_pretrained('{folder}', "
        f"dtype='bfloat16'{load}){undo}.save_pretrained('{folder}-bf16'); "
        f"t.AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}-bf16')\""
    )


def _context(config: Config, shape: Any, path: Path) -> Iterator[str]:
    positions = shape.get("max_position_embeddings") if isinstance(shape, dict) else None
    if isinstance(positions, int) and 0 < positions < config.data.context_size:  # XLNet's -1: as many as one likes
        origin = config.origins.get("context_size", "default")
        yield (
            f"context_size is {config.data.context_size} ({origin}), but the model has {positions} positions "
            f"(max_position_embeddings in {path}). Set context_size to {positions} at most."
        )
