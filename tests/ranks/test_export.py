"""What an engine has trained on two ranks and tools/convert_to_hf.py has exported computes what its trainer computed."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.nano import CONTEXT, make_nano
from tests.ranks.training import Ended, train, train_py

STEPS = 3
BY_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train_and_record(argv: Sequence[str]) -> int:
    """train.py on one rank; before its end rank 0 writes to the file SEEN what the engine holds and computes."""
    from ds_recipes.training import loop

    finish = loop.finish

    def record(run: Any, *rest: Any) -> int:
        generator = torch.Generator().manual_seed(5)
        input_ids = torch.randint(0, run.engine.model.config.vocab_size, (2, CONTEXT), generator=generator)
        logits = run.engine.logits(input_ids).contiguous()  # [rows, context, vocabulary]
        weights = {name: tensor.clone() for name, tensor in run.engine.weights()}
        if run.world.rank == 0:
            save_file(weights | {"input_ids": input_ids, "logits": logits}, os.environ["SEEN"])
        return finish(run, *rest)

    loop.finish = record
    return train_py(argv)


def convert(argv: Sequence[str]) -> int:
    """tools/convert_to_hf.py in a process of its own."""
    from tools import convert_to_hf

    sys.argv = ["convert_to_hf.py", *argv]
    return convert_to_hf.main()


def plain(argv: Sequence[str]) -> int:
    """Plain transformers in a process of its own: the float32 logits of model argv[0] for the ids of argv[1], to argv[2]."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(argv[0], dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.inference_mode():
        logits = model.eval()(load_file(argv[1])["input_ids"], use_cache=False).logits.float()
    save_file({"logits": logits.contiguous()}, argv[2])
    return 0


@pytest.mark.parametrize(
    "engine, precision, tied",
    [
        ("fsdp", "fp32", True),
        pytest.param("fsdp", "bf16", False, marks=pytest.mark.slow),
        pytest.param("fsdp", "fp32", False, marks=pytest.mark.slow),
        pytest.param("fsdp", "bf16", True, marks=pytest.mark.slow),
        pytest.param("deepspeed", "fp32", False, marks=pytest.mark.slow),
        pytest.param("deepspeed", "fp32", True, marks=pytest.mark.slow),
        pytest.param("deepspeed", "bf16", False, marks=pytest.mark.slow),
        pytest.param("deepspeed", "bf16", True, marks=pytest.mark.slow),
    ],
)
def test_an_exported_model_computes_what_its_trainer_computed(
    tmp_path: Path, engine: str, precision: str, tied: bool
) -> None:
    """Bit for bit: the exported weights are the engine's own, in the dtype that it computes in."""
    nano = make_nano(tmp_path, tied)
    before = load_file(tmp_path / "model" / "model.safetensors")
    run, out, seen_file, logits_file = (
        tmp_path / name for name in ("run", "out", "seen.safetensors", "logits.safetensors")
    )

    def started(ranks: int, program: Any, *argv: Any) -> Ended:
        env = {"SEEN": str(seen_file)}
        ended = train(ranks, *map(str, argv), outputs=tmp_path / "outputs", env=env, program=program)
        assert ended.statuses == (0,) * ranks, ended.text
        return ended

    flags = ("--engine", engine, "--precision", precision, "--lr", "1e-2", "--run_validation", "false")
    started(2, train_and_record, "--config", nano, "--save_checkpoint_path", run, "--max_steps", STEPS, *flags)
    started(1, convert, "--ckpt", run / f"iter_{STEPS:07d}", "--out", out)
    started(1, plain, out, seen_file, logits_file)
    seen, exported = load_file(seen_file), load_file(out / "model.safetensors")
    trainers, dtype = seen.pop("logits"), BY_DTYPE[precision]
    del seen["input_ids"]
    assert {name: tensor.shape for name, tensor in exported.items()} == {n: one.shape for n, one in before.items()}
    assert exported.keys() == seen.keys() and {tensor.dtype for tensor in exported.values()} == {dtype}
    for name, tensor in exported.items():
        assert torch.equal(tensor, seen[name].to(dtype)), name
        assert not torch.equal(tensor, before[name].to(dtype)), f"{name} was not trained"
    difference = (load_file(logits_file)["logits"] - trainers).abs().max()
    assert difference == 0, f"{difference} of {trainers.abs().max()}"
