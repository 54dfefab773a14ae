"""What a rank's memory grows by while it loads a model of real shards, and while it saves: its share, and a few buffers.

Measured by the kernel (VmHWM of /proc/self/status, begun anew before each) in processes of their own. On a CPU the engine's own
tensors are in it, which live on the GPU elsewhere.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.launch import run_ranks
from tests.ranks.weighed import load_and_save, make_shards

ENGINES = ("deepspeed", "fsdp")
MB = 1_000_000
BUFFERS = 32 * MB
"""A few buffers: a layer that is gathered and the next one (7 MB each, and on their way), what files are read by (2 x 8 MB)."""

COPIES = {"deepspeed": 5, "fsdp": 3}
"""Float32 values that an engine with AdamW holds of each of its share: the weights and two moments; ZeRO-3 a working copy and the
gradient too."""

BEFORE = {"deepspeed": 0, "fsdp": 1}
"""Those of them that have no memory yet when the values are read."""


def weigh(
    folder: Path, ranks: int, engine: str, optimizer: str, saves: bool, timeout: float = 240
) -> list[dict[str, Any]]:
    reports = run_ranks(load_and_save, ranks, str(folder), engine, optimizer, saves, timeout=timeout)
    assert not any(report["wrong"] for report in reports), reports
    return reports


def check_loading(reports: list[dict[str, Any]], engine: str) -> None:
    """Reading adds to what was built no more than the values that were not there before."""
    for report in reports:
        share = report["weights"] / len(reports)
        built, loaded = report["building"][0], report["loading"][0]
        assert loaded < BEFORE[engine] * share + 8 * MB, report
        assert built + loaded < COPIES[engine] * share + BUFFERS, report


def check_saves(reports: list[dict[str, Any]]) -> None:
    """Nothing but buffers; the first one beside training takes the memory for the copy, which the next ones use again."""
    for report in reports:
        first, *later = (peak for peak, _ in report["beside"])
        assert max(peak for peak, _ in report["streamed"]) < BUFFERS, report
        assert 0.9 * report["state"] < first < report["state"] + BUFFERS, report
        assert max(later) < BUFFERS, report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/: 114 MB in 17 files; the state with moments has 343."""
    folder = tmp_path_factory.mktemp("memory")
    make_shards(folder / "model", layers=16)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_loads_its_share_and_saves_through_a_few_buffers(folder: Path, engine: str) -> None:
    reports = weigh(folder, 2, engine, "adamw", saves=True)
    check_loading(reports, engine)
    check_saves(reports)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_alone_loads_no_second_copy(folder: Path, engine: str) -> None:
    check_loading(weigh(folder, 1, engine, "adamw", saves=False), engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers, optimizer",
    [pytest.param(48, "adamw", id="masters and moments of 1 GB"), pytest.param(144, "sgd", id="masters of 1 GB")],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_save_of_one_gigabyte_takes_a_few_buffers(tmp_path: Path, engine: str, layers: int, optimizer: str) -> None:
    make_shards(tmp_path / "model", layers)
    check_saves(weigh(tmp_path, 2, engine, optimizer, saves=True, timeout=600))
