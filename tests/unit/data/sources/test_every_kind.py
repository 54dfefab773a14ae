"""Whatever the kind of file: any slices join to the whole, any entry can be read alone, and threads do not disturb it."""

import json
import tempfile
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.sources.record import Record, Source
from ds_recipes.errors import InputError
from tests.unit.data.sources.kinds import KINDS, Row, everything, opened, rows

FEW = settings(deadline=None, max_examples=12)


def made(folder: str, kind: str, values: list[Row]) -> Source:
    path = Path(folder) / kind
    KINDS[kind](path, values)
    return opened(path)


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(values=st.lists(rows, min_size=1, max_size=20), data=st.data())
def test_slices_join_to_the_whole(kind: str, values: list[Row], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = made(folder, kind, values)
        whole = everything(source)
        assert [(found.value, found.entry) for found in whole if isinstance(found, Record)] == [
            (value, entry) for entry, value in enumerate(values)
        ]
        assert [found.line for found in whole if isinstance(found, Record)] == [
            source.line(entry) for entry in range(len(values))
        ]
        cuts = sorted({0, len(source), *data.draw(st.lists(st.integers(0, len(source)), max_size=4))})
        joined = [found for cut in pairwise(cuts) for found in source.read(*cut)]
        assert joined == whole


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(values=st.lists(rows, min_size=1, max_size=20), data=st.data())
def test_any_entry_can_be_read_alone(kind: str, values: list[Row], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = made(folder, kind, values)
        for entry in data.draw(st.permutations(range(len(values)))):
            (found,) = source.read(entry, entry + 1)
            assert isinstance(found, Record)
            assert (found.entry, found.value, found.source) == (entry, values[entry], source.name)
        assert list(source.read(0, 0)) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 100])
def test_cuts_are_slices_of_the_whole(tmp_path: Path, kind: str, pieces: int) -> None:
    source = made(str(tmp_path), kind, [{"text": "a" * i, "second": "b"} for i in range(40)])
    cuts = source.cuts(pieces)
    assert cuts[0] == 0 and cuts[-1] == len(source)
    assert cuts == sorted(set(cuts)) and len(cuts) - 1 <= pieces
    if pieces in (2, 3, 7):
        assert len(cuts) - 1 == pieces


def test_cuts_follow_bytes_not_lines(tmp_path: Path) -> None:
    source = made(str(tmp_path), "data.jsonl", [{"text": "a" * (1000 if i < 10 else 1)} for i in range(110)])
    assert source.cuts(2)[1] < 10


def test_a_compressed_file_is_cut_into_few_slices(tmp_path: Path) -> None:
    source = made(str(tmp_path), "data.jsonl.gz", [{"text": str(i)} for i in range(1000)])
    assert not source.random_access
    assert len(source.cuts(500)) - 1 == 32


@pytest.mark.parametrize("kind", KINDS)
def test_threads_read_at_once(tmp_path: Path, kind: str) -> None:
    values = [{"text": f"{i} " + "x" * (i % 50), "second": ""} for i in range(300)]
    source = made(str(tmp_path), kind, values)
    wrong: list[object] = []

    def read(start: int) -> None:
        for entry in range(start, len(values), 40):
            found = list(source.read(entry, min(entry + 3, len(values))))
            if [getattr(record, "value", record) for record in found] != values[entry : entry + 3]:
                wrong.append(found)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_follows_the_content_alone(tmp_path: Path, kind: str) -> None:
    first, copy, other = ([{"text": text, "second": ""}] * 2 for text in ("a", "a", "b"))
    for name, values in (("first", first), ("copy", copy), ("other", other)):
        (tmp_path / name).mkdir()
        made(str(tmp_path / name), kind, values)
    prints = {name: opened(tmp_path / name / kind).fingerprint for name in ("first", "copy", "other")}
    assert prints["first"] == prints["copy"] != prints["other"]
    assert len(bytes.fromhex(prints["first"])) == 16


@pytest.mark.parametrize("kind", ["data.jsonl", "data.jsonl.gz", "data.csv", "data.parquet"])
def test_a_file_that_changes_while_it_is_used_is_refused(tmp_path: Path, kind: str) -> None:
    source = made(str(tmp_path), kind, [{"text": "a", "second": "b"}] * 9)
    KINDS[kind](tmp_path / kind, [{"text": "longer than before", "second": "b"}])
    with pytest.raises(InputError, match=rf"{kind}: has changed since it was opened\."):
        everything(source)
    assert json.dumps(everything(opened(tmp_path / kind))[0].value).startswith('{"text": "longer')  # type: ignore[union-attr]
