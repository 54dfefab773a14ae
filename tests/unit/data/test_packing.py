"""Packing keeps every token and every target that it should, whatever the lengths; rows are never longer than the context."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data import packing as packing_module
from ds_recipes.data.packing import Packing, pack

lengths_of_documents = st.lists(st.integers(1, 40), max_size=60)
contexts = st.integers(2, 17)
selections = st.none() | st.sets(st.integers(0, 59))

Piece = tuple[int, int, int]  # document, start, length


def pieces_of(packing: Packing) -> list[list[Piece]]:
    pieces = list(zip(packing.document.tolist(), packing.start.tolist(), packing.length.tolist(), strict=True))
    offsets = packing.row_offsets.tolist()
    assert offsets[0] == 0 and offsets[-1] == len(pieces)
    assert {array.dtype for array in (packing.row_offsets, packing.document, packing.start, packing.length)} == {
        np.dtype(np.int64)
    }
    return [pieces[first:last] for first, last in pairwise(offsets)]


def selected_from(lengths: list[int], chosen: set[int] | None) -> tuple[np.ndarray | None, list[int]]:
    """As an argument of `pack`, and as a list."""
    if chosen is None:
        return None, list(range(len(lengths)))
    numbers = sorted(number for number in chosen if number < len(lengths))
    return np.array(numbers, np.int64), numbers


def padding(packing: Packing, context: int) -> float:
    return 1 - float(packing.length.sum()) / (len(packing) * context)


@pytest.mark.parametrize("method", ["documents", "concat", "off"])
@settings(deadline=None, max_examples=60)
@given(lengths=lengths_of_documents, context=contexts, chosen=selections)
def test_split_lays_and_predicts_every_token_once(
    method: str, lengths: list[int], context: int, chosen: set[int] | None
) -> None:
    selected, numbers = selected_from(lengths, chosen)
    packing = pack(method, np.array(lengths, np.int64), context, "split", selected)
    rows = pieces_of(packing)
    laid = sorted((document, token) for row in rows for document, start, n in row for token in range(start, start + n))
    last_alone = {(d, lengths[d] - 1) for d in numbers if method != "concat" and lengths[d] % context == 1 < lengths[d]}
    assert laid == [(d, token) for d in numbers for token in range(lengths[d]) if (d, token) not in last_alone]
    predicted = [(d, token + 1) for d, token in laid if token + 1 < lengths[d]]
    assert predicted == [(d, token) for d in numbers for token in range(1, lengths[d])]
    assert all(0 < sum(length for _, _, length in row) <= context for row in rows)
    assert all(length > 0 for row in rows for _, _, length in row)
    assert method != "off" or all(len(row) == 1 for row in rows)
    assert packing.num_dropped == 0


@settings(deadline=None, max_examples=60)
@given(lengths=lengths_of_documents, context=contexts, chosen=selections)
def test_concat_is_the_stream_cut_into_full_rows(lengths: list[int], context: int, chosen: set[int] | None) -> None:
    selected, numbers = selected_from(lengths, chosen)
    stream = [(document, token) for document in numbers for token in range(lengths[document])]
    rows = pieces_of(pack("concat", np.array(lengths, np.int64), context, "split", selected))
    laid = [[(d, token) for d, start, length in row for token in range(start, start + length)] for row in rows]
    assert laid == [stream[at : at + context] for at in range(0, len(stream), context)]
    assert all((a[0], a[1] + a[2]) != b[:2] for row in rows for a, b in pairwise(row))  # no piece is cut for nothing


@pytest.mark.parametrize("method", ["documents", "off"])
@settings(deadline=None, max_examples=60)
@given(lengths=lengths_of_documents, context=contexts, chosen=selections)
def test_truncate_keeps_each_beginning_and_drop_whole_documents(
    method: str, lengths: list[int], context: int, chosen: set[int] | None
) -> None:
    selected, numbers = selected_from(lengths, chosen)
    packing = pack(method, np.array(lengths, np.int64), context, "truncate", selected)
    pieces = sorted(piece for row in pieces_of(packing) for piece in row)
    assert pieces == [(document, 0, min(lengths[document], context)) for document in numbers]
    assert packing.num_dropped == 0

    packing = pack(method, np.array(lengths, np.int64), context, "drop", selected)
    pieces = sorted(piece for row in pieces_of(packing) for piece in row)
    fitting = [document for document in numbers if lengths[document] <= context + 1]  # the last may be a target alone
    assert pieces == [(document, 0, min(lengths[document], context)) for document in fitting]
    assert packing.num_dropped == len(numbers) - len(fitting)


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 17), min_size=1, max_size=300), context=contexts, pieces=st.integers(1, 50))
def test_small_windows_lose_nothing(lengths: list[int], context: int, pieces: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LEAST_WINDOW_PIECES", "USUAL_WINDOW_PIECES", "MOST_WINDOW_PIECES"):
            patch.setattr(packing_module, name, pieces)
        rows = pieces_of(pack("documents", np.array(lengths, np.int64), context, "truncate"))
    assert sorted(piece for row in rows for piece in row) == [(i, 0, min(n, context)) for i, n in enumerate(lengths)]
    assert all(row == sorted(row) and sum(length for _, _, length in row) <= context for row in rows)


@settings(deadline=None, max_examples=100)
@given(sizes=st.lists(st.integers(1, 12), max_size=9), room=st.integers(0, 50))
def test_what_a_row_has_left_is_filled_as_well_as_can_be(sizes: list[int], room: int) -> None:
    reachable = {0}
    for size in sizes:
        reachable |= {total + size for total in reachable}
    buckets = {size: [0] * sizes.count(size) for size in sizes}
    chosen = packing_module._fill(room, 0, sorted(buckets), buckets)
    assert sum(size * count for size, count in chosen) == max(total for total in reachable if total <= room)
    assert all(sum(n for other, n in chosen if other == size) <= sizes.count(size) for size in sizes)


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=200), context=st.integers(100, 300))
def test_at_most_one_row_is_half_empty(lengths: list[int], context: int) -> None:
    rows = pieces_of(pack("documents", np.array(lengths, np.int64), context, "split"))
    filled = sorted(sum(length for _, _, length in row) for row in rows)
    assert all(a + b > context for a, b in pairwise(filled))
    assert len(rows) <= 1 + 2 * sum(lengths) / context


@pytest.mark.parametrize(
    "kind, bound",
    [("like alpaca", 0.001), ("uniform", 0.015), ("tiny and full", 0.001), ("near half a row", 0.03), ("split", 0.005)],
)
def test_padding_is_small_where_it_can_be(kind: str, bound: float) -> None:
    random = np.random.default_rng(0)
    tiny, full = random.integers(2, 30, 6000), 2048 - random.integers(0, 30, 6000)
    lengths = {
        "like alpaca": np.clip(random.lognormal(4.6, 0.7, 10_000), 20, 2048).astype(np.int64),
        "uniform": random.integers(2, 2049, 10_000),
        "tiny and full": np.where(random.random(6000) < 0.5, tiny, full),
        "near half a row": random.integers(922, 1127, 10_000),
        "split": random.integers(2, 20_000, 2000),
    }[kind]
    packing = pack("documents", lengths, 2048, "split")
    spare = 1 / len(packing)  # the last row of all
    assert padding(packing, 2048) <= bound + spare
    again = pack("documents", lengths, 2048, "split")
    assert pieces_of(packing) == pieces_of(again)


@pytest.mark.parametrize("context", [2048, 131_072])
def test_pieces_of_one_token_and_of_one_size_fill_rows(context: int) -> None:
    for size, number in ((1, 3 * context + 5), (context // 2 + 1, 500), (100, 5000)):
        packing = pack("documents", np.full(number, size), context, "split")
        assert len(packing) == -(-number // (context // size))


def test_a_document_stays_near_its_neighbours() -> None:
    packing = pack("documents", np.full(20_000, 100), 2048, "split")
    assert all(max(row)[0] - min(row)[0] < 2 * packing_module.USUAL_WINDOW_PIECES for row in pieces_of(packing))


def test_packing_never_changes_between_versions() -> None:
    """A run goes on in the rows that it began with: if these change, PACKING_VERSION must go up."""
    lengths = np.array([5, 9, 2, 7, 3, 3, 8, 1, 12])
    assert packing_module.PACKING_VERSION == 1
    assert pieces_of(pack("documents", lengths, 8, "split")) == [
        [(1, 0, 8)],
        [(6, 0, 8)],
        [(8, 0, 8)],
        [(3, 0, 7), (7, 0, 1)],
        [(0, 0, 5), (4, 0, 3)],
        [(5, 0, 3), (8, 8, 4)],
        [(2, 0, 2)],
    ]
    assert pieces_of(pack("concat", lengths, 20, "split")) == [
        [(0, 0, 5), (1, 0, 9), (2, 0, 2), (3, 0, 4)],
        [(3, 4, 3), (4, 0, 3), (5, 0, 3), (6, 0, 8), (7, 0, 1), (8, 0, 2)],
        [(8, 2, 10)],
    ]
