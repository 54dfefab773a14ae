"""Names that users' scripts, dashboards and files depend on stay as they are; a new one is recorded with what adds it."""

import json

import pytest

from tests.house.public_names import RECORDED, public_names

NAMES = public_names()
KEPT = json.loads(RECORDED.read_text(encoding="utf-8"))


def test_the_kinds_of_names_are_those_recorded() -> None:
    assert NAMES.keys() == KEPT.keys() and all(NAMES.values())


@pytest.mark.parametrize("kind", KEPT)
def test_no_name_has_gone_and_new_ones_are_recorded(kind: str) -> None:
    gone, new = set(KEPT[kind]) - set(NAMES[kind]), set(NAMES[kind]) - set(KEPT[kind])
    assert not gone, f"{sorted(gone)}: files, scripts or dashboards of users name these"
    assert not new, f"{sorted(new)}: record them with python -m tests.house.public_names"
