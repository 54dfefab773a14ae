"""Flat ranges of tensors in safetensors files: write them streaming, read any slice of them.

A tensor in a safetensors file lies flat, so elements [start, start + count) of it are one stretch of bytes. Weights of
a Hugging Face folder, shards of an engine and checkpoints are all read and written this way; see docs/checkpoints.md.
"""

import json
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from ds_recipes.errors import InputError

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
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
COPY_BYTES = 16 << 20  # of a mapped file at a time, so that little of it is resident at once
ALIGNMENT = 64


class RangeReader(Protocol):
    """Anything that can give any slice of any flattened parameter.

    Kinds are "fp32" (the weights), "exp_avg" and "exp_avg_sq" (Adam's moments).
    """

    optimizer_step: int

    @property
    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def has(self, kind: str) -> bool: ...

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened tensor into `out` (1-D, any float dtype)."""
        ...


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: `begin` is its first byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


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
        piece = flat[start : start + step].cpu().contiguous()
        raw: Any = piece.view(torch.uint8).numpy()
        yield memoryview(raw)


class SafetensorsFile:
    """A memory-mapped safetensors file whose tensors can be read by ranges."""

    def __init__(self, path: Path) -> None:
        """Read the header and map the file.

        Raises:
            InputError: not a safetensors file, or cut short.
        """
        self.path = path
        with path.open("rb") as file:
            self.entries, self.metadata = _read_header(file, path)
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of a flattened tensor into `out`, converting its dtype."""
        entry = self.entries[name]
        if start < 0 or start + out.numel() > entry.numel:
            raise IndexError(
                f"{self.path}: {name} has {entry.numel} elements, asked for {start}..{start + out.numel()}"
            )
        size = entry.dtype.itemsize
        step = max(1, COPY_BYTES // size)
        for first in range(0, out.numel(), step):
            count = min(step, out.numel() - first)
            begin = entry.begin + (start + first) * size
            piece = torch.frombuffer(bytearray(memoryview(self._map)[begin : begin + count * size]), dtype=entry.dtype)
            out[first : first + count].copy_(piece)
            _forget_pages(self._map, begin, count * size)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, as a copy."""
        entry = self.entries[name]
        out = torch.empty(entry.numel, dtype=entry.dtype)
        self.read_into(name, 0, out)
        return out.reshape(entry.shape)


def _forget_pages(mapped: mmap.mmap, begin: int, length: int) -> None:
    """Let the kernel drop pages that were read, so that a large file does not fill this process's resident memory."""
    first = begin - begin % mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, first, begin + length - first)


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    size = path.stat().st_size
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
    if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
        raise InputError(f"{path}: not a safetensors file, or cut short ({size:,} bytes, header of {length:,})")
    try:
        table = json.loads(file.read(length))
        metadata = table.pop("__metadata__", {})
        entries = {}
        for name, fields in table.items():
            begin, end = fields["data_offsets"]
            entry = Entry(DTYPES[fields["dtype"]], tuple(fields["shape"]), 8 + length + begin)
            if not 0 <= begin <= end <= size - 8 - length or end - begin != entry.numel * entry.dtype.itemsize:
                raise InputError(
                    f"{path}: cut short or damaged: {name} should end at byte {8 + length + end:,} of {size:,}"
                )
            entries[name] = entry
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: its safetensors header is damaged ({error})") from error
    return entries, metadata


class HfFolder:
    """The safetensors files of a Hugging Face folder, as one table of tensors by their names in the files."""

    def __init__(self, folder: Path) -> None:
        """Find the files and read their headers.

        Raises:
            InputError: no safetensors in the folder, or an index that names something outside of it.
        """
        self.folder = folder
        files = {name: SafetensorsFile(path) for name, path in _weight_files(folder).items()}
        self.file_of: dict[str, SafetensorsFile] = {name: file for file in files.values() for name in file.entries}

    @property
    def names(self) -> list[str]:
        return list(self.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file_of[name].entries[name].shape

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of a flattened tensor into `out`."""
        self.file_of[name].read_into(name, start, out)


def _weight_files(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: not an index of safetensors files ({error})") from error
        for name in names:
            if Path(name).name != name:
                raise InputError(f"{index}: names {name!r}, which is not a file of this folder; nothing was read")
            if not (folder / name).exists():
                raise InputError(
                    f"{folder / name}: missing, but {index.name} names it. Download or copy the folder again."
                )
        return {name: folder / name for name in names}
    single = folder / "model.safetensors"
    if single.exists():
        return {single.name: single}
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{folder}: holds only pickled weights (pytorch_model*.bin), which can run code when they are read. Convert them "
            f'once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise InputError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json in this folder. Name a folder with weights; to "
        "start from random ones use --model_config."
    )
