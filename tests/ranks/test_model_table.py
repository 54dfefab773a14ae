"""The table of models: real runs of tiny models of any type, kept as they come, and gone on with after a type that hangs."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tools import model_table
from tools.tiny_models import VOCABULARY_SIZE, causal_types, tiny_config


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_next", "deepseek_v2", "opt", "bert"])
def test_a_tiny_model_has_every_kind_of_layer_and_no_dropout(model_type: str) -> None:
    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert config.vocab_size == VOCABULARY_SIZE
    assert not any(value for name, value in vars(config).items() if "drop" in name and isinstance(value, float))
    if model_type == "qwen3_next":
        assert set(config.layer_types) == {"linear_attention", "full_attention"}


def test_types_are_those_of_transformers() -> None:
    assert {"llama", "mixtral", "deepseek_v3"} <= set(causal_types())


@pytest.mark.slow
def test_types_are_trained_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, page = tmp_path / "results.json", tmp_path / "models.md"
    flags = ["--results", str(results), "--page", str(page), "--types"]
    monkeypatch.setattr(model_table, "LEAST_SECONDS", 0)
    assert model_table.main([*flags, "opt", "--seconds", "0.1"]) == 0  # two types that hang, as far as it can tell
    assert json.loads(results.read_text())["opt"]["fsdp/fp32"]["error"] == "not done within 0 s"
    monkeypatch.undo()
    assert model_table.main([*flags, "opt", "llama", "--failed"]) == 0
    kept = json.loads(results.read_text())
    for name, packed in (("llama", True), ("opt", False)):
        for run in kept[name].values():
            assert model_table.trains(run) and run["packed"] == packed, run
    first = results.stat().st_mtime_ns
    assert model_table.main([*flags, "opt", "llama"]) == 0  # all is known
    assert results.stat().st_mtime_ns == first
    assert re.search(r"^\| llama \| LlamaForCausalLM \| yes \| yes \| yes \|", page.read_text(), re.MULTILINE)
    assert "**2 train with ZeRO-3 and with FSDP2**" in page.read_text()
