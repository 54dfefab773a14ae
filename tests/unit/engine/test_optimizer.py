"""What a checkpoint keeps of an optimizer: AdamW's moments or SGD's momentum, and none of one for the other."""

from collections.abc import Iterator

import pytest
import torch

from ds_recipes.config.schema import OptimizerConfig
from ds_recipes.engine.optimizer import create_state, make_optimizer, moment_of, moments_in
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


class Parts:
    """Two trained parameters and a frozen one."""

    def __init__(self) -> None:
        self.tensors = {name: torch.nn.Parameter(torch.ones(3)) for name in ("weight", "norm", "frozen")}
        self.tensors["frozen"].requires_grad_(False)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self.tensors.items()


def test_adamw_is_made_as_the_settings_say_and_decays_what_it_is_told_to() -> None:
    parts = Parts()
    settings = OptimizerConfig(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.7, adam_eps=1e-3)
    optimizer = make_optimizer(parts, {"weight"}, settings)
    assert optimizer.defaults["betas"] == (0.8, 0.7) and optimizer.defaults["eps"] == 1e-3
    decay = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    assert decay == {id(parts.tensors["weight"]): 0.3, id(parts.tensors["norm"]): 0.0}
    plain = torch.optim.AdamW([torch.ones(3, requires_grad=True)], lr=0.1, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.3)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for one in (parts.tensors["weight"], *plain.param_groups[0]["params"]):
        one.grad = torch.tensor([1.0, -2.0, 1e-3])
    optimizer.step()
    plain.step()
    torch.testing.assert_close(parts.tensors["weight"].data, plain.param_groups[0]["params"][0].data)


def test_sgd_has_the_momentum_of_the_settings() -> None:
    optimizer = make_optimizer(Parts(), {"weight"}, OptimizerConfig(optimizer_type="sgd", sgd_momentum=0.6))
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.6
