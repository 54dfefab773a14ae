"""The README's commands do what it says, and the quickstart runs from cold without a compiler."""

import re
import shlex
from pathlib import Path

import pytest

from ds_recipes.config.load import load_config
from tests.e2e.launchers import ROOT, run
from tools import convert_to_hf, upload_to_hub

MODELS = ("llama2_7b", "llama2_13b", "llama2_70b", "mistral_7b")
PLAN_TABLE = (
    "python tools/plan.py --table --gpu_memory 80GB --context_size 4096 --activation_checkpointing --model_configs "
    + " ".join(f"examples/models/{model}.json" for model in MODELS)
)

COVERED = {
    "make quickstart": "test_the_quickstart_runs_from_cold_without_a_compiler",
    "make test": "this test is part of it",
    "source .venv/bin/activate": "tests run in that environment",
    "deepspeed --num_gpus 2 train.py --config examples/tiny_alpaca.yaml": "test_training_commands",
    "deepspeed --num_gpus 2 train.py --config examples/tiny_text.yaml": "test_training_commands",
    "python train.py --help": "test_commands_that_only_print",
    "python train.py --config examples/tiny_alpaca.yaml --print_config": "test_commands_that_only_print",
    "python tools/inspect_data.py --config examples/tiny_alpaca.yaml": "test_tools_that_look_at_data",
    "python tools/index_jsonl.py --strict --json embedded/text.jsonl": "test_tools_that_look_at_data",
    "python tools/lint_ds_config.py ds_configs/zero3.json --engine fsdp --world 64": "test_tools_that_look_at_a_json",
    "python tools/lint_ds_config.py --explain overlap_comm": "test_tools_that_look_at_a_json",
    "python tools/doctor.py": "tests/clusters/test_doctor.py",
    "python tools/render_job.py --cluster abci-pbs --nodes 4 --gpus_per_node 8 --walltime 12:00:00 --config run.yaml": (
        "tests/unit/cluster/test_job_script.py"
    ),
    PLAN_TABLE: "tests/unit/planner/",
    "python tools/convert_to_hf.py --ckpt runs/tiny_alpaca/iter_0000060 --out runs/tiny_alpaca/hf": "the quickstart",
    'python tools/generate.py runs/tiny_alpaca/hf --prompt "def main("': "the quickstart",
    "python tools/upload_to_hub.py --path runs/tiny_alpaca/hf --repo NAME --branch iter_0000060 --dry_run": "test_upload.py",
}
"""Commands that run here as they stand. The others need a cluster or a large model: their settings are parsed."""

TOO_LARGE = "deepspeed --num_gpus 8 train.py --model_name meta-llama/Llama-2-7b-hf"
ON_A_CLUSTER = (
    "python tools/launch.py -- deepspeed --hostfile hostfile train.py --config run.yaml",
    "deepspeed --hostfile hostfile train.py --config run.yaml --expected_world_size 16",
    "mpirun -np 16 -hostfile hostfile python train.py --use_mpi --config run.yaml",
    "mpirun -np 8 python tools/compare_engines.py --use_mpi --config run.yaml --steps 50",
    "torchrun --nproc_per_node 8 train.py --config run.yaml",
    "srun -n 16 --kill-on-bad-exit=1 python train.py --config run.yaml",
    "mpirun -np 16 -hostfile hostfile python tools/doctor.py --config run.yaml",
    "python tools/plan.py --config run.yaml --nodes 8 --gpus_per_node 8 --gpu_memory 80GB",
)


CONVERT, UPLOAD = "python tools/convert_to_hf.py", "python tools/upload_to_hub.py"
NEEDING_A_MODEL = (
    f"{CONVERT} --ckpt outputs/checkpoint-500 --model meta-llama/Llama-2-7b-hf --out hf",
    f"{CONVERT} --model meta-llama/Llama-2-7b-hf --ckpt model.pt --out hf",
    f"{CONVERT} --run runs/my-model --start 600 --end 800 --increment 200 --jobs 2 --out hf",
    f"{UPLOAD} --path hf --repo NAME --each branch --start 600 --end 800 --increment 200",
)
"""Commands of tools whose kind `test_convert.py` and `test_upload.py` run on small models; these are parsed."""


def readme_commands() -> list[str]:
    """The lines of the README's indented blocks, continued lines joined and comments cut off."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines() if line.startswith("    ")]
    return [re.sub(r"\s+", " ", line) for line in lines]


def test_every_command_of_the_readme_is_run_or_parsed() -> None:
    found = [command for command in readme_commands() if not command.startswith(TOO_LARGE)]
    assert set(found) == set(COVERED) | set(ON_A_CLUSTER) | set(NEEDING_A_MODEL)


def test_settings_of_the_commands_for_a_cluster_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (large,) = [command for command in readme_commands() if command.startswith(TOO_LARGE)]
    config = load_config(shlex.split(large.partition("train.py")[2]), env={})
    assert config.run.global_batch_size == 128
    run_file = tmp_path / "run.yaml"
    run_file.write_text((ROOT / "examples" / "tiny_alpaca.yaml").read_text())
    for command in ON_A_CLUSTER:
        flags = shlex.split(re.sub(r".*(train|compare_engines|doctor|plan)\.py|--steps 50|--nodes .*", "", command))
        flags = [str(run_file) if flag == "run.yaml" else flag for flag in flags]
        assert load_config(flags, env={}).data.dataset == "alpaca"


@pytest.mark.parametrize("command", NEEDING_A_MODEL)
def test_commands_that_need_a_model_are_valid(command: str) -> None:
    words = shlex.split(command)[2:]
    folder = upload_to_hub.parse(words).path if command.startswith(UPLOAD) else convert_to_hf.parse(words).out
    assert folder == Path("hf")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            command, marks=[pytest.mark.slow] if "tiny_alpaca" in command else []
        )  # the quickstart runs it too
        for command, test in COVERED.items()
        if test == "test_training_commands"
    ],
)
def test_training_commands(command: str, tmp_path: Path) -> None:
    words = [*shlex.split(command), "--max_steps", "1", "--save_checkpoint_path", str(tmp_path / "run")]
    ended = run(words)
    assert ended.status == 0, ended.output
    assert (tmp_path / "run" / "iter_0000001" / "manifest.json").exists()


def test_commands_that_only_print(tmp_path: Path) -> None:
    help_text = run(shlex.split("python train.py --help"))
    assert help_text.status == 0 and "--save_checkpoint_path" in help_text.output
    printed = run(shlex.split("python train.py --config examples/tiny_alpaca.yaml --print_config"))
    assert printed.status == 0
    again = tmp_path / "run.yaml"
    again.write_text(printed.output)
    printed_again = run(["python", "train.py", "--config", str(again), "--print_config"])
    assert settings(printed_again.output) == settings(printed.output)


@pytest.mark.parametrize("command", [name for name, test in COVERED.items() if test == "test_tools_that_look_at_data"])
def test_tools_that_look_at_data(command: str) -> None:
    ended = run(shlex.split(command))
    assert ended.status == 0, ended.output
    assert "embedded/" in ended.output and ("documents" in ended.output or "0 faults" in ended.output), ended.output


@pytest.mark.parametrize(
    "command", [name for name, test in COVERED.items() if test == "test_tools_that_look_at_a_json"]
)
def test_tools_that_look_at_a_json(command: str) -> None:
    ended = run(shlex.split(command))
    assert ended.status == 0, ended.output
    assert "no errors" in ended.output or "overlap_comm" in ended.output, ended.output


def settings(printed: str) -> list[str]:
    """The printed lines without their comments, which say where a value came from."""
    return [re.sub(r"\s+#.*", "", line) for line in printed.splitlines()]


def test_the_quickstart_runs_from_cold_without_a_compiler(tmp_path: Path) -> None:
    """No compiler and no cache of compiled code."""
    cold = {
        "CXX": "/bin/false",
        "CC": "/bin/false",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    words = ["python", "tools/quickstart.py", "--max_steps", "24"]
    ended = run(words, env=cold, timeout=400)
    assert ended.status == 0, ended.output
    for row in (
        "loss",
        "validation loss",
        "tokens per second",
        "checkpoint",
        "exported model",
        "sample",
        "your own data",
    ):
        assert f"│ {row} " in ended.output, ended.output
    assert (ROOT / "runs" / "quickstart" / "hf" / "model.safetensors").exists()
