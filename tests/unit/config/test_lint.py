"""The linter's parts: lines, batch arithmetic, memory, combinations, explanations, and the program itself."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.config.ds.table import ds_table
from ds_recipes.config.lint.explain import explain
from ds_recipes.config.lint.lines import find_places
from ds_recipes.config.lint.memory import memory_of
from ds_recipes.config.lint.report import ERROR, NOTE, UNSUPPORTED, WARNING, lint_file, lint_tree
from tests.unit.config.lint_oracle import ROOT

TOOL = ROOT / "tools" / "lint_ds_config.py"


def zero(stage: int = 3, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


def offload(**keys: Any) -> dict[str, Any]:
    return zero(offload_optimizer=keys)


def batch(world: int | None, train: Any = None, micro: Any = None, steps: Any = None) -> tuple[str, str]:
    """What a step will be, and the first error's text."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given = {name: value for name, value in zip(names, (train, micro, steps), strict=True) if value is not None}
    report = lint_tree(zero() | given, world=world)
    return report.batch, report.of(ERROR)[0].text if report.of(ERROR) else ""


@pytest.mark.parametrize(
    "world, given, words",
    [
        (64, (256, 2, 2), "256 rows a step = 2 a rank x 2 micro-batches x 64 ranks"),
        (64, (256, 2, None), "256 rows a step = 2 a rank x 2 micro-batches x 64 ranks"),
        (64, (256, None, 2), "256 rows a step = 2 a rank x 2 micro-batches x 64 ranks"),
        (64, (256, None, None), "256 rows a step = 4 a rank x 1 micro-batches x 64 ranks"),
        (64, (None, 3, 5), "960 rows a step = 3 a rank x 5 micro-batches x 64 ranks"),
        (64, (None, 3, None), "192 rows a step = 3 a rank x 1 micro-batches x 64 ranks"),
        (64, (None, 3.0, None), "192 rows a step = 3 a rank x 1 micro-batches x 64 ranks"),
        (64, ("auto", "auto", "auto"), "the run sets the rows of a step over 64 ranks"),
        (64, (None, None, 8), "the run sets the rows of a step over 64 ranks"),
        (None, (256, 2, 2), "256 rows a step = 2 x 2 x 64 ranks; no others"),
        (None, (256, 2, None), ""),
    ],
)
def test_what_a_step_will_be(world: int | None, given: tuple[Any, ...], words: str) -> None:
    assert batch(world, *given) == (words, "")


@pytest.mark.parametrize(
    "world, given, texts",
    [
        (64, (250, None, None), ("does not divide over 64 ranks", "Write 192 or 256")),
        (64, (250, 2, None), ("train_micro_batch_size_per_gpu 2", "Write 128 or 256")),
        (64, (32, None, None), ("Write 64",)),
        (64, (512, 2, 2), ("x 64 ranks is 256", "Write 256, or gradient_accumulation_steps 4")),
        (None, (10, 4, 2), ("no number of ranks", "Write 8 or 16")),
        (4, (0, None, None), ("above 0",)),
    ],
)
def test_what_does_not_divide_names_what_does(
    world: int | None, given: tuple[Any, ...], texts: tuple[str, ...]
) -> None:
    words, error = batch(world, *given)
    assert not words
    assert [text for text in texts if text not in error] == []


def test_batches_agree_with_deepspeeds_own_rule() -> None:
    """train = micro x steps x world, with the missing ones by whole division (runtime/config.py)."""
    for world in (1, 2, 3, 8):
        for train in (1, 6, 8, 24, 48):
            for micro in (None, 1, 2, 3):
                for steps in (None, 1, 2, 4):
                    m = micro or (train // world // steps if steps else train // world)
                    s = steps or (train // micro // world if micro else 1)
                    is_accepted = m > 0 and s > 0 and train == m * s * world
                    assert bool(batch(world, train, micro, steps)[1]) != is_accepted, (world, train, micro, steps)


def test_ranks_that_share_rows_and_groups_that_do_not_fit() -> None:
    assert (
        "3 groups of ranks"
        in lint_tree(zero() | {"sequence_parallel_size": 2, "train_micro_batch_size_per_gpu": 1}, world=6).batch
    )
    assert lint_tree(zero() | {"sequence_parallel_size": 4}, world=6).of(ERROR)[0].key == "sequence_parallel_size"
    assert "Write 2 or 4" in lint_tree(zero(zero_hpz_partition_size=3), world=8).of(ERROR)[0].text
    assert not lint_tree(zero(zero_hpz_partition_size=16), world=8).of(ERROR)


@pytest.mark.parametrize(
    "tree, engine, world, device, host",
    [
        (zero(3) | {"bf16": {"enabled": True}}, "deepspeed", 8, (2 + 4 + 4 + 8) / 8, 0),
        (zero(2) | {"bf16": {"enabled": True}}, "deepspeed", 8, 2 + (4 + 4 + 8) / 8, 0),
        (zero(1) | {"bf16": {"enabled": True}}, "deepspeed", 8, 2 + 4 + (4 + 8) / 8, 0),
        (zero(3) | {"bf16": {"enabled": False}}, "deepspeed", 2, (4 + 4 + 4 + 8) / 2, 0),
        (zero(3, offload_optimizer={"device": "cpu"}) | {"bf16": {"enabled": True}}, "deepspeed", 4, 2 / 4, (4 + 4 + 8) / 4),
        (
            zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}) | {"bf16": {"enabled": True}},
            "deepspeed", 4, 0, 18 / 4,
        ),
        (zero(3, zero_hpz_partition_size=4) | {"bf16": {"enabled": True}}, "deepspeed", 8, 18 / 8 + 2 / 4, 0),
        (
            zero(3) | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
            "deepspeed", 1, 2 + 4 + 2 + 4, 0,
        ),
        (zero(3) | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, "deepspeed", 1, 2 + 2 + 4 + 8, 0),
        (zero(3) | {"bf16": {"enabled": True}}, "fsdp", 8, (4 + 4 + 8) / 8, 0),
        (zero(2) | {"bf16": {"enabled": True}}, "fsdp", 8, 2 + (4 + 4 + 8) / 8, 0),
        (zero(3, zero_hpz_partition_size=4) | {"bf16": {"enabled": True}}, "fsdp", 8, (4 + 4 + 8) / 4, 0),
    ],
)  # fmt: skip
def test_memory_a_parameter(tree: dict[str, Any], engine: str, world: int, device: float, host: float) -> None:
    memory = memory_of(tree, tree["zero_optimization"]["stage"], engine, world)
    assert (memory.total("device"), memory.total("host")) == (pytest.approx(device), pytest.approx(host))


KNOWN: list[tuple[str, dict[str, Any], str, str]] = [
    (ERROR, zero() | {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled", "#bfloat16-training-options"),
    (ERROR, zero(mics_shard_size=8), "zero_optimization.mics_shard_size", "issues/8489"),
    (ERROR, offload(device="nvme"), "zero_optimization.offload_optimizer.nvme_path", "#optimizer-off"),
    (ERROR, zero() | {"optimizer": {"type": "OneBitAdam"}}, "optimizer.type", "issues/5046"),
    (
        ERROR,
        zero() | {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
        "optimizer.params.max_grad_norm", "#gradient-clipping",
    ),
    (ERROR, zero() | {"gradient_clippin": 1.0}, "gradient_clippin", "Did you mean gradient_clipping?"),
    (ERROR, offload(device="cpu", buffer_size=1), "zero_optimization.offload_optimizer.buffer_size", "refuses"),
    (NOTE, zero(2, offload_param={"device": "cpu"}), "zero_optimization.offload_param", "#parameter-offloading"),
    (NOTE, zero(3, round_robin_gradients=True), "zero_optimization.round_robin_gradients", "pull/1256"),
    (NOTE, offload(device="cpu", buffer_count=5), "zero_optimization.offload_optimizer.buffer_count", "nvme"),
    (
        WARNING,
        zero() | {"activation_checkpointing": {"contiguous_memory_optimization": True, "number_checkpoints": 4}},
        "activation_checkpointing.contiguous_memory_optimization", "issues/598",
    ),
    (WARNING, zero(zero_quantized_weights=True) | {"bf16": {"enabled": True}}, "zero_optimization.zero_quantized_weights", "4852"),
    (WARNING, zero(2) | {"prescale_gradients": True}, "prescale_gradients", "pull/4964"),
    (WARNING, zero(2) | {"pipeline": {"stages": 2}}, "pipeline", "issues/1629"),
    (WARNING, zero() | {"bf16": {"enabled": True}, "communication_data_type": "fp16"}, "communication_data_type", "65,504"),
    (WARNING, zero() | {"wall_clock_breakdown": False, "memory_breakdown": "false"}, "memory_breakdown", "for true"),
    (NOTE, zero() | {"fp16": {"enabled": True, "initial_scale_power": 32}}, "fp16.initial_scale_power", "#fp16-training"),
    (
        NOTE,
        zero() | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}},
        "scheduler.params", "issues/1298",
    ),
    (
        NOTE,
        zero(2, overlap_comm=True, allgather_bucket_size=5e8, reduce_bucket_size=5e8),
        "zero_optimization.reduce_bucket_size", "8.4 GiB",
    ),
    (NOTE, zero(offload_param={"device": "nvme", "nvme_path": "/n"}), "zero_optimization", "#asynchronous-io"),
]  # fmt: skip


@pytest.mark.parametrize("level, tree, key, text", KNOWN, ids=lambda value: value if isinstance(value, str) else "")
def test_known_combinations_come_with_an_address(level: str, tree: dict[str, Any], key: str, text: str) -> None:
    report = lint_tree(tree)
    levels = (level, UNSUPPORTED) if level == WARNING else (level,)  # a refusal of train.py goes before a warning
    said = [line.text for each in levels for line in report.of(each) if line.key == key]
    assert any(text in each for each in said), (said, [str(line) for line in report.lines])
    assert level == ERROR or not report.of(ERROR)


def test_a_plain_file_has_nothing_to_say_against() -> None:
    report = lint_tree(zero() | {"bf16": {"enabled": "auto"}, "train_batch_size": "auto"})
    assert report.lines == []
    assert report.verdict.endswith("no errors")


def test_lines_of_keys_in_hjson() -> None:
    text = '{\n  // a: 1\n  "a": {"b": [1, {"c": 2}],\n    /* d:\n */ d: "x: y" # e: 3\n    f: \'g\'\n  },\n\n  "h": "i"\n}\n'
    places = find_places(text)
    assert places.lines == {"a": 3, "a.b": 3, "a.b.c": 3, "a.d": 5, "a.f": 6, "h": 9}
    assert places.line_of("a.d.missing") == 5 and places.line_of("z") is None
    assert places.twice == []


def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "twice.json"
    file.write_text('{"zero_optimization": {"stage": 3},\n "steps_per_print": 1,\n "steps_per_print": 2, "amp": {}}')
    report = lint_file(str(file))
    assert [(line.key, line.line) for line in report.of(ERROR)] == [("steps_per_print", 3), ("amp", 3)]
    assert "The first is in line 2" in report.of(ERROR)[0].text


@pytest.mark.parametrize(
    "text, line, words",
    [
        ('{\n"a": [1,\n', 2, "not JSON"),
        ("", 1, "empty"),
        ("[1]", None, "must hold an object"),
        (None, None, "no such file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str | None, line: int | None, words: str) -> None:
    file = tmp_path / "broken.json"
    if text is not None:
        file.write_text(text)
    (error,) = lint_file(str(file)).of(ERROR)
    assert words in error.text and str(file) not in error.text
    assert line is None or error.line


def test_every_key_can_be_explained() -> None:
    for path in ds_table().keys:
        words, is_known = explain(path)
        assert is_known and words.startswith(path) and "here" in words and "FSDP2" in words


@pytest.mark.parametrize(
    "key, is_known, texts",
    [
        ("zero_hpz_partition_size", True, ("zero_optimization.zero_hpz_partition_size", "default  1", "stages   3")),
        ("prefetch_bucket_size", True, ("stage3_prefetch_bucket_size",)),
        ("warmup_num_steps", True, ("a parameter of the schedule", "WarmupLR (1000)")),
        ("reduce_bucket_siz", False, ("did you mean zero_optimization.reduce_bucket_size?",)),
        ("mics_shard_size", True, ("refuses a file that has it",)),
        ("cpu_offload", True, ("write offload_optimizer",)),
    ],
)
def test_explanations(key: str, is_known: bool, texts: tuple[str, ...]) -> None:
    words, found = explain(key)
    assert found == is_known
    assert [text for text in texts if text not in words] == []


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60)


def test_the_program_prints_plain_groups_and_ends_with_the_verdict(tmp_path: Path) -> None:
    good, refused, bad = (tmp_path / name for name in ("good.json", "refused.json", "bad.json"))
    good.write_text(json.dumps(zero()))
    refused.write_text(json.dumps(zero(0)))
    bad.write_text('{"zero_optimization": {"stage": 3,\n"offload_optimiser": {}},\n"amp": {}}')
    done = run(str(good), str(refused), "--world", "64")
    assert done.returncode == 0 and "\033" not in done.stdout
    assert f"{good}: no errors\n" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{refused}: no errors; train.py would refuse 1 setting"
    done = run(str(bad), str(good), "--engine", "fsdp")
    assert done.returncode == 2
    assert f"  {bad}:2: zero_optimization.offload_optimiser: is unknown" in done.stdout
    assert f"{bad}: 2 errors" in done.stdout.splitlines()
    assert run("--explain", "stage").returncode == 0
    assert run("--explain", "stagee").returncode == 2
    assert run().returncode == 2


def test_the_program_starts_without_torch() -> None:
    code = f"import sys, runpy; sys.argv = ['x', '--explain', 'stage']\ntry: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
    code += "finally: print(sorted({'torch', 'deepspeed', 'pydantic', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_output_on_the_page_is_what_the_program_prints(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "lint.md").read_text(encoding="utf-8")
    (old,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "old.json").write_text(old)
    (tmp_path / "zero3_offload.json").write_text((ROOT / "ds_configs" / "zero3_offload.json").read_text())
    commands = re.findall(r"`python tools/lint_ds_config.py (.*?)`", page)
    shown = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    for command, expected in zip(commands, shown, strict=True):
        done = subprocess.run(
            [sys.executable, str(TOOL), *command.split()], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == expected, command
