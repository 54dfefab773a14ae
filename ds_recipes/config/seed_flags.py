"""The flags of the ancestor's job scripts and of the DeepSpeed launcher, put into today's settings.

They are flags only: a run file uses the settings' own names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_recipes.config.entries import Entry
from ds_recipes.config.values import FALSE_WORDS, TRUE_WORDS


@dataclass(frozen=True)
class Switch:
    """A flag without a value that stands for `name` = `text`. An empty name: accepted, because it is always so."""

    name: str
    text: str
    doc: str


SWITCHES = {
    "enable_fsdp": Switch("engine", "fsdp", "the same as --engine fsdp"),
    "low_cpu_fsdp": Switch("", "", "loading is always sharded: no rank ever holds the whole model in host memory"),
    "mixed_precision": Switch("precision", "bf16", "the same as --precision bf16; false: --precision fp32"),
    "pure_bf16": Switch("precision", "bf16", "the same as --precision bf16 (float32 master weights are always kept)"),
    "fsdp_activation_checkpointing": Switch(
        "activation_checkpointing", "true", "the same as --activation_checkpointing"
    ),
}

DATASETS = {"alpaca_dataset": "alpaca", "wikipedia_dataset": "text"}

LAUNCHER_FLAGS = {
    "deepspeed": "alone: the same as --engine deepspeed; with a path: the same as --ds_config",
    "deepspeed_config": "the same as --ds_config",
    "local_rank": "passed by launchers; the environment says the same, and a difference is an error",
}

OTHER_NAMES = (*SWITCHES, *LAUNCHER_FLAGS)


def translate(flags: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Put the ancestor's and the launcher's flags into entries of today's settings. Second: problems."""
    entries: list[Entry] = []
    problems: list[str] = []
    switched_on = {flag.name for flag in flags if flag.name in SWITCHES and _switch_value(flag) is True}
    for flag in flags:
        if flag.name in SWITCHES:
            value = _switch_value(flag)
            if value is None:
                problems.append(flag.problem(f"must be true or false, not {' '.join(flag.texts)!r}"))
            elif value:
                entries += _switched(flag)
            elif flag.name == "mixed_precision" and "pure_bf16" not in switched_on:
                entries.append(replace(flag, name="precision", texts=("fp32",)))
        elif flag.name == "deepspeed" and (not flag.texts or flag.texts[0].lower() in TRUE_WORDS):
            entries.append(replace(flag, name="engine", texts=("deepspeed",)))
        elif flag.name in ("deepspeed", "deepspeed_config"):
            entries.append(replace(flag, name="ds_config"))
        else:
            entries.append(flag)
    return entries, problems


def modern_dataset(text: str) -> str:
    """The format's name today: alpaca_dataset is alpaca."""
    return DATASETS.get(text, text)


def yaml_hint(key: str) -> str | None:
    """What to write in a run file instead of a flag of the ancestor."""
    if key in SWITCHES:
        switch = SWITCHES[key]
        return f"write {switch.name}: {switch.text}" if switch.name else f"leave it out: {switch.doc}"
    if key in ("deepspeed", "deepspeed_config"):
        return "write ds_config: PATH"
    return "it is a flag of launchers only" if key in LAUNCHER_FLAGS else None


def _switch_value(flag: Entry) -> bool | None:
    words = [text.strip().lower() for text in flag.texts]
    if not words:
        return True
    if len(words) > 1 or words[0] not in TRUE_WORDS + FALSE_WORDS:
        return None
    return words[0] in TRUE_WORDS


def _switched(flag: Entry) -> list[Entry]:
    switch = SWITCHES[flag.name]
    return [replace(flag, name=switch.name, texts=(switch.text,))] if switch.name else []
