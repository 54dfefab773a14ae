"""What the ranks of a launch compare when they meet: the code they run, the packages that it stands on, their settings."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ds_recipes.config.schema import Config, values_of

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "peft", "triton")
"""Those that decide about the result, or about whether ranks can talk to each other."""

ROOT = Path(__file__).resolve().parents[1]


def facts_of(*configs: Config) -> dict[str, str]:
    """Texts by name; of several settings all values in order."""
    python = {"Python": ".".join(platform.python_version_tuple()[:2])}
    return python | _packages() | _code() | dict(_settings(configs))


def _packages() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _code() -> dict[str, str]:
    """The start of each source file's hash."""
    return {
        str(path.relative_to(ROOT.parent)): hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
        for path in sorted(ROOT.rglob("*.py"))
    }


def _settings(configs: tuple[Config, ...]) -> Iterator[tuple[str, str]]:
    """A DeepSpeed JSON counts by its content: where it lies may differ."""
    for name in values_of(configs[0]):
        if name != "ds_config":
            yield f"setting {name}", " | ".join(str(values_of(config)[name]) for config in configs)
    for config in configs:
        yield from _entries({} if config.ds is None else config.ds.tree)


def _entries(tree: Mapping[str, Any], above: str = "DeepSpeed JSON, ") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", json.dumps(value, default=str)
