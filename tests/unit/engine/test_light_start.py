"""A start does not load torch's compiler for DeepSpeed's Muon, which no run uses; what asks for Muon itself still gets it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.engine.zero3 import build
from tests.nano import make_nano

PROGRAM = """
import sys
import train
status = train.main(sys.argv[1:])
names = ("torch._inductor.compile_fx", "torch._inductor.graph", "torch._inductor.fx_passes.post_grad")
assert [name for name in names if name in sys.modules] == []
assert "MuonWithAuxAdam" in dir(sys.modules.get("deepspeed.runtime.zero.muon.muon_optimizer")) or "fsdp" in sys.argv
sys.exit(status)
"""
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "flags",
    [
        ("--engine", "deepspeed", "--ds_config", "ds_configs/zero3.json"),
        pytest.param(("--engine", "deepspeed", "--ds_config", "ds_configs/zero2.json"), marks=pytest.mark.slow),
        pytest.param(("--engine", "fsdp"), marks=pytest.mark.slow),
    ],
    ids=["zero3", "zero2", "fsdp"],
)
def test_an_engine_that_trains_has_not_loaded_the_compiler(flags: tuple[str, ...], tmp_path: Path) -> None:
    """In a fresh process: the tests' own may have loaded it."""
    run = ["--config", str(make_nano(tmp_path)), "--save_checkpoint_path", str(tmp_path / "run"), "--max_steps", "1"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *run, *flags], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_function_is_compiled_once_when_it_is_first_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Callable[..., Any]] = []

    def compile_it(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled.append(function)
        return lambda *arguments, **named: ("compiled", function(*arguments, **named))

    monkeypatch.setattr(torch, "compile", compile_it)

    def add(one: int, other: int) -> int:
        return one + other

    lazily = build._compiled_when_called(add)
    assert compiled == []
    assert [lazily(1, other=2), lazily(3, 4)] == [("compiled", 3), ("compiled", 7)]
    assert compiled == [add]
