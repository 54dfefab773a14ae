"""A folder that holds several splits of a data set is read whole, and says so."""

from pathlib import Path

import pytest

from ds_recipes.config.data_paths import splits_by_name
from tests.unit.data.made import write_jsonl
from tests.unit.data.tokens.stores import make_recipe, open_alone


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test.parquet"], {"train": 2, "test": 1}),
        (["Training/a.jsonl", "dev/a.jsonl", "my_val_set.jsonl"], {"train": 1, "validation": 2}),
        (["test/train.jsonl"], {"train": 1}),
        (["a_test_of_mine/a.jsonl", "a_test_of_mine/train.jsonl"], {"train": 1}),
        (["contest.jsonl", "trainers.jsonl", "validity/latest.jsonl", "a.jsonl"], {}),
        (["wiki.train.jsonl", "wiki valid.jsonl"], {"train": 1, "validation": 1}),
    ],
)  # fmt: skip
def test_names_of_splits(names: list[str], splits: dict[str, int]) -> None:
    assert splits_by_name(map(Path, names)) == splits


def test_a_folder_of_several_splits_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    (folder / "data").mkdir(parents=True)
    for name in ("train-0", "train-1", "test-0"):
        write_jsonl(folder / "data" / f"{name}.jsonl", [{"text": f"a dog {name}"}])
    documents = open_alone(folder, make_recipe())
    assert len(documents) == 3
    assert documents.notes == (
        "files of several splits by their names, of which all are read: test (1), train (2). To read one, name its files alone.",
    )
    assert open_alone(folder / "data" / "train-*", make_recipe()).notes == ()
