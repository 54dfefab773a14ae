"""Check a DeepSpeed JSON key by key against the table in ds_keys.py."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_recipes.config.ds_keys import (
    OPTIMIZERS,
    SCHEDULERS,
    TOP,
    Honoured,
    NoEffect,
    Only,
    Refused,
    Rule,
    Section,
    SwitchedOff,
)
from ds_recipes.config.entries import nearest
from ds_recipes.config.values import one_of


@dataclass(frozen=True)
class Binding:
    """A value of the JSON that says the same thing as one of the run's settings."""

    setting: str
    key: str  # path in the JSON, such as optimizer.params.lr
    value: Any  # in the setting's own terms
    shown: str  # as it stands in the JSON


@dataclass
class Findings:
    """What a JSON binds, what is wrong with it, and which of its keys change nothing. Lines begin with a key's path."""

    bindings: list[Binding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def bind(self, setting: str, key: str, value: Any, shown: Any) -> None:
        self.bindings.append(Binding(setting, key, value, json.dumps(shown)))


def check_tree(tree: Mapping[str, Any]) -> Findings:
    """Check every key and value of a DeepSpeed JSON, as far as that needs nothing of the run."""
    found = Findings()
    rules: dict[str, Rule] = TOP | {
        "optimizer": _optimizer_rule(tree.get("optimizer"), found),
        "scheduler": _scheduler_rule(tree.get("scheduler"), found),
    }
    _check_section(tree, rules, "", found)
    zero = tree.get("zero_optimization")
    if zero is None or (isinstance(zero, dict) and zero.get("stage") is None):
        found.problems.append('zero_optimization.stage is missing: write "zero_optimization": {"stage": 3}')
    if isinstance(tree.get("bf16"), dict) and "enabled" not in tree["bf16"]:
        found.problems.append('bf16.enabled is missing: write true, false or "auto"')
    if isinstance(tree.get("activation_checkpointing"), dict):
        found.bindings.append(Binding("activation_checkpointing", "activation_checkpointing", True, "there"))
    return found


def _optimizer_rule(section: Any, found: Findings) -> Rule:
    name = section.get("type") if isinstance(section, dict) else None
    optimizer_type, params = OPTIMIZERS.get(str(name).lower(), ("", {}))
    if not optimizer_type:
        return Refused(f"has the type {json.dumps(name)}: only AdamW, Adam and SGD are there")
    found.bind("optimizer_type", "optimizer.type", optimizer_type, name)
    return Section({"type": Honoured("text"), "params": Section(params)})


def _scheduler_rule(section: Any, found: Findings) -> Rule:
    name = section.get("type") if isinstance(section, dict) else None
    style, params = SCHEDULERS.get(str(name), ("", {}))
    if not style:
        return Refused(
            f"has the type {json.dumps(name)}: only {one_of(tuple(SCHEDULERS))} are there. "
            "Leave the section out and set lr_decay_style, lr_warmup, lr_decay and lr_min"
        )
    found.bind("lr_decay_style", "scheduler.type", style, name)
    given = section.get("params") or {}
    if isinstance(given, dict) and given.get("warmup_type") is None:
        found.problems.append(
            'scheduler.params.warmup_type is missing, and DeepSpeed\'s default is "log": the loop warms up linearly, so write '
            '"linear"'
        )
    if style == "linear":
        found.bind("lr_min", "scheduler.type", 0.0, name)
    return Section({"type": Honoured("text"), "params": Section(params)})


def _check_section(tree: Any, rules: Mapping[str, Rule], prefix: str, found: Findings) -> None:
    if not isinstance(tree, Mapping):
        found.problems.append(f"{prefix.rstrip('.')} must be an object, not {json.dumps(tree)}")
        return
    for key, value in tree.items():
        if key not in rules:
            guess = nearest(key, tuple(rules))
            hint = f"did you mean {guess}?" if guess else "DeepSpeed has no such key there; leave it out"
            found.problems.append(f"unknown key {prefix}{key}: {hint}")
        elif value is not None:
            _check_value(value, rules[key], prefix + key, found)


def _check_value(value: Any, rule: Rule, key: str, found: Findings) -> None:
    match rule:
        case Section(keys):
            _check_section(value, keys, f"{key}.", found)
        case Refused(reason):
            found.problems.append(f"{key} {reason}")
        case NoEffect(reason):
            found.notes.append(f"{key} has no effect: it {reason}")
        case Only(values, reason):
            if not any(isinstance(value, bool) == isinstance(each, bool) and value == each for each in values):
                found.problems.append(f"{key} is {json.dumps(value)}: {reason}")
        case SwitchedOff(reason):
            if not isinstance(value, dict) or value.get("enabled", False) not in (False, "auto"):
                found.problems.append(f"{key} is switched on: {reason}")
        case Honoured():
            _check_honoured(value, rule, key, found)


def _check_honoured(value: Any, rule: Honoured, key: str, found: Findings) -> None:
    if value == "auto":
        return
    wanted = _what_is_wanted(value, rule)
    if wanted:
        found.problems.append(f'{key} must be {wanted} or "auto", not {json.dumps(value)}{rule.hint}')
    elif rule.kind == "betas":
        found.bind("adam_beta1", f"{key}[0]", value[0], value[0])
        found.bind("adam_beta2", f"{key}[1]", value[1], value[1])
    elif rule.setting == "precision":
        found.bind("precision", key, "bf16" if value else "fp32", value)
    elif rule.setting:
        found.bind(rule.setting, key, int(value) if rule.kind == "count" else value, value)


def _what_is_wanted(value: Any, rule: Honoured) -> str:
    """What the value should have been, or nothing if it is that."""
    if rule.kind == "bool":
        return "" if isinstance(value, bool) else "true or false"
    if rule.kind == "text":
        is_choice = isinstance(value, str) and (not rule.choices or value in rule.choices)
        return "" if is_choice else ", ".join(f'"{choice}"' for choice in rule.choices)
    if rule.kind == "betas":
        return "" if isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) else "two numbers"
    if rule.kind == "number":
        return "" if _is_number(value) else "a number"
    least = 2 if rule.kind == "steps" else 0
    is_count = _is_number(value) and value >= least and value == int(value)
    return "" if is_count else f"a whole number of at least {least}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
