"""ZeRO stages 1 and 2 against the oracle, and every stage's precisions."""

import tempfile
from functools import cache
from typing import Any

import pytest
import torch

from ds_recipes.config.engine_settings import engine_settings
from tests.contract.engines import ROWS, Case, settings
from tests.contract.oracle import Oracle, global_batch, llama
from tests.contract.zero_states import LOW, OFFLOAD, UNEVEN, adam, gradient, relative, reports, zero
from tests.ranks.launch import run_ranks

STEPS = 10


GRADIENTS = {
    "1": gradient(zero(1)),
    "2": gradient(zero(2)),
    "1 in another order": gradient(zero(1, **UNEVEN), tied=True),
    "2 in another order": gradient(zero(2, **UNEVEN), tied=True),
    "2 offloaded": gradient(zero(2, **OFFLOAD), tied=True, checkpointing=True),
    "1 bf16": gradient(zero(1), precision="bf16"),
    "2 bf16": gradient(zero(2), precision="bf16"),
}
CURVES = {
    "1": adam(zero(1)),
    "2": adam(zero(2)),
    "1 bf16": adam(zero(1), precision="bf16"),
    "2 bf16 offloaded": adam(zero(2, **OFFLOAD), precision="bf16"),
}
ON_TWO_RANKS = {
    "1 offloaded": adam(zero(1, **OFFLOAD)),
    "2 offloaded": adam(zero(2, **OFFLOAD)),
    "1 bf16 poisoned": adam(zero(1), precision="bf16", poison=((1, 1),)),
    "2 bf16 poisoned": adam(zero(2), precision="bf16", poison=((1, 1),)),
    "1 fp32 poisoned": adam(zero(1), poison=((1, 1),)),
    **{
        f"{stage} {precision} poisoned, offloaded": adam(zero(stage, **OFFLOAD), precision=precision, poison=((1, 1),))
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16")
    },
}


@cache
def seen(ranks: int) -> dict[str, dict[str, Any]]:
    """What rank 0 saw of every case on so many ranks: one start for all of them."""
    cases = {f"gradient {name}": (case, 1) for name, case in GRADIENTS.items()}
    cases |= {f"curve {name}": (case, STEPS) for name, case in CURVES.items() if ranks in (2, 3)}
    cases |= {f"curve {name}": (case, 4) for name, case in ON_TWO_RANKS.items() if ranks == 2}
    with tempfile.TemporaryDirectory() as tmp:
        found = run_ranks(reports, ranks, list(cases.values()), tmp, timeout=300)[0]
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.slow), 2, 3, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", GRADIENTS)
def test_the_first_gradient_and_its_norm_are_the_oracles(name, ranks):
    case, report = GRADIENTS[name], seen(ranks)[f"gradient {name}"]
    loss_tolerance, tolerance = (1e-6, 1e-6) if case.precision == "fp32" else (2e-3, 3e-2)
    oracle = Oracle(llama(case.tied), report["before"], "sgd", weight_decay=0.0)
    loss, gradients = oracle.gradients(global_batch(0, ROWS))
    norm = torch.cat([g.flatten() for g in gradients.values()]).double().norm().item()
    assert report["steps"][0]["loss"] == pytest.approx(loss, rel=loss_tolerance)
    assert report["steps"][0]["norm"] == pytest.approx(norm, rel=tolerance)
    for parameter, expected in gradients.items():
        mine = (report["before"][parameter].double() - report["after"][parameter].double()) / case.lrs[0]
        assert relative(mine, expected) < tolerance, parameter


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CURVES)
def test_adamw_with_clipping_follows_the_oracle_for_ten_steps(name, ranks):
    follows_the_oracle(CURVES[name], seen(ranks)[f"curve {name}"], STEPS)


@pytest.mark.parametrize("name", ["1 offloaded", "2 offloaded"])
def test_offloaded_adamw_follows_the_oracle(name):
    report = seen(2)[f"curve {name}"]
    assert report["description"]["optimizer_device"] == "cpu"
    follows_the_oracle(ON_TWO_RANKS[name], report, 4)


def follows_the_oracle(case: Case, report: dict[str, Any], steps: int) -> None:
    loss_tolerance, norm_tolerance, tolerance = (1e-6, 1e-6, 1e-5) if case.precision == "fp32" else (2e-3, 3e-2, 3e-2)
    oracle = Oracle(llama(case.tied), report["before"], "adamw", weight_decay=case.weight_decay, clip=case.clip)
    for step, result in enumerate(report["steps"]):
        loss, norm = oracle.step(global_batch(step, ROWS), case.lrs[step % 2])
        assert norm > case.clip, "nothing was clipped: the test shows less than it says"
        assert result["loss"] == pytest.approx(loss, rel=loss_tolerance)
        assert result["norm"] == pytest.approx(norm, rel=norm_tolerance)
    assert report["optimizer_step"] == steps
    for name, weight in oracle.weights().items():
        assert relative(report["after"][name], weight) < tolerance, name


@pytest.mark.parametrize("name", [name for name in ON_TWO_RANKS if "poisoned" in name])
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(name):
    report = seen(2)[f"curve {name}"]
    assert [result["applied"] for result in report["steps"]] == [True, False, True, True]
    assert report["steps"][1]["norm"] == float("inf")
    assert report["optimizer_step"] == 3
    case = ON_TWO_RANKS[name]
    oracle = Oracle(llama(case.tied), report["before"], "adamw", weight_decay=0.1, clip=case.clip)
    for step in (0, 2, 3):
        oracle.step(global_batch(step, ROWS), case.lrs[step % 2])
    for parameter, weight in oracle.weights().items():
        assert relative(report["after"][parameter], weight) < (1e-5 if case.precision == "fp32" else 3e-2), parameter


def test_the_description_tells_what_was_asked_for(tmp_path):
    cases = {**GRADIENTS, **CURVES}
    for name, case in cases.items():
        report = seen(2)[("gradient " if case.optimizer == "sgd" else "curve ") + name]
        asked = engine_settings(settings(case, tmp_path)).precision
        for key in ("parameters", "master", "moments", "gradient_accumulation", "reduction"):
            assert report["description"][key] == getattr(asked, key), (name, key)
        assert report["description"]["sharding"] == f"ZeRO-{name[0]} over 2 ranks"
        assert report["buffers"]["model.rotary_emb.inv_freq"] == "torch.float32"


PRECISIONS = {
    "bf16 masters, stage 2": adam(zero(2, {"bf16": LOW}), precision="bf16"),
    "bf16 masters, stage 3": adam(zero(3, {"bf16": LOW}), precision="bf16"),
    "bf16 masters and sums, stage 1": adam(
        zero(1, {"bf16": LOW, "data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}),
        precision="bf16",
    ),
    "bf16 sums, stage 2": adam(zero(2, {"data_types": {"grad_accum_dtype": "bf16"}}), precision="bf16"),
    "bf16 reduction, stage 2": adam(zero(2, {"communication_data_type": "bf16"})),
    **{
        f"autocast, stage {stage}": adam(zero(stage, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}))
        for stage in (1, 2, 3)
    },
    "fp32 after autocast": adam(zero(2)),
    "bf16 after autocast": adam(zero(2), precision="bf16"),
}


@cache
def precisions() -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as tmp:
        found = run_ranks(reports, 2, [(case, 4) for case in PRECISIONS.values()], tmp, timeout=300)[0]
    return dict(zip(PRECISIONS, found, strict=True))


@pytest.mark.parametrize("name", PRECISIONS)
def test_other_precisions_track_fp32_and_say_what_they_are(name, tmp_path):
    case, report = PRECISIONS[name], precisions()[name]
    asked = engine_settings(settings(case, tmp_path)).precision
    for key in ("parameters", "master", "moments", "gradient_accumulation", "reduction", "autocast"):
        assert report["description"][key] == getattr(asked, key), key
    oracle = Oracle(llama(case.tied), report["before"], "adamw", weight_decay=0.1, clip=case.clip)
    exact = name == "fp32 after autocast"
    differences = []
    for step, result in enumerate(report["steps"]):
        loss, norm = oracle.step(global_batch(step, ROWS), case.lrs[step % 2])
        assert result["loss"] == pytest.approx(loss, rel=1e-6 if exact else 3e-3)
        assert result["norm"] == pytest.approx(norm, rel=1e-6 if exact else 3e-2)
        differences.append(abs(result["norm"] / norm - 1))
    assert exact or max(differences) > 1e-5, "it is plain fp32"
