"""What must hold between the settings that watch over the steps and those of saving."""

from collections.abc import Callable, Iterator

from ds_recipes.config.draft import Draft

LEAST_WINDOW = 8
"""Losses below which a median absolute deviation says nothing."""


def _spike_window(draft: Draft) -> Iterator[str]:
    if 0 < draft.values["spike_window"] < LEAST_WINDOW:
        yield (
            f"{draft.describe('spike_window')}: so few losses do not say what is normal. Set at least {LEAST_WINDOW}, or 0 to "
            "turn the watch off."
        )


def _rewind(draft: Draft) -> Iterator[str]:
    """Going back needs checkpoints to go back to, whole ones, that are still there when a row of spikes is complete."""
    if draft.values["spike_recovery"] != "rewind":
        return
    recovery = draft.describe("spike_recovery")
    if draft.values["spike_window"] == 0:
        yield f"{recovery}, but {draft.describe('spike_window')}: no spike is ever seen. Set spike_window, or leave it out."
    for name in ("save_model", "save_optimizer"):
        if not draft.values[name]:
            yield f"{recovery}, but {draft.describe(name)}: there would be nothing to go back to. Leave one of them out."
    interval, keep_last = draft.values["save_interval_iteration"], draft.values["keep_last"]
    if interval == 0:
        yield (
            f"{recovery}, but {draft.describe('save_interval_iteration')}: there is no checkpoint to go back to before the end. "
            "Set an interval."
        )
    elif keep_last is not None and keep_last <= (saves := -(-(draft.values["spike_patience"] - 1) // interval)):
        yield (
            f"{recovery}, but {draft.describe('keep_last')}: in a row of {draft.values['spike_patience']} spikes "
            f"(spike_patience) up to {saves} checkpoints are saved, and the last good one would be deleted. Keep at least "
            f"{saves + 1}, or save less often."
        )


GUARD_RULES: tuple[tuple[tuple[str, ...], Callable[[Draft], Iterator[str]]], ...] = (
    (("spike_window",), _spike_window),
    (
        (
            "spike_recovery",
            "spike_window",
            "spike_patience",
            "save_model",
            "save_optimizer",
            "save_interval_iteration",
            "keep_last",
        ),
        _rewind,
    ),
)
