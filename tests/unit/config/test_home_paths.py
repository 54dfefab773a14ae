"""`~` and variables in paths mean what a shell means by them, wherever the path comes from."""

import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from ds_recipes.config.load import load_config
from ds_recipes.config.schema import SETTINGS, Config, values_of
from ds_recipes.config.values import expand_path, path_argument
from ds_recipes.errors import ConfigError

NEEDED = {"model_name": "m", "train_data": "t.jsonl", "save_checkpoint_path": "run"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def by_flag(name: str, text: str) -> Config:
    return load_config([f"--{key}={value}" for key, value in {**NEEDED, name: text}.items()], env={})


def by_run_file(name: str, text: str) -> Config:
    Path("run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in {**NEEDED, name: text}.items()))
    return load_config(["--config", "run.yaml"], env={})


PATHS = [
    name for name, item in SETTINGS.items() if item.metadata["is_path"] and name not in ("model_config", "ds_config")
]


@pytest.mark.parametrize("read", [by_flag, by_run_file])
@pytest.mark.parametrize("name", PATHS)
def test_every_setting_that_names_a_path(name: str, read, home: Path) -> None:
    needs_rule = {"validation_data": "v", "chat_template": "--dataset", "prompt_template": "--dataset"}
    for text, meant in (
        ("~/a/b", f"{home}/a/b"),
        ("$SCRATCH/a", "/scratch/me/a"),
        ("${SCRATCH}/~/a", "/scratch/me/~/a"),
    ):
        try:
            value = values_of(read(name, text))[name]
        except ConfigError as error:  # a value that only goes with others; what is asked here is how it was read
            assert name in (*needs_rule, "dataset"), error
            assert meant in str(error) and text not in str(error)
            continue
        assert value == (meant,) if isinstance(value, tuple) else value == meant


@pytest.mark.parametrize("text", ["0.7:~/a.jsonl", "3:$SCRATCH/a.jsonl"])
def test_a_weight_stays_before_its_path(text: str, home: Path) -> None:
    weight = text.partition(":")[0]
    (read,) = by_flag("train_data", text).data.train_data
    assert read in (f"{weight}:{home}/a.jsonl", f"{weight}:/scratch/me/a.jsonl")


def test_the_run_file_and_the_json_themselves(home: Path) -> None:
    home.mkdir()
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "~/nvme"}}
    (home / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    (home / "run.yaml").write_text("model_name: m\ntrain_data: t\nsave_checkpoint_path: r\nds_config: ~/zero.json\n")
    config = load_config(["--config=~/run.yaml"], env={})
    assert config.ds is not None and config.ds.path == f"{home}/zero.json"
    assert config.ds.tree["zero_optimization"]["offload_optimizer"]["nvme_path"] == f"{home}/nvme"


def test_what_is_no_path_of_the_home_folder_stays() -> None:
    for text in ("a~b", "a/~", "runs/$", "100$/x", "hub:owner/name", "meta-llama/Llama-2-7b-hf", "./~", "$5/x"):
        assert expand_path(text) == text
    Path("$NOT_SET").mkdir()
    assert expand_path("$NOT_SET") == "$NOT_SET", "a folder that is there is meant"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("$NOT_SET/runs/x", "the environment has no variable NOT_SET. Set it, or write the path out"),
        ("${NOT_SET}/x", "the environment has no variable NOT_SET"),
        ("~nobody-of-this-name/x", "there is no home folder for ~nobody-of-this-name"),
    ],
)
def test_what_cannot_be_known_is_refused(text: str, reason: str) -> None:
    for read, where in ((by_flag, "command line"), (by_run_file, "run.yaml:3")):
        with pytest.raises(ConfigError) as refused:
            read("save_checkpoint_path", text)
        (problem,) = refused.value.problems
        assert reason in problem and where in problem and "save_checkpoint_path" in problem
    with pytest.raises(ArgumentTypeError, match=r"there is no home|has no variable"):
        path_argument(text)
