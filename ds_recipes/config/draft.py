"""The settings while they are put together from flags, run file, JSON and defaults. Problems are collected, not raised."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_recipes.config import later, other_trainers, seed_flags
from ds_recipes.config.ds.findings import Binding, Findings
from ds_recipes.config.entries import Entry, nearest
from ds_recipes.config.schema import SETTINGS
from ds_recipes.config.values import COMMAND_LINE, base_type, check_limits, describe, parse, to_text

DEFAULT = "default"
TYPING_MISTAKE = 0.85  # difflib's ratio: one that is less alike may well be a name of another meaning


@dataclass
class Draft:
    """Values and origins by setting, and what is wrong so far. `failed` names settings that have a problem already."""

    values: dict[str, Any] = field(default_factory=lambda: {name: item.default for name, item in SETTINGS.items()})
    origins: dict[str, str] = field(default_factory=lambda: dict.fromkeys(SETTINGS, DEFAULT))
    problems: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    seed_dataset: str | None = None  # the ancestor's name of the data set, where it was used

    def fail(self, problem: str, *names: str) -> None:
        """Note a problem. Later checks that look at any of `names` are left out: their message would only confuse."""
        self.problems.append(problem)
        self.failed.update(names)

    def is_given(self, name: str) -> bool:
        """True if the user asked for it: by a flag, or in a file with another value than the default."""
        origin = self.origins[name]
        return origin == COMMAND_LINE or (origin != DEFAULT and self.values[name] != SETTINGS[name].default)

    def describe(self, name: str) -> str:
        return describe(SETTINGS[name], self.values[name], self.origins[name])

    def take(self, entries: Sequence[Entry]) -> None:
        """Take the entries of one level (command line or run file). Levels come in falling order of precedence."""
        first: dict[str, tuple[Entry, Any]] = {}
        for entry in entries:
            if entry.name not in SETTINGS:
                self._unknown(entry)
                continue
            refusal = next(filter(None, (later.refusal(entry.name, text) for text in entry.texts)), None)
            if refusal:
                self.fail(entry.refused(refusal), entry.name)
                continue
            try:
                value = self._parse(entry)
            except ValueError as error:
                self.fail(entry.problem(str(error)), entry.name)
                continue
            earlier, earlier_value = first.setdefault(entry.name, (entry, value))
            if earlier_value != value:
                self.fail(_clash(entry, value, earlier, earlier_value), entry.name)
        taken = {name: (entry, value) for name, (entry, value) in first.items() if self.origins[name] == DEFAULT}
        for name, other in (
            ("gradient_accumulation_steps", "global_batch_size"),
            ("global_batch_size", "gradient_accumulation_steps"),
        ):
            if self.origins[other] == COMMAND_LINE and self.values[other] is not None:
                taken.pop(name, None)  # the two say one thing: a flag replaces the run file's other one
        for name, (entry, value) in taken.items():
            self.values[name], self.origins[name] = value, entry.origin

    def adopt(self, path: str, found: Findings) -> None:
        """Take what a DeepSpeed JSON says about settings that the run leaves open; where both speak they must agree."""
        for problem in (*found.problems, *found.unsupported):
            self.fail(f"{path}: {problem}")
        keys: dict[str, str] = {}
        for binding in sorted(found.bindings, key=lambda each: (each.times != "", each.is_default)):
            try:
                value = self._bound(binding)
            except ValueError as error:
                self.fail(f"{path}: {binding.key} {error}", binding.setting)
                continue
            self._adopt(path, binding, value, keys)

    def _bound(self, binding: Binding) -> Any:
        item = SETTINGS[binding.setting]
        value = binding.value * self.values[binding.times] if binding.times else binding.value
        return check_limits(item, float(value) if base_type(item) is float else value)

    def _adopt(self, path: str, binding: Binding, value: Any, keys: dict[str, str]) -> None:
        name, where = binding.setting, f"{path}: {binding.key}"
        if self.origins[name] == DEFAULT or (self.values[name] is None and not binding.is_default):
            self.values[name], self.origins[name], keys[name] = value, path, f"{binding.key} is {binding.shown}"
        elif binding.is_default or self._agrees(binding, value):
            return
        elif name in keys:
            self.fail(f"{where} is {binding.shown}, but {keys[name]} in the same file. Make them equal.", name)
        elif name not in self.failed:
            is_fixed = binding.key.endswith("type") or binding.shown == "there"
            advice = "Leave one of them out" if is_fixed else 'Set one of them, or write "auto" in the JSON'
            self.fail(f"{where} is {binding.shown}, but {self.describe(name)}. {advice}.", name)

    def _agrees(self, binding: Binding, value: Any) -> bool:
        current = self.values[binding.setting]
        return current in (value, *binding.also) or (binding.times != "" and math.isclose(current, value))

    def _parse(self, entry: Entry) -> Any:
        item = SETTINGS[entry.name]
        texts = entry.texts
        if entry.name == "dataset" and len(texts) == 1 and texts[0] in seed_flags.DATASETS:
            self.seed_dataset = texts[0]
            texts = (seed_flags.DATASETS[texts[0]],)
        kind = base_type(item)
        if kind is tuple:
            if not texts and not entry.is_list:
                raise ValueError("needs a value")
            return tuple(parse(item, text) for text in texts)
        if kind is bool and not texts and not entry.is_list:
            return True
        if len(texts) != 1 or entry.is_list:
            given = f"{len(texts)} ({', '.join(texts)})" if texts else "none"
            raise ValueError(f"takes one value, not {given}" if texts else "needs a value")
        return parse(item, texts[0])

    def _unknown(self, entry: Entry) -> None:
        is_flag = entry.origin == COMMAND_LINE
        kind, dashes = ("flag", "--") if is_flag else ("key", "")
        where = (
            f"unknown {kind} {entry.shown} (command line)" if is_flag else f"{entry.origin}: unknown key {entry.shown}"
        )
        if entry.name in later.LATER_NAMES:
            self.fail(entry.refused(later.LATER_NAMES[entry.name]))
            return
        hint = None if is_flag else seed_flags.yaml_hint(entry.name)
        positive = entry.name.removeprefix("no_")
        if hint is None and positive != entry.name and positive in SETTINGS:
            hint = f"to turn it off write {dashes}{positive}{' ' if is_flag else ': '}false"
        names = (*SETTINGS, *seed_flags.OTHER_NAMES, "config", "print_config", "help") if is_flag else tuple(SETTINGS)
        hint = hint or other_trainers.hint(entry.name, is_flag)
        guess = None if hint else nearest(entry.name, names, TYPING_MISTAKE)
        if hint is None:
            hint = f"did you mean {dashes}{guess}?" if guess else "see --help for all settings"
        meant = guess or other_trainers.NAMES.get(entry.name)
        self.fail(f"{where}: {hint}", *([meant] if meant else []))


def _clash(entry: Entry, value: Any, earlier: Entry, earlier_value: Any) -> str:
    item = SETTINGS[entry.name]
    one, two = to_text(item, earlier_value), to_text(item, value)
    if earlier.shown == entry.shown:
        return f"{entry.shown} is given twice, as {one} and as {two} (command line). Leave one of them out."
    return f"{earlier.shown} makes {entry.name} {one}, but {entry.shown} makes it {two} (both command line). Leave one of them out."


def frozen_groups(values: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, Any]:
    """Build each group's dataclass from the values by name."""
    return {
        name: group(**{item: values[item] for item in group.__dataclass_fields__}) for name, group in groups.items()
    }
