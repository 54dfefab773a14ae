"""Tiny inputs on which training succeeds, made once."""

from pathlib import Path

import pytest

from tests.e2e.bad_input import SECONDS, write_material
from tests.ranks.launch import fork_rank, wait_for


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, tokenizers and data; tests work in copies of it."""
    folder = tmp_path_factory.mktemp("inputs") / "inputs"
    folder.mkdir()
    output = folder.with_name("output.txt")
    process = fork_rank(write_material, (folder,), output)  # where transformers has been imported already
    assert wait_for([process], SECONDS) and process.exitcode == 0, output.read_text(encoding="utf-8")
    return folder
