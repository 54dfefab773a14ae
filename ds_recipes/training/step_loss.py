"""The loss of a step over all ranks, without a wait of its own for the device."""

from collections.abc import Sequence

import torch

from ds_recipes.world.group import World


class StepLoss:
    """Sum of the token losses of a rank's micro-batches, on its way to the host since it was made.

    It is made before the engine's update, whose own wait for the device (the gradient's norm) covers it.
    """

    def __init__(self, losses: Sequence[torch.Tensor]) -> None:
        """`losses`: a scalar a micro-batch, on the device."""
        total = torch.stack([loss.double() for loss in losses]).sum()
        self._total = total.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream(total.device).record_event() if total.is_cuda else None

    def mean(self, world: World, target_tokens: int) -> float:
        """Nats a target token over all ranks; not finite if any rank's sum is not. Every rank must call it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        (loss_sum,) = world.sum([float(self._total)])
        return loss_sum / target_tokens
