"""Flat ranges of tensors in safetensors files: write them streaming, read any slice of them.

A tensor in a safetensors file lies flat, so elements [start, start + count) of it are one stretch of bytes. Weights of
a Hugging Face folder, shards of an engine and checkpoints are all read and written this way; see docs/checkpoints.md.
"""

import json
import os
import struct
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from ds_recipes.errors import InputError
from ds_recipes.fsops import calls
from ds_recipes.fsops.again import again

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Names of the safetensors format. The last six are of codes and scales of quantised weights: to be refused by name."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
MAX_TENSORS = 300_000
"""Tensors of one file or index. The largest models have fewer; a table of millions would fill the memory."""

SIGNS_A_TENSOR = 16  # of "{[," in a header's entry, at most: a bound on the objects that parsing makes
SIGNS_A_NAME = 1  # the same of an index
COPY_BYTES = (
    4 << 20
)  # of a file at a time: little memory, and a piece is still in the processor's cache when it is used
ALIGNMENT = 64


NONE_MISSED: Mapping[str, int] = MappingProxyType({})
"""`missed_steps` of a reader all of whose parameters have taken all steps."""


class RangeReader(Protocol):
    """Anything that can give any slice of any flattened parameter.

    Kinds are "fp32" (the weights), "exp_avg" and "exp_avg_sq" (Adam's moments).
    """

    optimizer_step: int
    missed_steps: Mapping[str, int]
    """By how many steps a parameter's own count is behind `optimizer_step`, where it has been without a gradient."""

    @property
    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def has(self, kind: str) -> bool: ...

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """The model's saved buffers (`models.skeleton.saved_buffers`) by name, whole, in the dtype that they lie in."""
        ...

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened tensor into `out` (1-D, any float dtype)."""
        ...


class ReaderOver:
    """A range reader that has what another one has; a subclass says how it reads."""

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self.optimizer_step = reader.optimizer_step
        self.missed_steps = reader.missed_steps

    @property
    def names(self) -> Sequence[str]:
        return self._reader.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(name)

    def has(self, kind: str) -> bool:
        return self._reader.has(kind)

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        return self._reader.buffers


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file: `begin` is its first byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file whose tensors follow in the given order, without gaps."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The raw little-endian bytes of a tensor, in pieces, without a second full copy of one that is on a GPU."""
    flat = tensor.detach().reshape(-1)
    step = max(1, COPY_BYTES // flat.element_size())
    for start in range(0, flat.numel(), step):
        yield raw_bytes(flat[start : start + step].cpu().contiguous())


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous 1-D tensor on the CPU, to read and to write."""
    raw: Any = tensor.detach().view(torch.uint8).numpy()
    return memoryview(raw)


class FileByPosition:
    """A file whose bytes are read by position, straight into the tensor that asks for them or through a small buffer.

    A memory map is no faster, and a file that is cut short or lost on its server meanwhile would end the process with SIGBUS.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = again(lambda: calls.open_to_read(path))
        weakref.finalize(self, os.close, self._descriptor)

    def elements_into(self, begin: int, dtype: torch.dtype, out: torch.Tensor) -> None:
        """Copy elements of `dtype` that lie from byte `begin` on into `out`, converting them.

        Raises:
            InputError: the file ends before them.
        """
        if out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
            self._fill(raw_bytes(out), begin)
            return
        step = max(1, COPY_BYTES // dtype.itemsize)
        buffer = torch.empty(min(step, out.numel()), dtype=dtype)
        for first in range(0, out.numel(), step):
            piece = buffer[: out.numel() - first]
            self._fill(raw_bytes(piece), begin + first * dtype.itemsize)
            out[first : first + piece.numel()].copy_(piece)

    def bytes_at(self, begin: int, length: int) -> bytes:
        """So many bytes of the file.

        Raises:
            InputError: the file ends before them.
        """
        data = bytearray(length)
        self._fill(memoryview(data), begin)
        return bytes(data)

    def _fill(self, target: memoryview, begin: int) -> None:
        while target:
            count = os.preadv(self._descriptor, [target], begin)
            if not count:
                raise InputError(f"{self.path}: cut short while it was read: it ends at byte {begin:,}")
            target, begin = target[count:], begin + count


class SafetensorsFile(FileByPosition):
    """A safetensors file whose tensors can be read by ranges."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its header.

        Raises:
            InputError: not a safetensors file, or cut short.
        """
        super().__init__(path)
        self.entries, self.metadata, self._head_bytes = self._read_header()

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of a flattened tensor into `out`, converting its dtype.

        Raises:
            InputError: the file ends before them.
        """
        entry = self.entries[name]
        if start < 0 or start + out.numel() > entry.numel:
            raise IndexError(
                f"{self.path}: {name} has {entry.numel} elements, asked for {start}..{start + out.numel()}"
            )
        self.elements_into(entry.begin + start * entry.dtype.itemsize, entry.dtype, out)

    def head(self) -> bytes:
        """The file's first bytes, up to the first tensor: the header with its length before it."""
        return self.bytes_at(0, self._head_bytes)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, as a copy."""
        entry = self.entries[name]
        out = torch.empty(entry.numel, dtype=entry.dtype)
        self.read_into(name, 0, out)
        return out.reshape(entry.shape)

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str], int]:
        """The entries, the metadata, and the bytes before the first tensor. Nothing large is read or made of a bad one."""
        size = os.fstat(self._descriptor).st_size
        length = struct.unpack("<Q", self.bytes_at(0, 8))[0] if size >= 8 else -1
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise InputError(
                f"{self.path}: not a safetensors file, or cut short ({size:,} bytes, header of {length:,})"
            )
        begin = 8 + length
        table = _bounded_json(self.bytes_at(8, length), SIGNS_A_TENSOR, self.path)
        try:
            metadata = table.pop("__metadata__", {})
            entries = {name: _entry(fields, begin) for name, fields in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path}: its safetensors header is damaged ({error})") from error
        for name, entry in entries.items():
            end = entry.begin + entry.numel * entry.dtype.itemsize
            if end > size:
                raise InputError(f"{self.path}: cut short or damaged: {name} should end at byte {end:,} of {size:,}")
        return entries, metadata, begin


def _entry(fields: dict[str, Any], begin: int) -> Entry:
    first, end = fields["data_offsets"]
    entry = Entry(DTYPES[fields["dtype"]], tuple(fields["shape"]), begin + first)
    if first < 0 or any(type(length) is not int or length < 0 for length in entry.shape):
        raise ValueError(f"no tensor lies at {first} with shape {list(entry.shape)}")
    if end - first != entry.numel * entry.dtype.itemsize:
        raise ValueError(f"{end - first} bytes for shape {list(entry.shape)}")
    return entry


def _bounded_json(text: bytes, signs: int, path: Path) -> Any:
    """Parse a table of tensors, unless it would take more memory than any model's.

    Raises:
        InputError: not JSON, or too many entries.
    """
    if sum(text.count(sign) for sign in (b"{", b"[", b",")) > signs * MAX_TENSORS:
        raise InputError(
            f"{path}: its table of tensors is absurd: it has more than {MAX_TENSORS:,} entries; nothing was read"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its safetensors header or index is damaged ({error})") from error


def file_inside(folder: Path, name: str) -> Path:
    """A file of a folder, by a name that was read from somewhere.

    Raises:
        InputError: the name or a link leads out of the folder. The hub's cache links from a snapshot to its blobs: that is inside.
    """
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise InputError(f"{folder}: {name!r} is named there, which is not a file of this folder; nothing was read")
    if path.is_symlink():
        home, target = folder.resolve(), path.resolve()
        blobs = [home.parents[1] / "blobs"] if home.parent.name == "snapshots" else []
        if target.parent not in (home, *blobs):
            raise InputError(
                f"{path}: is a link to {target}, outside of its folder; nothing was read. Put the file itself there."
            )
    return path


class HfFolder:
    """The safetensors files of a Hugging Face folder, as one table of tensors by their names in the files.

    Of a name that several files have the last one counts; `doubles` are the others.
    """

    def __init__(self, folder: Path) -> None:
        """Find the files and read their headers.

        Raises:
            InputError: no safetensors in the folder, or an index that names something outside of it.
        """
        self.folder = folder
        files = {name: SafetensorsFile(path) for name, path in _weight_files(folder).items()}
        self.file_of: dict[str, SafetensorsFile] = {}
        self.doubles: dict[str, list[SafetensorsFile]] = {}
        for file in files.values():
            for name in file.entries:
                if name in self.file_of:
                    self.doubles.setdefault(name, []).append(self.file_of[name])
                self.file_of[name] = file

    @property
    def names(self) -> list[str]:
        return list(self.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file_of[name].entries[name].shape

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of a flattened tensor into `out`."""
        self.file_of[name].read_into(name, start, out)


def _weight_files(folder: Path) -> dict[str, Path]:
    single = folder / "model.safetensors"
    if single.exists():  # before an index, as transformers chooses
        return {single.name: file_inside(folder, single.name)}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise InputError(
                f"{index}: {index.stat().st_size:,} bytes are no index of safetensors files; nothing was read"
            )
        try:
            names = sorted(set(_bounded_json(index.read_bytes(), SIGNS_A_NAME, index)["weight_map"].values()))
            files = {name: file_inside(folder, name) for name in names}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: not an index of safetensors files ({error})") from error
        for path in files.values():
            if not path.exists():
                raise InputError(f"{path}: missing, but {index.name} names it. Download or copy the folder again.")
        return files
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{folder}: holds only pickled weights (pytorch_model*.bin), which can run code when they are read. Convert them "
            f"once: python -c \"import transformers as t; t.AutoModelForCausalLM.from_pretrained('{folder}', dtype='auto')"
            f".save_pretrained('{folder}-safetensors'); "
            f"t.AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise InputError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json in this folder. Name a folder with weights; to "
        "start from random ones use --model_config."
    )
