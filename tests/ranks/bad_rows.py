"""train.py over data of which some rows are bad: they spoil their step on whatever rank and in whatever micro-batch they lie."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tests.ranks.training import train_py

VARIABLE = "BAD_ROWS"


def bad_rows(**positions: Iterable[int]) -> dict[str, str]:
    """The environment for `with_bad_rows`: positions of the run's order, by what lies there.

    `gradient`: a NaN in the gradient, of a finite loss; `loss`: an infinite loss, of a finite gradient; `spike`: a loss that
    is eight times as high, and leads away from it.
    """
    return {VARIABLE: json.dumps({kind: list(rows) for kind, rows in positions.items()})}


def with_bad_rows(argv: Sequence[str]) -> int:
    """What one rank does in place of train.py."""
    from ds_recipes.models import loss_head
    from ds_recipes.training import start

    bad = {int(row): kind for kind, rows in json.loads(os.environ[VARIABLE]).items() for row in rows}
    kinds: list[str] = []  # of the micro-batch that is being computed
    create_engine, token_loss = start.create_engine, loss_head._token_loss

    def create(*arguments: Any) -> Any:
        engine = create_engine(*arguments)
        backward = engine.backward

        def noting(batch: Any, scale: float) -> torch.Tensor:
            kinds[:] = {bad[row] for row in batch.row_ids if row in bad}
            try:
                return backward(batch, scale)
            finally:
                kinds.clear()

        engine.backward = noting  # type: ignore[method-assign]
        return engine

    def spoiled(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        loss, gradient = token_loss(*arguments)
        for kind in kinds:
            loss, gradient = _spoil(kind, loss, gradient)
        return loss, gradient

    start.create_engine = create
    loss_head._token_loss = spoiled
    return train_py(argv)


def _spoil(kind: str, loss: torch.Tensor, gradient: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    assert gradient is not None
    effects: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = {
        "gradient": (loss, gradient * float("nan")),
        "loss": (loss + float("inf"), gradient),
        "spike": (loss * 8, -gradient),
    }
    return effects[kind]
