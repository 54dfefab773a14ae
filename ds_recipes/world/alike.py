"""What must be the same on all ranks of a launch, such as code, packages and settings: compared when they meet.

Each rank says one digest. What it stands for is read only where digests differ.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ds_recipes.errors import WorldError
from ds_recipes.world.channel import name_ranks

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

Facts = Mapping[str, str]
"""A text by name."""

SHOWN = 12
SHOWN_CHARACTERS = 80


def offer(store: "Store", facts: Facts) -> str:
    """Put `facts` where the other ranks find them, unless one with the same has done it; returns their digest."""
    text = json.dumps(dict(facts), sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    if not store.check([_key(digest)]):
        store.set(_key(digest), text)
    return digest


def check_alike(store: "Store", hosts: Sequence[str], digests: Sequence[str]) -> None:
    """Compare what the ranks have said, by rank. The same verdict on every rank.

    Raises:
        WorldError: they differ; with what is different, and where.
    """
    if len(set(digests)) == 1:
        return
    groups: dict[str, list[int]] = {}
    for rank, digest in enumerate(digests):
        groups.setdefault(digest, []).append(rank)
    facts = {digest: json.loads(store.get(_key(digest))) for digest in groups}
    names = sorted({name for one in facts.values() for name in one})
    different = [name for name in names if len({one.get(name) for one in facts.values()}) > 1]
    lines = []
    for name in different[:SHOWN]:
        values: dict[str, list[int]] = {}
        for digest, ranks in groups.items():
            values.setdefault(_shown(facts[digest].get(name)), []).extend(ranks)
        lines.append(f"  {name}: {'; '.join(f'{value} ({_where(ranks, hosts)})' for value, ranks in values.items())}")
    if len(different) > SHOWN:
        lines.append(f"  and {len(different) - SHOWN} more")
    raise WorldError(
        "The ranks of this launch do not run the same:\n"
        + "\n".join(lines)
        + "\nLet all hosts use the same code, packages and settings, then start again."
    )


def _key(digest: str) -> str:
    return f"facts/{digest}"


def _shown(value: str | None) -> str:
    if value is None:
        return "missing"
    return value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]}..."


def _where(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`ranks 0-3 on node-a, rank 4 on node-b`."""
    by_host = groupby(sorted(ranks), key=lambda rank: hosts[rank])
    return ", ".join(f"{name_ranks(list(group))} on {host}" for host, group in by_host)
