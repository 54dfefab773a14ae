"""What the ranks of a launch compare when they meet: the code they run, the packages that it stands on, their settings."""

import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

from ds_recipes.config.schema import Config, values_of
from ds_recipes.config.values import dotted_entries
from ds_recipes.training.run_record import versions

NO_MATTER = frozenset({"python", "ds-recipes", "mpi4py", "wandb"})
"""Of what `run_record.versions` names: the code itself is compared, and rank 0 alone has trackers."""

ROOT = Path(__file__).resolve().parents[1]


def facts_of(*configs: Config) -> dict[str, str]:
    """Texts by name; of several settings all values in order."""
    python = {"Python": ".".join(platform.python_version_tuple()[:2])}
    return python | _packages() | _code() | dict(_settings(configs))


def _packages() -> dict[str, str]:
    return {name: found for name, found in versions().items() if name not in NO_MATTER}


def _code() -> dict[str, str]:
    """The start of each source file's hash."""
    return {
        str(path.relative_to(ROOT.parent)): hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
        for path in sorted(ROOT.rglob("*.py"))
    }


def _settings(configs: tuple[Config, ...]) -> Iterator[tuple[str, str]]:
    """The JSON of the engine counts by its content: where it lies may differ."""
    values = [values_of(config) for config in configs]
    for name in values[0]:
        if name != "ds_config":
            yield f"setting {name}", " | ".join(str(one[name]) for one in values)
    for number, config in enumerate(configs, 1):
        which = "" if len(configs) == 1 else f"of run {number} "
        yield from dotted_entries({} if config.ds is None else config.ds.tree, f"ds_config {which}")
