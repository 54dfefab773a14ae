"""Megatron's token files are read as they are, and an index that says anything wrong is refused before a token is read."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.sources.megatron import MegatronFile, is_megatron
from ds_recipes.data.sources.open import open_source
from ds_recipes.errors import InputError

CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "f8": 6, "f4": 7, "u2": 8}


def write_pair(
    folder: Path, documents: list[list[list[int]]], dtype: str = "u2", reverse: bool = False, **wrong: Any
) -> Path:
    """Write documents, each of several sequences; the sequences may lie in the token file in reverse order."""
    sequences = [sequence for document in documents for sequence in document]
    order = range(len(sequences))[::-1] if reverse else range(len(sequences))
    pointers, tokens = [0] * len(sequences), b""
    for number in order:
        pointers[number] = len(tokens)
        tokens += np.array(sequences[number], dtype).tobytes()
    parts: dict[str, Any] = {
        "magic": b"MMIDIDX\x00\x00",
        "version": 1,
        "code": CODES[dtype],
        "sequences": len(sequences),
        "entries": len(documents) + 1,
        "lengths": [len(sequence) for sequence in sequences],
        "pointers": pointers,
        "bounds": np.cumsum([0, *map(len, documents)]).tolist(),
        "tokens": tokens,
        "more": b"",
    } | wrong
    header = struct.pack("<9sQBQQ", *(parts[name] for name in ("magic", "version", "code", "sequences", "entries")))
    index = [
        np.array(parts[name], kind).tobytes()
        for name, kind in (("lengths", "<i4"), ("pointers", "<i8"), ("bounds", "<i8"))
    ]
    (folder / "data.idx").write_bytes(header + b"".join(index) + parts["more"])
    (folder / "data.bin").write_bytes(parts["tokens"])
    return folder / "data.bin"


def read(path: Path) -> MegatronFile:
    cache = path.parent / "cache"
    cache.mkdir(exist_ok=True)
    return MegatronFile(path, cache)


DOCUMENTS = [[[1, 2, 3], [4]], [], [[5]], [[], [6, 7]]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "u2"])
def test_documents_are_their_sequences_joined(tmp_path: Path, dtype: str, reverse: bool) -> None:
    file = read(write_pair(tmp_path, DOCUMENTS, dtype, reverse))
    assert [file.tokens(i).tolist() for i in range(len(file))] == [[1, 2, 3, 4], [], [5], [6, 7]]
    assert file.lengths.tolist() == [4, 0, 1, 2]
    assert file.tokens(0).dtype == np.dtype(dtype)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=5), max_size=4), min_size=1, max_size=6), st.booleans()
)
def test_any_documents_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], reverse: bool
) -> None:
    if not any(sequence for document in documents for sequence in document):
        return
    file = read(write_pair(tmp_path_factory.mktemp("pair"), documents, reverse=reverse))
    joined = [[token for sequence in document for token in sequence] for document in documents]
    assert [file.tokens(i).tolist() for i in range(len(file))] == joined


def test_tokens_are_not_copied(tmp_path: Path) -> None:
    file = read(write_pair(tmp_path, DOCUMENTS))
    assert np.shares_memory(file.tokens(0), file.tokens(0))


def test_any_name_of_the_pair_will_do(tmp_path: Path) -> None:
    write_pair(tmp_path, DOCUMENTS)
    names = [tmp_path / name for name in ("data.bin", "data.idx", "data")]
    assert all(is_megatron(name) for name in names)
    assert len({read(name).fingerprint for name in names}) == 1
    assert {read(name).name for name in names} == {str(tmp_path / "data.bin")}
    assert not is_megatron(tmp_path / "other.bin")
    (tmp_path / "text.idx").write_text("0\n10\n")
    assert not is_megatron(tmp_path / "text.jsonl") and not is_megatron(tmp_path / "text.idx")


def test_a_name_with_points_is_a_pair_too(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"v1.5_text{suffix}").write_bytes(write_pair(tmp_path, DOCUMENTS).with_suffix(suffix).read_bytes())
    assert len(read(tmp_path / "v1.5_text")) == len(DOCUMENTS)


def test_the_fingerprint_follows_both_files(tmp_path: Path) -> None:
    prints = [
        read(write_pair(tmp_path, documents)).fingerprint
        for documents in ([[[1, 2]]], [[[1, 3]]], [[[1], [2]]], [[[1]], [[2]]], [[[1, 2]]])
    ]
    assert len(set(prints)) == 4 and prints[0] == prints[4]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"magic": b"MMIDIDX\x00\x01"}, "is no index of Megatron's"),
        ({"version": 2}, "has version 2, not 1"),
        ({"code": 7}, "says that the tokens are float32, not whole numbers"),
        ({"code": 9}, "says that the tokens are an unknown dtype (code 9), not whole numbers"),
        ({"code": 4}, "but {folder}/data.bin has 14 bytes"),
        ({"sequences": 6}, "has 134 bytes, but 6 sequences and 5 entries of documents need 146"),
        ({"sequences": 2**60}, "sequences and 5 entries of documents need"),
        ({"entries": 2**63}, "entries of documents need"),
        ({"more": b"\x00" * 5}, "has 139 bytes, but"),
        ({"sequences": 0, "lengths": [], "pointers": [], "bounds": [0] * 5}, "holds no documents"),
        ({"pointers": [0, 6, 8, 10, 12]}, "lays sequence 4 at byte 12 with 2 tokens of 2 bytes, but {folder}/data.bin has 14"),
        ({"pointers": [-2, 6, 8, 10, 10]}, "lays sequence 0 at byte -2 "),
        ({"pointers": [0, 6, 7, 10, 10]}, "lays sequence 2 at byte 7 "),
        ({"pointers": [0, 6, 2**63 - 2, 10, 10]}, "lays sequence 2 at byte 9,223,372,036,854,775,806 "),
        ({"lengths": [3, 1, 1, -1, 2]}, "lays sequence 3 at byte 10 with -1 tokens"),
        ({"bounds": [0, 2, 2, 3, 4]}, "has documents that do not cover its 5 sequences in order (from 0 to 4)"),
        ({"bounds": [1, 2, 2, 3, 5]}, "do not cover its 5 sequences in order (from 1 to 5)"),
        ({"bounds": [0, 3, 2, 3, 5]}, "do not cover its 5 sequences in order"),
        ({"bounds": [0, 2, 2, 9, 5]}, "do not cover its 5 sequences in order"),
        ({"tokens": b"\x00" * 13}, "says that a token has 2 bytes, but {folder}/data.bin has 13 bytes"),
        ({"tokens": b"\x00" * 10}, "but {folder}/data.bin has 10 bytes"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_index_is_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(write_pair(tmp_path, DOCUMENTS, **wrong))
    assert str(caught.value).startswith(f"{tmp_path / 'data.idx'}: ")
    assert message.format(folder=tmp_path) in str(caught.value)


def test_negative_ids_are_refused_where_they_are(tmp_path: Path) -> None:
    file = read(write_pair(tmp_path, [[[1]], [[2, -3]]], "i4"))
    assert file.tokens(0).tolist() == [1]
    with pytest.raises(InputError, match=r"data\.bin:2: holds the token id -3\."):
        file.tokens(1)


def test_a_missing_half_is_named(tmp_path: Path) -> None:
    path = write_pair(tmp_path, DOCUMENTS)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"data\.bin: is empty\."):
        read(path)
    path.unlink()
    with pytest.raises(InputError, match=r"data\.bin: no such file"):
        read(tmp_path / "data.idx")
    path.write_bytes(b"\x01\x00")
    (tmp_path / "data.idx").unlink()
    with pytest.raises(InputError, match=r"data\.bin: token files come in pairs, but .*data\.idx is not there"):
        open_source(path, tmp_path)
