"""What must stay the same when a run is continued, and the comparison that refuses a silent change."""

from collections.abc import Mapping, Sequence

from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config
from ds_recipes.errors import CheckpointError


def identity_of(config: Config, plan: Plan, data_fingerprint: str, tokenizer_fingerprint: str) -> dict[str, str]:
    """The keys that a checkpoint records and a continued run is compared by."""
    return {
        "data": data_fingerprint,
        "tokenizer": tokenizer_fingerprint,
        "dataset": config.data.dataset,
        "packing": config.data.packing,
        "context_size": str(config.data.context_size),
        "seed": str(config.run.seed),
        "global_batch_size": str(plan.global_rows),
        "precision": config.run.precision,
        "optimizer": config.optimizer.optimizer_type,
    }


def refuse_changes(saved: Mapping[str, str], now: Mapping[str, str], allowed: Sequence[str], where: str) -> list[str]:
    """Compare two identities; return the allowed differences, one line each.

    Raises:
        CheckpointError: a key differs that `allowed` does not name. All such keys are listed.
    """
    changed = {key: (saved.get(key, "unknown"), value) for key, value in now.items() if saved.get(key) != value}
    refused = [key for key in changed if key not in allowed]
    if refused:
        lines = [f"  {key}: the checkpoint has {changed[key][0]}, this run has {changed[key][1]}" for key in refused]
        raise CheckpointError(
            f"{where} was made with other settings:\n" + "\n".join(lines) + "\n"
            "Set them back, start in a new run folder, or allow the change with --allow_change "
            + " ".join(refused)
            + "."
        )
    return [f"{key} changed from {old} to {new}" for key, (old, new) in changed.items()]
