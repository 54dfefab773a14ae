"""What one key of a DeepSpeed JSON means: to DeepSpeed, at which stages, on FSDP2, and to this program."""

import json
from collections.abc import Mapping

from ds_recipes.config.ds.keys import TOP
from ds_recipes.config.ds.optimizer import OPTIMIZERS
from ds_recipes.config.ds.rules import LACKING, SAME, NoEffect, Only, Removed, Rule, Section, Switch, Value
from ds_recipes.config.ds.scheduler import SCHEDULERS
from ds_recipes.config.ds.table import Entry, ds_table
from ds_recipes.config.entries import nearest
from ds_recipes.config.lint.advice import ADDRESSES

SECTIONS = (("optimizer.params.", "optimizer"), ("scheduler.params.", "schedule"))


def explain(key: str) -> tuple[str, bool]:
    """Lines about a key, dotted or bare, and whether there is such a key; else the names that are like it."""
    table = ds_table()
    same_name = [entry.path for entry in table.keys.values() if key in (entry.name, entry.short_name)]
    paths = (
        [key] if key in table.keys else [path for path in same_name if path.count(".") == min(map(_depth, same_name))]
    )
    if paths:
        others = [path for path in same_name if path not in paths]
        words = [_about(table.keys[path]) for path in paths]
        return "\n\n".join(words + ([f"Other keys of that name: {', '.join(others)}"] if others else [])), True
    if parameters := _parameters(key):
        return parameters, True
    guess = nearest(key, list(table.keys)) or nearest(key, [entry.name for entry in table.keys.values()])
    return f"{key} is no key of DeepSpeed {table.deepspeed}" + (f"; did you mean {guess}?" if guess else ""), False


def _depth(path: str) -> int:
    return path.count(".")


def _about(entry: Entry) -> str:
    rows = [("", entry.about)]
    if entry.kind == "removed":
        rows.append(("DeepSpeed", f"removed: {ds_table().deepspeed} refuses a file that has it"))
    else:
        rows.append(("type", _type(entry)))
        if entry.has_default:
            rows.append(("default", json.dumps(entry.default)))
        rows.append(("stages", _stages(entry)))
    if entry.replaced_by:
        rows.append(("old name", f"write {entry.replaced_by}"))
    if entry.short_name:
        rows.append(("also", entry.short_name))
    rule = rule_of(entry.path)
    rows += [("FSDP2", _on_fsdp(rule)), ("here", _here(rule, entry))]
    if entry.path in ADDRESSES:
        rows.append(("see", ADDRESSES[entry.path]))
    return "\n".join([entry.path, *(f"  {name:<8} {text}".rstrip() if name else f"  {text}" for name, text in rows)])


def _type(entry: Entry) -> str:
    words = entry.kind
    if entry.choices:
        words += ": " + ", ".join(map(json.dumps, entry.choices))
    limits = (("at least", entry.least), ("above", entry.above), ("at most", entry.most), ("below", entry.below))
    words += "".join(f", {word} {limit:g}" for word, limit in limits if limit is not None)
    return words + (", or null" if entry.null else "")


def _stages(entry: Entry) -> str:
    words = " ".join(map(str, entry.stages)) if entry.stages else "all"
    return f"{words}, while {entry.condition[0]} is {json.dumps(entry.condition[1])}" if entry.condition else words


def rule_of(path: str) -> Rule | None:
    """This program's rule for a key; None where it has none of its own."""
    rules: Mapping[str, Rule] = TOP
    rule: Rule | None = None
    for name in path.split("."):
        rule = rules.get(name)
        rules = rule.keys if isinstance(rule, Section) else {}
        if isinstance(rule, Switch):
            return rule
    return rule


def _on_fsdp(rule: Rule | None) -> str:
    match rule:
        case Value(fsdp=fsdp) if fsdp == SAME:
            return "does the same"
        case Value(fsdp=fsdp) if fsdp == LACKING:
            return "has no counterpart; goes without, and no result depends on it"
        case Value(fsdp=fsdp):
            return f"refused: {fsdp}"
        case Section():
            return "key by key"
    return "as here"


def _here(rule: Rule | None, entry: Entry) -> str:
    if entry.path.startswith(("optimizer", "scheduler")):
        return "read by the loop, which makes the optimizer and the schedule itself"
    match rule:
        case Value(setting=setting) if setting:
            return f"the setting {setting}"
        case Value():
            return "honoured"
        case Only(values=values, reason=reason):
            return f"only {', '.join(map(json.dumps, values)) or 'without it'}: {reason}"
        case NoEffect(reason=reason):
            return f"no effect: {reason}"
        case Removed(reason=reason):
            return f"refused: it {reason}"
        case Switch(reason=reason, is_noted=True):
            return f"no effect: {reason}"
        case Switch(reason=reason):
            return f"refused if switched on: {reason}"
        case Section():
            return "key by key"
    return f"read as {entry.replaced_by}" if entry.replaced_by else "refused"


def _parameters(key: str) -> str:
    """A parameter of an optimizer or a schedule: which types take it, and with which default."""
    table, name = ds_table(), key.rpartition(".")[2]
    lines = []
    for (prefix, what), types, here in zip(
        SECTIONS, (table.optimizers, table.schedulers), (OPTIMIZERS, SCHEDULERS), strict=True
    ):
        takers = {kind: given[name] for kind, given in types.items() if name in given}
        if takers and (key == name or key == prefix + name):
            defaults = {
                kind: json.dumps(given["default"]) if "default" in given else "needed" for kind, given in takers.items()
            }
            own = [kind for kind, (_, rules) in here.items() if name in rules]
            lines += [
                prefix + name,
                f"  a parameter of the {what}",
                "  types    " + ", ".join(f"{kind} ({default})" for kind, default in defaults.items()),
                "  here     " + (f"with {', '.join(own)}" if own else "refused"),
            ]
    return "\n".join(lines)
