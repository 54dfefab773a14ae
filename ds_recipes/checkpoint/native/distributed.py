"""Read the model out of a folder that torch.distributed.checkpoint wrote: FSDP's sharded states of Accelerate and the Trainer, too.

FOLDER/.metadata     a pickle: every tensor's size and dtype, and where each rank's chunk of it lies
FOLDER/__R_N.distcp  what rank R wrote: one archive of torch.save after another, a chunk each

Nothing of the pickles is run: their names become objects that keep what they are given. Values are read by position when they
are asked for, so memory does not grow with the model.
"""

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ds_recipes.checkpoint.native.full_state import WRAPPERS
from ds_recipes.checkpoint.native.pickles import MAX_PICKLE_BYTES, Inert
from ds_recipes.errors import InputError
from ds_recipes.ranges import NONE_MISSED, FileByPosition, file_inside

METADATA = ".metadata"
OPTIMIZER = "optim"
"""What the names of an optimizer's folders and states begin with."""

WITHIN_NAMES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
INERT_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",
    "pathlib",
    "pathlib._local",
)
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""What a pickle calls a stretch of memory of that dtype."""

LOCAL_HEADER = struct.Struct("<26xHH")  # of a file in a zip archive: the lengths of its name and of a further field


def find_distributed(path: Path) -> Path | None:
    """The folder with the model's `.metadata`: `path` itself, or the one in it that is not an optimizer's; None: there is none.

    Raises:
        InputError: there are several.
    """
    if not path.is_dir():
        return None
    if (path / METADATA).is_file():
        return path
    found = sorted(file.parent for file in path.glob(f"*/{METADATA}") if not file.parent.name.startswith(OPTIMIZER))
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise InputError(
            f"{path}: holds several checkpoints of torch.distributed.checkpoint ({names}). Name one of them."
        )
    return found[0] if found else None


def open_distributed(folder: Path, trust_pickle: bool = False) -> "DistributedReader":
    """Open a folder of torch.distributed.checkpoint; nothing but its table is read.

    Raises:
        InputError: a file is missing or damaged, a tensor is not there as a whole, or the pickle needs other names than those of
            such a table while `trust_pickle` is False.
    """
    path = folder / METADATA
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise InputError(f"{path}: has {path.stat().st_size:,} bytes; no model has so large a table. Nothing was read.")
    table = _unpickle(path.read_bytes(), path, trust_pickle)
    try:
        return DistributedReader(folder, _layout(table))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a table of torch.distributed.checkpoint, or damaged ({error!r})") from error


class _Unpickler(pickle.Unpickler):
    """Makes plain containers, dtypes, and `Inert` objects of the names that such files have; any other name is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            known = getattr(torch, name, None)
            if isinstance(known, torch.dtype):
                return known
            if name == "Size":
                return tuple
            if name in STORAGES:
                return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module in INERT_MODULES or (module, name) in (
            ("torch.serialization", "_get_layout"),
            ("torch._utils", "_rebuild_tensor_v2"),
        ):
            return Inert
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _Refused(Exception):
    """A name of a pickle that is not known to be harmless."""


def _unpickle(data: bytes, path: Path, trust: bool) -> Any:
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except _Refused as refused:
        if trust:
            return pickle.loads(data)
        raise InputError(
            f"{path}: to read it, {refused} would have to be called. A pickle can run any program, so nothing of it was run. If "
            "you trust whoever wrote the file, add --trust_pickle."
        ) from refused
    except Exception as error:  # whatever a damaged pickle makes the loader raise
        raise InputError(
            f"{path}: cannot be read ({error!r:.200}). Copy it again from where it was written."
        ) from error


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor, from `starts` on and of `sizes`; its archive is `length` bytes of `file` from `begin` on."""

    file: str
    begin: int
    length: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Tensor:
    """A tensor's place: `name` is what the model calls it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    chunks: tuple[_Chunk, ...]


def _layout(table: Any) -> list[_Tensor]:
    """The model's tensors out of the unpickled table."""
    stored = {(index.fqn, getattr(index, "offset", None)): info for index, info in table.storage_data.items()}
    tensors = {key: entry for key, entry in table.state_dict_metadata.items() if hasattr(entry, "chunks")}
    planner: Mapping[str, Any] = getattr(table, "planner_data", None) or {}
    found = []
    for name, key in _model_names({key: tuple(map(str, planner.get(key, (key,)))) for key in tensors}).items():
        entry = tensors[key]
        chunks = []
        for chunk in entry.chunks:
            info = stored[key, chunk.offsets]
            if getattr(info, "transform_descriptors", None):
                raise ValueError(f"{key} was compressed ({info.transform_descriptors})")
            place = str(info.relative_path), int(info.offset), int(info.length)
            chunks.append(_Chunk(*place, tuple(chunk.offsets), tuple(chunk.sizes)))
        found.append(_Tensor(name, tuple(entry.size), _dtype(entry), tuple(chunks)))
    return found


def _dtype(entry: Any) -> torch.dtype | None:
    state = getattr(entry.properties, "state", None)
    first = state[0] if isinstance(state, tuple) and state else getattr(entry.properties, "dtype", None)
    return first if isinstance(first, torch.dtype) else None


def _model_names(paths: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """The model's own names and the table's keys. `paths` say in which dictionaries a tensor lay when it was saved."""
    for depth in (0, 1):
        for wrapper in WRAPPERS:
            inside = {key: path[depth + 1 :] for key, path in paths.items() if path[depth : depth + 1] == (wrapper,)}
            inside = {key: path for key, path in inside.items() if path}
            if inside:
                return {_plain(".".join(path)): key for key, path in inside.items()}
    return {_plain(key): key for key, path in paths.items() if not path[0].startswith(OPTIMIZER)}


def _plain(name: str) -> str:
    for wrapper in WITHIN_NAMES:
        name = name.replace(wrapper, "")
    return name


@dataclass(frozen=True)
class _Rows:
    """A chunk seen as rows [first, last) and columns [left, right) of its tensor as a matrix of `width` columns."""

    chunk: _Chunk
    first: int
    last: int
    left: int
    right: int
    width: int


def _as_rows(tensor: _Tensor, chunk: _Chunk) -> _Rows:
    """Sharded dimensions may be the first one and one more; all between them must be whole.

    Raises:
        ValueError: the box is not of that kind.
    """
    shape, starts, sizes = tensor.shape, chunk.starts, chunk.sizes
    if len(starts) != len(shape) or any(
        a < 0 or n < 0 or a + n > d for a, n, d in zip(starts, sizes, shape, strict=True)
    ):
        raise ValueError(f"{tensor.name}: a chunk of {list(sizes)} at {list(starts)} is not within {list(shape)}")
    cut = [i for i in range(len(shape)) if sizes[i] != shape[i]]
    split = cut[-1] if len(cut) > 1 or (cut and cut[0] > 0) else 0
    if not shape or not split:
        width = prod(shape[1:])
        first, rows = (starts[0], sizes[0]) if shape else (0, 1)
        return _Rows(chunk, first, first + rows, 0, width, width)
    if any(i not in (0, split) for i in cut):
        raise ValueError(f"{tensor.name}: is split along the dimensions {cut}, which this reader does not put together")
    inner, between = prod(shape[split + 1 :]), prod(shape[1:split])
    first, rows = starts[0] * between, sizes[0] * between
    left = starts[split] * inner
    return _Rows(chunk, first, first + rows, left, left + sizes[split] * inner, shape[split] * inner)


class DistributedReader:
    """A range reader over the chunks of all ranks; it has the weights only."""

    optimizer_step = 0
    missed_steps = NONE_MISSED
    step: int | None = None

    def __init__(self, folder: Path, tensors: Sequence[_Tensor]) -> None:
        self.folder = folder
        self.tied: dict[str, str] = {}
        self._tensors = {tensor.name: tensor for tensor in tensors}
        if not self._tensors:
            raise InputError(f"{folder}: holds no model, only an optimizer's state or other values")
        self._rows = {tensor.name: [_as_rows(tensor, chunk) for chunk in tensor.chunks] for tensor in tensors}
        for tensor in tensors:
            found = sum(prod(chunk.sizes) for chunk in tensor.chunks)
            if found != prod(tensor.shape):
                raise InputError(f"{folder}: {tensor.name} has {prod(tensor.shape):,} elements, {found:,} were saved")
        missing = {chunk.file for tensor in tensors for chunk in tensor.chunks if not (folder / chunk.file).is_file()}
        if missing:
            raise InputError(
                f"{folder}: {min(missing)} is missing, which holds a part of the model ({len(missing)} such files are). Copy the "
                "folder whole: on a cluster without a shared disk each host has its own ranks' files."
            )
        dtypes = (tensor.dtype for tensor in tensors if tensor.dtype is not None and tensor.dtype.is_floating_point)
        self.trained_in = next((str(dtype).removeprefix("torch.") for dtype in dtypes), None)
        self._files: dict[str, FileByPosition] = {}
        self._opened: dict[_Chunk, tuple[torch.dtype, int]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def has(self, kind: str) -> bool:
        return kind == "fp32"

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """None that are known as such: the table does not tell them from parameters."""
        return {}

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened tensor into `out`, converting its dtype."""
        assert kind == "fp32", "only the weights are read"
        stop = start + out.numel()
        if start < 0 or stop > prod(self.shape(name)):
            raise IndexError(f"{self.folder}: {name} has {prod(self.shape(name))} elements, not [{start}, {stop})")
        copied = sum(self._read(rows, start, stop, out) for rows in self._rows[name])
        if copied != out.numel():
            raise InputError(f"{self.folder}: chunks of {name} overlap, or leave something out. Copy the folder again.")

    def _read(self, rows: _Rows, start: int, stop: int, out: torch.Tensor) -> int:
        """Copy what a chunk has of the elements [start, stop); returns how many those are."""
        columns = rows.right - rows.left
        if columns == rows.width:  # its rows lie end to end in the tensor too
            low, high = max(start, rows.first * rows.width), min(stop, rows.last * rows.width)
            if low < high:
                self._copy(rows.chunk, low - rows.first * rows.width, out[low - start : high - start])
            return max(0, high - low)
        copied = 0
        for row in range(max(rows.first, start // rows.width), min(rows.last, -(-stop // rows.width))):
            left = row * rows.width + rows.left
            low, high = max(start, left), min(stop, left + columns)
            if low < high:
                self._copy(rows.chunk, (row - rows.first) * columns + low - left, out[low - start : high - start])
                copied += high - low
        return copied

    def _copy(self, chunk: _Chunk, start: int, out: torch.Tensor) -> None:
        if chunk not in self._opened:
            self._opened[chunk] = self._open(chunk)
        dtype, begin = self._opened[chunk]
        self._file(chunk).elements_into(begin + start * dtype.itemsize, dtype, out)

    def _file(self, chunk: _Chunk) -> FileByPosition:
        if chunk.file not in self._files:
            self._files[chunk.file] = FileByPosition(file_inside(self.folder, chunk.file))
        return self._files[chunk.file]

    def _open(self, chunk: _Chunk) -> tuple[torch.dtype, int]:
        """A chunk's dtype and the place of its first element in its file.

        Raises:
            InputError: the archive there is not one contiguous tensor of the chunk's size.
        """
        file = self._file(chunk)
        where = f"{file.path}: what lies at byte {chunk.begin:,}"
        try:
            with zipfile.ZipFile(_Window(file, chunk.begin, chunk.length)) as archive:
                entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
                if entries["data.pkl"].file_size > MAX_PICKLE_BYTES:
                    raise ValueError("its pickle is absurdly large")
                made = _unpickle(archive.read(entries["data.pkl"]), file.path, trust=False)
                (_, dtype, key, _, _), offset, size, stride, *_ = made.arguments
                if archive.read(entries["byteorder"]) != b"little" if "byteorder" in entries else False:
                    raise ValueError("it was written on a big-endian machine")
                data = entries[f"data/{key}"]
            if data.compress_type != zipfile.ZIP_STORED or tuple(size) != chunk.sizes:
                raise ValueError(f"it is compressed, or a tensor of {list(size)} where {list(chunk.sizes)} is due")
            if not torch.empty_strided(size, stride, device="meta").is_contiguous():
                raise ValueError(f"its elements do not lie in order (strides {list(stride)})")
            if (int(offset) + prod(chunk.sizes)) * dtype.itemsize > data.file_size:
                raise ValueError("it is cut short")
            header = file.bytes_at(chunk.begin + data.header_offset, LOCAL_HEADER.size)
        except (zipfile.BadZipFile, KeyError, TypeError, AttributeError, ValueError, EOFError) as error:
            raise InputError(f"{where} is not a tensor as torch.save writes it ({error})") from error
        begin = chunk.begin + data.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
        return dtype, begin + int(offset) * dtype.itemsize


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, file: FileByPosition, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size < 0 else min(size, left)
        data = self._file.bytes_at(self._begin + self._at, count)
        self._at += count
        return data
