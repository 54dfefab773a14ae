"""Hostfiles, `host slots=N` a line, as DeepSpeed's launcher and Open MPI's mpirun read them.

DeepSpeed wants `slots=` right after the host (`_parse_hostfile` in its launcher/runner.py). Open MPI also takes hosts without it,
further words such as max_slots=, and `host:N`. Both skip blank lines and lines that begin with #; only Open MPI takes a host
that is named again, so that is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.errors import WorldError
from ds_recipes.fsops.durable import replace_file


@dataclass(frozen=True)
class HostSlots:
    """A host and how many ranks it may have; None where the file does not say."""

    host: str
    slots: int | None = None


def read_hostfile(path: Path | str) -> list[HostSlots]:
    """The hosts of a file, in its order.

    Raises:
        WorldError: it is missing or names no host, or a line is not as documented or names a host again; every such line
            is told.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WorldError(
            f"The hostfile {path} cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8 text'}.\n"
            "DeepSpeed's launcher would train on this machine alone without it. Give the path of a file with a line "
            "`host slots=N` for each host."
        ) from error
    hosts, problems, seen = [], [], dict[str, int]()
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        found = _host_slots(words)
        if found is None:
            problems.append(f"{path}:{number}: {line.strip()!r} is not `host slots=N` with N of at least 1.")
        elif found.host in seen:
            problems.append(
                f"{path}:{number}: {found.host} stands on line {seen[found.host]} already. Give each host one line, with all "
                "of its slots."
            )
        else:
            seen[found.host] = number
            hosts.append(found)
    if not hosts and not problems:
        problems.append(f"{path} names no host. It needs a line `host slots=N` for each host.")
    if problems:
        raise WorldError("\n".join(problems))
    return hosts


def write_hostfile(path: Path, hosts: Sequence[HostSlots]) -> None:
    """Write a line `host slots=N` for each host: the form that both launchers read.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [item.host if item.slots is None else f"{item.host} slots={item.slots}" for item in hosts]
    replace_file(path, "".join(line + "\n" for line in lines).encode())


def _host_slots(words: list[str]) -> HostSlots | None:
    match = re.fullmatch(r"([\w.-]+)(?::(\d+))?", words[0])
    if match is None:
        return None
    found = [word.partition("=")[2] for word in words[1:] if word.startswith("slots=")]
    text = found[0] if found else match[2]
    if (
        len(found) > 1
        or any("=" not in word for word in words[1:])
        or (text is not None and not re.fullmatch(r"0*[1-9]\d*", text))
    ):
        return None
    return HostSlots(match[1], None if text is None else int(text))
