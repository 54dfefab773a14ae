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
from ds_recipes.training.changes import environment_line, not_recorded, refuse_changes
from ds_recipes.training.identity import identity_of
from tests.house.tree import ROOT

OF_THE_CHECKPOINT = {"optimizer"}
"""Also allows a checkpoint that was saved without the optimizer's state."""


LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e4}, "use_cache": True}
SHORT = ("--max_steps", "100")


def identity(monkeypatch: pytest.MonkeyPatch, *flags: str, model: dict[str, Any] = LLAMA) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    config = load_config(["--config", str(Path("examples/tiny_alpaca.yaml")), *flags], env={})
    read: Any = SimpleNamespace(
        corpus=SimpleNamespace(fingerprint="data-1", weights=None),
        tokenizer_fingerprint="tokenizer-1",
        format_fingerprint="0123456789abcdef",
        tokens_version="1",
        long_documents="truncate",
    )
    return identity_of(config, make_plan(config, 2, 600), read, model)


def test_every_key_can_be_allowed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(identity(monkeypatch)) == set(CHANGES)
    assert set(CHANGES) >= OF_THE_CHECKPOINT


def test_all_differences_are_refused_at_once_and_allowed_ones_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = identity(monkeypatch, *SHORT)
    now = identity(monkeypatch, *SHORT, "--seed", "7", "--precision", "bf16", "--global_batch_size", "24")
    with pytest.raises(CheckpointError) as refused:
        refuse_changes(saved, now, ["seed"], "runs/x/iter_0000001")
    assert "precision: the checkpoint has fp32, this run has bf16\n" in str(refused.value)
    assert "precision.parameters: the checkpoint has float32, this run has bfloat16\n" in str(refused.value)
    assert "moments" not in str(refused.value)
    assert "global_batch_size: the checkpoint has 12, this run has 24" in str(refused.value)
    assert "seed" not in str(refused.value)
    allowed = refuse_changes(saved, now, ["seed", "precision", "global_batch_size", "schedule"], "x")
    assert sorted(allowed) == [
        "global_batch_size changed from 12 to 24",
        "precision changed from fp32 to bf16",
        "precision.parameters changed from float32 to bfloat16",
        "seed changed from 42 to 7",
    ]
    assert refuse_changes(saved, saved, [], "x") == []


def test_every_dtype_counts_and_engine_stage_and_offload_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def with_json(tree: dict[str, Any], *flags: str) -> str:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | tree))
        return identity(monkeypatch, "--ds_config", str(path), "--precision", "bf16", *flags)["precision"]  # type: ignore[no-any-return]

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


CHANGED_SCHEDULES = [
    ((), ("--lr", "2e-4"), {"lr"}),
    ((), ("--lr_min", "1e-6"), {"lr_min"}),
    ((), ("--weight_decay", "0"), {"weight_decay"}),
    ((), ("--adam_beta2", "0.99"), {"adam_beta2"}),
    ((), ("--adam_eps", "1e-6"), {"adam_eps"}),
    ((), ("--max_grad_norm", "0"), {"max_grad_norm"}),
    ((), ("--lr_warmup", "5"), {"warmup_steps"}),
    ((), ("--max_steps", "40"), {"decay_steps"}),
    (("--lr_decay", "10"), ("--lr_decay", "10", "--max_steps", "40"), set()),
    (("--lr_decay_style", "constant"), ("--lr_decay_style", "constant", "--max_steps", "40"), set()),
    (("--lr_decay_style", "inverse_sqrt"), ("--lr_decay_style", "inverse_sqrt", "--max_steps", "40"), set()),
    (
        ("--lr_decay_style", "wsd", "--lr_decay", "10"),
        ("--lr_decay_style", "wsd", "--lr_decay", "10", "--max_steps", "40"),
        {"total_steps"},
    ),
    ((), ("--lr_decay_style", "constant"), {"lr_decay_style", "decay_steps"}),
    ((), ("--eval_interval", "1", "--save_interval_iteration", "1", "--keep_last", "3"), set()),
]


@pytest.mark.parametrize(
    "then, now, differing",
    CHANGED_SCHEDULES,
    ids=lambda value: " ".join(sorted(value) if isinstance(value, set) else value),
)
def test_a_changed_schedule_is_named_entry_by_entry_and_a_longer_run_only_where_its_course_differs(
    monkeypatch: pytest.MonkeyPatch, then: tuple[str, ...], now: tuple[str, ...], differing: set[str]
) -> None:
    begin = ("--max_steps", "30", "--lr_warmup", "2")
    saved = identity(monkeypatch, *begin, *then)
    changed = identity(monkeypatch, *merged(begin, now))
    if not differing:
        assert refuse_changes(saved, changed, [], "x") == []
        return
    with pytest.raises(CheckpointError, match="--allow_change schedule") as refused:
        refuse_changes(saved, changed, [], "x")
    named = {line.split(":")[0].strip().removeprefix("schedule.") for line in str(refused.value).splitlines()[1:-1]}
    assert named == differing
    assert len(refuse_changes(saved, changed, ["schedule"], "x")) == len(differing)


def merged(first: tuple[str, ...], second: tuple[str, ...]) -> list[str]:
    """Flags of which the later ones win."""
    given = dict(zip(first[::2], first[1::2], strict=True)) | dict(zip(second[::2], second[1::2], strict=True))
    return [word for pair in given.items() for word in pair]


def test_of_the_model_what_it_computes_counts_and_the_rest_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = identity(monkeypatch)
    free = LLAMA | {"use_cache": False, "transformers_version": "9", "_name_or_path": "x", "a_new_entry": 0}
    assert refuse_changes(saved, identity(monkeypatch, model=free), [], "x") == []
    other = LLAMA | {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 5e5}}
    with pytest.raises(CheckpointError) as refused:
        refuse_changes(saved, identity(monkeypatch, model=other), [], "x")
    assert "model.rms_norm_eps: the checkpoint has 1e-06, this run has 1e-05" in str(refused.value)
    assert "model.rope_parameters.rope_theta: the checkpoint has 10000.0, this run has 500000.0" in str(refused.value)


def test_an_older_checkpoint_is_not_refused_for_what_it_does_not_record(monkeypatch: pytest.MonkeyPatch) -> None:
    now = identity(monkeypatch)
    old = {key: value for key, value in now.items() if key not in ("model", "schedule")}
    assert refuse_changes(old, now, [], "x") == []
    assert not_recorded(old, now) == ["model", "schedule"] and not_recorded(now, now) == []


@pytest.mark.parametrize(
    "ranks, says",
    [
        (4, "set --global_batch_size 12, which makes 3 micro-steps on 4 ranks"),
        (5, "12 rows cannot be shared by 5 ranks with batch_size_training 1: start 1, 2, 3, 4, 6, 12 ranks"),
    ],
)
def test_what_keeps_the_global_batch_is_said(monkeypatch: pytest.MonkeyPatch, ranks: int, says: str) -> None:
    saved = identity(monkeypatch)
    monkeypatch.chdir(ROOT)
    config = load_config(
        ["--config", "examples/tiny_alpaca.yaml", "--batch_size_training", "1", "--gradient_accumulation_steps", "2"],
        env={},
    )
    plan = make_plan(config, ranks, 600)
    now = saved | {"global_batch_size": str(plan.global_rows)}
    with pytest.raises(CheckpointError, match=says):
        refuse_changes(saved, now, [], "x", plan=plan)


def test_what_may_change_is_told_in_one_line() -> None:
    then = {"torch": "2.10", "ranks": "2", "code": "abc", "engine": "fsdp"}
    now = {"torch": "2.11", "ranks": "3", "engine": "fsdp", "wandb": "1"}
    assert environment_line(then, now) == "torch 2.10 -> 2.11; ranks 2 -> 3; wandb none -> 1; code abc -> none"
    assert environment_line(then, then) is None and environment_line({}, now) is None
