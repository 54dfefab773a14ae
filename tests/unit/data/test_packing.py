"""Packing keeps every token and every target, whatever the lengths; rows are never longer than the context."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.packing import Packing, pack

lengths_of_documents = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def pieces_of(packing: Packing) -> list[list[tuple[int, int, int]]]:
    pieces = list(zip(packing.document.tolist(), packing.start.tolist(), packing.length.tolist(), strict=True))
    offsets = packing.row_offsets.tolist()
    return [pieces[first:last] for first, last in pairwise(offsets)]


@pytest.mark.parametrize("method", ["documents", "concat", "off"])
@settings(deadline=None)
@given(lengths=lengths_of_documents, context=st.integers(2, 17))
def test_every_token_is_predicted_once(method: str, lengths: list[int], context: int) -> None:
    rows = pieces_of(pack(method, np.array(lengths), context, splits_long=True))
    predicted = sorted(
        (document, token + 1)
        for row in rows
        for document, start, length in row
        for token in range(start, start + length)
        if token + 1 < lengths[document]
    )
    assert predicted == [(document, token) for document, length in enumerate(lengths) for token in range(1, length)]
    assert all(0 < sum(length for _, _, length in row) <= context for row in rows)
    assert all(length > 0 for row in rows for _, _, length in row)


@settings(deadline=None)
@given(lengths=lengths_of_documents, context=st.integers(2, 17))
def test_concat_is_the_stream_cut_into_full_rows(lengths: list[int], context: int) -> None:
    stream = [(document, token) for document, length in enumerate(lengths) for token in range(length)]
    rows = pieces_of(pack("concat", np.array(lengths), context, splits_long=False))
    laid = [[(d, token) for d, start, length in row for token in range(start, start + length)] for row in rows]
    assert laid == [stream[at : at + context] for at in range(0, len(stream), context)]


@settings(deadline=None)
@given(lengths=lengths_of_documents, context=st.integers(2, 17))
def test_without_splitting_a_document_keeps_its_beginning(lengths: list[int], context: int) -> None:
    for method in ("documents", "off"):
        rows = pieces_of(pack(method, np.array(lengths), context, splits_long=False))
        assert sorted(piece for row in rows for piece in row) == [
            (document, 0, min(length, context)) for document, length in enumerate(lengths)
        ]
        assert method == "documents" or all(len(row) == 1 for row in rows)


def test_padding_is_at_most_one_percent_on_lengths_like_those_of_alpaca() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.2, 0.7, 5000), 40, 4000).astype(np.int64)
    packing = pack("documents", lengths, 2048, splits_long=False)
    assert 1 - packing.length.sum() / (len(packing) * 2048) <= 0.01
    again = pack("documents", lengths, 2048, splits_long=False)
    assert pieces_of(packing) == pieces_of(again)


def test_a_document_stays_near_its_neighbours() -> None:
    packing = pack("documents", np.full(5000, 100), 2048, splits_long=True)
    assert all(max(row)[0] - min(row)[0] < 2000 for row in pieces_of(packing))
