"""The README.md of an exported model: where it comes from, in the hub's form. It claims no licence and no language."""

import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData

import ds_recipes
from ds_recipes.checkpoint.export.sources import Source
from ds_recipes.checkpoint.files import read_bytes
from ds_recipes.models.end_tokens import GENERATION_CONFIG

SETTINGS = (
    "precision",
    "context_size",
    "packing",
    "truncation",
    "dataset",
    "num_epochs",
    "max_steps",
    "max_tokens",
    "seed",
    "optimizer_type",
    "lr",
    "lr_min",
    "lr_warmup",
    "lr_decay_style",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "grad_clip_norm",
)
"""The settings of run.yaml that a reader of a model asks for first."""

TRAINED_WITH = ("ds-recipes", "torch", "deepspeed", "transformers", "engine", "stage", "ranks")
"""What the card tells of the environment of training; hosts and the like are nobody's business."""


def model_card(source: Source, dtype: str) -> str:
    """The card's text. Of files and folders of this machine it names no more than their last part."""
    run = _run_settings(source.path)
    base = source.state.get("base_model") or run.get("model_name")
    data = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[source.hf_config.model_type, "ds-recipes"],
    )
    rows = {
        "Base model": _base(base, run),
        "Made from": f"{source.path.name} ({source.kind})",
        "Weights": dtype,
        "Generation ends at": _ends(source),
        **_progress(source.state),
        **_settings(run, source.state),
    }
    text = "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {type(source.skeleton).__name__} from {source.path.name}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, "", [])),
            "",
            f"Exported with {_versions()}.",
            "",
        ]
    )
    return str(ModelCard(text))


def _ends(source: Source) -> list[str]:
    """The tokens at which generation stops, by name where the tokenizer says it."""
    settings, tokens = (
        json.loads(read_bytes(source.files[name])) if name in source.files else {}
        for name in (GENERATION_CONFIG, "tokenizer.json")
    )
    ids = settings.get("eos_token_id")
    names = {token["id"]: token["content"] for token in tokens.get("added_tokens", ())}
    return [
        f"{names.get(number, '')} ({number})".strip() for number in (ids if isinstance(ids, list) else [ids]) if ids
    ]


def _run_settings(checkpoint: Path) -> Mapping[str, Any]:
    """The settings that train.py wrote into the run's folder; none if they are not there."""
    path = checkpoint.parent / "run.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _is_hub_id(name: str | None) -> bool:
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _base(base: str | None, run: Mapping[str, Any]) -> str | None:
    if base is None:
        return "none: random weights" if run.get("model_config") else None
    return base if _is_hub_id(base) else Path(base).name


def _progress(state: Mapping[str, Any]) -> dict[str, Any]:
    """Steps, tokens and data of the run."""
    counts = {"Optimizer steps": "step", "Tokens": "tokens", "Target tokens": "target_tokens", "Documents": "samples"}
    rows: dict[str, Any] = {
        shown: f"{state[key]:,}" for shown, key in counts.items() if isinstance(state.get(key), int)
    }
    evaluation = state.get("evaluation") or {}
    if "eval_loss" in evaluation:
        rows["Validation loss, nats a target token"] = f"{evaluation['eval_loss']:.4f}"
    environment = state.get("environment", {})
    rows["Trained with"] = ", ".join(f"{key} {environment[key]}" for key in TRAINED_WITH if key in environment)
    rows["Data"] = [f"{Path(str(entry[0])).name} ({entry[1]})" for entry in state.get("data_files", ())]
    return rows


def _settings(run: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by their own names; what the run's folder does not say is taken from the checkpoint."""
    engine, identity = state.get("engine", {}), state.get("identity", {})
    known = {**{key: identity[key] for key in ("precision", "context_size", "packing") if key in identity}}
    known |= {key: run[key] for key in SETTINGS if run.get(key) is not None}
    rows = {f"`{key}`": value for key, value in known.items()}
    if "global_batch_size" in identity:
        rows["`global_batch_size`"] = identity["global_batch_size"]
    if "sharding" in engine:
        rows["Engine"] = f"{engine.get('engine', '')}, {engine['sharding']}"
    return rows


def _cell(value: object) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return json.dumps(shown, ensure_ascii=False)[1:-1].replace("|", r"\|").replace(r"\"", '"')


def _versions() -> str:
    return (
        f"ds-recipes {ds_recipes.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, safetensors "
        f"{version('safetensors')}, Python {platform.python_version()}"
    )
