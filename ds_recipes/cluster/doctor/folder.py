"""The run folder: can this host write there, how fast, what kind of file system is it, and how much room is left."""

import errno
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.cluster.doctor.checks import Check, Context
from ds_recipes.cluster.doctor.findings import Finding, error, fine, warning

BLOCK_BYTES = 2**20
BLOCKS = 16
SMALL_WRITES = 10
LOW_BYTES = 10 * 10**9
LOW_FILES = 10_000
SLOW_MB_PER_SECOND = 50.0
SLOW_FSYNC_SECONDS = 0.2
SHARED = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.ceph",
    "cifs",
    "smb3",
    "9p",
    "virtiofs",
    "fuse.glusterfs",
    "wekafs",
)
FLEETING = {
    "tmpfs": "it lies in memory: it takes memory from the ranks, and is gone when the host restarts",
    "ramfs": "it lies in memory: it takes memory from the ranks, and is gone when the host restarts",
    "overlay": "it is a container's own layer: it is gone when the container is removed",
}


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo (proc(5))."""

    point: Path
    kind: str
    source: str
    options: frozenset[str]


def run_folder(context: Context) -> Iterator[Finding]:
    """Whatever a checkpoint will ask of the folder, tried on a small scale."""
    folder = context.run_folder
    if folder is None:
        return
    existing = nearest(folder)
    if not existing.is_dir():
        yield _unusable(folder, f"{existing} is a file", "Name a folder; it is made by the run.")
        return
    mount = mount_of(existing)
    yield from _kind(folder, mount)
    yield from _room(folder, existing)
    try:
        yield _speed(folder, existing, mount)
    except OSError as failure:
        yield _refused(folder, mount, failure)


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there: the doctor makes no run folder."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _speed(folder: Path, existing: Path, mount: Mount) -> Finding:
    """Write, flush, rename and read back."""
    own = existing / f".doctor-{uuid.uuid4().hex[:8]}"
    own.mkdir()
    try:
        written = _written(own / "large.partial")
        (own / "large.partial").replace(own / "large")
        if (own / "large.partial").exists() or (own / "large").stat().st_size != BLOCKS * BLOCK_BYTES:
            return error(
                "folder.rename",
                f"{folder}: a renamed file still has its old name, or lost bytes",
                f"the file system ({mount.kind}) does not rename as POSIX says",
                "Use another file system for the run folder: checkpoints are published by renaming.",
            )
        read = _read(own / "large")
        flushes = _flushes(own)
    finally:
        for file in own.iterdir():
            file.unlink()
        own.rmdir()
    size = BLOCKS * BLOCK_BYTES / 1e6
    text = (
        f"{folder}: {size / written:.0f} MB/s written and flushed, {size / read:.0f} MB/s read, "
        f"{flushes * 1000:.1f} ms a small flushed file, {BLOCKS} MiB tried"
    )
    data = {"write_mb_per_second": size / written, "read_mb_per_second": size / read, "flush_seconds": flushes}
    if size / written < SLOW_MB_PER_SECOND or flushes > SLOW_FSYNC_SECONDS:
        return warning(
            "folder.slow",
            text,
            f"a slow or busy file system ({mount.kind} at {mount.point})",
            "Use a faster one for the run folder, or save less often: a checkpoint of 7B parameters has 84 GB.",
            **data,
        )
    return fine("folder.speed", text, **data)


def _written(file: Path) -> float:
    """Seconds for the large file, its flush included."""
    block = os.urandom(BLOCK_BYTES)  # a file system that compresses must not look fast
    began = time.monotonic()
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for _ in range(BLOCKS):
            view = memoryview(block)
            while view:
                view = view[os.write(handle, view) :]
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # so that reading asks the disk, where it can
    finally:
        os.close(handle)
    return time.monotonic() - began


def _read(file: Path) -> float:
    began = time.monotonic()
    with file.open("rb", buffering=0) as handle:
        while handle.read(BLOCK_BYTES):
            pass
    return max(time.monotonic() - began, 1e-6)


def _flushes(folder: Path) -> float:
    """Mean seconds for a new file of 4 KiB with its flush."""
    began = time.monotonic()
    for number in range(SMALL_WRITES):
        handle = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(handle, bytes(4096))
            os.fsync(handle)
        finally:
            os.close(handle)
    return (time.monotonic() - began) / SMALL_WRITES


def _refused(folder: Path, mount: Mount, failure: OSError) -> Finding:
    where = f"{mount.kind} at {mount.point}"
    said = f"{folder}: {failure.strerror} ({where})"
    if failure.errno == errno.ENOSPC:
        return error(
            "folder.full",
            said,
            "the disk is full, or has no entries left for new files",
            f"Make room (df -h {folder}; df -i {folder}), or name another folder.",
        )
    if failure.errno == errno.EDQUOT:
        return error(
            "folder.quota",
            said,
            "your quota there is used up, although the disk has room",
            "Ask how much is left (quota -s, lfs quota -h), remove old checkpoints, or name another folder.",
        )
    if failure.errno == errno.EFBIG:
        return error(
            "folder.file_size",
            said,
            "the limit of a file's size (ulimit -f) is below that of any checkpoint",
            "Put 'ulimit -f unlimited' before the launcher.",
        )
    if failure.errno == errno.EROFS or "ro" in mount.options:
        return error(
            "folder.read_only",
            f"{folder}: is on a read-only mount ({where})",
            "it is mounted so on this host, or the kernel made it so after an error of the disk",
            "Name a folder elsewhere; ask the administrator if it should be writable (dmesg).",
        )
    return _unusable(
        folder, failure.strerror or str(failure), f"Look at its owner and mode (ls -ld {folder}), or name another."
    )


def _unusable(folder: Path, why: str, advice: str) -> Finding:
    return error("folder.unusable", f"{folder} cannot be written: {why}", "wrong path, or missing permission", advice)


def _room(folder: Path, existing: Path) -> Iterator[Finding]:
    stat = os.statvfs(existing)
    free, total = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    text = f"{folder}: {free / 1e9:.1f} of {total / 1e9:.0f} GB are free"
    if stat.f_files and stat.f_favail < LOW_FILES:
        yield warning(
            "folder.inodes",
            f"{folder}: only {stat.f_favail} more files can be made",
            "the file system's table of files (inodes) is almost full, however much room there is",
            f"Remove small files (df -i {existing}).",
        )
    if total == 0:
        return  # a file system of the kernel's, which has no blocks
    if free < LOW_BYTES:
        yield warning(
            "folder.room",
            text,
            "the disk is almost full, or small; a quota is not seen here",
            "A checkpoint with its optimizer takes 12 bytes a parameter (7B: 84 GB): make room, or set --keep_last.",
            free_bytes=free,
        )
    else:
        yield fine("folder.room", f"{text} (a quota is not seen here)", free_bytes=free)


def _kind(folder: Path, mount: Mount) -> Iterator[Finding]:
    text = f"{folder}: {mount.kind} at {mount.point}, from {mount.source}"
    if mount.kind in FLEETING:
        yield warning(
            "folder.fleeting",
            text,
            FLEETING[mount.kind],
            "Name a folder on a disk, one that all hosts share.",
            kind=mount.kind,
        )
    else:
        yield fine("folder.kind", text, kind=mount.kind, shared=mount.kind in SHARED)


def mount_of(path: Path) -> Mount:
    """The mount that a path lies on: the last one of those above it."""
    path = path.resolve()
    found = Mount(Path("/"), "unknown", "unknown", frozenset())
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, source, *_) = left.split(), right.split()
        point = Path(fields[4].encode().decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= len(found.point.parts):
            found = Mount(point, kind, source, frozenset(fields[5].split(",")))
    return found


CHECKS = (Check("run folder", run_folder, "host", 30),)
