"""tools/plan.py as a user starts it: exit statuses, JSON, errors, and the README's table."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ds_recipes.config.load import load_config
from ds_recipes.config.schema import Config
from ds_recipes.errors import ConfigError, InputError
from ds_recipes.planner.command import STAND_INS, run
from ds_recipes.planner.find import find_architecture
from ds_recipes.planner.machine import memory_bytes
from tests.unit.planner.models import small

ROOT = Path(__file__).parents[3]
EXAMPLES = [f"examples/models/{name}.json" for name in ("llama2_7b", "llama2_13b", "llama2_70b", "mistral_7b")]
STATED = ["--context_size", "4096", "--activation_checkpointing"]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    status = run([*flags, "--json"], "")
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, document


def test_the_readmes_table_is_what_the_tool_prints(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--table", "--model_configs", *EXAMPLES, *STATED, "--gpu_memory", "80GB"], "")
    rows = capsys.readouterr().out.strip().splitlines()
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2 + len(EXAMPLES)
    assert [row for row in rows if row not in readme] == []


def test_it_runs_without_torch_or_transformers(tmp_path: Path) -> None:
    blocked = (
        "import sys\nfor name in ('torch', 'transformers', 'deepspeed', 'safetensors'):\n    sys.modules[name] = None\n"
    )
    code = (
        f"{blocked}import runpy\nsys.argv[0] = 'tools/plan.py'\nrunpy.run_path('tools/plan.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, "--model_config", EXAMPLES[0], *STATED, "--max_steps", "10"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    for part in ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "It fits", "10 steps"):
        assert part in ended.stdout


def test_exit_statuses_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model_config", EXAMPLES[0], *STATED, "--max_steps", "100", "--price_per_gpu_hour", "2")
    status, fits = planned(capsys, *flags)
    assert status == 0 and fits["fits"] and fits["suggestions"] == []
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
    assert sum(fits["gpu_bytes"][part] for part in parts) == pytest.approx(fits["gpu_bytes"]["tensors"], abs=len(parts))
    assert fits["run"]["cost"] == pytest.approx(fits["run"]["hours"] * 8 * 2)
    status, other = planned(capsys, *flags, "--gpu_memory", "20GB")
    assert status == 1 and not other["fits"] and any(one["fits"] for one in other["suggestions"])
    assert other["smallest_cluster"]["nodes"] > 1
    with pytest.raises(ConfigError, match="batch_size_training"):
        run(["--model_config", EXAMPLES[0], "--global_batch_size", "3"], "")


def test_the_smallest_cluster_fits_and_one_less_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    _, document = planned(capsys, "--model_config", EXAMPLES[2], *STATED)
    smallest = document["smallest_cluster"]
    flags = ("--model_config", EXAMPLES[2], *STATED, "--nodes")
    assert planned(capsys, *flags, str(smallest["nodes"]))[0] == 0
    assert planned(capsys, *flags, str(smallest["nodes"] - 1))[0] == 1


def test_a_suggestions_number_is_what_following_it_gives(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    offload = tmp_path / "offload.json"
    section = {"stage": 3, "reduce_bucket_size": 50_000_000, "offload_optimizer": {"device": "cpu"}}
    offload.write_text(json.dumps({"zero_optimization": section}))
    flags = ("--model_config", EXAMPLES[1], "--context_size", "4096", "--gpu_memory", "10GB")
    _, before = planned(capsys, *flags)
    suggested = {one["what"]: one["needed"] for one in before["suggestions"]}
    followed = {
        "--activation_checkpointing": ["--activation_checkpointing"],
        "--attn_implementation flash_attention_2": ["--attn_implementation", "flash_attention_2"],
        "--engine fsdp": ["--engine", "fsdp"],
        '"offload_optimizer": {"device": "cpu"}': ["--ds_config", str(offload)],
    }
    for what, more in followed.items():
        _, after = planned(capsys, *flags, *more)
        assert after["gpu_bytes"]["needed"] == pytest.approx(suggested[what], rel=1e-6), what


@pytest.mark.parametrize(
    "less", [["--activation_checkpointing"], ["--engine", "fsdp"], ["--attn_implementation", "flash_attention_2"]]
)
def test_what_should_need_less_does(capsys: pytest.CaptureFixture[str], less: list[str]) -> None:
    flags = ("--model_config", EXAMPLES[1], "--context_size", "4096", "--batch_size_training", "2")
    before, after = (planned(capsys, *flags, *more)[1]["gpu_bytes"]["needed"] for more in ([], less))
    assert after < before


def test_more_gpus_never_need_more_memory(capsys: pytest.CaptureFixture[str]) -> None:
    for engine in ("deepspeed", "fsdp"):
        flags = ("--model_config", EXAMPLES[3], *STATED, "--engine", engine, "--nodes")
        needed = [planned(capsys, *flags, str(nodes))[1]["gpu_bytes"]["needed"] for nodes in (1, 2, 4, 16)]
        assert needed == sorted(needed, reverse=True)


def test_the_length_of_the_run_follows_from_the_datas_size(capsys: pytest.CaptureFixture[str]) -> None:
    _, document = planned(
        capsys, "--model_config", EXAMPLES[0], *STATED, "--epoch_tokens", "1_000_000", "--num_epochs", "2"
    )
    assert document["run"]["total_steps"] == -(-2 * -(-1_000_000 // 4096) // 8)


@pytest.mark.parametrize(
    "text, expected", [("80GB", 80e9), ("79.6GiB", 79.6 * 2**30), ("81559MiB", 81559 * 2**20), ("40", 40e9)]
)
def test_sizes_of_memory(text: str, expected: float) -> None:
    assert memory_bytes(text) == int(expected)


@pytest.mark.parametrize("text", ["", "eighty", "80TB", "-1GB", "0GB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu_memory takes a size"):
        memory_bytes(text)


def settings(folder: Path) -> Config:
    return load_config(["--model_name", str(folder)], stand_ins=STAND_INS)


def write_model(folder: Path, values: dict[str, Any], leave_out: str = "nothing") -> int:
    """A folder with weights of one byte a number, and how many numbers they have."""
    import numpy as np
    import torch

    config = AutoConfig.for_model("llama", **small("llama"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters() if leave_out not in name}
    save_file({name: np.zeros(shape, np.int8) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return sum(one.numel() for one in model.parameters())


def test_the_sizes_of_an_unknown_family_are_read_from_its_files(tmp_path: Path) -> None:
    numel = write_model(tmp_path, {"model_type": "novel", **small("llama")})
    found = find_architecture(settings(tmp_path))
    assert found.model.numel == numel and found.model.exact and len(found.model.blocks) == 3 and not found.model.tied
    assert "'novel' are not known to the planner: their sizes were read from the files" in found.notes[0]


def test_files_that_do_not_fit_their_config_are_noted(tmp_path: Path) -> None:
    write_model(tmp_path, {"model_type": "llama", **small("llama")})
    assert find_architecture(settings(tmp_path)).notes == ()
    write_model(tmp_path, {"model_type": "llama", **small("llama")}, leave_out="layers.2.mlp")
    (note,) = find_architecture(settings(tmp_path)).notes
    assert re.search(r"hold [\d,]+ parameters, but its config.json describes [\d,]+", note)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    write_model(tmp_path, {"model_type": "novel", **small("llama")})
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: not a safetensors file"):
        find_architecture(settings(tmp_path))
