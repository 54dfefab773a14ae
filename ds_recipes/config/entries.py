"""Flags and YAML keys as entries: which setting, which texts, and where they stand. Nothing is converted here."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from ds_recipes.config.values import COMMAND_LINE


@dataclass(frozen=True)
class Entry:
    """One setting as the user wrote it. `shown` is the flag or the key by which messages name it; in `name` dashes are underscores.

    `texts` is empty for a bare flag and for an empty YAML list.
    """

    name: str
    texts: tuple[str, ...]
    shown: str
    origin: str  # "command line" or "run.yaml:3"
    is_list: bool = False

    def problem(self, message: str) -> str:
        """One line that says where: '--lr must be ... (command line)' or 'run.yaml:3: lr must be ...'."""
        if self.origin == COMMAND_LINE:
            return f"{self.shown} {message} (command line)"
        return f"{self.origin}: {self.shown} {message}"

    def refused(self, reason: str) -> str:
        """One line for a setting or value that cannot be used: '--engine fsdp (command line): ...'."""
        is_alias = self.origin == COMMAND_LINE and self.shown != f"--{self.name}"
        words = self.shown if is_alias else " ".join((self.shown, *self.texts))
        return (
            f"{words} (command line): {reason}" if self.origin == COMMAND_LINE else f"{self.origin}: {words}: {reason}"
        )


def read_flags(argv: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """Split a command line into entries: `--name value ...`, `--name=value` or a bare `--name`. Second: problems."""
    flags: list[tuple[str, list[str]]] = []
    problems = []
    texts: list[str] | None = None  # of the last flag; None where a value belongs to no flag
    for token in argv:
        if token.startswith("--") and len(token) > 2:
            name, equals, text = token[2:].partition("=")
            texts = [text] if equals else []
            flags.append((name, texts))
        elif re.match(r"-[A-Za-z]", token):
            problems.append(f"unexpected argument {token!r} (command line): flags begin with two dashes, --{token[1:]}")
            texts = []
        elif texts is not None:
            texts.append(token)
        else:
            problems.append(f"unexpected argument {token!r} (command line): settings are given as --name value")
    return [Entry(name.replace("-", "_"), tuple(texts), f"--{name}", COMMAND_LINE) for name, texts in flags], problems


def read_yaml(path: str) -> tuple[list[Entry], list[str]]:
    """Read a run file: settings as top-level keys, every scalar kept as the text that stands there. Second: problems.

    Raises:
        ValueError: there is nothing to read; the message names the file and, where known, the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise ValueError(f"--config {path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return [], []
    if isinstance(root, yaml.MappingNode):
        return _entries(path, root)
    raise ValueError(f"{path}:{root.start_mark.line + 1}: a run file holds lines of 'name: value'")


def _entries(path: str, root: yaml.MappingNode) -> tuple[list[Entry], list[str]]:
    entries: list[Entry] = []
    problems = []
    first_lines: dict[str, int] = {}
    for key, value in root.value:
        line = key.start_mark.line + 1
        origin = f"{path}:{line}"
        if not isinstance(key, yaml.ScalarNode):
            problems.append(f"{origin}: a key must be the name of a setting")
        elif key.value.replace("-", "_") in first_lines:
            first = first_lines[key.value.replace("-", "_")]
            problems.append(f"{origin}: {key.value} stands here a second time; the first is in line {first}")
        elif isinstance(value, yaml.MappingNode):
            problems.append(f"{origin}: {key.value} holds a mapping; settings stand at the top level, without groups")
        elif not all(isinstance(node, yaml.ScalarNode) for node in _scalars(value)):
            problems.append(f"{origin}: {key.value} holds a list of something else than single values")
        else:
            texts = tuple(node.value for node in _scalars(value))
            is_list = isinstance(value, yaml.SequenceNode)
            entries.append(Entry(key.value.replace("-", "_"), texts, key.value, origin, is_list))
        if isinstance(key, yaml.ScalarNode):
            first_lines.setdefault(key.value.replace("-", "_"), line)
    return entries, problems


def _scalars(value: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(value, yaml.SequenceNode):
        yield from value.value
    else:
        yield value


def nearest(name: str, valid: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The valid name that is most like `name`, if any is (`cutoff`: difflib's ratio)."""
    matches = get_close_matches(name.replace("-", "_"), valid, n=1, cutoff=cutoff)
    return matches[0] if matches else None
