"""The words of `train_data`: weights, hub names, globs and folders, and which files they mean."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_recipes.config.data_paths import DataPath, HubData, find_files, is_saved_dataset, parse_data_path


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("data/train.jsonl", "data/train.jsonl", None),
        ("0.7:data/train.jsonl", "data/train.jsonl", 0.7),
        (".5:a", "a", 0.5),
        ("2.:a", "a", 2.0),
        ("1e-3:a", "a", 1e-3),
        ("3:a:b", "a:b", 3.0),
        ("./0.5:a", "./0.5:a", None),
        ("a:0.5", "a:0.5", None),
        ("0x1:a", "0x1:a", None),
        ("-1:a", "-1:a", None),
        ("0.7: a", " a", 0.7),
        ("hubble.jsonl", "hubble.jsonl", None),
    ],
)
def test_a_weight_comes_before_the_path(text: str, path: str, weight: float | None) -> None:
    assert parse_data_path(text) == DataPath(path, weight, None)
    assert parse_data_path(text).name == path


@given(st.floats(0, exclude_min=True, allow_infinity=False))
def test_any_weight_above_0_is_read_as_python_writes_it(weight: float) -> None:
    assert parse_data_path(f"{weight!r}:a").weight == weight


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:a", "has a weight of 0 in '0:a'; a weight must be above 0"),
        ("0.0:a", "has a weight of 0 "),
        ("1e-999:a", "has a weight of 0 "),
        ("1e999:a", "has a weight of inf "),
        ("0.5:", "names no path after the weight in '0.5:'"),
        ("hub:", "must name a data set as hub:owner/name"),
        ("hub:name", "not 'hub:name'"),
        ("0.5:hub:name", "not 'hub:name'"),
        ("hub:a/b/c", "not 'hub:a/b/c'"),
        ("hub:../b", "not 'hub:../b'"),
        ("hub:a/..", "not 'hub:a/..'"),
        ("hub:a/b@", "not 'hub:a/b@'"),
        ("hub:a/b@../../c", "not 'hub:a/b@../../c'"),
        ("hub:a/b:c:d:e", "not 'hub:a/b:c:d:e'"),
        ("hub:a/b:c d", "not 'hub:a/b:c d'"),
        ("hub:a/b:train[:10%]", "not 'hub:a/b:train[:10%]'"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^(has|must|names) ") as caught:
        parse_data_path(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hub"),
    [
        ("hub:a/b", HubData("a/b", None, None, "train")),
        ("hub:a/b:test", HubData("a/b", None, None, "test")),
        ("hub:a/b:ja:test", HubData("a/b", None, "ja", "test")),
        ("hub:a/b@v1.0", HubData("a/b", "v1.0", None, "train")),
        ("hub:a-1/b.c_d@refs/convert:1.ja:train", HubData("a-1/b.c_d", "refs/convert", "1.ja", "train")),
    ],
)  # fmt: skip
def test_a_hub_name_has_revision_config_and_split(text: str, hub: HubData) -> None:
    assert parse_data_path(text) == DataPath(text, None, hub)
    assert parse_data_path(f"0.5:{text}") == DataPath(text, 0.5, hub)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data of many kinds, saved data sets, and much that is no data."""
    names = (
        "b.jsonl a.jsonl.gz notes.txt x.idx x.bin .hidden.jsonl sub/c.parquet sub/deep/d.csv sub/.index_cache/e.json "
        ".index_cache/f.json saved/state.json saved/dataset_info.json saved/data-0.arrow "
        "splits/dataset_dict.json splits/train/state.json splits/train/dataset_info.json sub/g.JSONL model/weights.pt"
    )
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = ["a.jsonl.gz", "b.jsonl", "saved", "splits", "sub/c.parquet", "sub/deep/d.csv", "x.bin"]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (".", ALL),
        ("sub", ["sub/c.parquet", "sub/deep/d.csv"]),
        ("saved", ["saved"]),
        ("splits", ["splits"]),
        ("splits/train", ["splits/train"]),
        ("sub/.index_cache", ["sub/.index_cache/e.json"]),
        ("b.jsonl", ["b.jsonl"]),
        ("none.jsonl", ["none.jsonl"]),
        ("x", ["x.bin"]),
        ("y", ["y"]),
        ("x.idx", ["x.idx"]),
        ("*.jsonl", ["b.jsonl"]),
        ("*.txt", ["notes.txt"]),
        ("[ab].jsonl*", ["a.jsonl.gz", "b.jsonl"]),
        ("s*/*.parquet", ["sub/c.parquet"]),
        ("**/*.csv", ["sub/deep/d.csv"]),
        ("**/*.json", []),
        (".index_cache/*", [".index_cache/f.json"]),
        ("s*", ["saved", "splits"]),
        ("saved/*", []),
        ("../{name}/*.jsonl", ["../{name}/b.jsonl"]),
    ],
)
def test_a_path_means_files(tree: Path, path: str, found: list[str]) -> None:
    path, found = path.format(name=tree.name), [name.format(name=tree.name) for name in found]
    if not found:
        with pytest.raises(ValueError, match="no file matches this pattern"):
            find_files(path)
        return
    assert find_files(path) == [Path(name) for name in found]
    absolute = find_files(str(tree / path))
    assert [file.resolve() for file in absolute] == [(tree / name).resolve() for name in found]
    assert all(file.is_absolute() for file in absolute)


def test_a_file_whose_name_is_a_pattern_is_itself(tree: Path) -> None:
    (tree / "[ab].jsonl").touch()
    assert find_files("[ab].jsonl") == [Path("[ab].jsonl")]


def test_links_are_followed_but_not_in_circles(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    far = tmp_path_factory.mktemp("far")
    (far / "h.jsonl").touch()
    (tree / "sub" / "link").symlink_to(far)
    (far / "back").symlink_to(tree / "sub")
    (tree / "sub" / "broken.jsonl").symlink_to("nowhere")
    assert [str(file) for file in find_files("sub")] == ["sub/c.parquet", "sub/deep/d.csv", "sub/link/h.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [("model", "is a folder without data files (.jsonl, "), ("*.nothing", "no file"), ("a**b", "Invalid pattern")],
)
def test_a_path_that_means_nothing_is_refused(tree: Path, path: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        find_files(path)
    assert str(caught.value).startswith(message)


def test_a_folder_that_cannot_be_listed_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ValueError, match=r"cannot be listed \(.*: Permission denied\)"):
        find_files(".")


def test_a_saved_data_set_is_known_by_its_files(tree: Path) -> None:
    assert [name for name in ("saved", "splits", "splits/train", "sub", "none") if is_saved_dataset(tree / name)] == [
        "saved", "splits", "splits/train"
    ]  # fmt: skip
