"""The storage that huggingface_hub sends large files to: chunks come in xorbs, and shards say which chunks make a file.

Written from the public specification (https://huggingface.co/docs/xet). Files are put together from the chunks that came,
so that their hashes prove what arrived.
"""

import io
from dataclasses import dataclass, field

import numpy as np
import pyarrow

HEADER_BYTES = 48
CHUNK_HEADER_BYTES = 8
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30
FOOTER = b"XETBLOB"
END_OF_FILES = b"\xff" * 32


@dataclass
class XetStore:
    """Chunks by their xorb, and how many bytes of xorbs have come."""

    xorbs: dict[str, list[bytes]] = field(default_factory=dict)
    received_bytes: int = 0

    def add_xorb(self, name: str, body: bytes) -> None:
        self.received_bytes += len(body)
        chunks = []
        start = 0
        while start < len(body) and body[start : start + 7] != FOOTER:
            packed = int.from_bytes(body[start + 1 : start + 4], "little")
            size = int.from_bytes(body[start + 5 : start + 8], "little")
            kind = body[start + 4]
            start += CHUNK_HEADER_BYTES
            chunks.append(unpacked(body[start : start + packed], kind, size))
            start += packed
        self.xorbs[name] = chunks

    def files_of(self, shard: bytes) -> list[bytes]:
        """The content of the files that a shard describes."""
        source = io.BytesIO(shard)
        source.read(HEADER_BYTES)
        found = []
        while (head := source.read(HEADER_BYTES))[:32] != END_OF_FILES:
            flags, count = (int.from_bytes(head[i : i + 4], "little") for i in (32, 36))
            content = b"".join(self._segment(source.read(HEADER_BYTES)) for _ in range(count))
            source.read(HEADER_BYTES * (count * bool(flags & WITH_VERIFICATION) + bool(flags & WITH_METADATA)))
            found.append(content)
        return found

    def _segment(self, entry: bytes) -> bytes:
        name = "".join(f"{int.from_bytes(entry[i : i + 8], 'little'):016x}" for i in range(0, 32, 8))
        size, first, end = (int.from_bytes(entry[i : i + 4], "little") for i in (36, 40, 44))
        content = b"".join(self.xorbs[name][first:end])
        assert len(content) == size
        return content


def unpacked(data: bytes, kind: int, size: int) -> bytes:
    """0: as it is, 1: LZ4, 2: LZ4 of the bytes grouped by their place in words of four."""
    if kind == 0:
        return data
    plain = pyarrow.decompress(data, size, codec="lz4", asbytes=True)
    if kind == 1:
        return plain
    words = np.empty(size, np.uint8)
    start = 0
    for place in range(4):
        count = len(range(place, size, 4))
        words[place::4] = np.frombuffer(plain, np.uint8, count, start)
        start += count
    return words.tobytes()
