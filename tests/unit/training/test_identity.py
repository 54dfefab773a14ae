"""What must stay the same is what may be allowed to change, key by key."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_recipes.config.checkpoint_settings import CHANGES
from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.errors import CheckpointError
from ds_recipes.training.identity import identity_of, refuse_changes
from tests.house.tree import ROOT

OF_THE_CHECKPOINT = {"optimizer"}
"""Also allows a checkpoint that was saved without the optimizer's state."""


REST = "master float32, moments float32, gradient accumulation float32, reduction float32"
IN_FP32, IN_BF16 = f"fp32: parameters float32, {REST}", f"bf16: parameters bfloat16, {REST}"


def identity(monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, str]:
    monkeypatch.chdir(ROOT)
    config = load_config(["--config", str(Path("examples/tiny_alpaca.yaml")), *flags], env={})
    read: Any = SimpleNamespace(
        corpus=SimpleNamespace(fingerprint="data-1", weights=None),
        tokenizer_fingerprint="tokenizer-1",
        format_fingerprint="0123456789abcdef",
        long_documents="truncate",
    )
    return identity_of(config, make_plan(config, 2), read)


def test_every_key_can_be_allowed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(identity(monkeypatch)) == set(CHANGES)
    assert set(CHANGES) >= OF_THE_CHECKPOINT


def test_all_differences_are_refused_at_once_and_allowed_ones_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = identity(monkeypatch)
    now = identity(monkeypatch, "--seed", "7", "--precision", "bf16", "--global_batch_size", "24")
    with pytest.raises(CheckpointError) as refused:
        refuse_changes(saved, now, ["seed"], "runs/x/iter_0000001")
    assert f"precision: the checkpoint has {IN_FP32}, this run has {IN_BF16}\n" in str(refused.value)
    assert "global_batch_size: the checkpoint has 12, this run has 24" in str(refused.value)
    assert "seed" not in str(refused.value)
    allowed = refuse_changes(saved, now, ["seed", "precision", "global_batch_size"], "x")
    assert sorted(allowed) == [
        "global_batch_size changed from 12 to 24",
        f"precision changed from {IN_FP32} to {IN_BF16}",
        "seed changed from 42 to 7",
    ]
    assert refuse_changes(saved, saved, [], "x") == []


def test_every_dtype_counts_and_engine_stage_and_offload_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def with_json(tree: dict[str, Any], *flags: str) -> str:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | tree))
        return identity(monkeypatch, "--ds_config", str(path), "--precision", "bf16", *flags)["precision"]

    base = with_json({})
    changed = [
        with_json({"communication_data_type": "bf16"}),
        with_json({"data_types": {"grad_accum_dtype": "bf16"}}),
    ]
    assert len({base, *changed}) == 3
    free = [
        with_json({}, "--engine", "fsdp"),
        with_json({"zero_optimization": {"stage": 2}}),
        with_json({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}),
    ]
    assert set(free) == {base}


def test_changed_files_are_named_with_both_fingerprints_and_moved_ones_are_not() -> None:
    before = [("a.jsonl", "1"), ("b.jsonl", "2"), ("c.jsonl", "3"), ("gone.jsonl", "4")]
    now = [("a.jsonl", "1"), ("b.jsonl", "20"), ("moved.jsonl", "3"), ("new.jsonl", "5")]
    with pytest.raises(CheckpointError) as refused:
        refuse_changes({"data": "x"}, {"data": "y"}, [], "runs/x/iter_0000001", before, now)
    lines = [line.strip() for line in str(refused.value).splitlines()]
    assert lines[1:5] == [
        "data: the checkpoint has x, this run has y",
        "b.jsonl: 2 then, 20 now",
        "gone.jsonl: 4 then, not there now",
        "new.jsonl: not there then, 5 now",
    ]
    many = [(f"{number}.jsonl", "1") for number in range(50)]
    with pytest.raises(CheckpointError, match="and 45 more files"):
        refuse_changes({"data": "x"}, {"data": "y"}, [], "x", many, [])
