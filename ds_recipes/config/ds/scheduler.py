"""The scheduler section of a DeepSpeed JSON: its known types become the loop's schedule.

The shapes are DeepSpeed's (runtime/lr_schedules.py); the steps are counted as the loop counts them, so that no update is
spent at a rate of 0.
"""

import json
from collections.abc import Mapping
from typing import Any

from ds_recipes.config.ds.findings import Findings
from ds_recipes.config.ds.rules import SAME, NoEffect, Rule, Section, Value
from ds_recipes.config.ds.values import is_number
from ds_recipes.config.values import one_of

STEPS = Value("count", least=1, fsdp=SAME)
RATE = Value("number", fsdp=SAME)
WARMUP: dict[str, Rule] = {"warmup_num_steps": STEPS, "warmup_type": Value("text", fsdp=SAME)}
WARMUP_RATES: dict[str, Rule] = {**WARMUP, "warmup_min_lr": RATE, "warmup_max_lr": RATE}
NOT_SAVED = NoEffect("the step comes from the checkpoint")

SCHEDULERS: dict[str, tuple[str, dict[str, Rule]]] = {
    "WarmupLR": ("constant", WARMUP_RATES),
    "WarmupDecayLR": ("linear", {**WARMUP_RATES, "total_num_steps": STEPS}),
    "WarmupCosineLR": (
        "cosine",
        {**WARMUP, "total_num_steps": STEPS, "warmup_min_ratio": RATE, "cos_min_ratio": RATE},
    ),
}
OTHERS = (
    "LRRangeTest", "OneCycle", "LambdaLR", "MultiplicativeLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR",
    "ExponentialLR", "SequentialLR", "CosineAnnealingLR", "ChainedScheduler", "ReduceLROnPlateau", "CyclicLR",
    "CosineAnnealingWarmRestarts", "OneCycleLR", "PolynomialLR", "LRScheduler",
)  # fmt: skip
PARAMS = "scheduler.params"


def scheduler_rule(section: Any, found: Findings) -> Rule | None:
    """The rule for this section, with what it says bound; None where there is nothing more to check."""
    if not isinstance(section, Mapping):
        return Section({})
    name = section.get("type")
    if name is None:
        found.problems.append("scheduler.type is missing: DeepSpeed ignores the section then; leave it out")
        return None
    if not isinstance(name, str) or name not in SCHEDULERS:
        lines = found.unsupported if str(name) in OTHERS else found.problems
        who = "this program has" if str(name) in OTHERS else "DeepSpeed has no such scheduler; this program has"
        lines.append(
            f"scheduler.type is {json.dumps(name)}: {who} {one_of(tuple(SCHEDULERS))}. Leave the section out and set "
            "lr_decay_style, lr_warmup, lr_decay and lr_min"
        )
        return None
    style, rules = SCHEDULERS[name]
    params = section.get("params")
    if not isinstance(params, Mapping):
        found.problems.append(f"{PARAMS} is missing: DeepSpeed cannot make a {name} without")
        return None
    if "total_num_steps" in rules and params.get("total_num_steps") is None:
        found.problems.append(
            f'{PARAMS}.total_num_steps is missing: DeepSpeed needs it. Write "auto" for the run\'s length'
        )
    found.bind("lr_decay_style", "scheduler.type", style, name)
    _bind_warmup(params, found)
    if style == "cosine":
        _bind_ratios(params, found)
    else:
        _bind_rates(style, params, found)
    return Section({"type": Value("text", fsdp=SAME), "params": Section({**rules, "last_batch_iteration": NOT_SAVED})})


def _bind_warmup(params: Mapping[str, Any], found: Findings) -> None:
    steps, shape = params.get("warmup_num_steps"), params.get("warmup_type")
    key = f"{PARAMS}.warmup_num_steps"
    if steps is None:
        found.bind("lr_warmup", key, 1000, 1000, is_default=True)
    elif _is_steps(steps):
        found.bind("lr_warmup", key, max(2, int(steps)), steps)  # 1 would be the whole run; DeepSpeed takes 2 too
    if _is_steps(params.get("total_num_steps")):
        found.bind(
            "lr_decay", f"{PARAMS}.total_num_steps", max(2, int(params["total_num_steps"])), params["total_num_steps"]
        )
    key = f"{PARAMS}.warmup_type"
    if shape in ("log", "linear"):
        found.bind("lr_warmup_style", key, shape, shape)
    elif shape is None:
        found.bind("lr_warmup_style", key, "log", "log", is_default=True)
    elif shape != "auto":
        found.bind("lr_warmup_style", key, "log", shape)
        found.notes.append(f'{key} is {json.dumps(shape)}, which DeepSpeed reads as "log"')


def _bind_rates(style: str, params: Mapping[str, Any], found: Findings) -> None:
    """WarmupDecayLR falls to the rate that the warm-up began at."""
    lowest, peak = params.get("warmup_min_lr", 0), params.get("warmup_max_lr")
    if is_number(lowest):
        is_default = "warmup_min_lr" not in params
        found.bind("lr_warmup_start", f"{PARAMS}.warmup_min_lr", lowest, lowest, is_default=is_default)
        if style == "linear":
            key = "scheduler.type" if is_default else f"{PARAMS}.warmup_min_lr"
            found.bind("lr_min", key, lowest, "WarmupDecayLR" if is_default else lowest)
    if is_number(peak):
        found.bind("lr", f"{PARAMS}.warmup_max_lr", peak, peak)
    elif peak is None and style == "linear":
        found.notes.append(f"{PARAMS}.warmup_max_lr is missing: DeepSpeed would rise to 0.001, this run to its own lr")


def _bind_ratios(params: Mapping[str, Any], found: Findings) -> None:
    for name, setting, default in (("warmup_min_ratio", "lr_warmup_start", 0), ("cos_min_ratio", "lr_min", 0.0001)):
        ratio = params.get(name, default)
        if is_number(ratio):
            found.bind(setting, f"{PARAMS}.{name}", ratio, ratio, times="lr", is_default=name not in params)


def _is_steps(value: Any) -> bool:
    return is_number(value) and value >= 1 and value == int(value)
