"""Files that cannot be used are named before anything heavy is loaded, with what to do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_recipes.config.async_io import missing_for_async_io
from ds_recipes.config.check import check_inputs
from ds_recipes.config.load import load_config
from ds_recipes.config.model_check import is_folder_name
from tests.house.tree import ROOT
from tests.unit.config.settings import write_json


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a tokenizer, data and a run folder, all fine."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "tokenizer", "data", "run"):
        Path(name).mkdir()
    Path("model/config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    Path("tokenizer/tokenizer.json").write_text("{}")
    Path("data/train.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def problems(**changes: str) -> list[str]:
    if "prompt_template" in changes:
        changes["dataset"] = "alpaca"
    settings = {
        "model_name": "./model",
        "tokenizer_name": "./tokenizer",
        "train_data": "data/train.jsonl",
        "save_checkpoint_path": "run",
    } | changes
    return problems_of([f"--{name}={value}" for name, value in settings.items() if value])


def problems_of(argv: list[str]) -> list[str]:
    """The problems, with this test's folder as HERE."""
    return [problem.replace(str(Path.cwd()), "HERE") for problem in check_inputs(load_config(argv))]


def test_what_is_fine_gives_no_problem(here: Path) -> None:
    assert problems() == []
    assert problems(model_name="owner/name", tokenizer_name="owner/name") == []
    assert problems(save_checkpoint_path="new/run/folder", load_checkpoint_path="run") == []
    assert problems(model_name="", model_config="model/config.json") == []


CASES = {
    ("train_data", "data/trian.jsonl"): (
        "--train_data data/trian.jsonl (command line): there is no such file; did you mean data/train.jsonl?"
    ),
    ("train_data", "date/train.jsonl"): (
        "--train_data date/train.jsonl (command line): there is no such file (date does not exist); check the path (looked in HERE)"
    ),
    ("train_data", "run"): (
        "--train_data run (command line): is a folder without data files (.jsonl, .json, .jsonl.gz, .json.gz, "
        ".jsonl.zst, .json.zst, .parquet, .csv, .bin)"
    ),
    ("train_data", "2024:10/x.jsonl"): (
        "--train_data 2024:10/x.jsonl (command line): there is no such file (10 does not exist); check the path (looked in "
        "HERE). What stands before the first colon was read as its weight; a path that begins so is written "
        "./2024:10/x.jsonl"
    ),
    ("train_data", "12:*.csv"): (
        "--train_data 12:*.csv (command line): no file matches this pattern. What stands before the first colon was read "
        "as its weight; a path that begins so is written ./12:*.csv"
    ),
    ("train_data", "2:run"): (
        "--train_data 2:run (command line): is a folder without data files (.jsonl, .json, .jsonl.gz, .json.gz, "
        ".jsonl.zst, .json.zst, .parquet, .csv, .bin). What stands before the first colon was read as its weight; a path "
        "that begins so is written ./2:run"
    ),
    ("train_data", "data/*.csv"): "--train_data data/*.csv (command line): no file matches this pattern",
    ("prompt_template", "gone.json"): (
        "--prompt_template gone.json (command line): there is no such file; check the path (looked in HERE)"
    ),
    ("validation_data", "empty"): (
        "--validation_data empty (command line): the file is empty; name one with a JSON object a line, or a JSON array"
    ),
    ("model_name", "./modle"): "--model_name ./modle (command line): there is no such folder; did you mean model?",
    ("model_name", "data"): (
        "--model_name data (command line): no config.json in this folder; check the path (looked in HERE)"
    ),
    (
        "model_name",
        "./empty",
    ): "--model_name ./empty (command line): is a file; name the folder with config.json and safetensors files",
    ("model_name", "broken"): (
        "--model_name broken (command line): broken/config.json cannot be read as JSON: Expecting value: line 1 column 1 (char 0)"
    ),
    ("tokenizer_name", "./nowhere"): (
        "--tokenizer_name ./nowhere (command line): there is no such folder; check the path (looked in HERE)"
    ),
    ("tokenizer_name", "data"): (
        "--tokenizer_name data (command line): no tokenizer in this folder (tokenizer.json, tokenizer_config.json or "
        "tokenizer.model)"
    ),
    ("context_size", "4096"): (
        "context_size is 4096 (command line), but the model has 2048 positions (max_position_embeddings in "
        "model/config.json). Set context_size to 2048 at most."
    ),
    ("save_checkpoint_path", "empty"): (
        "--save_checkpoint_path empty (command line): empty is a file; name a folder (it is made)"
    ),
    ("save_checkpoint_path", "empty/run"): (
        "--save_checkpoint_path empty/run (command line): empty is a file; name a folder (it is made)"
    ),
    ("load_checkpoint_path", "gone"): (
        "--load_checkpoint_path gone (command line): there is no such folder; check the path (looked in HERE)"
    ),
    ("load_checkpoint_path", "empty"): "--load_checkpoint_path empty (command line): is a file; name a run folder",
}


@pytest.mark.parametrize(("name", "value"), CASES)
def test_what_cannot_be_used_is_one_line(name: str, value: str, here: Path) -> None:
    Path("empty").touch()
    Path("broken").mkdir()
    Path("broken/config.json").touch()
    assert problems(**{name: value}) == [CASES[name, value]]


def test_a_file_of_the_whole_name_is_not_taken_for_one_with_a_weight(here: Path) -> None:
    for name in ("10/x.jsonl", "2024:10/x.jsonl"):
        Path(name).parent.mkdir()
        Path(name).write_text('{"text": "a"}\n')
    assert problems(train_data="2024:10/x.jsonl") == [
        "--train_data 2024:10/x.jsonl (command line): there is 2024:10/x.jsonl, but 2024 was read as a weight of 10/x.jsonl. "
        "Write ./2024:10/x.jsonl"
    ]
    assert problems(train_data="./2024:10/x.jsonl") == problems(train_data="2024.0:10/x.jsonl") == []


def test_empty_parts_of_a_folder_or_pattern_are_no_problem(here: Path) -> None:
    Path("data/none.jsonl").touch()
    assert problems(train_data="data") == problems(train_data="data/*.jsonl") == []
    assert "data/none.jsonl" in problems(train_data="data/none.jsonl")[0]


def test_all_files_are_reported_at_once(here: Path) -> None:
    assert len(problems(train_data="a", model_name="./b", tokenizer_name="./c", load_checkpoint_path="d")) == 4


def test_a_path_from_a_run_file_is_reported_with_its_line(here: Path) -> None:
    Path("run.yaml").write_text("model_name: ./model\nsave_checkpoint_path: run\ntrain_data: [data/train.jsonl, b]\n")
    assert problems_of(["--config", "run.yaml"]) == [
        "run.yaml:3: train_data b: there is no such file; check the path (looked in HERE)"
    ]


def test_a_config_of_another_kind_of_model_says_nothing_about_positions(here: Path) -> None:
    Path("model/config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert problems(context_size="100000") == []


def test_folders_and_hub_ids(here: Path) -> None:
    assert [name for name in ("model", "./x", "../x", "/x", "~/x", "a/b/c", "x/") if not is_folder_name(name)] == []
    assert [name for name in ("gpt2", "owner/name", "owner/name.v1") if is_folder_name(name)] == []


def without_torch(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """train.py in a Python that has what reads the settings, and neither torch nor DeepSpeed nor anything else."""
    packages = folder / "packages"
    packages.mkdir()
    for name in ("yaml", "_yaml", "hjson", "numpy", "numpy.libs", "xxhash"):
        source = next((Path(path) / name for path in sys.path if (Path(path) / name).exists()), None)
        if source is not None:
            (packages / name).symlink_to(source)
    return subprocess.run(
        [sys.executable, "-S", str(ROOT / "train.py"), *argv],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={"PYTHONPATH": str(packages), "PATH": "/usr/bin:/bin"},
    )


def test_an_engine_that_is_not_installed_is_one_line_that_says_how_to_get_it(here: Path) -> None:
    given = "--model_name ./model --tokenizer_name ./tokenizer --train_data data/train.jsonl --save_checkpoint_path run"
    done = without_torch(here, *given.split(), "--engine", "deepspeed")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert (
        "--engine deepspeed (command line): DeepSpeed is not installed. Run 'pip install deepspeed', or use --engine fsdp, which "
        "needs only torch." in done.stderr
    )


@pytest.mark.parametrize(
    ("found", "is_fine"),
    [("2.10.1+cu128", False), ("1.13", False), ("2.11.0", True), ("2.13.0+cpu", True), ("3.0", True)],
)
def test_fsdp_needs_a_torch_that_has_it(found: str, is_fine: bool, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is read from the installed package's metadata, which a folder before all others on the path gives here."""
    metadata = here / f"torch-{found}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {found}\n")
    monkeypatch.syspath_prepend(here)
    lines = problems(engine="fsdp")
    assert lines == (
        []
        if is_fine
        else [
            (
                f"--engine fsdp (command line): FSDP2 needs torch 2.11 or later, and {found} is installed. Run 'pip install -U "
                "torch', or use --engine deepspeed."
            )
        ]
    )


def test_nvme_offload_needs_its_folder_and_what_it_is_built_with(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device, path, folder_lines in (("nvme", "nvme", 0), ("nvme", "nmve", 1), ("cpu", "nmve", 0)):
        Path("nvme").mkdir(exist_ok=True)
        write_json(
            here, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": device, "nvme_path": path}}}
        )
        lines = problems(ds_config="zero3.json")
        asks = device == "nvme" and missing_for_async_io() is not None
        assert len(lines) == folder_lines + asks
        if folder_lines:
            assert lines[-1] == (
                "zero3.json: zero_optimization.offload_optimizer.nvme_path is nmve: there is no such folder on this host; name one "
                "on a fast local disk; did you mean nvme?"
            )
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "no-compiler")
    write_json(here, {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "nvme"}}})
    expected = missing_for_async_io()
    assert problems(ds_config="zero3.json") == ([] if expected is None else [f"zero3.json: {expected}"])


def test_state_on_nvme_cannot_be_saved_for_other_programs(here: Path) -> None:
    Path("nvme").mkdir()
    for device, expected in (("nvme", 1), ("cpu", 0)):
        section = {"stage": 3, "offload_optimizer": {"device": device, "nvme_path": "nvme"}}
        write_json(here, {"zero_optimization": section})
        lines = [
            line
            for line in problems(ds_config="zero3.json", checkpoint_format="deepspeed")
            if "checkpoint_format" in line
        ]
        assert len(lines) == expected
        assert all(
            re.match(r"--checkpoint_format deepspeed \(command line\): zero3\.json has the state on NVMe", line)
            for line in lines
        )


FOREIGN = {
    "Kotoba-Recipes": (
        "iter_0000100/model.pt",
        "iter_0000200/model.pt",
        "iter_0000200/optimizer.pt",
        "latest_iteration.txt",
    ),
    "Megatron-LM": ("iter_0000200/mp_rank_00/model_optim_rng.pt", "latest_checkpointed_iteration.txt"),
    "DeepSpeed": ("global_step200/mp_rank_00_model_states.pt", "latest"),
    "torch.distributed.checkpoint": ("step200/.metadata", "step200/__0_0.distcp"),
    "the Hugging Face Trainer": ("checkpoint-90/trainer_state.json", "checkpoint-200/trainer_state.json"),
}


@pytest.mark.parametrize("program", FOREIGN)
def test_another_programs_run_is_named_with_how_to_use_its_weights(program: str, here: Path) -> None:
    """As the folder to begin from, in each of its settings, and as the run folder where its names are those of ours."""
    for name in FOREIGN[program]:
        (here / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "old" / name).touch()
    before = sorted(here.rglob("*"))
    newest = max((name.split("/")[0] for name in FOREIGN[program] if "/" in name), key=lambda name: (len(name), name))
    for settings in ({"load_checkpoint_path": "old"}, {"resume": "old"}):
        first, *others = problems(**settings)
        assert f"holds checkpoints of {program} (the newest is {newest})" in first, first
        assert "--model_name" in first and not [other for other in others if "no checkpoint" not in other]
    both = problems(load_checkpoint_path="old", save_checkpoint_path="old")
    assert len(both) == 1 and program in both[0]
    alone = problems(save_checkpoint_path="old")
    assert len(alone) == newest.startswith("iter_")
    assert sorted(here.rglob("*")) == before


def test_a_run_of_ours_beside_another_programs_is_ours(here: Path) -> None:
    for name in ("iter_0000100/model.pt", "iter_0000200/manifest.json"):
        (here / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "run" / name).touch()
    assert problems(load_checkpoint_path="run") == []
