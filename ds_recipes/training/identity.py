"""What must stay the same when a run is continued, and the comparison that refuses a silent change."""

from collections.abc import Mapping, Sequence

from ds_recipes.config.engine_settings import engine_settings
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config
from ds_recipes.data.packing import PACKING_VERSION
from ds_recipes.data.reading import Reading
from ds_recipes.data.tokens.store import VERSION as TOKENS_VERSION
from ds_recipes.errors import CheckpointError

SHOWN_FILES = 5

Files = Sequence[Sequence[str]]
"""(name, content fingerprint) of each data file."""


def identity_of(config: Config, plan: Plan, read: Reading) -> dict[str, str]:
    """The keys that a checkpoint records and a continued run is compared by."""
    data, weights = config.data, read.corpus.weights
    return {
        "data": read.corpus.fingerprint,
        "tokenizer": read.tokenizer_fingerprint,
        "dataset": f"{data.dataset} ({read.format_fingerprint[:12]}, version {TOKENS_VERSION})",
        "mixture": "no weights" if weights is None else " ".join(f"{weight:g}" for weight in weights),
        "validation_split": str(data.validation_split),
        "packing": f"{data.packing} (version {PACKING_VERSION})",
        "truncation": read.long_documents,
        "context_size": str(data.context_size),
        "seed": str(config.run.seed),
        "global_batch_size": str(plan.global_rows),
        "precision": f"{config.run.precision}: {engine_settings(config).precision}",
        "optimizer": config.optimizer.optimizer_type,
    }


def refuse_changes(
    saved: Mapping[str, str],
    now: Mapping[str, str],
    allowed: Sequence[str],
    where: str,
    saved_files: Files = (),
    files: Files = (),
) -> list[str]:
    """Compare two identities; return the allowed differences, one line each.

    Raises:
        CheckpointError: a key differs that `allowed` does not name. All such keys are listed, and of the data the files.
    """
    changed = {key: (saved.get(key, "unknown"), value) for key, value in now.items() if saved.get(key) != value}
    refused = [key for key in changed if key not in allowed]
    if refused:
        lines = [f"  {key}: the checkpoint has {changed[key][0]}, this run has {changed[key][1]}" for key in refused]
        if "data" in refused:
            lines += [f"    {line}" for line in _changed_files(saved_files, files)]
        raise CheckpointError(
            f"{where} was made with other settings:\n" + "\n".join(lines) + "\n"
            "Set them back, start in a new run folder, or allow the change with --allow_change "
            + " ".join(refused)
            + "."
        )
    return [f"{key} changed from {old} to {new}" for key, (old, new) in changed.items()]


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
