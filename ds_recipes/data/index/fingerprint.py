"""The fingerprint of a file's bytes: xxh3-128 over the digests of its chunks and its size, so that threads can share it."""

import io
import os
from pathlib import Path

import xxhash

from ds_recipes.data.index.chunks import CHUNK_BYTES, PART_BYTES, Progress, in_threads, read_parts
from ds_recipes.data.index.raw import open_packed, reading


class TreeHash:
    """Digests of chunks of equal size (the last one may be shorter), in order, become one."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._all, self._chunk = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._in_chunk, self._size = 0, 0

    def update(self, data: memoryview) -> None:
        """Add bytes, however they are cut."""
        while data:
            part = data[: self._chunk_bytes - self._in_chunk]
            self._chunk.update(part)
            self._in_chunk += len(part)
            data = data[len(part) :]
            if self._in_chunk == self._chunk_bytes:
                self._close_chunk()

    def add_chunk(self, digest: bytes, size: int) -> None:
        """Add a chunk that was hashed elsewhere."""
        self._all.update(digest)
        self._size += size

    def hexdigest(self) -> str:
        """32 hex digits; nothing can be added afterwards."""
        if self._in_chunk:
            self._close_chunk()
        self._all.update(self._size.to_bytes(8, "little"))
        return str(self._all.hexdigest())

    def _close_chunk(self) -> None:
        self.add_chunk(self._chunk.digest(), self._in_chunk)
        self._chunk = xxhash.xxh3_128()
        self._in_chunk = 0


class HashedFile(io.RawIOBase):
    """A file that is hashed while others read it from beginning to end."""

    def __init__(self, path: Path, progress: Progress | None, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._path, self._file, self._progress = path, open_packed(path), progress
        self._size = os.fstat(self._file.fileno()).st_size
        self._hash, self._done = TreeHash(chunk_bytes), 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._done

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        with reading(self._path):
            count = self._file.readinto(buffer) or 0
        self._hash.update(memoryview(buffer)[:count])
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._size)
        return count

    def fingerprint(self) -> str:
        """Read what nobody has read, and give the file's fingerprint."""
        rest = bytearray(PART_BYTES)
        while self.readinto(rest):
            pass
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


def hash_file(path: Path, progress: Progress | None = None, chunk_bytes: int = CHUNK_BYTES) -> str:
    """The fingerprint of a file, hashed in threads.

    Raises:
        InputError: it cannot be read, or is cut short meanwhile.
    """
    tree, done = TreeHash(chunk_bytes), 0
    with open_packed(path) as file:
        size, handle = os.fstat(file.fileno()).st_size, file.fileno()

        def digest(start: int) -> tuple[bytes, int]:
            hasher, stop = xxhash.xxh3_128(), min(start + chunk_bytes, size)
            for part in read_parts(path, handle, start, stop, memoryview(bytearray(PART_BYTES))):
                hasher.update(part)
            return hasher.digest(), stop - start

        for chunk_digest, chunk_size in in_threads(digest, iter(range(0, size, chunk_bytes))):
            tree.add_chunk(chunk_digest, chunk_size)
            done += chunk_size
            if progress is not None:
                progress(done, size)
    return tree.hexdigest()
