"""Check a DeepSpeed JSON key by key against the tables in keys*.py."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ds_recipes.config.ds.combine import check_combinations, section
from ds_recipes.config.ds.findings import Binding, Findings
from ds_recipes.config.ds.keys import TOP
from ds_recipes.config.ds.old_names import with_todays_names
from ds_recipes.config.ds.optimizer import optimizer_rule
from ds_recipes.config.ds.precision import bind_precision
from ds_recipes.config.ds.rules import (
    LACKING,
    LOW,
    SAME,
    SHARDED,
    STAGES,
    NoEffect,
    Only,
    Removed,
    Rule,
    Section,
    Switch,
    Value,
    asks_nothing,
)
from ds_recipes.config.ds.scheduler import scheduler_rule
from ds_recipes.config.ds.table_check import more_problems
from ds_recipes.config.ds.values import is_number, read_value
from ds_recipes.config.entries import nearest

__all__ = ["Binding", "Findings", "check_tree"]

OTHER_NAMES = ("optimizer", "scheduler")
STAGE_0 = 'this program shards with the stages 1, 2 and 3. Write "zero_optimization": {"stage": 3}'
INSIDE_WANDB = {"project": "wandb_project", "team": "wandb_entity"}


def check_tree(tree: Mapping[str, Any], engine: str = "deepspeed") -> Findings:
    """Check every key and value of a DeepSpeed JSON for an engine, as far as that needs nothing of the run."""
    found = Findings()
    today = with_todays_names(tree, found)
    stage = _stage(today, found)
    rules: dict[str, Rule] = dict(TOP)
    for name, rule_of in (("optimizer", optimizer_rule), ("scheduler", scheduler_rule)):
        rule = rule_of(today[name], found) if today.get(name) is not None else None
        if rule is None:
            today.pop(name, None)
        else:
            rules[name] = rule
    walk = _Walk(engine, stage, found)
    found.tree = walk.section(today, rules, "", is_model=False)
    found.problems += _by_stage(section(today, "zero_optimization"), stage)
    _low_stage_nvme(found, stage)
    check_combinations(found.tree, engine, stage, found)
    bind_precision(today, found)
    _bind_the_rest(today, found)
    found.problems += more_problems(tree, found.problems)
    return found


def _stage(tree: Mapping[str, Any], found: Findings) -> int:
    zero = section(tree, "zero_optimization")
    given = zero.get("stage")
    if given in (None, "auto", 0, "0"):
        words = "is missing, which is stage 0" if given is None else f"is {json.dumps(given)}"
        lines = found.problems if "stage" in zero and given is None else found.unsupported
        lines.append(f"zero_optimization.stage {words}: {STAGE_0}")
        return 0
    try:
        stage = int(read_value(given, "count", is_lax=True))
    except ValueError:
        return 3  # the wrong type is found where the key is checked; the other keys are read as in most files
    if stage > 3:
        found.problems.append(f"zero_optimization.stage is {stage}: there are the stages 0, 1, 2 and 3")
    return min(stage, 3)


def _by_stage(zero: Mapping[str, Any], stage: int) -> Iterator[str]:
    """What DeepSpeed refuses at one stage and takes at another (runtime/zero/config.py)."""
    if stage in SHARDED and zero.get("compute_grad_norm") in (False, "false"):
        yield "zero_optimization.compute_grad_norm is false: DeepSpeed refuses that at stage 3, leave it out"
    ratio = section(zero, "offload_optimizer").get("ratio", 1)
    if stage in LOW and is_number(ratio) and ratio < 1:
        yield f"zero_optimization.offload_optimizer.ratio is {ratio}: DeepSpeed refuses that below stage 3, leave it out"


def _low_stage_nvme(found: Findings, stage: int) -> None:
    """Stages 1 and 2 take any device but "none" for the CPU (stage_1_and_2.py)."""
    zero = found.tree.get("zero_optimization") or {}
    offload = zero.get("offload_optimizer") or {}
    if stage in LOW and offload.get("device") == "nvme":
        zero["offload_optimizer"] = {key: value for key, value in offload.items() if key != "nvme_path"} | {
            "device": "cpu"
        }
        found.notes.append(
            f'zero_optimization.offload_optimizer.device is "nvme": at stage {stage} DeepSpeed takes the CPU'
        )


def _bind_the_rest(tree: Mapping[str, Any], found: Findings) -> None:
    if isinstance(tree.get("activation_checkpointing"), Mapping):
        found.bindings.append(Binding("activation_checkpointing", "activation_checkpointing", True, "there"))
    wandb = found.tree.pop("wandb", {})
    if wandb.get("enabled"):
        for key, setting in INSIDE_WANDB.items():
            if key in wandb:
                found.bind(setting, f"wandb.{key}", wandb[key], wandb[key])
        if "project" not in wandb:
            found.bind("wandb_project", "wandb.project", "deepspeed", "deepspeed", is_default=True)


@dataclass
class _Walk:
    """Goes through the sections; what it returns is the part of the JSON that has an effect."""

    engine: str
    stage: int
    found: Findings

    def section(self, tree: Any, rules: Mapping[str, Rule], prefix: str, is_model: bool) -> dict[str, Any]:
        if not isinstance(tree, Mapping):
            self.found.problems.append(f"{prefix.rstrip('.')} must be an object, not {json.dumps(tree)}")
            return {}
        kept: dict[str, Any] = {}
        for name, value in tree.items():
            key, rule = prefix + name, rules.get(name)
            if rule is None:
                self._unknown(key, name, (*rules, *(OTHER_NAMES if not prefix else ())))
            elif isinstance(rule, Removed):
                self.found.problems.append(f"{key} {rule.reason}")
            elif value is None:
                if is_model and not getattr(rule, "nullable", False):
                    self.found.problems.append(f"{key} is null, which DeepSpeed refuses: leave it out")
            elif value != "auto":
                self._known(key, name, value, rule, is_model, kept)
        return kept

    def _unknown(self, key: str, name: str, names: tuple[str, ...]) -> None:
        guess = nearest(name, names)
        hint = f"did you mean {guess}?" if guess else "DeepSpeed has no such key there; leave it out"
        self.found.problems.append(f"{key} is unknown: {hint}")

    def _known(self, key: str, name: str, value: Any, rule: Rule, is_model: bool, kept: dict[str, Any]) -> None:
        if isinstance(rule, Switch):
            self._switch(key, value, rule)
            return
        if isinstance(rule, Section):
            inner = self.section(value, rule.keys, f"{key}.", rule.is_model)
            if self._is_at_stage(key, [each for each in inner.values() if not asks_nothing(each)], rule.stages):
                kept[name] = inner
            return
        assert not isinstance(rule, Removed)
        try:
            read = self._read(value, rule, is_model)
        except ValueError as wanted:
            self.found.problems.append(f'{key} must be {wanted} or "auto", not {json.dumps(value)}')
            return
        if not self._is_at_stage(key, read, rule.stages):
            return
        if isinstance(rule, NoEffect):
            if not asks_nothing(read):
                self.found.notes.append(f"{key} has no effect: {rule.reason}")
        elif isinstance(rule, Only):
            if not any(isinstance(read, bool) == isinstance(each, bool) and read == each for each in rule.values):
                self.found.unsupported.append(f"{key} is {json.dumps(value)}: {rule.reason}")
        elif self._is_there(key, read, rule):
            self._take(key, name, read, rule, kept)

    @staticmethod
    def _read(value: Any, rule: Value | Only | NoEffect, is_model: bool) -> Any:
        choices, least = (rule.choices, rule.least) if isinstance(rule, Value) else ((), None)
        return read_value(value, rule.kind, choices, least, is_model)

    def _is_at_stage(self, key: str, value: Any, stages: tuple[int, ...]) -> bool:
        if self.stage in stages or (self.stage == 0 and stages == STAGES):
            return True
        if not asks_nothing(value):
            where = f"stage {stages[0]}" if len(stages) == 1 else f"stages {stages[0]} and {stages[-1]}"
            self.found.notes.append(f"{key} has no effect at stage {self.stage}: it is for {where}")
        return False

    def _is_there(self, key: str, value: Any, rule: Value) -> bool:
        """False if the engine cannot do it."""
        if self.engine == "fsdp" and not asks_nothing(value):
            if rule.fsdp == LACKING:
                self.found.lacking.append(key)
            elif rule.fsdp != SAME:
                self.found.unsupported.append(f"{key} is {json.dumps(value)}: {rule.fsdp}")
                return False
        return True

    def _take(self, key: str, name: str, value: Any, rule: Value, kept: dict[str, Any]) -> None:
        if rule.kind == "betas":
            self.found.bind("adam_beta1", f"{key}[0]", value[0], value[0])
            self.found.bind("adam_beta2", f"{key}[1]", value[1], value[1])
        elif not rule.setting:
            kept[name] = value
        elif not (rule.setting == "tensorboard" and value is False):  # false only says that DeepSpeed does not write it
            self.found.bind(rule.setting, key, value, value)

    def _switch(self, key: str, value: Any, rule: Switch) -> None:
        if not isinstance(value, Mapping):
            self.found.problems.append(f"{key} must be an object, not {json.dumps(value)}")
            return
        for name in value:
            if rule.keys and name not in rule.keys:
                self._unknown(f"{key}.{name}", name, rule.keys)
        if asks_nothing(value.get("enabled")):
            return
        if rule.is_noted:
            self.found.notes.append(f"{key} has no effect: {rule.reason}")
        else:
            self.found.unsupported.append(f"{key} is switched on: {rule.reason}")
