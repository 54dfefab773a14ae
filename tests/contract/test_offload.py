"""The optimizer on the host: the same steps as elsewhere, and gradients kept once."""

from pathlib import Path

import pytest

from ds_recipes.world.group import World
from tests.contract.engines import Case, build, train_and_report, train_steps
from tests.contract.oracle import Oracle, global_batch, llama
from tests.ranks.launch import run_ranks


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-6), ("bf16", 2e-3)])
def test_offloaded_steps_with_clipping_follow_the_oracle(precision, tolerance, tmp_path):
    case = Case(optimizer="adamw", precision=precision, offload=True, weight_decay=0.1, clip=0.5, lrs=(1e-3, 5e-4))
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
    case = Case(optimizer="adamw", precision="bf16", offload=True)
    for gradients, masters in run_ranks(memory_of_gradients, 2, case, str(tmp_path)):
        assert gradients == pytest.approx(masters, rel=0.01)
