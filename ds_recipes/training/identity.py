"""What must stay the same when a run is continued, as a checkpoint records it; `changes.py` compares it."""

from collections.abc import Mapping
from typing import Any

from ds_recipes.config.engine_settings import engine_settings
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config
from ds_recipes.config.values import dotted_entries
from ds_recipes.data.packing import PACKING_VERSION
from ds_recipes.data.reading import Reading

Identity = Mapping[str, str | Mapping[str, str]]
"""A text for each key of `CHANGES`, or several by name."""

WITHOUT_EFFECT = frozenset(
    {
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "id2label",
        "label2id",
        "problem_type",
        "chunk_size_feed_forward",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pretraining_tp",
        "name_or_path",
    }
)
"""Entries of a model's config that say nothing about what its training computes."""


def identity_of(config: Config, plan: Plan, read: Reading, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a checkpoint records and a continued run is compared by.

    `plan` is laid out without the rows that a run leaves out: those may change on the way. `hf_config` is the model's config.
    """
    data, weights, part = config.data, read.corpus.weights, config.model.model_part
    return {
        "data": read.corpus.fingerprint,
        "tokenizer": read.tokenizer_fingerprint,
        "dataset": f"{data.dataset} ({read.format_fingerprint[:12]}, version {read.tokens_version})",
        "mixture": "no weights" if weights is None else " ".join(f"{weight:g}" for weight in weights),
        "validation_split": str(data.validation_split),
        "packing": f"{data.packing} (version {PACKING_VERSION})",
        "truncation": read.long_documents,
        "context_size": str(data.context_size),
        "seed": str(config.run.seed),
        "global_batch_size": str(plan.global_rows),
        "precision": f"{config.run.precision}: {engine_settings(config).precision}",
        "optimizer": config.optimizer.optimizer_type,
        "model": dict(dotted_entries(hf_config, counts=_has_effect))
        | ({} if part == "whole" else {"model_part": part}),
        "schedule": _schedule(config, plan),
    }


def _has_effect(name: str) -> bool:
    return not name.startswith("_") and name not in WITHOUT_EFFECT


def _schedule(config: Config, plan: Plan) -> dict[str, str]:
    """The course of the learning rate, and what else an update depends on.

    The number of steps is in it only through the course: a constant rate goes on for as long as one likes.
    """
    optimizer = config.optimizer
    values: dict[str, Any] = {
        "lr": plan.lr,
        "lr_min": plan.lr_min,
        "lr_decay_style": plan.lr_decay_style,
        "warmup_steps": plan.warmup_steps,
        "lr_warmup_style": plan.lr_warmup_style,
        "lr_warmup_start": plan.lr_warmup_start,
        "decay_steps": plan.decay_steps,
        "total_steps": plan.total_steps if plan.lr_decay_style == "wsd" else None,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
    }
    names = ("sgd_momentum",) if optimizer.optimizer_type == "sgd" else ("adam_beta1", "adam_beta2", "adam_eps")
    values |= {name: getattr(optimizer, name) for name in names}
    return {name: "none" if value is None else str(value) for name, value in values.items()}
