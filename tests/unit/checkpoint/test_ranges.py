"""Safetensors files are read by ranges, and a file or folder that was made to do harm is refused before its payload."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ds_recipes.errors import InputError
from ds_recipes.ranges import COPY_BYTES, HfFolder, SafetensorsFile, file_inside, header_bytes, tensor_bytes

ROOT = Path(__file__).resolve().parents[3]


def write_raw(path: Path, header: bytes, payload: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + payload)
    return path


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float64])
def test_any_range_in_any_dtype(stored: torch.dtype, asked: torch.dtype, tmp_path: Path) -> None:
    """Across the borders of the pieces that are read at a time."""
    size = COPY_BYTES // 2 + 1001
    whole = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(stored)
    save_file({"before": torch.ones(3), "w": whole}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for start, length in ((0, size), (17, size - 40), (size - 1, 1), (5, 0)):
        out = torch.full((length + 2,), 7, dtype=asked)
        file.read_into("w", start, out[1:-1])
        assert torch.equal(out[1:-1], whole[start : start + length].to(asked))
        assert out[0] == out[-1] == 7
    strided = torch.zeros(20, dtype=asked)
    file.read_into("w", 3, strided[::2])
    assert torch.equal(strided[::2], whole[3:13].to(asked)) and not strided[1::2].any()


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "empty": torch.empty(0, 4), "scalar": torch.tensor(2.0)}
    head = header_bytes(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, {"format": "pt"}
    )
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join([head, *(piece for tensor in tensors.values() for piece in tensor_bytes(tensor))]))
    file = SafetensorsFile(path)
    assert file.head() == head
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in tensors.items())


HARMFUL = {
    "a header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "not a safetensors file, or cut short"),
    "the longest header there is": (struct.pack("<Q", (1 << 64) - 1) + b"{}", "not a safetensors file, or cut short"),
    "no header": (b"\x01\x02", "not a safetensors file"),
    "an empty file": (b"", "not a safetensors file"),
    "no JSON": (b"\x04" + bytes(7) + b"\x80\x04K\x01", "damaged"),
    "a list": (b"\x02" + bytes(7) + b"[]", "damaged"),
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_a_file_that_is_none_is_refused(harm: str, tmp_path: Path) -> None:
    data, said = HARMFUL[harm]
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=said):
        SafetensorsFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [([-2, -3], [0, 24]), ([1 << 62, 4], [0, 8]), ([2], [0, 4]), ([2], [-8, 0]), ([2.0], [0, 8]), ([4], [0, 16])],
)
def test_a_tensor_that_cannot_lie_there_is_refused(shape: list[int], offsets: list[int], tmp_path: Path) -> None:
    entry = {"w": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
    path = write_raw(tmp_path / "a.safetensors", json.dumps(entry).encode(), bytes(8))
    with pytest.raises(InputError, match="damaged"):
        SafetensorsFile(path)


def test_absurd_tables_are_refused_in_little_memory(tmp_path: Path) -> None:
    """A million tensors, thirty million empty objects and an index of a million names, where each may take 250 MB."""
    entries = b",".join(b'"w%d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}' % number for number in range(10**6))
    write_raw(tmp_path / "tensors.safetensors", b"{" + entries + b"}", bytes(4))
    write_raw(tmp_path / "objects.safetensors", b'{"a":[' + b"{}," * 30_000_000 + b"{}]}")
    names = b",".join(b'"w%d":"a.safetensors"' % number for number in range(10**6))
    folder = tmp_path / "indexed"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_bytes(b'{"weight_map":{' + names + b"}}")
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from ds_recipes.errors import InputError
from ds_recipes.ranges import HfFolder, SafetensorsFile
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for open_it, path in ((SafetensorsFile, "tensors.safetensors"), (SafetensorsFile, "objects.safetensors"), (HfFolder, "indexed")):
    try:
        open_it(Path({str(tmp_path)!r}) / path)
        print("opened", path)
    except InputError as error:
        assert "more than 300,000 entries" in str(error), error
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "opened" not in done.stdout
    assert int(done.stdout) < 250_000, f"{done.stdout} KB"


def save_model(folder: Path, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/b.safetensors", "..", ""])
def test_an_index_that_leads_outside_is_refused(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "part.safetensors").parent
    save_model(tmp_path / "elsewhere", "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(InputError, match="nothing was read"):
        HfFolder(folder)


def test_a_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    secret = save_model(tmp_path / "elsewhere")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(secret)
    with pytest.raises(InputError, match=r"outside of its folder; nothing was read"):
        HfFolder(folder)
    (folder / "real.safetensors").write_bytes(secret.read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("real.safetensors")
    assert HfFolder(folder).names == ["w"]


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    """A snapshot's files are links to blobs of the same repository, and to nothing else."""
    repository = tmp_path / "models--owner--name"
    blob = save_model(repository / "blobs", "0123abcd")
    snapshot = repository / "snapshots" / "0f1e2d"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123abcd")
    assert HfFolder(snapshot).names == ["w"]
    other = save_model(tmp_path / "models--owner--other" / "blobs", "4567")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other)
    with pytest.raises(InputError, match="outside"):
        HfFolder(snapshot)
    assert file_inside(blob.parent, blob.name) == blob


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path) -> None:
    """A memory map would end the process with SIGBUS."""
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100_000)}, path)
    file = SafetensorsFile(path)
    with path.open("r+b") as changed:
        changed.truncate(10_000)
    with pytest.raises(InputError, match="cut short while it was read"):
        file.read_into("w", 0, torch.empty(100_000))


def test_opening_many_files_closes_them(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    SafetensorsFile(path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        SafetensorsFile(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_nothing_is_read_past_a_tensors_end(tmp_path: Path) -> None:
    """Behind it lies the next one, whose bytes would look like any weights."""
    path = tmp_path / "two.safetensors"
    save_file({"a": torch.arange(10.0), "b": torch.full((10,), 7.0)}, path)
    file = SafetensorsFile(path)
    for start, count in ((8, 3), (10, 1), (0, 11), (-1, 2)):
        with pytest.raises(IndexError, match="a has 10 elements"):
            file.read_into("a", start, torch.empty(count))
    out = torch.empty(3)
    file.read_into("a", 7, out)
    assert out.tolist() == [7.0, 8.0, 9.0]
