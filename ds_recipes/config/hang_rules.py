"""What must hold between the settings of the hang monitor."""

from collections.abc import Callable, Iterator

from ds_recipes.config.draft import Draft
from ds_recipes.config.hang_settings import parse_limits


def _limits(draft: Draft) -> Iterator[str]:
    try:
        parse_limits(draft.values["hang_limits"])
    except ValueError as error:
        yield f"{draft.describe('hang_limits')}: it {error}."


def _switched_off(draft: Draft) -> Iterator[str]:
    if draft.values["hang_monitor"]:
        return
    for name in ("hang_limits", "hang_factor"):
        if draft.is_given(name):
            yield f"{draft.describe(name)} has no effect: {draft.describe('hang_monitor')}. Leave one of them out."


HANG_RULES: tuple[tuple[tuple[str, ...], Callable[[Draft], Iterator[str]]], ...] = (
    (("hang_limits",), _limits),
    (("hang_monitor", "hang_limits", "hang_factor"), _switched_off),
)
