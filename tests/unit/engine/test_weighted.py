"""The factor on a loss is exact where the loss is finite, and spoils the gradient where it is not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.engine.base import weighted

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200, deadline=None)
@given(finite, st.floats(1e-9, 1e9))
def test_of_a_finite_loss_nothing_changes(value: float, scale: float) -> None:
    plain, loss = (torch.tensor(value, requires_grad=True) for _ in range(2))
    (plain * scale).backward()
    weighted(loss, scale).backward()
    assert torch.equal(weighted(loss, scale), plain * scale)
    assert loss.grad is not None and plain.grad is not None and torch.equal(loss.grad, plain.grad)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value: float) -> None:
    weights = torch.ones(3, requires_grad=True)
    loss = weights.sum() + value  # its own gradient is one, everywhere
    weighted(loss, 0.25).backward()
    assert weights.grad is not None and weights.grad.isnan().all()
