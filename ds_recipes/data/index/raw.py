"""The bytes of a data file: plain, or unpacked from gzip or zstd as they are read. Nothing is unpacked onto the disk."""

import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ds_recipes.errors import InputError, NoRecordsError

MAX_RECORD_BYTES = 1 << 28
"""An entry that is longer is refused when it is read."""

BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # pzstd begins a file with such a frame (RFC 8878, 3.1.2)
TESTERS = {"gzip": "gzip -t", "zstd": "zstd -t"}

NOT_TEXT = {
    b"PK\x03\x04": "is a zip archive. Unpack it.",
    b"BZh": "is compressed with bzip2. Unpack it with bunzip2.",
    b"\xfd7zXZ\x00": "is compressed with xz. Unpack it with unxz.",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive. Unpack it.",
    b"PAR1": "is a Parquet file, which needs no index. Name it with the ending .parquet.",
    b"ARROW1": "is an Arrow file. Name the folder that `save_to_disk` of `datasets` wrote.",
    b"\xff\xfe": "is UTF-16. Convert it to UTF-8.",
    b"\xfe\xff": "is UTF-16. Convert it to UTF-8.",
    GZIP: "is compressed twice. Unpack it once.",
    ZSTD: "is compressed twice. Unpack it once.",
}
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257

BUFFER_BYTES = 1 << 17
HEAD_BYTES = 1 << 12


@dataclass(frozen=True)
class Shape:
    """What a file of text holds: lines or one JSON array, and where its first byte behind a byte order mark lies."""

    compression: str | None
    is_array: bool
    body: int  # in the unpacked content


def compression_of(path: Path) -> str | None:
    """How a file is compressed, by its first bytes: "gzip", "zstd" or None.

    Raises:
        InputError: it is missing or cannot be read.
    """
    with open_packed(path) as file, reading(path):
        head = file.read(4)
    if head.startswith(GZIP):
        return "gzip"
    return "zstd" if head == ZSTD or ZSTD_SKIPPABLE.match(head) else None


def open_raw(path: Path) -> BinaryIO:
    """The unpacked content as a stream. That of a compressed file can be sought forwards only.

    Raises:
        InputError: the file is missing or cannot be read; while reading, it is damaged or cut off.
    """
    return unpacked(path, open_packed(path), compression_of(path))


def open_packed(path: Path) -> io.FileIO:
    """The file as it lies on disk, without a buffer.

    Raises:
        InputError: it is missing, a folder, no regular file, or cannot be read.
    """
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: is a pipe or a device. Data are read more than once; name a regular file.")
        return path.open("rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: no such file (looked in {Path.cwd()}). Check the path.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder. Name the JSONL or JSON files in it.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the file and its permissions.") from error


def unpacked(path: Path, packed: io.RawIOBase, compression: str | None) -> io.BufferedReader:
    """The content of an open file; `path` is what messages call it."""
    return io.BufferedReader(_Unpacked(path, packed, compression) if compression else packed, BUFFER_BYTES)


def shape_of(path: Path) -> Shape:
    """Look at the beginning of a file of text.

    Raises:
        InputError: it is empty, blank, or no text.
    """
    compression = compression_of(path)
    with open_raw(path) as stream, reading(path):
        head = stream.read(HEAD_BYTES)
        if not head:
            raise NoRecordsError(f"{path}: is empty. Name a file with one JSON object a line, or a JSON array.")
        _check_is_text(path, head)
        body = len(BOM) if head.startswith(BOM) else 0
        part = head[body:]
        while part and not part.strip():
            part = stream.read(BUFFER_BYTES)
    if not part:
        raise NoRecordsError(f"{path}: holds no records, only blank lines. Name a file with one JSON object a line.")
    return Shape(compression, part.lstrip().startswith(b"["), body)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system says against reading a file becomes a message for the user.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the file and its disk.") from error


def _check_is_text(path: Path, head: bytes) -> None:
    for magic, problem in NOT_TEXT.items():
        if head.startswith(magic):
            raise InputError(f"{path}: {problem}")
    if head.startswith(TAR_MAGIC, TAR_MAGIC_AT):
        raise InputError(f"{path}: is a tar archive. Unpack it.")


class _Unpacked(io.RawIOBase):
    """Unpacks as it is read; every fault of the data names the file."""

    def __init__(self, path: Path, packed: io.RawIOBase, compression: str) -> None:
        self._path, self._packed, self._compression = path, packed, compression
        self._position = 0
        self._stream = _gzip_stream(packed) if compression == "gzip" else _zstd_stream(packed)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        try:
            count = self._stream.readinto(buffer) or 0
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise InputError(
                f"{self._path}: its {self._compression} data cannot be unpacked ({error}): the file is damaged or was "
                f"cut off. Test it with `{TESTERS[self._compression]}`, and copy or make it again."
            ) from error
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        target = offset + (self._position if whence == os.SEEK_CUR else 0)
        if whence == os.SEEK_END or target < self._position:
            raise io.UnsupportedOperation(f"{self._path} is compressed, so it can be sought forwards only")
        skipped = bytearray(min(BUFFER_BYTES, target - self._position))
        while self._position < target:
            if not self.readinto(memoryview(skipped)[: target - self._position]):  # type: ignore[arg-type]
                break
        return self._position

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._packed.close()
        super().close()


def _gzip_stream(packed: io.RawIOBase) -> io.BufferedIOBase:
    import gzip

    return gzip.GzipFile(fileobj=io.BufferedReader(packed, BUFFER_BYTES))


def _zstd_stream(packed: io.RawIOBase) -> io.BufferedIOBase:
    """pyarrow's: the reader of `zstandard` takes a file that was cut off for one that ends there."""
    import pyarrow

    stream: io.BufferedIOBase = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd")
    return stream
