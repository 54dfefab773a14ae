"""The file of variables that DeepSpeed's launcher carries to other hosts (.deepspeed_env), written and checked.

Source: `main` in launcher/runner.py and `add_export`, `PDSHRunner.get_cmd` in launcher/multinode_runner.py of DeepSpeed 0.19. It
splits every line at the first `=` (a blank line or a comment is a crash), strips the value, puts it between double quotes if it
holds anything unusual, and hands `export NAME=VALUE;` to a shell on each host, through pdsh, which replaces %-words of its
own. For a single host it reads no such file: the ranks inherit the environment.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ds_recipes.errors import ConfigError

FILE_VARIABLE, FILE_NAME = "DS_ENV_FILE", ".deepspeed_env"
PLAIN = re.compile(r"[\w@%+=:,./-]*")
"""DeepSpeed hands such a value on as it is, anything else between double quotes."""

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def encode(name: str, value: str) -> str:
    """The line, without its end, that reaches the ranks as exactly this value.

    Raises:
        ConfigError: no line can: the name is no variable's, or the value has a line break.
    """
    if not VARIABLE.fullmatch(name):
        raise ConfigError([f"{name!r} is no name of a variable: letters, digits and _, no digit first."])
    if re.search(r"[\n\r\0]", value):
        raise ConfigError(
            [
                f"The value of {name} has a line break, and DeepSpeed's launcher reads a line a variable. Unset {name}, or set it "
                "where the ranks start."
            ]
        )
    text = value.replace("%", "%%")  # pdsh
    if not PLAIN.fullmatch(text):
        text = re.sub(r'(["\\$`])', r"\\\1", text)
    if text != text.strip():  # DeepSpeed strips the value, and then puts double quotes around what is left
        text = f'""{text}""'
    return f"{name}={text}"


def problems_of(path: Path) -> list[str]:
    """What in an existing file DeepSpeed's launcher would crash on or take for something else, by line number."""
    problems = []
    for number, line in enumerate(_lines(path), start=1):
        name, equals, _ = line.partition("=")
        if not line.strip():
            problems.append(f"{path}:{number}: a blank line. DeepSpeed's launcher crashes on it: delete the line.")
        elif line.lstrip().startswith("#"):
            problems.append(
                f"{path}:{number}: a comment, {line.strip()!r}. DeepSpeed's launcher knows none: delete the line."
            )
        elif not equals:
            problems.append(
                f"{path}:{number}: {line.strip()!r} has no `=`, and DeepSpeed's launcher crashes on it. Write NAME=VALUE."
            )
        elif not VARIABLE.fullmatch(name.strip()):
            problems.append(
                f"{path}:{number}: {name.strip()!r} is no name of a variable. Write NAME=VALUE, without export."
            )
    return problems


def files_read(env: Mapping[str, str], folder: Path) -> list[Path]:
    """The files that DeepSpeed's launcher reads when it is started in `folder`; where two name a variable, the last counts.

    They are .deepspeed_env in the home folder and in `folder`; DS_ENV_FILE gives another name or, absolute, one file.
    """
    name = env.get(FILE_VARIABLE, FILE_NAME)
    found = [Path(env.get("HOME") or Path.home()) / name, folder / name]
    return [path for path in dict.fromkeys(found) if path.is_file()]


def read_lines(path: Path) -> dict[str, str]:
    """The lines of a file by the variable that they set, as they stand.

    Raises:
        ConfigError: with every line that DeepSpeed's launcher could not read.
    """
    problems = problems_of(path)
    if problems:
        raise ConfigError(problems)
    return {line.partition("=")[0].strip(): line for line in _lines(path)}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8 text'}."]
        ) from error


def text_of(variables: Mapping[str, str], existing: Mapping[str, str] | None = None) -> str:
    """A whole file: `variables` by name and value, and lines of a user's own file, which count where both name one.

    Raises:
        ConfigError: a value cannot be written, see `encode`.
    """
    lines = {name: encode(name, value) for name, value in variables.items()} | dict(existing or {})
    return "".join(f"{line}\n" for line in lines.values())
