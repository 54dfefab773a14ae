"""Files are told apart by their first bytes, unpacked as they are read, and refused with a reason."""

import io
import os
import tracemalloc
import zlib
from pathlib import Path

import pytest
import zstandard

from ds_recipes.data.index.cache import file_fingerprint, open_index
from ds_recipes.data.index.raw import compression_of, open_raw
from ds_recipes.errors import InputError
from tests.unit.data.index.made import PACKERS, write

MB = 1_000_000
CONTENT = b"".join(b'{"number": %d}\n' % i for i in range(30_000))
REFUSED = [
    (b"", "is empty. Name a file with one JSON object a line, or a JSON array."),
    (b" \n\r\n", "holds no records, only blank lines. Name a file with one JSON object a line."),
    (b"\n" * (1 << 21), "holds no records, only blank lines. Name a file with one JSON object a line."),
    (b"\xef\xbb\xbf", "holds no records, only blank lines. Name a file with one JSON object a line."),
    (b"\xff\xfe{\x00", "is UTF-16. Convert it to UTF-8."),
    (b"\xfe\xff\x00{", "is UTF-16. Convert it to UTF-8."),
    (b"PK\x03\x04", "is a zip archive. Unpack it."),
    (b"BZh91AY", "is compressed with bzip2. Unpack it with bunzip2."),
    (b"\xfd7zXZ\x00", "is compressed with xz. Unpack it with unxz."),
    (b"PAR1", "is a Parquet file, which needs no index. Name it with the ending .parquet."),
    (b"a.jsonl".ljust(257, b"\0") + b"ustar", "is a tar archive. Unpack it."),
]


@pytest.mark.parametrize("packer", [None, *PACKERS])
def test_content_is_read_as_a_stream_that_goes_forwards(tmp_path: Path, packer: str | None) -> None:
    path = write(tmp_path / "a", PACKERS[packer](CONTENT) if packer else CONTENT)
    assert compression_of(path) == (packer.split()[0] if packer else None)
    with open_raw(path) as stream:
        assert stream.read(100) == CONTENT[:100]
        assert stream.seek(123_456) == stream.tell() == 123_456
        assert stream.read(7) == CONTENT[123_456:123_463]
        assert stream.seek(200_000) == 200_000
        assert stream.read() == CONTENT[200_000:]
        assert stream.read(1) == b""
    with open_raw(path) as stream:
        assert stream.read() == CONTENT


@pytest.mark.parametrize("packer", PACKERS)
def test_a_compressed_stream_says_that_it_cannot_go_back(tmp_path: Path, packer: str) -> None:
    content = os.urandom(5_000_000)
    with open_raw(write(tmp_path / "a", PACKERS[packer](content))) as stream:
        stream.seek(4_000_000)
        with pytest.raises(io.UnsupportedOperation, match="forwards only"):
            stream.seek(0)


@pytest.mark.parametrize("packer", ["gzip", "gzip members", "zstd", "zstd frames"])
@pytest.mark.parametrize("cut", [1, 5, 1000, 0.5])
def test_an_archive_that_was_cut_off_is_refused(tmp_path: Path, packer: str, cut: float) -> None:
    packed = PACKERS[packer](CONTENT)
    path = write(tmp_path / "a.jsonl.packed", packed[: -cut if isinstance(cut, int) else int(len(packed) * cut)])
    with pytest.raises(
        InputError, match=r"the file is damaged or was cut off\. Test it with `(gzip|zstd) -t`"
    ) as caught:
        open_index(path, tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("packer", ["gzip", "zstd"])
@pytest.mark.parametrize("where", [0.3, 0.9])
def test_a_damaged_archive_is_refused(tmp_path: Path, packer: str, where: float) -> None:
    checked = zstandard.ZstdCompressor(write_checksum=True).compress
    packed = bytearray(checked(CONTENT) if packer == "zstd" else PACKERS[packer](CONTENT))
    packed[int(len(packed) * where)] ^= 0x55
    with pytest.raises(InputError, match="cannot be unpacked"):
        open_index(write(tmp_path / "a", packed), tmp_path)


def test_a_bomb_is_indexed_in_bounded_memory(tmp_path: Path) -> None:
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    bomb = packer.compress(b'{"text": "') + b"".join(packer.compress(b"a" * MB) for _ in range(100)) + packer.flush()
    path = write(tmp_path / "a.gz", bomb)
    tracemalloc.start()
    try:
        index = open_index(path, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert index.ends.tolist() == [100 * MB + 10]
    assert peak < 20 * MB


@pytest.mark.parametrize("packer", [None, "gzip", "zstd"])
@pytest.mark.parametrize(("content", "problem"), REFUSED)
def test_what_holds_no_text_is_refused(tmp_path: Path, content: bytes, problem: str, packer: str | None) -> None:
    path = write(tmp_path / "a.jsonl", PACKERS[packer](content) if packer else content)
    with pytest.raises(InputError) as caught:
        open_index(path, tmp_path)
    assert str(caught.value) == f"{path}: {problem}"


def test_an_archive_in_an_archive_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", PACKERS["gzip"](PACKERS["zstd"](CONTENT)))
    with pytest.raises(InputError, match=r"is compressed twice\. Unpack it once\."):
        open_index(path, tmp_path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (
        ("none.jsonl", r"none\.jsonl: no such file \(looked in .*\)\. Check the path\."),
        (".", r"is a folder\. Name the JSONL or JSON files in it\."),
        ("pipe", r"is a pipe or a device"),
    ):
        for read in (open_index, file_fingerprint):
            with pytest.raises(InputError, match=problem):
                read(tmp_path / name, tmp_path)
