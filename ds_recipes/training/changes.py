"""Comparing a run with the checkpoint that it continues: what is refused, what was allowed, what is only told."""

from collections.abc import Mapping, Sequence

from ds_recipes.config.plan import Plan
from ds_recipes.errors import CheckpointError
from ds_recipes.training.identity import Identity

SHOWN_FILES = 5
SHOWN_ENTRIES = 8
ABSENT = "none"
GROWING = ("model", "schedule")
"""Their entries may become more with another version: only those that both sides have are compared."""

Files = Sequence[Sequence[str]]
"""(name, content fingerprint) of each data file."""


def refuse_changes(
    saved: Identity,
    now: Identity,
    allowed: Sequence[str],
    where: str,
    saved_files: Files = (),
    files: Files = (),
    plan: Plan | None = None,
) -> list[str]:
    """Compare two identities; return the allowed differences, one line each.

    A key that the checkpoint does not have is not compared: see `not_recorded`.

    Raises:
        CheckpointError: a key differs that `allowed` does not name. All such keys are listed, of the data the files, of the
            model, the schedule and the precision the entries.
    """
    changed = {key: _differences(key, saved[key], now[key]) for key in now if key in saved}
    refused = [key for key, lines in changed.items() if lines and key not in allowed]
    if refused:
        lines = []
        for key in refused:
            entries = [f"  {name}: the checkpoint has {old}, this run has {new}" for name, old, new in changed[key]]
            more = len(entries) - SHOWN_ENTRIES
            lines += entries if more <= 0 else [*entries[:SHOWN_ENTRIES], f"  and {more} more entries of {key}"]
            if key == "data":
                lines += [f"    {line}" for line in _changed_files(saved_files, files)]
            if key == "global_batch_size" and plan is not None:
                lines.append(f"    {_how_to_keep(int(str(saved[key])), plan)}")
        raise CheckpointError(
            f"{where} was made with other settings:\n" + "\n".join(lines) + "\n"
            "Set them back, start in a new run folder, or allow the change with --allow_change "
            + " ".join(refused)
            + "."
        )
    return [f"{name} changed from {old} to {new}" for entries in changed.values() for name, old, new in entries]


def not_recorded(saved: Identity, now: Identity) -> list[str]:
    """The keys that an older checkpoint says nothing about."""
    return [key for key in now if key not in saved]


def environment_line(saved: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What differs of what may differ, in one line; None if nothing does, or the checkpoint does not tell."""
    if not saved:
        return None
    changed = [
        f"{name} {saved.get(name, ABSENT)} -> {now.get(name, ABSENT)}"
        for name in {**now, **saved}
        if saved.get(name) != now.get(name)
    ]
    return "; ".join(changed) or None


def _differences(key: str, saved: object, now: object) -> list[tuple[str, str, str]]:
    """(name, old, new) of each entry that differs."""
    before, after = _entries(key, saved), _entries(key, now)
    names = [name for name in {**before, **after} if key not in GROWING or (name in before and name in after)]
    return [
        (name, before.get(name, ABSENT), after.get(name, ABSENT))
        for name in names
        if before.get(name, ABSENT) != after.get(name, ABSENT)
    ]


def _entries(key: str, value: object) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {f"{key}.{name}": str(entry) for name, entry in value.items()}
    if key == "precision" and ": " in str(value):
        name, _, rest = str(value).partition(": ")
        parts = (part.rpartition(" ") for part in rest.split(", "))
        return {key: name, **{f"{key}.{what}": dtype for what, _, dtype in parts}}
    return {key: str(value)}


def _how_to_keep(rows: int, plan: Plan) -> str:
    """What to set so that a step trains as many rows as before."""
    share = plan.rows_per_rank * plan.world_size
    if rows % share == 0:
        return f"set --global_batch_size {rows}, which makes {rows // share} micro-steps on {plan.world_size} ranks"
    fitting = [str(ranks) for ranks in range(1, rows + 1) if rows % (plan.rows_per_rank * ranks) == 0]
    on = f"start {', '.join(fitting)} ranks" if fitting else f"set --batch_size_training to a divisor of {rows}"
    return (
        f"{rows} rows cannot be shared by {plan.world_size} ranks with batch_size_training {plan.rows_per_rank}: {on}"
    )


def _changed_files(saved: Files, now: Files) -> list[str]:
    """Which files are other ones, with both fingerprints; a file that only moved is not told."""
    before = {entry[0]: entry[1] for entry in saved}
    after = {entry[0]: entry[1] for entry in now}
    lines = [
        f"{name}: {print_} then, {after.get(name, 'not there')} now"
        for name, print_ in before.items()
        if after.get(name) != print_ and (name in after or print_ not in after.values())
    ]
    lines += [
        f"{name}: not there then, {print_} now"
        for name, print_ in after.items()
        if name not in before and print_ not in before.values()
    ]
    more = len(lines) - SHOWN_FILES
    return lines if more <= 0 else [*lines[:SHOWN_FILES], f"and {more} more files"]
