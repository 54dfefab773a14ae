"""What all ranks raise when something went wrong on some of them."""

from typing import Any

from ds_recipes.errors import ConfigError, DsRecipesError, PeerFailure
from ds_recipes.world.channel import name_ranks


def shared_error(name: str, failures: dict[int, tuple[type[Exception], str]], size: int) -> DsRecipesError:
    """One error out of those of some ranks, the same on every rank."""
    foreign = [rank for rank, (kind, _) in failures.items() if not issubclass(kind, DsRecipesError)]
    if foreign:
        last_line = failures[foreign[0]][1].splitlines()[-1]
        return PeerFailure(f"{name_ranks(foreign).capitalize()} failed in {name}: {last_line}")
    kind: Any = next(iter(failures.values()))[0]
    texts: dict[str, list[int]] = {}
    for rank, (_, text) in failures.items():
        texts.setdefault(text, []).append(rank)
    lines = [text if len(ranks) == size else f"{text} ({name_ranks(ranks)})" for text, ranks in texts.items()]
    error: DsRecipesError = kind(lines) if issubclass(kind, ConfigError) else kind("\n".join(lines))
    error.add_note(f"(in {name})")
    return error
