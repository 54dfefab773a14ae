"""What a launch says of trained parameters that its first step gave no gradient."""

from types import SimpleNamespace
from typing import Any

import pytest

from ds_recipes.engine.zero3.unused import check_used_alike
from ds_recipes.errors import TrainingError
from ds_recipes.training.run import Run


def told(step: int, unused: set[str]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    run = SimpleNamespace(
        state=SimpleNamespace(step=40), trackers=SimpleNamespace(event=lambda kind, **fields: events.append(fields))
    )
    Run.report_unused(run, step, unused)  # type: ignore[arg-type]
    return events


def test_layers_and_experts_of_one_kind_are_one_name() -> None:
    unused = {f"layers.{layer}.experts.{expert}.up.weight" for layer in range(3) for expert in range(8)} | {
        "tower.bias"
    }
    (event,) = told(41, unused)
    assert event["step"] == 41
    assert event["message"].startswith("25 trained parameters got no gradient in this step")
    assert event["message"].endswith("layers.*.experts.*.up.weight (24), tower.bias")


def test_a_long_list_is_shortened() -> None:
    (event,) = told(41, {f"part{letter}.weight" for letter in "abcdefghij"})
    assert event["message"].endswith("partf.weight and 4 more kinds")


@pytest.mark.parametrize("step, unused", [(42, {"tower.bias"}), (41, set())])
def test_it_is_told_after_the_first_step_alone(step, unused) -> None:
    assert not told(step, unused)


def test_what_some_ranks_used_alone_ends_a_run_below_stage_3_but_for_experts() -> None:
    check_used_alike(["experts.3.weight"], {"experts.3.weight"})
    with pytest.raises(
        TrainingError, match=r"vision\.weight got a gradient on some ranks and none on others .* 1 other"
    ):
        check_used_alike(["experts.3.weight", "vision.weight", "vision.bias"], {"experts.3.weight"})
