"""What tests of clusters share: a tiny run, and two hosts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.hosts import Host, two_hosts
from tests.nano import make_nano


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a model and records made on the spot."""
    return make_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both
