"""The settings as text: `--help`, a run file, and the reference page. All of it comes from the fields themselves."""

import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any

import yaml

from ds_recipes.config.schema import GROUPS, Config, values_of
from ds_recipes.config.seed_flags import DATASETS, LAUNCHER_FLAGS, SWITCHES
from ds_recipes.config.setting import Limits
from ds_recipes.config.values import FALSE_WORDS, NONE_WORDS, TRUE_WORDS, base_type, one_of, to_text

KIND_WORDS = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT", tuple: "TEXT ..."}
PLAIN_YAML = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
WIDTH = 120


def help_text() -> str:
    """The text of --help, grouped as the settings are."""
    width = min(shutil.get_terminal_size((100, 24)).columns, WIDTH)
    lines = [
        "usage: train.py [--config run.yaml] [--any_setting value ...]",
        "",
        *textwrap.wrap(
            "Every setting is a flag and, without the dashes, a key of the run file. A flag wins over the run file, the run "
            "file over the default. A flag of a true/false setting can stand alone. Dashes in a name are taken for underscores; "
            "~ and $NAME in a path are expanded.",
            width,
        ),
        "",
        *_help_entry("--config RUN.YAML", "Run file with settings, one 'name: value' a line.", width),
        *_help_entry("--print_config", "Print the effective run file, with comments, and exit.", width),
        *_help_entry("--help", "Print this text and exit.", width),
    ]
    for name, group in GROUPS.items():
        lines += ["", f"{name}: {group.__doc__}"]
        for item in fields(group):
            lines += _help_entry(f"--{item.name} {_kind(item)}", _sentence(item), width)
    lines += ["", "flags of earlier job scripts and of launchers, accepted with their meaning:"]
    for flag, meaning in _other_flags():
        lines += _help_entry(flag, meaning, width)
    return "\n".join(lines)


def to_yaml(config: Config) -> str:
    """The effective run file: every setting with its documentation. Loading it gives an equal Config."""
    values = values_of(config)
    lines = ["# The settings of a run. A flag of the same name wins over this file."]
    for name, group in GROUPS.items():
        lines += ["", f"# ---- {name}: {group.__doc__}"]
        for item in fields(group):
            lines += [f"# {line}" for line in textwrap.wrap(_sentence(item), WIDTH - 2)]
            origin = config.origins.get(item.name, "default")
            comment = "" if origin == "default" else f"  # {_printable(origin)}"
            lines.append(f"{item.name}: {_yaml_value(item, values[item.name])}{comment}")
    return "\n".join(lines) + "\n"


def reference_page() -> str:
    """docs/reference/settings.md."""
    lines = [
        "# Settings",
        "",
        "Generated from `ds_recipes/config/schema.py` by `tools/make_reference.py`. Every setting is a flag (`--name value`) and",
        "a key of the run file (`name: value`). A flag wins over the run file, the run file over the default.",
    ]
    for name, group in GROUPS.items():
        lines += [
            "",
            f"## {name}",
            "",
            str(group.__doc__),
            "",
            "| setting | value | default | meaning |",
            "|---|---|---|---|",
        ]
        for item in fields(group):
            kind = _kind(item).replace("|", " or ")
            lines.append(f"| `{item.name}` | {kind} | {_default(item)} | {item.metadata['doc']} |")
    lines += ["", "## Flags of earlier job scripts and of launchers", "", "| flag | meaning |", "|---|---|"]
    lines += [f"| `{flag}` | {meaning} |" for flag, meaning in _other_flags()]
    return "\n".join(lines) + "\n"


def _help_entry(head: str, doc: str, width: int) -> list[str]:
    if len(head) + 2 > width:  # many choices: let them break at a bar
        head = textwrap.fill(head.replace("|", " | "), width - 2, subsequent_indent=" " * 6)
    return [*f"  {head}".splitlines(), *textwrap.wrap(doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _sentence(item: Field[Any]) -> str:
    return f"{item.metadata['doc']} Default: {_default(item)}."


def _default(item: Field[Any]) -> str:
    if item.metadata["default_doc"]:
        return str(item.metadata["default_doc"])
    return "none" if item.default in (None, ()) else to_text(item, item.default)


def _kind(item: Field[Any]) -> str:
    limits: Limits = item.metadata["limits"]
    unit = item.metadata["unit"]
    if limits.choices:
        return "|".join(limits.choices) + (" ..." if base_type(item) is tuple else "")
    if unit in ("duration", "path"):
        return str(unit).upper() + (" ..." if base_type(item) is tuple else "")
    return f"{KIND_WORDS[base_type(item)]} ({unit})" if unit else KIND_WORDS[base_type(item)]


def _other_flags() -> Iterator[tuple[str, str]]:
    for name, switch in SWITCHES.items():
        yield f"--{name}", switch.doc
    yield (
        "--dataset " + "|".join(DATASETS),
        f"the same as --dataset {one_of(tuple(DATASETS.values()))}, with --train_data",
    )
    for name, doc in LAUNCHER_FLAGS.items():
        yield f"--{name}", doc


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _yaml_value(item: Field[Any], value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml_text(text) for text in value)}]"
    if base_type(item) is str and value is not None:
        return _yaml_text(value)
    return to_text(item, value)


def _yaml_text(text: str) -> str:
    """A scalar that every YAML reader takes as this text: plain where it looks like nothing else, else quoted."""
    if PLAIN_YAML.fullmatch(text) and text.lower() not in {
        *TRUE_WORDS,
        *FALSE_WORDS,
        *NONE_WORDS,
        "y",
        "n",
        ".inf",
        ".nan",
    }:
        return text
    return str(yaml.safe_dump(text, default_style='"', allow_unicode=True, width=2**31)).rstrip("\n")
