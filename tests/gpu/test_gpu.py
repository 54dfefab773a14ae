"""The whole path on one GPU: train in bf16, resume, export, and the CPU's losses in fp32. Run by `make gpu-test`."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_recipes.training.meter import peak_flops
from tests.unit.models.isolation import VOCABULARY, documents_of, documents_that_change

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300

NEEDS_FLASH = pytest.mark.skipif(find_spec("flash_attn") is None, reason="the flash-attn package is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use"),
]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default, made here: a GPU machine need not have run `make setup`."""
    folder = tmp_path_factory.mktemp("default") / "embedded"
    run(["tools/embedded_default.py", str(folder)])
    return folder


def run(arguments: list[str], env: dict[str, str] | None = None) -> str:
    """Run a Python program of the project; its output, which is shown if it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def train(embedded: Path, folder: Path, *flags: str, env: dict[str, str] | None = None) -> str:
    settings = [
        *("--model_name", str(embedded / "model"), "--dataset", "alpaca"),
        *("--train_data", str(embedded / "alpaca.jsonl")),
        *("--validation_data", str(embedded / "alpaca_validation.jsonl"), "--context_size", "256"),
        *("--batch_size_training", "6", "--global_batch_size", "12", "--lr", "1e-3"),
        *("--save_checkpoint_path", str(folder), *flags),
    ]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "train.py"]
    return run([*launcher, *settings], env)


def metrics(folder: Path, key: str = "loss") -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if key in line}


@pytest.fixture(scope="module")
def in_bf16(embedded: Path) -> tuple[Path, str]:
    """A run of 40 steps in bf16 with checkpoints at 20 and 40, and what it printed."""
    folder = embedded.parent / "bf16"
    return folder, train(
        embedded, folder, "--precision", "bf16", "--max_steps", "40", "--save_interval_iteration", "20"
    )


def test_it_learns_in_bf16_with_fp32_masters(in_bf16: tuple[Path, str]) -> None:
    folder, output = in_bf16
    lines = metrics(folder)
    assert lines[40]["loss"] < 0.9 * lines[1]["loss"]
    known = peak_flops(torch.cuda.get_device_name(), "bf16") is not None
    assert lines[40]["memory_gib"] > 0 and (lines[40]["mfu"] is not None) == known
    said = [" ".join(line.split()) for line in output.splitlines()]
    for line in ("parameters bfloat16", "master float32", "moments float32", "optimizer device cuda"):
        assert line in said, output


def test_resumed_it_goes_on_where_it_was(embedded: Path, in_bf16: tuple[Path, str], tmp_path: Path) -> None:
    """The first loss is equal bit for bit; later ones may differ by the order of sums in backward kernels."""
    whole, _ = in_bf16
    folder = tmp_path / "resumed"
    folder.mkdir()
    shutil.copytree(whole / "iter_0000020", folder / "iter_0000020")
    train(embedded, folder, "--precision", "bf16", "--max_steps", "40", "--save_interval_iteration", "20")
    mine, theirs = metrics(folder), metrics(whole)
    assert mine[21]["loss"] == theirs[21]["loss"]
    for step in range(22, 41):
        assert mine[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=5e-3)
        assert mine[step]["data_hash"] == theirs[step]["data_hash"]


def test_it_exports_and_loads_with_plain_transformers(in_bf16: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = in_bf16
    output = run(["tools/convert_to_hf.py", "--ckpt", str(folder / "iter_0000040"), "--out", str(tmp_path / "hf")])
    assert "in bfloat16" in output and "loads with plain transformers" in output


@pytest.mark.parametrize("offload", [False, True])
def test_in_fp32_the_losses_are_the_cpus(embedded: Path, tmp_path: Path, offload: bool) -> None:
    flags = ["--precision", "fp32", "--max_steps", "10"]
    on_gpu = [*flags, "--ds_config", "ds_configs/zero3_offload.json"] if offload else flags
    train(embedded, tmp_path / "gpu", *on_gpu)
    train(embedded, tmp_path / "cpu", *flags, env={"CUDA_VISIBLE_DEVICES": ""})
    mine, theirs = metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu")
    assert mine[1]["loss"] == pytest.approx(theirs[1]["loss"], rel=1e-5)
    assert mine[1]["grad_norm"] == pytest.approx(theirs[1]["grad_norm"], rel=1e-4)
    for step in range(2, 11):
        assert mine[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-3)


def test_the_benchmark_of_training_runs(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--context", "1024", "--seconds", "10", "--json", str(tmp_path / "result.json")]
    run(["benchmarks/gpu_train.py", *arguments])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["tokens_per_sec"] > 0 and result["peak_memory_gib"] > 0
    assert result["loss_last"] < result["loss_first"] + 0.5


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flash_attention_2", marks=NEEDS_FLASH)])
def test_packed_documents_do_not_see_each_other(implementation: str) -> None:
    """In bfloat16 and by a GPU's kernels too: changing a document leaves every bit of the others' logits as it was."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=implementation,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device="cuda", dtype=torch.bfloat16).eval()
    assert model.config._attn_implementation == implementation
    rows = documents_of(((90, 300, 1, 121), (128, 128, 200, 56)))  # two rows of 512 tokens
    for which in range(8):
        assert documents_that_change(model, rows, which) == [which]
    if implementation == "sdpa":
        mistake: dict[str, Any] = {"attention_mask": torch.ones(2, 512, dtype=torch.int64, device="cuda")}
        assert documents_that_change(model, rows, 1, **mistake) == [1, 2, 3]
    else:
        borders = torch.tensor([0, 1024], dtype=torch.int32, device="cuda")
        mistake = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 1024, "max_length_k": 1024}
        assert documents_that_change(model, rows, 1, **mistake) == [1, 2, 3, 4, 5, 6, 7]
