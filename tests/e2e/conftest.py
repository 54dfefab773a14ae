"""Tiny inputs on which training succeeds, made once."""

from pathlib import Path

import pytest

from tests.e2e.bad_input import write_material


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, tokenizers and data; tests work in copies of it."""
    folder = tmp_path_factory.mktemp("inputs") / "inputs"
    folder.mkdir()
    write_material(folder)
    return folder
