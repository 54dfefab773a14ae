"""Code that comes with a model, a tokenizer or data does not run unless it is asked for: what it would write is not there."""

import json
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import xxhash

from tests.e2e.launchers import ROOT
from tests.nano import make_nano
from tests.ranks.launch import fork_rank, wait_for
from tests.ranks.training import train

CODE = """
from pathlib import Path
Path({canary!r}).write_text("this code has run")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""
MODEL_MAP = {
    "AutoConfig": "own_code.Config",
    "AutoModelForCausalLM": "own_code.Model",
    "AutoTokenizer": ["own_code.Tokenizer", None],
}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def checkpoint(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("begun") / "run"
    ended = train(1, *flags(nano, run), outputs=run.with_name("outputs"))
    assert ended.statuses == (0,), ended.text
    return run / "iter_0000001"


def flags(nano: Path, run: Path, steps: int = 1) -> list[str]:
    given = {
        "config": nano,
        "save_checkpoint_path": run,
        "max_steps": steps,
        "lr_decay_style": "constant",
        "lr_warmup": 0,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + ["--run_validation", "false"]


def with_code(model: Path, into: Path, model_type: str) -> Path:
    """A copy of a model's folder with a file of Python, which its config and its tokenizer name; where the canary would be."""
    shutil.copytree(model, into)
    canary = into.with_name(f"{into.name}-canary")
    for name in ("own_code.py", "tokenization_own.py", "dataset.py"):
        (into / name).write_text(CODE.format(canary=str(canary)))
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((into / name).read_text())
        (into / name).write_text(json.dumps(content | {"auto_map": MODEL_MAP}))
    config = json.loads((into / "config.json").read_text())
    (into / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return canary


def tool(name: str, arguments: Sequence[str]) -> None:
    sys.argv = [name, *arguments]
    runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")


def run_tool(folder: Path, name: str, *arguments: str) -> tuple[int | None, str]:
    output = folder / f"output-{name}"
    process = fork_rank(tool, (name, arguments), output)
    assert wait_for([process], 120)
    return process.exitcode, output.read_text(errors="replace")


NEED_NO_CODE = ("plan.py", "doctor.py", "convert_to_hf.py", "upload_to_hub.py")
"""They ask the files alone; the third has all that it needs in the checkpoint."""


@pytest.mark.parametrize("model_type", ["llama", "of_its_own"])
def test_no_program_runs_what_lies_in_a_models_folder(
    nano: Path, checkpoint: Path, tmp_path: Path, model_type: str
) -> None:
    """A type that transformers knows is read without the code; another one is refused, with what to do."""
    model = tmp_path / "model"
    canary = with_code(nano.parent / "model", model, model_type)
    known = model_type == "llama"
    given = ["--model_name", str(model)]
    ended = train(1, *flags(nano, tmp_path / "run"), *given, outputs=tmp_path / "outputs")
    assert ended.statuses == ((0,) if known else (2,)), ended.text
    assert known or "--trust_remote_code" in ended.text
    run_file = ["--config", str(nano), *given]
    for name, arguments in (
        ("inspect_data.py", run_file),
        ("plan.py", [*run_file, "--gpus_per_node", "2"]),
        ("doctor.py", ["--quick", *run_file, "--save_checkpoint_path", str(tmp_path / "run")]),
        ("generate.py", [str(model), "--prompt", "river", "--max_new_tokens", "1"]),
        ("upload_to_hub.py", ["--path", str(model), "--repo", "me/model", "--dry_run"]),
        ("convert_to_hf.py", ["--ckpt", str(checkpoint), "--model", str(model), "--out", str(tmp_path / "out")]),
    ):
        status, text = run_tool(tmp_path, name, *arguments)
        assert not canary.exists(), name
        assert "Traceback" not in text, text
        if known or name in NEED_NO_CODE:
            assert status == 0, text
        else:
            assert status and "trust_remote_code" in text, text
    assert not canary.exists()


def put_code_into(checkpoint: Path, model: Path) -> None:
    """A checkpoint whose config names code that lies beside it, with the hashes that belong to it."""
    shutil.copy(model / "own_code.py", checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"auto_map": MODEL_MAP, "model_type": "of_its_own"}))
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    for name in ("config.json", "own_code.py"):
        data = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    content = {key: value for key, value in manifest.items() if key not in ("format", "version", "xxh3_128")}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"xxh3_128": xxhash.xxh3_128_hexdigest(canonical)}))


def test_code_that_came_with_a_checkpoint_does_not_run(nano: Path, checkpoint: Path, tmp_path: Path) -> None:
    canary = with_code(nano.parent / "model", tmp_path / "model", "of_its_own")
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parent, run)
    put_code_into(run / checkpoint.name, tmp_path / "model")
    status, text = run_tool(
        tmp_path, "convert_to_hf.py", "--ckpt", str(run / checkpoint.name), "--out", str(tmp_path / "out")
    )
    assert status and "trust_remote_code" in text and "Traceback" not in text, text
    ended = train(1, *flags(nano, run, 2), outputs=tmp_path / "outputs")
    assert ended.statuses == (0,) and (run / "iter_0000002").is_dir(), ended.text
    assert not canary.exists()


def test_a_script_beside_the_data_does_not_run(nano: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    canary = with_code(nano.parent / "model", tmp_path / "model", "llama")
    data.mkdir()
    shutil.copy(nano.parent / "train.jsonl", data)
    for name in ("data.py", "__init__.py", "conftest.py"):
        shutil.copy(tmp_path / "model" / "own_code.py", data / name)
    given = ["--train_data", str(data)]
    ended = train(1, *flags(nano, tmp_path / "run"), *given, outputs=tmp_path / "outputs")
    status, text = run_tool(tmp_path, "index_jsonl.py", str(data))
    assert ended.statuses == (0,) and status == 0, ended.text + text
    assert not canary.exists()


def test_where_it_is_asked_for_it_does_run(nano: Path, tmp_path: Path) -> None:
    """So that the other tests can fail."""
    canary = with_code(nano.parent / "model", tmp_path / "model", "of_its_own")
    given = ["--model_name", str(tmp_path / "model"), "--trust_remote_code"]
    train(
        1, *flags(nano, tmp_path / "run"), *given, outputs=tmp_path / "outputs", env={"HF_HOME": str(tmp_path / "hf")}
    )
    assert canary.exists()
