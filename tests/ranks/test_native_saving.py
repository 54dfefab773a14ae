"""`--checkpoint_format deepspeed`: as safe as a checkpoint of ours, and read by DeepSpeed, its script, and any engine here."""

import contextlib
import errno
import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.whole import export
from ds_recipes.checkpoint.load import find_newest, open_reader
from ds_recipes.checkpoint.native.write import NativePart
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.checkpoint.store import Store
from ds_recipes.engine.base import Engine
from ds_recipes.engine.zero3.low_stages import masters as low_masters
from ds_recipes.errors import CheckpointError, SaveError
from ds_recipes.fsops import calls
from ds_recipes.world.group import World, solo
from tests.contract.engines import ROWS, Case, build, train_steps
from tests.contract.oracle import freeze, llama
from tests.contract.zero_states import save, zero
from tests.nano import make_nano
from tests.ranks.launch import run_ranks
from tests.ranks.training import metrics, train
from tests.unit.checkpoint.flat_engine import contents

STEP = 3
ADAM = Case(optimizer="adamw", lrs=(1e-3,), weight_decay=0.1)
LAYER = r"layers\.0"
CASES: dict[str, Case] = {
    "zero3": replace(ADAM, ds=zero(3, sub_group_size=20_000)),
    "zero3 bf16 tied": replace(ADAM, ds=zero(3), precision="bf16", tied=True),
    "zero3 frozen": replace(ADAM, ds=zero(3), frozen=LAYER),
    "zero2": replace(ADAM, ds=zero(2, round_robin_gradients=True, parameter_alignment=True)),
    "zero2 bf16 frozen": replace(ADAM, ds=zero(2), precision="bf16", frozen=LAYER),
    "zero2 fp16": replace(ADAM, ds=zero(2, {"fp16": {"enabled": "auto", "initial_scale_power": 8}}), precision="fp16"),
    "zero1": replace(ADAM, ds=zero(1, offload_optimizer={"device": "cpu"})),
}
RESUMED_BY: dict[int, dict[str, Case]] = {
    1: {"zero3": replace(ADAM, ds=zero(3))},
    3: {"zero1": replace(ADAM, ds=zero(1)), "fsdp": replace(ADAM, engine="fsdp")},
}
"""Engines that continue every checkpoint, by the number of ranks."""


def split(case: Case, ranks: int) -> Case:
    """One micro-step a step, whose global batch is the same on any number of ranks."""
    return replace(case, rows_per_rank=ROWS // ranks)


def publish(folder: Path, step: int, engine: Engine, world: World) -> Path:
    store = Store(folder, world, "test-1", Keep())
    return store.publish(contents(engine, step), NativePart(engine, world, step)).path


def save_each(world: World, folder: str) -> dict[str, Any]:
    """Save every case's engine, note what it holds and how it goes on; let plain DeepSpeed load it; fail once."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed refuses it on a CPU, where torch can compute it
    seen: dict[str, Any] = {}
    for name, given in CASES.items():
        case = split(given, world.size)
        engine = build(world, case, Path(folder))
        train_steps(engine, world, case, range(STEP))
        path = publish(Path(folder) / name, STEP, engine, world)
        held, own = save(engine, world).tensors, flat_state(engine._zero)  # type: ignore[attr-defined]
        losses = [result["loss"] for result in train_steps(engine, world, case, range(STEP, STEP + 2))]
        if name == "zero3":
            seen["failed"] = fail_on_one_rank(world, Path(folder) / name, engine)
        engine.close()
        loaded = load_plainly(path, case)
        same = [torch.equal(ours, theirs) for ours, theirs in zip(own, loaded, strict=True)]
        seen[name] = {"path": path, "held": held, "losses": losses, "loaded": world.gather(same)}
    return seen


def fail_on_one_rank(world: World, folder: Path, engine: Engine) -> dict[str, Any]:
    """A disk that is full for rank 1 alone, amid its optimizer's file."""

    def full(call: calls.Call) -> None:
        if call.kind == "write" and "rank_1" in call.path.name and "optim" in call.path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    if world.rank == 1:
        calls.interceptor = full
    started, text = time.monotonic(), ""
    try:
        publish(folder, STEP + 2, engine, world)
    except SaveError as error:
        text = str(error)
    finally:
        calls.interceptor = None
    world.barrier("the end of a save")
    return {
        "text": text,
        "seconds": time.monotonic() - started,
        "names": sorted(path.name for path in folder.glob("*iter*")),
    }


def load_plainly(path: Path, case: Case) -> list[torch.Tensor]:
    """This rank's state after `load_checkpoint` in another program with plain DeepSpeed."""
    import deepspeed

    model = LlamaForCausalLM(llama(case.tied))
    freeze(model, case.frozen)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2]}, {"params": [p for p in trained if p.ndim < 2]}]
    settings = json.loads(case.ds or "{}") | {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": case.precision == "bf16"},
        "fp16": {"enabled": case.precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    where, _ = engine.load_checkpoint(str(path))
    assert where is not None and engine.global_steps == STEP
    found = flat_state(engine.optimizer)
    engine.destroy()
    return found


def flat_state(zero: Any) -> list[torch.Tensor]:
    """What a rank of any stage holds: master weights and moments of each group, as they lie in memory."""
    masters = zero.fp32_partitioned_groups_flat if hasattr(zero, "fp32_partitioned_groups_flat") else low_masters(zero)
    return [flat.detach().clone() for master in masters for flat in (master, *adam_of(zero.optimizer.state[master]))]


def adam_of(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [state[key].reshape(-1) for key in ("exp_avg", "exp_avg_sq", "step")]


def resume_each(world: World, folder: str, paths: dict[str, Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """Fill one engine of each kind from every checkpoint: what it then holds, and how it goes on."""
    seen = {}
    for by, (name, path) in product(RESUMED_BY[world.size], paths.items()):
        case = split(replace(RESUMED_BY[world.size][by], tied=CASES[name].tied, frozen=CASES[name].frozen), world.size)
        engine = build(world, case, Path(folder))
        found = find_newest(path, world)
        assert found is not None
        engine.load_shards(open_reader(path, found.manifest))
        held, step = save(engine, world).tensors, engine.optimizer_step
        losses = [result["loss"] for result in train_steps(engine, world, case, range(STEP, STEP + 2))]
        engine.close()
        seen[by, name] = {"held": held, "step": step, "losses": losses}
    return seen


@cache
def scratch() -> TemporaryDirectory[str]:
    """Removed when the tests end."""
    return TemporaryDirectory(prefix="native-")


@cache
def saved() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(save_each, 2, scratch().name, timeout=200)[0]
    return found


@cache
def resumed(ranks: int) -> dict[tuple[str, str], dict[str, Any]]:
    paths = {name: saved()[name]["path"] for name in CASES}
    found: dict[tuple[str, str], dict[str, Any]] = run_ranks(resume_each, ranks, scratch().name, paths, timeout=200)[0]
    return found


def deepspeeds(path: Path) -> dict[str, torch.Tensor]:
    """What DeepSpeed's own reader makes of a checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        found: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(path))
    return found


def differing(ours: Any, theirs: Any) -> list[str]:
    return [
        f"{kind} of {name}"
        for kind, tensors in theirs.items()
        for name, tensor in tensors.items()
        if not torch.equal(ours[kind][name].flatten(), tensor.flatten())
    ]


@pytest.mark.parametrize("name", CASES)
def test_plain_deepspeed_loads_it(name: str) -> None:
    ranks = saved()[name]["loaded"]
    assert len(ranks) == 2 and all(len(same) >= 3 and all(same) for same in ranks), ranks


@pytest.mark.parametrize("name", CASES)
def test_deepspeeds_script_reads_it(name: str) -> None:
    seen = saved()[name]
    theirs = deepspeeds(seen["path"])
    assert seen["held"]["fp32"].keys() <= theirs.keys()
    assert differing({"fp32": theirs}, {"fp32": seen["held"]["fp32"]}) == []
    assert (seen["path"] / "latest").read_text() == f"global_step{STEP}"


def test_the_script_beside_it_runs(tmp_path: Path) -> None:
    seen = saved()["zero3"]
    command = [sys.executable, "zero_to_fp32.py", ".", str(tmp_path / "out"), "--safe_serialization"]
    done = subprocess.run(command, cwd=seen["path"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert differing({"fp32": load_file(tmp_path / "out" / "model.safetensors")}, {"fp32": seen["held"]["fp32"]}) == []


@pytest.mark.parametrize("ranks", RESUMED_BY)
@pytest.mark.parametrize("name", CASES)
def test_any_engine_on_any_ranks_continues_it(name: str, ranks: int) -> None:
    expected = saved()[name]
    loose = 2e-3 if "16" in name else 2e-6  # it goes on in float32
    for by in RESUMED_BY[ranks]:
        seen = resumed(ranks)[by, name]
        assert seen["step"] == STEP and differing(seen["held"], expected["held"]) == [], by
        assert seen["losses"] == pytest.approx(expected["losses"], rel=loose), by


def test_one_ranks_full_disk_is_every_ranks_error() -> None:
    failed = saved()["failed"]
    assert re.search(
        r"rank_1_mp_rank_00_optim_states\.pt: the checkpoint could not be written: No space left", failed["text"]
    )
    assert failed["seconds"] < 5 and failed["names"] == [f"iter_{STEP:07d}"]


@pytest.mark.parametrize(
    "pattern", ["global_step3/*rank_1*optim*", "global_step3/*rank_0*model*", "latest", "zero_to_fp32.py"]
)
def test_every_file_is_verified(pattern: str) -> None:
    path = saved()["zero3"]["path"]
    file = next(path.glob(pattern))
    whole = file.read_bytes()
    try:
        for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=re.escape(file.name)):
                find_newest(path, solo())
    finally:
        file.write_bytes(whole)
    assert find_newest(path, solo()) is not None


def test_a_file_too_many_is_found(tmp_path: Path) -> None:
    path = saved()["zero3"]["path"]
    extra = path / "global_step3" / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    extra.touch()
    try:
        with pytest.raises(CheckpointError, match=r"rank_2.*two saves"):
            find_newest(path, solo())
    finally:
        extra.unlink()


@pytest.mark.slow
def test_train_py_is_killed_while_it_saves_and_continues(tmp_path: Path) -> None:
    """Two ranks save in DeepSpeed's format, and one is killed amid its file. The same command goes on from the save before;
    so does another engine on one rank, and what they write down is equal.
    """
    run_file = make_nano(tmp_path)
    run = tmp_path / "run"
    given = ("--config", str(run_file), "--max_steps", "4", "--save_interval_iteration", "2")
    native = (*given, "--checkpoint_format", "deepspeed", "--save_checkpoint_path", str(run))
    faults = "tear@2 rank=1 kind=write path=*iter_0000004*optim_states.pt"
    env = {"FAULT_TEST": "1", "DS_RECIPES_FAULTS": faults}
    killed = train(2, *native, outputs=tmp_path / "out", env=env)
    first, last = run / "iter_0000002", run / "iter_0000004"
    assert killed.statuses[1] == -9 and killed.statuses[0] not in (0, None), killed.text
    assert first.is_dir() and not last.exists()
    before = metrics(run)
    ended = train(2, *native, outputs=tmp_path / "out")
    assert ended.statuses == (0, 0), ended.text
    assert (last / "global_step4").is_dir() and not list(run.glob(".iter*"))
    again = (
        "--engine",
        "fsdp",
        "--save_checkpoint_path",
        str(tmp_path / "other"),
        "--load_checkpoint_path",
        str(first),
    )
    ended = train(1, *given, *again, outputs=tmp_path / "out")
    assert ended.statuses == (0,), ended.text
    straight, other = metrics(run), metrics(tmp_path / "other")
    assert [straight[step]["loss"] for step in (3, 4)] == [before[step]["loss"] for step in (3, 4)]
    assert [other[step]["loss"] for step in (3, 4)] == pytest.approx(
        [before[step]["loss"] for step in (3, 4)], rel=2e-6
    )
    made = export(last, tmp_path / "hf", Wanted(load_check=False))
    weights = load_file(made.folder / "model.safetensors")
    assert differing({"fp32": deepspeeds(last)}, {"fp32": weights}) == []
    assert not {"latest", "zero_to_fp32.py"} & {path.name for path in made.folder.iterdir()}
