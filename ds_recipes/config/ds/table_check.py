"""What DeepSpeed itself refuses in a JSON, or ignores without a word: found with the table of its keys."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ds_recipes.config.ds.table import Entry, Table, ds_table
from ds_recipes.config.ds.table_values import is_refused, is_text_for_bool, wrong_value
from ds_recipes.config.entries import nearest

ZERO = "zero_optimization"
COMMENT_NAMES = re.compile(r"[_#$]|//|comment", re.IGNORECASE)
"""How keys begin by which people write comments into JSON."""

BATCH = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}

MISSPELT = 0.8
"""Likeness of names, from 0 to 1, above which one is taken for a slip of the other."""

REMOVED = "https://github.com/deepspeedai/DeepSpeed/issues/8489"


@dataclass(frozen=True)
class Finding:
    """One thing to say about one key. `key` is its path in the file."""

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key} {self.text}"


class Ignored(Finding):
    """A key that DeepSpeed does not read, which changes nothing in its training."""


def table_problems(tree: Mapping[str, Any]) -> list[Finding]:
    """Keys that DeepSpeed refuses or that are misspelt, values that it refuses, and combinations of them."""
    found = [each for each in _section(tree, "", "", ds_table()) if not isinstance(each, Ignored)]
    return [*found, *_between_keys(tree)]


def more_problems(tree: Mapping[str, Any], problems: Iterable[str]) -> list[str]:
    """What DeepSpeed refuses about keys of which `problems`, lines that begin with a key's path, say nothing.

    Batch sizes are left to the run's own settings, which are checked with them.
    """
    keys = {line.partition(" ")[0] for line in problems} | BATCH
    return [str(each) for each in table_problems(tree) if each.key not in keys]


def ignored_keys(tree: Mapping[str, Any]) -> list[Finding]:
    """Keys that are like no other, and that DeepSpeed ignores without a word."""
    return [each for each in _section(tree, "", "", ds_table()) if isinstance(each, Ignored)]


def table_warnings(tree: Mapping[str, Any]) -> list[Finding]:
    """Values that DeepSpeed takes for something else than they say."""
    return list(_misread(tree, "", ds_table()))


def no_effect(tree: Mapping[str, Any], stage: int) -> list[Finding]:
    """Keys that ask for something and change nothing at this stage, or while another key is as it is."""
    return list(_idle(tree, "", stage, tree, ds_table()))


def _idle(
    section: Mapping[str, Any], prefix: str, stage: int, tree: Mapping[str, Any], table: Table
) -> Iterator[Finding]:
    for name, value in section.items():
        entry, key = table.find(prefix.rstrip("."), name), prefix + name
        if entry is None or value in (None, False, "auto", "none") or value == {}:
            continue
        if entry.stages and stage not in entry.stages:
            yield Finding(key, f"has no effect at stage {stage}: it is for {_words(entry.stages)}")
        elif entry.condition and _at(tree, entry.condition[0]) != entry.condition[1]:
            other, wanted = entry.condition
            yield Finding(key, f"has no effect unless {other.rpartition('.')[2]} is {json.dumps(wanted)}")
        elif isinstance(value, Mapping):
            yield from _idle(value, f"{key}.", stage, tree, table)


def _words(stages: tuple[int, ...]) -> str:
    return f"stage {stages[0]}" if len(stages) == 1 else f"stages {', '.join(map(str, stages[:-1]))} and {stages[-1]}"


def _section(tree: Mapping[str, Any], section: str, prefix: str, table: Table) -> Iterator[Finding]:
    entry = table.keys.get(section)
    for name, value in tree.items():
        found, key = table.find(section, name), prefix + name
        if key == "bfloat16" and tree.get("bf16") is not None:
            continue  # DeepSpeed does not look at it
        if found is None:
            if not (entry and entry.open) and section not in ("optimizer.params", "scheduler.params"):
                yield _unknown(key, name, section, table)
        elif found.kind == "removed":
            yield Finding(key, f"was removed from DeepSpeed, which refuses it ({REMOVED}). {found.about}")
        elif found.kind == "section" and isinstance(value, Mapping):
            yield from _section(value, found.path, f"{key}.", table)
        elif not (found.path == ZERO and isinstance(value, bool)):
            wanted = _wrong(value, found)
            if wanted:
                yield Finding(key, f"must be {wanted}, not {json.dumps(value)}")


def _wrong(value: Any, entry: Entry) -> str:
    if entry.kind == "section" and not entry.checked:
        is_absent = (value is None and (entry.null or entry.path in ("bf16", "aio"))) or entry.path == "expert_parallel"
        return "" if isinstance(value, Mapping) or (is_absent and not value) else "an object"
    return wrong_value(value, entry) if is_refused(entry) else ""


def _unknown(key: str, name: str, section: str, table: Table) -> Finding:
    is_refused_there = section in table.models
    what = "DeepSpeed refuses it" if is_refused_there else "DeepSpeed ignores it without a word"
    names = table.names(section)
    is_misspelt = bool(get_close_matches(name, names, n=1, cutoff=MISSPELT))
    words = sorted(name.split("_"))
    guess = next((each for each in names if sorted(each.split("_")) == words), None) or nearest(name, names)
    elsewhere = [
        entry.path
        for entry in table.keys.values()
        if entry.name == name and entry.kind != "removed" and entry.path != section
    ]
    if elsewhere and not is_misspelt:
        hint = f"It belongs to {elsewhere[0]}"
    else:
        hint = f"Did you mean {guess}?" if guess else "Leave it out"
    if not section and COMMENT_NAMES.match(name):
        return Ignored(key, "is no key; DeepSpeed ignores it, as a comment")
    kind = Finding if is_refused_there or is_misspelt or (len(elsewhere) == 1 and section == "") else Ignored
    return kind(key, f"is unknown; {what}. {hint}")


def _misread(tree: Mapping[str, Any], prefix: str, table: Table) -> Iterator[Finding]:
    for name, value in tree.items():
        entry, key = table.find(prefix.rstrip("."), name), prefix + name
        if isinstance(value, Mapping):
            yield from _misread(value, f"{key}.", table)
        elif entry and is_text_for_bool(value, entry):
            shown = json.dumps(value)
            yield Finding(key, f"is the text {shown}: DeepSpeed takes every text for true here. Write true or false")
        elif entry and not is_refused(entry) and wrong_value(value, entry):
            shown, wanted = json.dumps(value), wrong_value(value, entry)
            yield Finding(key, f"is {shown}, and DeepSpeed does not check it: it should be {wanted}")


def _at(tree: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path; the default where it is absent, null or "auto"."""
    value: Any = tree
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return default if value is None or value == "auto" else value


def _is_on(value: Any) -> bool:
    return str(value).lower() in ("true", "t", "yes", "y", "on", "1", "1.0")


def _is_off(value: Any) -> bool:
    return str(value).lower() in ("false", "f", "no", "n", "off", "0", "0.0")


def _between_keys(tree: Mapping[str, Any]) -> Iterator[Finding]:
    """What DeepSpeed asserts between keys when it reads the file (runtime/config.py and the models' validators)."""
    stage = _stage(tree)
    if _is_on(_at(tree, "bf16.enabled")) and _is_on(_at(tree, "fp16.enabled")):
        yield Finding("bf16.enabled", "is on, and fp16.enabled too: DeepSpeed refuses both, switch one off")
    if str(_at(tree, "gradient_allreduce_op", "")).lower() == "sum":
        for key, is_set in (
            (f"{ZERO}.stage", stage == 3),
            (f"{ZERO}.zenflow", _at(tree, f"{ZERO}.zenflow") is not None),
            ("compile.deepcompile", _is_on(_at(tree, "compile.deepcompile"))),
        ):
            if is_set:
                yield Finding("gradient_allreduce_op", f'is "sum", which does not go with {key} as it stands')
    for key in (
        "fp16.fp16_master_weights_and_grads",
        "bf16.bf16_master_weights_and_grads",
        "bf16.bf16_optimizer_states",
    ):
        if _is_on(_at(tree, key)) and stage not in (1, 2, 3):
            yield Finding(key, "needs ZeRO stage 1, 2 or 3")
    if _is_on(_at(tree, "bf16.bf16_optimizer_states")) and not _is_on(_at(tree, "bf16.bf16_master_weights_and_grads")):
        yield Finding("bf16.bf16_optimizer_states", "needs bf16_master_weights_and_grads: write both")
    if _is_off(_at(tree, f"{ZERO}.compute_grad_norm")) and stage not in (1, 2):
        yield Finding(f"{ZERO}.compute_grad_norm", "can be false at stages 1 and 2 only: leave it out")
    if _is_below_one(_at(tree, f"{ZERO}.offload_optimizer.ratio")) and stage != 3:
        yield Finding(f"{ZERO}.offload_optimizer.ratio", "below 1 is for stage 3: leave it out")
    yield from _dynamic_scale(tree)
    for name in ("results_dir", "exps_dir"):
        autotuning = tree.get("autotuning")
        if isinstance(autotuning, Mapping) and name in autotuning and not autotuning[name]:
            yield Finding(f"autotuning.{name}", "must be the path of a folder")
    for section, needed in (("curriculum_learning", "curriculum_metrics"), ("dynamic_batching", "max_tokens")):
        key = f"data_efficiency.data_sampling.{section}"
        if _at(tree, f"{key}.enabled") and _at(tree, f"{key}.{needed}") is None:
            yield Finding(f"{key}.enabled", f"is on, and {needed} is missing")
    if _at(tree, "expert_parallel.load_balance_coeff") is not None:
        yield Finding("expert_parallel.load_balance_coeff", "is not there any more: leave it out")


def _stage(tree: Mapping[str, Any]) -> int:
    given = str(_at(tree, f"{ZERO}.stage", int(tree.get(ZERO) is True))).strip()
    return int(given) if given in ("0", "1", "2", "3") else 0


def _is_below_one(value: Any) -> bool:
    try:
        return float(value) < 1
    except (TypeError, ValueError):
        return False


def _dynamic_scale(tree: Mapping[str, Any]) -> Iterator[Finding]:
    if not _is_on(_at(tree, "fp16.enabled")) or _at(tree, "fp16.loss_scale", 0) not in (0, "0", "0.0"):
        return
    for name in ("loss_scale_window", "min_loss_scale"):
        value = _at(tree, f"fp16.{name}", 1)
        if isinstance(value, int | float) and value <= 0:
            yield Finding(f"fp16.{name}", "must be above 0 while the loss scale adapts (loss_scale 0)")
