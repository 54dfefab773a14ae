"""What is said while a store is made: how much of the source is tokenised, also within a part and a long record."""

import gzip
import json
import re
from collections.abc import Callable
from itertools import pairwise
from multiprocessing import Pipe
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from ds_recipes.data import long_text
from ds_recipes.data.tokens import make, progress, store, token_files, worker
from ds_recipes.data.tokens.answers import Advanced
from ds_recipes.data.tokens.files import describe
from ds_recipes.data.tokens.make import PartMaker, Task
from ds_recipes.data.tokens.progress import Amount, Ticker, bytes_text, duration, progress_line, short
from tests.unit.data.made import write_jsonl
from tests.unit.data.tokens.stores import cut_small, documents_on, make_recipe, open_alone, store_files
from tests.unit.data.tokens.test_token_files import some_documents, write_megatron


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (12_345_678, "12.3 M"),
        (999_700_000, "1,000 M"),
        (1.5e9, "1.5 G"),
        (2e12, "2 T"),
    ],
)
def test_numbers(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (89, "89 s"), (120, "2 min"), (5400, "1 h 30 min"), (36_000, "10 h 0 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_of_progress() -> None:
    amount = Amount(1_200_000, 40_000, "1.2 MB")
    line = progress_line("data/train.jsonl", amount, 300_000, 12_300_000, 10.0)
    assert line == "tokenising data/train.jsonl: 28.3 % of 1.2 MB, 12.3 M tokens, 1.23 M tokens/s, 29 s left"
    assert progress_line("a", amount, 0, 0, 10.0) == "tokenising a: 3.3 % of 1.2 MB"
    assert progress_line("a", amount, 300_000, 0, 10.0) == "tokenising a: 28.3 % of 1.2 MB, 29 s left", (
        "no part is whole"
    )
    assert progress_line("a", amount, 9, 9, 0.0) == "tokenising a: 3.3 % of 1.2 MB, 9 tokens", (
        "a clock that has not moved yet"
    )
    almost = progress_line("a", Amount(10**9, 0, "1 GB"), 10**9 - 1, 0, 1.0)
    assert "99.9 %" in almost, "100 % is all of it"
    assert progress_line("a", Amount(0, 0, "3 documents"), 0, 0, 1.0) == "tokenising a: 0.0 % of 3 documents"


def test_sizes() -> None:
    assert [bytes_text(number) for number in (5, 12_345_678, 3_600_000_000)] == ["5 B", "12.3 MB", "3.6 GB"]


TEXTS = [f"a dog {i} and the quick fox 日本語 " * (1 + i % 7) for i in range(90)]
RECORDS = "".join(json.dumps({"text": text}) + "\n" * (1 + i % 3) for i, text in enumerate(TEXTS)).encode()


def lines(folder: Path) -> Path:
    (folder / "a.jsonl").write_bytes(RECORDS)
    return folder / "a.jsonl"


def packed(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(RECORDS))
    return folder / "a.jsonl.gz"


def elements(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=2))
    return folder / "a.json"


def comma_separated(folder: Path) -> Path:
    (folder / "a.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in TEXTS))
    return folder / "a.csv"


def table(folder: Path) -> Path:
    parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "a.parquet", row_group_size=25)
    return folder / "a.parquet"


def saved(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved"


def tokens(folder: Path) -> Path:
    return write_megatron(folder / "a", some_documents(90))


def one_long_line(folder: Path) -> Path:
    (folder / "a.jsonl").write_text(json.dumps({"text": "the quick fox " * 20_000}) + "\n")
    return folder / "a.jsonl"


def long_among_short(folder: Path) -> Path:
    texts = ["a dog", "the quick fox " * 10_000, "two dogs", "日本語 " * 30_000, "three"]
    return write_jsonl(folder / "a.jsonl", [{"text": text} for text in texts])


KINDS = [lines, packed, elements, comma_separated, table, saved, tokens, one_long_line, long_among_short]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "BATCH_RECORDS", 7)
    monkeypatch.setattr(token_files, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(long_text, "LONG_CHARACTERS", 5000)


def task_of(path: Path) -> Task:
    file = describe(path, path.parent)
    return store._task(path.parent / "store", (file,), make_recipe())


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_comes_to_all_its_bytes_step_by_step(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    task = task_of(kind(tmp_path))
    (part,) = task.parts
    steps: list[int] = []
    PartMaker(task).make(0, lambda source_bytes: steps.append(source_bytes) or True)  # type: ignore[func-returns-value]
    assert steps == sorted(steps)
    assert steps[-1] == part.source_bytes > 0
    largest_step = max(after - before for before, after in pairwise([0, *steps]))
    assert largest_step < part.source_bytes / 4, "it stood still and then jumped"


@pytest.mark.usefixtures("small_parts", "small_steps")
@pytest.mark.parametrize("kind", [lines, packed, table, tokens, long_among_short])
def test_the_shown_share_grows_to_all_on_any_number_of_ranks(
    kind: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    path = kind(tmp_path)
    ends = []
    for size, workers in [(1, 0), (3, 0), *([(2, 1)] if kind is lines else [])]:
        said: list[str] = []
        documents_on(size, path, make_recipe(workers=workers, cache=tmp_path / f"on {size}"), said.append)
        shown = [re.match(r"tokenising .*: ([0-9.]+) % of (.*?)(,|$)", line) for line in said]
        shares = [float(found[1]) for found in shown if found]
        assert shares == sorted(shares)
        ends.append((shares[-1], next(found[2] for found in shown if found)))
    amount = {table: "90 rows", tokens: "90 documents"}.get(kind)
    unpacked = len(gzip.decompress(path.read_bytes()) if kind is packed else path.read_bytes())
    assert set(ends) == {(100.0, amount or bytes_text(unpacked))}


@pytest.mark.usefixtures("small_steps")
def test_what_was_there_before_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(set_value=monkeypatch.setattr)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    path = lines(tmp_path)
    folder = open_alone(path, make_recipe()).folder
    whole = store_files(folder)
    (folder / "store.json").unlink()
    part = sorted(folder.glob("parts/0*"))[1]
    (part / "part.json").unlink()
    said: list[str] = []
    open_alone(path, make_recipe(), said.append)
    shares = [float(found[1]) for line in said if (found := re.match(r"tokenising .*: ([0-9.]+) % of", line))]
    assert shares[0] > 80
    assert shares[-1] == 100
    assert store_files(folder) == whole


def test_nobody_who_listens_harms_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "TELL_SECONDS", 0.0)
    here, there = Pipe()
    tell = worker.Teller(there, 3)
    assert tell(5)
    assert here.recv() == Advanced(3, 5)
    here.close()
    assert tell(6)


def test_lines_come_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said: list[str] = []
    ticker = Ticker(said.append)
    for second in range(36):
        now[0] = 100.0 + second
        ticker.tick(f"after {ticker.seconds:.0f}")
    assert said == ["after 10", "after 20", "after 30"]
    silent = Ticker(None)
    now[0] += 20
    silent.tick("nobody listens")
