"""Absurd input gives an error or works, in bounded memory: measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_recipes.data.sources import entries
from ds_recipes.data.sources.record import Bad, Record
from tests.unit.data.sources.kinds import bad_messages, everything, opened

GIB = 1 << 30
MOST_GROWTH_MB = 300

READ_ALL = """
import json, sys
from pathlib import Path
from ds_recipes.data.sources.open import open_source
from ds_recipes.data.sources.record import Bad

def peak_mb():
    # getrusage would also count what the parent had when it started this process
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6

path = Path(sys.argv[1])
before = peak_mb()
source = open_source(path, path.parent)
records, bad = 0, []
for found in source.read(0, len(source)):
    if isinstance(found, Bad):
        bad.append(found.message)
    else:
        records += 1
print(json.dumps([records, bad, peak_mb() - before]))
"""


def read_elsewhere(path: Path) -> tuple[int, list[str]]:
    """(records, messages of bad ones) of a file, read by a process whose memory must not grow much."""
    ended = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    records, bad, growth_mb = json.loads(ended.stdout)
    assert growth_mb < MOST_GROWTH_MB
    return records, bad


def write_with_hole(path: Path, before: bytes, hole_bytes: int, after: bytes) -> None:
    """Between the two, NUL bytes that take no space on the disk."""
    with path.open("wb") as file:
        file.write(before)
        file.seek(hole_bytes, 1)
        file.write(after)


def test_a_line_of_2_gib_is_bad_and_the_others_are_read(tmp_path: Path) -> None:
    write_with_hole(tmp_path / "data.jsonl", b'{"a": 1}\n', 2 * GIB, b'\n{"a": 2}\n')
    records, bad = read_elsewhere(tmp_path / "data.jsonl")
    assert records == 2
    assert bad == [f"{tmp_path}/data.jsonl:2: a record of 2,147 MB; at most 268 MB are read. Split or remove it."]


def test_a_quote_that_is_never_closed_is_bad_and_the_others_are_read(tmp_path: Path) -> None:
    write_with_hole(tmp_path / "data.csv", b'a,b\n1,2\n"', GIB // 2, b"\n3,4\n")
    records, bad = read_elsewhere(tmp_path / "data.csv")
    assert records == 1
    assert bad == [
        f"{tmp_path}/data.csv:3: a record of 537 MB; at most 268 MB are read. "
        "Perhaps a double quote that opens a cell is never closed; fix or remove the row."
    ]


def test_a_large_array_is_read_element_by_element(tmp_path: Path) -> None:
    element = json.dumps({"text": "日本語" * 1000}, ensure_ascii=False).encode()
    with (tmp_path / "data.json").open("wb") as file:
        file.write(b"[" + element)
        for _ in range(MOST_GROWTH_MB * 1_000_000 // len(element)):
            file.write(b",\n" + element)
        file.write(b"]")
    records, bad = read_elsewhere(tmp_path / "data.json")
    assert (records, bad) == (MOST_GROWTH_MB * 1_000_000 // len(element) + 1, [])


def test_a_million_fields_are_a_record(tmp_path: Path) -> None:
    content = "{" + ",".join(f'"{i}":1' for i in range(1_000_000)) + "}\n"
    (found,) = everything(opened(tmp_path / "data.jsonl", content.encode()))
    assert isinstance(found, Record) and len(found.value) == 1_000_000
    header = ",".join(map(str, range(1_000_000)))
    (found,) = everything(opened(tmp_path / "data.csv", f"{header}\n{header}\n".encode()))
    assert isinstance(found, Record) and found.value["999999"] == "999999"


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
@pytest.mark.parametrize(
    "junk",
    [
        b"[" * 10_000,
        b"\xff" * 1_000_000,
        b"\x00" * 1_000_000,
        b'"' * 999_999,
        "\U000e0001".encode() * 100_000,
        b"[{}," * 9999,
    ],
    ids=["deep", "not UTF-8", "NUL", "quotes", "unprintable", "not closed"],
)
def test_messages_stay_short_whatever_they_show(tmp_path: Path, name: str, junk: bytes) -> None:
    path = tmp_path / name
    found = everything(opened(path, b'{"a": 1}\n' + junk + b"\n"))
    for message in [one.message for one in found if isinstance(one, Bad)]:
        assert message.startswith(f"{path}:2: ") and len(message) < len(str(path)) + 300
    assert found[1:] or name == "data.csv"


def test_escaped_surrogates_and_nul_are_passed_on(tmp_path: Path) -> None:
    """A format decides what to make of them."""
    source = opened(tmp_path / "data.jsonl", b'{"a": "\\ud800", "\\udfff": "\\u0000"}\n')
    assert [one.value for one in everything(source) if isinstance(one, Record)] == [{"a": "\ud800", "\udfff": "\x00"}]


def test_the_longest_record_that_is_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "MAX_RECORD_BYTES", 1000)
    for size, is_bad in ((1000, False), (1001, True)):
        content = b'{"a":"' + b"x" * (size - len('{"a":""}\n')) + b'"}\n'
        assert bool(bad_messages(opened(tmp_path / "data.jsonl", content * 2))) == is_bad
