"""What of a folder may go to the hub, decided without network: the model and nothing else, and never a secret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ds_recipes.checkpoint.hub.credentials import HIDDEN, find_token, hidden, hide
from ds_recipes.checkpoint.hub.folder import LocalFile, exports_in, read_folder
from ds_recipes.checkpoint.manifest import FORMAT
from ds_recipes.errors import ConfigError, InputError
from tests.e2e.launchers import ROOT
from tools.upload_to_hub import parse

TOKEN = "hf_" + "Ab3d" * 9


def make_model(folder: Path, shards: int = 1, words: int = 50) -> Path:
    """A folder that looks like an exported model; its weights are a few numbers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    names = ["model.safetensors"] if shards == 1 else names
    for number, name in enumerate(names):
        save_file({f"w{number}": np.arange(words, dtype=np.float32) + number}, folder / name)
    if shards > 1:
        where = {f"w{number}": name for number, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "hf", shards=3)


def refusal(path: Path, **chosen: list[str]) -> str:
    with pytest.raises(InputError) as caught:
        read_folder(path, **chosen)
    return str(caught.value)


def test_the_model_goes_and_everything_of_training_stays(model: Path) -> None:
    stays = [
        "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", "global_step7/x.pt",
        "wandb/run/config.yaml", ".cache/huggingface/x", ".git/config", "events.out.tfevents.1", "run.json", "x.partial-ab/y",
        ".x.partial-ab/y", "model.safetensors.tmp", "rank-00000-of-00002.safetensors", "pytorch_model.bin", "a.pkl",
        "__pycache__/m.pyc", "sub/.hidden", "latest", "probe.safetensors",
    ]  # fmt: skip
    goes = {"README.md", ".gitattributes", "modeling_x.py", "sub/config.json", "chat_template.jinja"}
    goes |= {file.name for file in model.iterdir()}
    for name in [*stays, "README.md", ".gitattributes", "modeling_x.py", "sub/config.json", "chat_template.jinja"]:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("text")
    folder = read_folder(model)
    assert {file.name for file in folder.files} == goes
    assert folder.size == sum((model / name).stat().st_size for name in goes)
    left_out = [name for name, _ in folder.left_out]
    assert all(any(name == out or name.startswith(f"{out}/") for out in left_out) for name in stays)


@pytest.mark.parametrize(
    "name", [".env", ".env.local", "token", "token.txt", "sub/id_rsa", "my.pem", "hf_token", ".netrc"]
)
def test_secrets_by_name_are_refused_and_may_be_excluded(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("?")
    assert name in refusal(model)
    assert name not in {file.name for file in read_folder(model, exclude=[name]).files}


@pytest.mark.parametrize("text", [f"use {TOKEN} here", "-----BEGIN OPENSSH PRIVATE KEY-----", "AKIAABCDEFGHIJKLMNOP"])
def test_secrets_by_content_are_refused_without_being_shown(model: Path, text: str) -> None:
    (model / "README.md").write_text(f"# Model\n{text}\n")
    said = refusal(model)
    assert "README.md" in said and "looks like" in said and TOKEN not in said
    read_folder(model, exclude=["README.md"])


def test_links_out_of_the_folder_are_refused(model: Path) -> None:
    outside = model.parent / "private.json"
    outside.write_text("{}")
    (model / "extra.json").symlink_to(outside)
    assert "extra.json" in refusal(model)
    (model / "extra.json").unlink()
    (model / "extra.json").symlink_to(model / "config.json")
    read_folder(model)
    (model / "folder").symlink_to(model.parent)
    assert not [file.name for file in read_folder(model).files if file.name.startswith("folder")]


def test_a_pipe_is_not_waited_for(model: Path) -> None:
    os.mkfifo(model / "pipe.json")
    assert "pipe.json" in refusal(model)


def test_checkpoints_of_training_are_refused_with_the_command_to_run(tmp_path: Path) -> None:
    ours = make_model(tmp_path / "iter_0000010")
    (ours / "manifest.json").write_text(json.dumps({"format": FORMAT}))
    theirs = tmp_path / "deepspeed"
    (theirs / "global_step5").mkdir(parents=True)
    state = tmp_path / "old"
    state.mkdir()
    (state / "model.pt").write_bytes(b"?")
    for path in (ours, theirs, state):
        assert f"python tools/convert_to_hf.py --ckpt {path}" in refusal(path)


def test_unfinished_exports_and_other_folders_are_refused(tmp_path: Path) -> None:
    assert "not finished" in refusal(make_model(tmp_path / ".hf.partial-12ab"))
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    assert "no such folder" in refusal(tmp_path / "none")
    without = make_model(tmp_path / "without")
    (without / "model.safetensors").unlink()
    assert "no safetensors" in refusal(without)
    assert "no safetensors" in refusal(make_model(tmp_path / "excluded"), exclude=["*.safetensors"])


def test_weights_that_are_not_whole_are_refused(model: Path) -> None:
    second = model / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    for kept in (0, 3, 8, 30, len(whole) - 1):
        second.write_bytes(whole[:kept])
        assert second.name in refusal(model)
    second.write_bytes(whole + b"x")
    assert second.name in refusal(model)
    second.write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])
    assert second.name in refusal(model)
    second.write_bytes((model / "model-00003-of-00003.safetensors").read_bytes())
    assert "has no tensor w1" in refusal(model)
    second.unlink()
    assert f"{second.name} is missing" in refusal(model)
    second.write_bytes(whole)
    (model / "model.safetensors.index.json").unlink()
    assert "index.json is missing" in refusal(model)


def test_include_and_exclude_choose_files(model: Path) -> None:
    (model / "notes.md").write_text("x")
    taken = {file.name for file in read_folder(model, include=["*.json", "*.safetensors"], exclude=["tok*"]).files}
    assert "notes.md" not in taken and "tokenizer.json" not in taken and "config.json" in taken


def test_exports_are_chosen_by_step(tmp_path: Path) -> None:
    for name in (
        "iter_0000600",
        "iter_0000800",
        "iter_0001000",
        "checkpoint-10000",
        ".iter_0001200.partial-ab",
        "other",
    ):
        (tmp_path / name).mkdir()

    def steps(*chosen: int | None) -> list[str]:
        return [path.name.removeprefix("iter_") for path in exports_in(tmp_path, *chosen)]

    assert steps(None, None, None) == ["0000600", "0000800", "0001000", "checkpoint-10000"]
    assert steps(700, 1000, None) == ["0000800", "0001000"]
    assert steps(None, 1000, 200) == ["0000600", "0000800", "0001000"]
    assert steps(600, 1000, 400) == ["0000600", "0001000"]
    for chosen, missing in (((600, 1200, 200), "step 1200"), ((1, 2, None), "no exported models")):
        with pytest.raises(InputError, match=missing):
            exports_in(tmp_path, *chosen)
    (tmp_path / "global_step800").mkdir()
    with pytest.raises(InputError, match="of one step"):
        exports_in(tmp_path, None, None, None)


def test_hashes_are_those_of_git_and_of_the_hub(model: Path) -> None:
    path = model / "model-00001-of-00003.safetensors"
    file = LocalFile(path.name, path, path.stat().st_size)
    for command, made in ((["git", "hash-object", path], file.git_sha1), (["sha256sum", path], file.sha256)):
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        assert said.split()[0] == made


def test_nothing_secret_is_printed() -> None:
    hide("plain-secret-of-a-user")
    address = "https://s3.example/bucket/key?X-Amz-Signature=abc&X-Amz-Date=1"
    shown = hidden(f"a {TOKEN} b plain-secret-of-a-user PUT {address}, then")
    assert shown == f"a {HIDDEN} b {HIDDEN} PUT https://s3.example/bucket/key?... then"


@pytest.mark.parametrize("content", ["", "two words", "\x01\x02", "tökèn"])
def test_a_file_without_one_token_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(InputError) as caught:
        find_token(tmp_path / "file")
    assert not content or content not in str(caught.value)


def test_the_checks_need_neither_torch_nor_the_hubs_library() -> None:
    code = "import sys, tools.upload_to_hub; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == "set()", said.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--branch=a..b", "not a name that git takes"),
        ("--tag=-x", "not a name that git takes"),
        ("--branch=refs/pr/1", "not a name that git takes"),
        ("--each branch --branch b", "names the branch itself"),
        ("--each tag --tag b", "names the tag itself"),
        ("--start 1", "need --each"),
        ("--each tag --start 1 --end 3 --increment 0", "not a positive number"),
    ],
)
def test_options_that_contradict_each_other(flags: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(["--path", "x", "--repo", "y", *flags.split()])


def test_options_are_written_with_either_dash() -> None:
    words = [
        "--ckpt-path",
        "x",
        "--repo_name=y",
        "--branch-name",
        "iter/1",
        "--dry-run",
        "--exclude",
        "a-b_c",
        "--token-file=f",
    ]
    given = parse(words)
    assert (given.path, given.repo, given.branch, given.dry_run) == (Path("x"), "y", "iter/1", True)
    assert given.exclude == ["a-b_c"] and given.token_file == Path("f")
