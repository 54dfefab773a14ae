"""What is saved can be found and read again in any slices; what is damaged is named and never used."""

import errno
import json
import os
import random
import resource
import shutil
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ds_recipes.checkpoint.load import CheckpointReader, check_same_model, find_newest, remove_partials
from ds_recipes.checkpoint.manifest import read_manifest
from ds_recipes.checkpoint.rank_file import Streamed
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.checkpoint.rng import capture_rng, derive_rng, restore_rng
from ds_recipes.errors import CheckpointError, SaveError, TrainingError
from ds_recipes.fsops import calls
from ds_recipes.world.group import solo
from tests.unit.checkpoint.flat_engine import FlatEngine, publish, save, some_tensors


def read_all(path: Path, kind: str = "fp32") -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path, read_manifest(path))
    tensors = {}
    for name in reader.names:
        out = torch.full((torch.Size(reader.shape(name)).numel(),), float("nan"))
        reader.read_into(kind, name, 0, out)
        tensors[name] = out.reshape(reader.shape(name))
    return tensors


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    found = find_newest(tmp_path, solo())
    assert found is not None and found.path == path and found.skipped == ()
    assert found.manifest.step == 3 and found.manifest.optimizer_step == 7
    assert equal(read_all(path), some_tensors(3))
    assert equal(read_all(path, "exp_avg_sq"), {name: t.square() for name, t in some_tensors(3).items()})
    assert len(found.state["rng"]) == 1
    assert (tmp_path / "latest").read_text() == "iter_0000003\n"


def test_a_state_that_says_another_step_than_its_manifest_is_not_continued(tmp_path: Path) -> None:
    """Both are whole, and their hashes are right: they are of two saves."""
    save(tmp_path, 2)
    save(tmp_path, 3, state={"step": 9, "identity": {}})
    found = find_newest(tmp_path, solo())
    assert found is not None and found.manifest.step == 2
    assert "state.json is that of step 9, manifest.json of step 3" in found.skipped[0]


def test_a_rank_file_is_plain_safetensors(tmp_path: Path) -> None:
    tensors = load_file(save(tmp_path, 1) / "rank-00000-of-00001.safetensors")
    assert set(tensors) == {f"{kind}/{name}" for kind in ("fp32", "exp_avg", "exp_avg_sq") for name in some_tensors()}


def test_another_program_can_read_it_by_the_documentation(tmp_path: Path) -> None:
    """docs/checkpoints.md, "The files, exactly", followed with json, struct, numpy and xxhash alone."""
    path = save(tmp_path, 3, FlatEngine(some_tensors(3), frozen=["norm.weight"]), files={"config.json": "é".encode()})
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert (manifest["format"], manifest["version"], manifest["layout"]) == ("ds_recipes flat ranges", 1, "ranges")
    content = {key: value for key, value in manifest.items() if key not in ("format", "version", "xxh3_128")}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    assert manifest["xxh3_128"] == xxhash.xxh3_128_hexdigest(canonical)
    assert {file.name for file in path.iterdir()} == {"manifest.json", *manifest["files"]}
    raw = {name: (path / name).read_bytes() for name in manifest["files"]}
    for name, record in manifest["files"].items():
        assert record["bytes"] == len(raw[name]) and record["xxh3_128"] == xxhash.xxh3_128_hexdigest(raw[name])
    for name, tensor in some_tensors(3).items():
        for kind in manifest["kinds"] if name not in manifest["frozen"] else ["fp32"]:
            values = np.concatenate([read_range(raw[file], f"{kind}/{name}") for file, _, _ in covered(manifest, name)])
            full = {"fp32": tensor, "exp_avg": tensor * 0.1, "exp_avg_sq": tensor.square()}[kind]
            assert np.array_equal(values.reshape(manifest["parameters"][name]["shape"]), full.numpy())
    assert isinstance(json.loads(raw["state.json"])["rng"], list)


def covered(manifest: dict[str, Any], name: str) -> list[tuple[str, int, int]]:
    cover = [tuple(part) for part in manifest["parameters"][name]["cover"]]
    assert sum(length for _, _, length in cover) == np.prod(manifest["parameters"][name]["shape"], dtype=int)
    return cover


def read_range(raw: bytes, name: str) -> np.ndarray:
    (length,) = struct.unpack("<Q", raw[:8])
    assert (8 + length) % 64 == 0
    entry = json.loads(raw[8 : 8 + length])[name]
    begin, end = entry["data_offsets"]
    assert entry["dtype"] == "F32" and entry["shape"] == [(end - begin) // 4]
    return np.frombuffer(raw[8 + length + begin : 8 + length + end], dtype="<f4")


def test_a_hint_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    published = publish(tmp_path, 1, Keep())
    assert published.path.is_dir() and len(published.warnings) == 1
    assert "the checkpoint's name could not be noted" in published.warnings[0]


def test_a_folder_that_is_seen_late_is_waited_for(tmp_path: Path) -> None:
    """Another host may see what rank 0 made seconds later."""
    left = 2

    def not_yet(call: calls.Call) -> None:
        nonlocal left
        if call.kind == "stat" and "partial" in call.path.name and left:
            left -= 1
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(call.path))

    calls.interceptor = not_yet
    try:
        assert publish(tmp_path, 1, Keep()).path.is_dir() and left == 0
    finally:
        calls.interceptor = None


def test_what_is_read_back_otherwise_than_written_deletes_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def flip(call: calls.Call) -> None:
        """The disk changes a byte once the checkpoint has its name."""
        if call.kind == "rename":
            file = next(call.path.glob("rank-*"))
            damaged = bytearray(file.read_bytes())
            damaged[-1] ^= 1
            file.write_bytes(damaged)

    calls.interceptor = flip
    try:
        with pytest.raises(SaveError, match=r"rank-.* is damaged .* reads it right after it was saved"):
            publish(tmp_path, 3, Keep(last=2))
    finally:
        calls.interceptor = None
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002"]


def test_a_rank_that_holds_nothing_writes_no_file(tmp_path: Path) -> None:
    part = Streamed(FlatEngine({}), ())
    assert part.write(tmp_path).files == {} and not list(tmp_path.iterdir())


def test_without_optimizer_or_without_moments_only_weights_are_there(tmp_path: Path) -> None:
    light = save(tmp_path, 1, save_optimizer=False)
    sgd = save(tmp_path, 2, FlatEngine(some_tensors(2), with_moments=False))
    assert read_manifest(light).kinds == read_manifest(sgd).kinds == ("fp32",)
    assert not CheckpointReader(sgd, read_manifest(sgd)).has("exp_avg")


def test_a_frozen_parameter_has_weights_only_and_takes_no_others_moments(tmp_path: Path) -> None:
    path = save(tmp_path, 3, FlatEngine(some_tensors(3), frozen=["layer.weight"]))
    manifest = read_manifest(path)
    assert manifest.kinds == ("fp32", "exp_avg", "exp_avg_sq") and manifest.frozen == ("layer.weight",)
    assert equal(read_all(path), some_tensors(3))
    moments = {name: tensor.square() for name, tensor in some_tensors(3).items()}
    assert equal(read_all(path, "exp_avg_sq"), moments | {"layer.weight": torch.zeros(3, 5)})
    assert "exp_avg/layer.weight" not in load_file(path / "rank-00000-of-00001.safetensors")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_slice_of_any_cover_is_the_slice_of_the_whole(tmp_path_factory, data) -> None:
    """The cover is cut at random places into several files, as ranks of several engines would."""
    from ds_recipes.checkpoint.manifest import Manifest, Parameter, Range
    from ds_recipes.ranges import header_bytes, tensor_bytes

    folder = tmp_path_factory.mktemp("cover")
    size = data.draw(st.integers(1, 40))
    full = torch.arange(size, dtype=torch.float32) + 0.5
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(1, size), max_size=4))})
    cover = []
    for number, (start, end) in enumerate(pairwise(cuts)):
        name = f"rank-{number}.safetensors"
        head = header_bytes({"fp32/w": (torch.float32, (end - start,))}, {})
        (folder / name).write_bytes(b"".join([head, *map(bytes, tensor_bytes(full[start:end]))]))
        cover.append(Range(name, start, end - start))
    reader = CheckpointReader(folder, Manifest(1, 1, ("fp32",), {}, {"w": Parameter((size,), tuple(cover))}, {}, {}))
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    out = torch.full((end - start,), float("nan"))
    reader.read_into("fp32", "w", start, out)
    assert torch.equal(out, full[start:end])


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    chosen = random.Random(0)
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for _ in range(25):
            damaged = bytearray(whole)
            damaged[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
            file.write_bytes(damaged)
            found = find_newest(tmp_path, solo())
            assert found is not None and found.manifest.step == 1, file.name
            assert file.name in found.skipped[0] or "manifest.json" in found.skipped[0]
        file.write_bytes(whole)
    found = find_newest(tmp_path, solo())
    assert found is not None and found.manifest.step == 2


@pytest.mark.parametrize("how", ["cut", "empty", "missing", "swapped", "no_manifest"])
def test_other_damage_is_found_and_named(tmp_path: Path, how: str) -> None:
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    victim = newest / ("manifest.json" if how == "no_manifest" else "rank-00000-of-00001.safetensors")
    if how in ("missing", "no_manifest"):
        victim.unlink()
    elif how == "swapped":
        shutil.copy(older / victim.name, victim)
    else:
        os.truncate(victim, 0 if how == "empty" else victim.stat().st_size - 1)
    found = find_newest(tmp_path, solo())
    assert found is not None and found.path == older
    assert str(newest) in found.skipped[0] and victim.name in found.skipped[0]


def test_only_damaged_ones_never_mean_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        os.truncate(save(tmp_path, step) / "state.json", 1)
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints can be used(.|\n)*state\.json"):
        find_newest(tmp_path, solo())
    assert find_newest(tmp_path / "nothing", solo()) is None


def test_the_hint_latest_decides_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    for content in ("", "iter_0000001\n", "../../elsewhere\n"):
        (tmp_path / "latest").write_text(content)
        found = find_newest(tmp_path, solo())
        assert found is not None and found.path == path


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (9_999_999, 10_000_000):
        path = save(tmp_path, step)
    found = find_newest(tmp_path, solo())
    assert found is not None and found.path == path
    save(tmp_path, 10_000_001, keep_last=2)
    assert not (tmp_path / "iter_9999999").exists() and path.exists()


def test_a_manifest_cannot_name_files_outside_nor_leave_elements_out(tmp_path: Path) -> None:
    from ds_recipes.checkpoint.files import hash_bytes
    from ds_recipes.checkpoint.manifest import _canonical

    path = save(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    for change, message in (
        (lambda c: c["files"].update({"../x": {"bytes": 1, "xxh3_128": ""}}), "nothing was read"),
        (lambda c: c["parameters"]["embed.weight"].update(shape=[12, 4]), "44 are covered"),
        (lambda c: c["parameters"]["embed.weight"]["cover"][0].__setitem__(1, 1), "not covered"),
        (lambda c: c.update(files=3), "makes no sense"),
    ):
        forged = json.loads(json.dumps(content))
        change(forged)
        body = {key: value for key, value in forged.items() if key not in ("format", "version", "xxh3_128")}
        forged["xxh3_128"] = hash_bytes(_canonical(body))
        (path / "manifest.json").write_text(json.dumps(forged))
        with pytest.raises(CheckpointError, match=message):
            read_manifest(path)


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does, in the middle of a write."""
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(
            TrainingError, match=r"rank-00000.*could not be written: File too large \([\d,]+ bytes are free"
        ):
            save(tmp_path, 2, FlatEngine({"w": torch.zeros(5000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir() if "iter" in path.name] == ["iter_0000001"]


def test_leftovers_are_removed_at_the_start_and_nothing_else(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in (".iter_0000002.partial-abcd", ".iter_0000000.deleted", "notes"):
        (tmp_path / name).mkdir()
    remove_partials(tmp_path, solo())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([path.name, "latest", "notes"])


def test_another_model_is_refused_with_the_differences(tmp_path: Path) -> None:
    manifest = read_manifest(save(tmp_path, 1))
    shapes = manifest.shapes()
    check_same_model(manifest, shapes, "here")
    other = {**shapes, "norm.weight": (8,), "head.weight": (11, 4)}
    with pytest.raises(CheckpointError) as refused:
        check_same_model(manifest, other, "here")
    assert "head.weight: absent in the checkpoint, [11, 4] in the model" in str(refused.value)
    assert "norm.weight: [7] in the checkpoint, [8] in the model" in str(refused.value)


def test_generators_go_on_where_they_were() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    derive_rng(1, 2, 3)
    first = draw()
    saved = json.loads(json.dumps(capture_rng()))
    after = draw()
    restore_rng(saved)
    assert draw() == after
    derive_rng(1, 2, 3)
    assert draw() == first
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        derive_rng(*other)
        assert draw() != first
