"""Target tokens are counted and listed as a plain loop counts and lists them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.targets import TargetCounts, targets_within

Masks = list[list[bool]]
MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), max_size=6)


def documents_of(masks: Masks) -> Any:
    """The arrays of `Documents` that counting reads; a first token is never a target."""
    spans: list[tuple[int, int]] = []
    counts = []
    for mask in masks:
        padded = [False, *mask[1:], False]
        edges = np.flatnonzero(np.diff(np.array(padded, int)))
        found = [(int(a) + 1, int(b) + 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        spans += found
        counts.append(len(found))
    return SimpleNamespace(
        offsets=np.append(0, np.cumsum([len(mask) for mask in masks])).astype(np.int64),
        span_offsets=np.append(0, np.cumsum(counts)).astype(np.int64),
        spans=np.array(spans, np.int32).reshape(-1, 2),
    )


@settings(deadline=None)
@given(masks=MASKS, data=st.data())
def test_counts_and_lists_equal_a_loop(masks: Masks, data: Any) -> None:
    documents = documents_of(masks)
    counts = TargetCounts(documents)
    asked = []
    for number, mask in enumerate(masks):
        first = data.draw(st.integers(0, len(mask)))
        asked.append((number, first, data.draw(st.integers(first, len(mask)))))
    columns = np.array(asked, np.int64).reshape(-1, 3)
    expected = [[at for at in range(first, stop) if at and masks[number][at]] for number, first, stop in asked]
    assert counts.between(*columns.T).tolist() == [len(targets) for targets in expected]
    for (number, first, stop), targets in zip(asked, expected, strict=True):
        spans = documents.spans[documents.span_offsets[number] : documents.span_offsets[number + 1]]
        assert targets_within(spans, first, stop).tolist() == targets
