"""A mapped file that has been cut is told by its name, before anything looks beyond its end."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from ds_recipes.data.array_files import facts_of_array, map_array, open_numbers
from ds_recipes.data.mapped import _PATHS, check_mapped, map_file
from ds_recipes.errors import DsRecipesError

MAPPERS = {
    "bytes": map_file,
    "array": map_array,
    "numbers": lambda path: open_numbers(path, facts_of_array(path, 5000, 64), 64),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.save(tmp_path / "a.npy", np.arange(5000))
    return tmp_path / "a.npy"


@pytest.mark.parametrize("left", [0, 1, 4096, 40127])
@pytest.mark.parametrize("kind", MAPPERS)
def test_a_cut_file_is_named_with_both_sizes(path: Path, kind: str, left: int) -> None:
    mapped = MAPPERS[kind](path)
    check_mapped()
    os.truncate(path, left)
    with pytest.raises(
        DsRecipesError, match=f"{path}: has become shorter.* 40,128 bytes when it was opened, {left:,} now"
    ):
        check_mapped()
    del mapped
    gc.collect()
    check_mapped()


@pytest.mark.parametrize("kind", MAPPERS)
def test_a_file_that_is_replaced_or_removed_is_read_as_it_was(path: Path, kind: str) -> None:
    mapped = MAPPERS[kind](path)
    before = bytes(memoryview(mapped).cast("B"))
    other = path.with_name("other.npy")
    np.save(other, np.zeros(3))
    other.replace(path)
    check_mapped()
    path.unlink()
    check_mapped()
    assert bytes(memoryview(mapped).cast("B")) == before


def test_a_file_that_grows_is_no_error_and_what_is_read_whole_is_not_watched(path: Path) -> None:
    known = len(_PATHS)
    small = open_numbers(path, facts_of_array(path, 5000, 64), 64, read_up_to=1 << 20)
    assert len(_PATHS) == known
    os.truncate(path, 10)
    check_mapped()
    assert small[-1] == 4999
    np.save(path, np.arange(10))
    mapped = map_array(path)
    os.truncate(path, 10**6)
    check_mapped()
    assert mapped[-1] == 9
