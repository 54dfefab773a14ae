"""The optimizer on the host: the same steps as elsewhere, and gradients kept once."""

import os
from pathlib import Path

import pytest

from ds_recipes.config.async_io import missing_for_async_io
from ds_recipes.config.plan import make_plan
from ds_recipes.engine.create import create_engine
from ds_recipes.engine.zero3.nvme_folders import _most_within, _refuse_left_lock
from ds_recipes.errors import ConfigError
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World
from tests.contract.engines import Case, build, settings, train_and_report, train_steps
from tests.contract.oracle import Oracle, global_batch, llama
from tests.ranks.launch import run_ranks


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-6), ("bf16", 2e-3)])
def test_offloaded_steps_with_clipping_follow_the_oracle(precision, tolerance, tmp_path):
    case = Case(
        optimizer="adamw", precision=precision, ds="zero3_offload.json", weight_decay=0.1, clip=0.5, lrs=(1e-3, 5e-4)
    )
    seen = run_ranks(train_and_report, 2, case, 6, str(tmp_path), timeout=240)[0]
    assert seen["description"]["optimizer_device"] == "cpu"
    oracle = Oracle(llama(case.tied), seen["before"], "adamw", weight_decay=0.1, clip=0.5)
    for step, result in enumerate(seen["steps"]):
        loss, norm = oracle.step(global_batch(step, 12), case.lrs[step % 2])
        assert norm > 0.5, "nothing was clipped: the test shows less than it says"
        assert result["loss"] == pytest.approx(loss, rel=tolerance)


def memory_of_gradients(world: World, case: Case, tmp: str) -> tuple[int, int]:
    """Bytes of all gradient storages, each once, after two steps; and of the master weights."""
    engine = build(world, case, Path(tmp))
    train_steps(engine, world, case, range(2))
    zero = engine._zero
    kept = [zero.grad_partitions_flat_buffer, *(master.grad for master in zero.fp32_partitioned_groups_flat)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    masters = sum(master.untyped_storage().nbytes() for master in zero.fp32_partitioned_groups_flat)
    engine.close()
    return sum(storages.values()), masters


def test_offloaded_gradients_are_kept_once(tmp_path):
    case = Case(optimizer="adamw", precision="bf16", ds="zero3_offload.json")
    for gradients, masters in run_ranks(memory_of_gradients, 2, case, str(tmp_path)):
        assert gradients == pytest.approx(masters, rel=0.01)


def refused(world: World, case: Case, tmp: str) -> str:
    """What the engine says to a JSON that it cannot use."""
    config = settings(case, Path(tmp))
    source = ModelSource(llama(False), None, 7, False)
    try:
        create_engine(config, make_plan(config, world.size), source, world)
    except ConfigError as error:
        return str(error)
    return "nothing"


def test_missing_headers_are_told_in_one_line_with_the_packages(tmp_path):
    environment = {"PATH": str(tmp_path), "CXX": "no-such-compiler"}
    message = missing_for_async_io(environment, header_folders=(str(tmp_path),))
    assert message is not None and "\n" not in message
    for word in ("libaio.h", "a C++ compiler", "apt-get install libaio-dev"):
        assert word in message


def test_quantised_communication_is_refused_on_a_cpu(tmp_path):
    case = Case(ds='{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}')
    (message,) = run_ranks(refused, 1, case, str(tmp_path))
    assert "zero_quantized_weights: DeepSpeed quantises on a GPU only" in message and "\n" not in message


def test_the_lock_of_a_killed_build_is_told_instead_of_waited_for(tmp_path):
    lock = tmp_path / "lock"
    _refuse_left_lock(lock)
    lock.touch()
    _refuse_left_lock(lock)
    os.utime(lock, (0, 0))
    with pytest.raises(ConfigError, match="left of a build that was killed"):
        _refuse_left_lock(lock)


@pytest.mark.parametrize("distance, count", [(0, 0), (1, 1), (3, 1), (4, 2), (100, 4)])
def test_as_many_buffers_as_parameters_begin_within_the_reuse_distance(distance, count):
    assert _most_within([3, 5, 3, 4], distance) == count
