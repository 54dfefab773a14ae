"""Data sets of the hub, asked for by the real `datasets` library from a local server, and folders that it saved."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError
from tests.unit.data.sources.dataset_hub import COMMIT, DATASET, DatasetHub, serving
from tests.unit.data.sources.kinds import everything, lines_of, opened, save_dataset

TRAIN = [{"text": "a"}, {"text": "b"}]
TEST = [{"text": "c"}]
OTHER_COMMIT = "6" * 40

OPEN_EACH = """
import json, sys
from pathlib import Path
from ds_recipes.config.data_paths import parse_data_path
from ds_recipes.data.sources.open import open_source
from ds_recipes.errors import InputError

for text in sys.argv[2:]:
    try:
        source = open_source(parse_data_path(text).hub, Path(sys.argv[1]))
        print(json.dumps([source.name, source.fingerprint, [found.value for found in source.read(0, len(source))]]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


def open_each(folder: Path, endpoint: str, offline: bool, *names: str) -> list[Any]:
    """What each name gives in a new process: [name, fingerprint, values], or the error's message."""
    env = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
    }
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    ended = subprocess.run(
        [sys.executable, "-c", OPEN_EACH, str(cache), *names], env=env, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr, "no progress bars and no warnings"
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_splits_of_the_hub_are_read_and_later_without_the_hub(tmp_path: Path) -> None:
    files = {"train.jsonl": lines_of(TRAIN), "test.jsonl": lines_of(TEST), "README.md": b"---\nlicense: mit\n---\n"}
    names = [f"hub:{DATASET}", f"hub:{DATASET}:test", f"hub:{DATASET}@main:train", f"hub:{DATASET}@{COMMIT}:train"]
    wrong = [
        f"hub:{DATASET}:nope",
        f"hub:{DATASET}:nope:train",
        "hub:someone/none",
        f"hub:{DATASET}@{OTHER_COMMIT}:train",
    ]
    with serving(files) as endpoint:
        train, test, main, commit, *problems = open_each(tmp_path, endpoint, False, *names, *wrong)
        assert sum(asked.startswith("GET") and asked.endswith("train.jsonl") for asked in DatasetHub.asked) == 1
        seen = len(DatasetHub.asked)
        later = open_each(tmp_path, endpoint, True, *names, *wrong)
        assert len(DatasetHub.asked) == seen
    assert train[0] == f"hub:{DATASET}:train" and train[2] == TRAIN
    assert test[2] == TEST and test[1] != train[1]
    assert main[1:] == commit[1:] == train[1:]
    assert problems[0].startswith(f'hub:{DATASET}:nope: the hub gave no such data (Unknown split "nope".')
    assert problems[1].startswith(
        f"hub:{DATASET}:nope:train: the hub gave no such data (BuilderConfig 'nope' not found."
    )
    assert problems[2].startswith(
        "hub:someone/none:train: the hub gave no such data (Dataset 'someone/none' doesn't exist"
    )
    assert later[:4] == [train, test, main, commit]
    for problem in later[4:7]:
        assert ": the hub could not be reached, and it is not in the cache (" in problem
    refused = (
        f"hub:{DATASET}@{OTHER_COMMIT}:train: the hub did not give this revision, and the cache has '{COMMIT}' only. "
        "Name that one, or run once where the hub can be reached."
    )
    assert problems[3] == later[7] == refused


def test_a_script_of_a_data_set_is_not_run(tmp_path: Path) -> None:
    script = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    with serving({"data.py": script, "train.jsonl": lines_of(TRAIN), "README.md": b""}) as endpoint:
        (problem,) = open_each(tmp_path, endpoint, False, f"hub:{DATASET}")
    assert "Dataset scripts are no longer supported" in problem
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_the_same_name_is_not_taken_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_recipes.config.data_paths import HubData
    from ds_recipes.data.sources.open import open_source

    (tmp_path / DATASET).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"hub:someone/data:train: there is a someone/data in .*Name \./someone/data\."
    ):
        open_source(HubData(DATASET, None, None, "train"), tmp_path)


def test_saved_values_are_plain_python(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "turns": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "any": datasets.Json(),
            "picture": datasets.Image(decode=True),
        }
    )
    rows = [
        {"text": "a", "turns": [{"role": "user", "content": "日本"}], "label": 1, "any": {"x": [1]}, "picture": None},
        {"text": None, "turns": [], "label": 0, "any": "text", "picture": {"bytes": b"\x89PNG", "path": None}},
    ]
    datasets.Dataset.from_list(rows, features=features).with_format("numpy").save_to_disk(tmp_path / "saved")
    del rows[1]["picture"]["path"]  # a null within a struct, as of a row that has no such field
    assert [one.value for one in everything(opened(tmp_path / "saved")) if isinstance(one, Record)] == rows


def test_a_folder_of_splits_names_them(tmp_path: Path) -> None:
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(TRAIN) for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "saved")
    assert str(caught.value) == (
        f"{tmp_path}/saved: holds several splits. Name one of them: '{tmp_path}/saved/train', '{tmp_path}/saved/test'."
    )
    assert len(opened(tmp_path / "saved" / "train")) == 2


def outside_by(link: bool, name: str) -> Callable[[Path], None]:
    """A change to a saved folder: its first file is another name, or a link of the same name."""

    def change(folder: Path) -> None:
        (folder.parent / "secret.arrow").write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())
        if link:
            (folder / "data-00000-of-00002.arrow").unlink()
            (folder / "data-00000-of-00002.arrow").symlink_to(folder.parent / "secret.arrow")
        state = json.loads((folder / "state.json").read_text())
        state["_data_files"][0]["filename"] = name.format(folder=folder)
        (folder / "state.json").write_text(json.dumps(state))

    return change


@pytest.mark.parametrize(
    ("link", "name"),
    [
        (False, "../secret.arrow"),
        (False, "{folder}/../secret.arrow"),
        (False, "/etc/passwd"),
        (False, "{folder}/data-00000-of-00002.arrow"),
        (False, "sub/../data-00000-of-00002.arrow"),
        (True, "data-00000-of-00002.arrow"),
    ],
)
def test_files_outside_of_the_folder_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool, name: str
) -> None:
    save_dataset(tmp_path / "saved", TRAIN)
    outside_by(link, name)(tmp_path / "saved")
    monkeypatch.setattr(datasets.Dataset, "load_from_disk", None)
    with pytest.raises(
        InputError, match=r"saved: its state\.json names '.*', which is outside of the folder\. Do not use it\."
    ):
        opened(tmp_path / "saved")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", r"state\.json: cannot be read \("),
        ("[" * 100_000, r"state\.json: cannot be read \("),
        ("[]", r"state\.json: does not hold a JSON object\."),
        ('{"_data_files": [{"filename": 3}]}', r"state\.json: has an entry without a file's name\."),
        ('{"_data_files": ["a.arrow"]}', r"state\.json: has an entry without a file's name\."),
        ('{"_data_files": 3}', r"state\.json: does not list the files\."),
        (
            '{"_data_files": [{"filename": "none.arrow"}]}',
            r"saved: 'none\.arrow' is missing\. Copy the whole folder again\.",
        ),
        ('{"_data_files": []}', r"saved: holds no records\."),
        ('{"_data_files": [{"filename": "data-00000-of-00002.arrow"}]}', r"saved: cannot be opened as a data set \("),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, state: str, message: str) -> None:
    save_dataset(tmp_path / "saved", TRAIN)
    (tmp_path / "saved" / "state.json").write_text(state)
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "saved")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    save_dataset(tmp_path / "saved", TRAIN)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"saved: cannot be opened as a data set \("):
        opened(tmp_path / "saved")


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"saved: holds no records\."):
        opened(tmp_path / "saved")


def test_the_fingerprint_does_not_follow_the_folder(tmp_path: Path) -> None:
    save_dataset(tmp_path / "saved", TRAIN)
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    save_dataset(tmp_path / "other", TRAIN[::-1])
    first, copy, other = (opened(tmp_path / name).fingerprint for name in ("saved", "copy", "other"))
    assert first == copy != other
