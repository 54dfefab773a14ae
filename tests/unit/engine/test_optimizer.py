"""What a checkpoint keeps of an optimizer: AdamW's moments or SGD's momentum, and none of one for the other."""

import pytest
import torch

from ds_recipes.engine.optimizer import create_state, moment_of, moments_in
from ds_recipes.ranges import NONE_MISSED


class Holding:
    """A reader that has these kinds."""

    optimizer_step = 3
    missed_steps = NONE_MISSED
    names: tuple[str, ...] = ()

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds

    def has(self, kind: str) -> bool:
        return kind in self._kinds

    def shape(self, name: str) -> tuple[int, ...]:
        raise AssertionError("not asked for")

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        raise AssertionError("not asked for")


def made(name: str) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizers = {
        "adamw": lambda: torch.optim.AdamW([parameter], lr=0.1),
        "momentum": lambda: torch.optim.SGD([parameter], lr=0.1, momentum=0.9),
        "sgd": lambda: torch.optim.SGD([parameter], lr=0.1),
    }
    return optimizers[name](), parameter


@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
def test_state_made_before_the_first_step_changes_no_step(name: str) -> None:
    (plain, one), (prepared, other) = made(name), made(name)
    create_state(prepared, other)
    for step in range(3):
        for optimizer, parameter in ((plain, one), (prepared, other)):
            parameter.grad = parameter.detach() * (step + 1)
            optimizer.step()
    assert torch.equal(one, other)
    for kind in ("exp_avg", "exp_avg_sq"):
        mine, theirs = moment_of(prepared.state.get(other, {}), kind), moment_of(plain.state.get(one, {}), kind)
        assert (mine is None) == (theirs is None) == ((kind == "exp_avg_sq" and name != "adamw") or name == "sgd")
        assert mine is None or theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "name, kinds, found",
    [
        ("adamw", ("fp32", "exp_avg", "exp_avg_sq"), ("exp_avg", "exp_avg_sq")),
        ("adamw", ("fp32", "exp_avg"), ()),
        ("adamw", ("fp32",), ()),
        ("momentum", ("fp32", "exp_avg"), ("exp_avg",)),
        ("momentum", ("fp32", "exp_avg", "exp_avg_sq"), ()),
        ("momentum", ("fp32",), ()),
    ],
)
def test_no_optimizer_takes_anothers_state(name: str, kinds: tuple[str, ...], found: tuple[str, ...]) -> None:
    assert moments_in(Holding(*kinds), made(name)[0]) == found
