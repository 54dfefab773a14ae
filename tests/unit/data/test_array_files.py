"""A .npy file that grows is the file that numpy would have written at once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.array_files import ArrayFile, array_bytes, map_array
from ds_recipes.data.tokens.parts import DOCUMENT, SPAN


@pytest.mark.parametrize(
    "dtype, row", [(np.dtype("<u2"), ()), (np.dtype("<u4"), ()), (SPAN, (2,)), (DOCUMENT, ()), (np.dtype("<i8"), ())]
)
@settings(deadline=None, max_examples=20)
@given(pieces=st.lists(st.integers(0, 12), max_size=5))
def test_equals_what_numpy_saves(
    tmp_path_factory: pytest.TempPathFactory, dtype: np.dtype[Any], row: tuple[int, ...], pieces: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("arrays")
    whole = np.zeros((sum(pieces), *row), dtype)
    whole.view(np.uint8).reshape(-1)[:] = np.arange(whole.nbytes) % 251
    with ArrayFile(folder / "grown.npy", dtype, row) as file:
        for stop, piece in zip(np.cumsum(pieces), pieces, strict=True):
            file.append(whole[stop - piece : stop])
    np.save(folder / "saved.npy", whole)
    assert (folder / "grown.npy").read_bytes() == (folder / "saved.npy").read_bytes()
    assert (folder / "grown.npy").stat().st_size == array_bytes(dtype, row, len(whole))
    assert np.array_equal(map_array(folder / "grown.npy"), whole)


def test_the_header_is_as_long_for_any_number_of_rows() -> None:
    sizes = {array_bytes(SPAN, (2,), rows) - 8 * rows for rows in (0, 1, 10**6, 10**15)}
    assert len(sizes) == 1


def test_what_is_mapped_cannot_be_changed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4))
    with pytest.raises(ValueError, match="read-only"):
        map_array(tmp_path / "a.npy")[0] = 1
