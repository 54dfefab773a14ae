"""The contract of DESIGN section 4, engine against oracle: gradients, norms, curves, and what must not matter."""

from functools import cache

import pytest
import torch

from tests.contract.engines import ROWS, Case, train_and_report
from tests.contract.oracle import Oracle, global_batch, joined, llama
from tests.ranks.launch import run_ranks

HUGE_LR = 2.0**20
"""One SGD step this long leaves weights that are the gradient, to float32's last digits."""

CURVE_STEPS = 10
GRADIENT = Case(lrs=(HUGE_LR,))


@cache
def report(case: Case, ranks: int, steps: int) -> dict:
    """What rank 0 saw; one start of the ranks serves every test of the same case."""
    import tempfile

    with tempfile.TemporaryDirectory() as tmp:
        return run_ranks(train_and_report, ranks, case, steps, tmp, timeout=240)[0]


def relative(mine: torch.Tensor, reference: torch.Tensor) -> float:
    return float((mine.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize(
    "case, ranks",
    [
        (GRADIENT, 1),
        (GRADIENT, 2),
        (Case(lrs=(HUGE_LR,), rows_per_rank=3), 2),
        (Case(lrs=(HUGE_LR,), tied=True), 3),
        (Case(lrs=(HUGE_LR,), rows_per_rank=3), 4),
        (Case(lrs=(HUGE_LR,), tied=True, checkpointing=True), 2),
        (Case(lrs=(HUGE_LR,), offload=True), 2),
    ],
)
def test_the_first_gradient_equals_the_oracles_however_the_batch_is_split(case, ranks):
    seen = report(case, ranks, 1)
    oracle = Oracle(llama(case.tied), seen["before"], "sgd", weight_decay=0.0)
    loss, gradients = oracle.gradients(global_batch(0, ROWS))
    assert seen["steps"][0]["loss"] == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        mine = (seen["before"][name].double() - seen["after"][name].double()) / HUGE_LR
        assert relative(mine, gradient) < 1e-6, name


@pytest.mark.parametrize("ranks, rows_per_rank", [(1, 12), (2, 1), (3, 2), (4, 1)])
def test_losses_and_norms_follow_the_oracle_for_ten_steps(ranks, rows_per_rank):
    case = Case(rows_per_rank=rows_per_rank, lrs=(0.05, 0.02), clip=1.0)
    seen = report(case, ranks, CURVE_STEPS)
    oracle = Oracle(llama(False), seen["before"], "sgd", weight_decay=0.0, clip=1.0)
    clipped = 0
    for step, result in enumerate(seen["steps"]):
        loss, norm = oracle.step(global_batch(step, ROWS), case.lrs[step % 2])
        clipped += norm > 1.0
        assert result["applied"]
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        assert result["norm"] == pytest.approx(norm, rel=1e-6)
    assert clipped, "no step was clipped: the test shows less than it says"
    assert seen["steps"][-1]["loss"] < seen["steps"][0]["loss"] or seen["optimizer_step"] == CURVE_STEPS


def test_adamw_follows_the_oracle_with_its_learning_rate_and_decay_as_given():
    case = Case(optimizer="adamw", weight_decay=0.1, lrs=(1e-3, 5e-4, 0.0))
    seen = report(case, 2, 6)
    oracle = Oracle(llama(False), seen["before"], "adamw", weight_decay=0.1)
    for step, result in enumerate(seen["steps"]):
        loss, norm = oracle.step(global_batch(step, ROWS), case.lrs[step % 3])
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        assert result["norm"] == pytest.approx(norm, rel=1e-5)
    for name, weight in oracle.weights().items():
        assert relative(seen["after"][name], weight) < 1e-4, name


def test_evaluation_is_the_oracles_loss():
    seen = report(GRADIENT, 2, 1)
    oracle = Oracle(llama(False), seen["after"], "sgd")
    batch = joined(global_batch(99, 2))
    with torch.no_grad():
        expected = float(oracle.loss_sum(batch)) / batch.num_target_tokens
    assert seen["evaluated"] == pytest.approx(expected, rel=2e-6)


def test_bf16_tracks_fp32_with_fp32_masters_and_fp32_rotary_frequencies():
    case = Case(optimizer="adamw", precision="bf16", lrs=(1e-3,))
    seen = report(case, 2, 20)
    oracle = Oracle(llama(False), seen["before"], "adamw", weight_decay=0.0)
    for step, result in enumerate(seen["steps"]):
        loss, norm = oracle.step(global_batch(step, ROWS), 1e-3)
        assert result["loss"] == pytest.approx(loss, rel=2e-3)
        assert result["norm"] == pytest.approx(norm, rel=3e-2)
    description = seen["description"]
    assert description["parameters"] == "bfloat16"
    assert {description[key] for key in ("master", "moments", "gradient_accumulation", "reduction")} == {"float32"}
    assert seen["buffers"]["model.rotary_emb.inv_freq"] == "torch.float32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(precision):
    case = Case(optimizer="adamw", precision=precision, lrs=(1e-3,), poison=((1, 1),))
    seen = report(case, 2, 3)
    assert [result["applied"] for result in seen["steps"]] == [True, False, True]
    assert seen["optimizer_step"] == 2
    assert not any(tensor.isnan().any() for tensor in seen["after"].values())
