"""The verdict on two engines: which bound holds, and what is found."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.errors import ConfigError
from ds_recipes.training.compare.asked import Asked, read_asked
from ds_recipes.training.compare.measure import Measured, Moved, Perturbed, Step, moved
from ds_recipes.training.compare.show import lines, write_json
from ds_recipes.training.compare.verdict import Verdict, compare
from ds_recipes.world.group import solo
from tests.contract.engines import GivenWeights


def run(engine: str, losses: Sequence[float], **changed: Any) -> Measured:
    steps = tuple(Step(loss, 1.5, True, None, 1e-4) for loss in losses)
    return replace(Measured(engine, {"master": "float32"}, steps, 1000.0, 2.0), **changed)


LOSSES = (6.0, 5.0, 4.0)
ONE = run("deepspeed", LOSSES)
WEIGHTS = {"a.weight": Moved(1.0, 1.0, 1e-4), "b.bias": Moved(0.0, 0.0, 0.0)}


def judged(other: Measured, precision: str = "fp32", lr: float = 1e-4, again: Measured | None = None) -> Verdict:
    return compare(ONE, other, precision, lr, WEIGHTS, again)


def test_equal_runs_agree_and_the_largest_difference_is_named() -> None:
    verdict = judged(run("fsdp", (6.0, 5.000004, 4.0)))
    assert verdict.agree and verdict.loss_step == 2
    assert verdict.loss_difference == pytest.approx(4e-6) and verdict.loss_bound == 1e-5


@pytest.mark.parametrize("precision, apart, agree", [("fp32", 2e-5, False), ("bf16", 2e-5, True), ("bf16", 0.1, False)])
def test_the_bound_is_that_of_the_precision(precision: str, apart: float, agree: bool) -> None:
    verdict = judged(run("fsdp", (6.0, 5.0, 4.0 + apart)), precision)
    assert verdict.agree == agree
    assert agree or "the losses of step 3 are" in verdict.reasons[0]


def test_at_higher_rates_the_bound_is_three_times_the_engines_distance_from_itself() -> None:
    again, other = run("deepspeed", (6.0, 5.0, 4.01)), run("fsdp", (6.0, 5.0, 4.02))
    assert judged(other, lr=1e-3, again=again).agree
    assert not judged(run("fsdp", (6.0, 5.0, 4.04)), lr=1e-3, again=again).agree
    assert judged(other, lr=1e-3, again=ONE).loss_bound == 1e-5, "it is never narrower than at a gentle rate"


def test_a_scaled_gradient_is_found_though_the_losses_are_the_same() -> None:
    steps = tuple(replace(step, grad_norm=1.01 * step.grad_norm) for step in ONE.steps)
    verdict = judged(run("fsdp", LOSSES, steps=steps))
    assert not verdict.agree and "the gradient norm of step 1, from the same weights" in verdict.reasons[0]
    later = (ONE.steps[0], *steps[1:])
    assert judged(run("fsdp", LOSSES, steps=later)).agree, "later norms are of other weights: they are shown only"


def test_what_is_not_finite_and_what_one_engine_alone_skips_is_found() -> None:
    assert "fsdp: the loss of step 2 is nan" in judged(run("fsdp", (6.0, math.nan, 4.0))).reasons
    skipped = (*ONE.steps[:2], replace(ONE.steps[2], applied=False))
    reasons = judged(run("fsdp", LOSSES, steps=skipped)).reasons
    assert reasons == (
        "fsdp: step 3 was skipped, its gradient is not finite",
        "step 3 was taken by deepspeed and skipped by fsdp",
    )
    scaled = tuple(replace(step, applied=False, loss_scale=65536.0) for step in ONE.steps)
    both = [run(engine, LOSSES, steps=scaled) for engine in ("deepspeed", "fsdp")]
    assert compare(*both, "fp16", 1e-4, WEIGHTS).agree, "both overflow alike"


def test_it_is_shown_side_by_side_and_written_as_json(tmp_path: Path) -> None:
    other = run("fsdp", (6.0, 5.0, 4.5), memory_gib=1.0)
    verdict = judged(other)
    text = "\n".join(lines(ONE, other, verdict, on_gpu=False))
    for words in ("loss deepspeed", "resident memory, GiB a rank (peak)  2.00", "THE ENGINES DO NOT AGREE", "1,000"):
        assert words in text, text
    write_json(tmp_path / "it.json", ONE, other, verdict, 2)
    tree = json.loads((tmp_path / "it.json").read_text())
    assert tree["agree"] is False and tree["engines"][1]["steps"][2]["loss"] == 4.5
    assert tree["verdict"]["reasons"] and "torch" in tree["versions"]


def test_own_flags_are_taken_out_and_the_choice_of_an_engine_is_dropped() -> None:
    argv = [
        "--config",
        "run.yaml",
        "--steps=7",
        "--enable_fsdp",
        "--train_data",
        "a",
        "b",
        "--use_mpi",
        "--engine",
        "fsdp",
    ]
    asked = read_asked([*argv, "--deepspeed", "ds.json", "--output", "it.json"])
    settings = ("--config=run.yaml", "--train_data", "a", "b", "--use_mpi", "--ds_config=ds.json")
    assert asked == Asked(7, Path("it.json"), settings)
    assert read_asked(["--config", "run.yaml"]).steps == 50


@pytest.mark.parametrize(
    "argv, problem",
    [
        (["--steps", "0"], "--steps must be a whole number above 0, not '0'"),
        (["--steps"], "--steps must be a whole number above 0, not ''"),
        (["--output"], "--output needs one path"),
        (["fifty"], "unexpected argument 'fifty'"),
    ],
)
def test_bad_flags_are_refused(argv: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_asked(argv)


def test_a_rounding_error_is_small_and_the_same_in_any_slice() -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    reader = Perturbed(GivenWeights({"w": exact}))
    whole, part = torch.empty(1000), torch.empty(300)
    reader.read_into("fp32", "w", 0, whole)
    reader.read_into("fp32", "w", 450, part)
    assert torch.equal(whole[450:750], part) and not torch.equal(whole, exact)
    error = (whole.double() - exact.double()) / exact.double()
    assert 5e-8 < float(error.square().mean().sqrt()) < 2e-7


def test_weights_that_one_engine_alone_changes_are_found_though_the_losses_agree() -> None:
    other = run("fsdp", LOSSES)
    verdict = compare(ONE, other, "fp32", 1e-4, WEIGHTS | {"tower.weight": Moved(1e-6, 0.0, 1e-6)})
    assert verdict.reasons == ("deepspeed has changed tower.weight, which fsdp has left alone",)
    verdict = compare(ONE, other, "fp32", 1e-4, WEIGHTS | {"tower.weight": Moved(0.0, 1e-6, 1e-6)})
    assert verdict.reasons == ("fsdp has changed tower.weight, which deepspeed has left alone",)


def test_weights_that_went_another_way_are_found() -> None:
    far = {"a.weight": Moved(1.0, 1.0, 0.3), "b.weight": Moved(1.0, 1.0, 0.0)}
    verdict = compare(ONE, run("fsdp", LOSSES), "fp32", 1e-4, far)
    assert not verdict.agree and "the weights are 2.1e-01 of their way apart" in verdict.reasons[0]
    assert verdict.farthest == "a.weight"
    own = {"a.weight": Moved(1.0, 1.0, 0.2), "b.weight": Moved(1.0, 1.0, 0.0)}
    assert compare(ONE, run("fsdp", LOSSES), "fp32", 1e-3, far, ONE, own).agree, "as far as rounding alone leads"


def test_ways_are_norms_of_the_changes() -> None:
    one = run("deepspeed", LOSSES, updates={"a": torch.tensor([3.0, 0.0]), "b": torch.zeros(1)})
    other = run("fsdp", LOSSES, updates={"a": torch.tensor([0.0, 4.0]), "b": torch.ones(1)})
    assert moved(one, other, solo()) == {"a": Moved(3.0, 4.0, 5.0), "b": Moved(0.0, 1.0, 1.0)}
