"""How fast a run trains and how much memory it takes, by the monotonic clock."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ds_recipes.config.plan import Plan
from ds_recipes.models.flops import ModelFlops

GIB = 2**30
PEAK_BF16_FLOPS = (
    # The first name that the device's own name contains decides. Dense figures, without structured sparsity.
    ("GH200", 989e12),  # NVIDIA GH200 data sheet
    ("H200 NVL", 835e12),  # NVIDIA H200 data sheet
    ("H200", 989e12),
    ("H100 NVL", 835e12),  # NVIDIA H100 data sheet: SXM, NVL, PCIe
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),  # NVIDIA A100 data sheet, SXM and PCIe
    ("V100", 125e12),  # NVIDIA V100 data sheet: the tensor cores' float16 figure, there is none for bfloat16
)
"""bf16 FLOP/s of one device at its best, by a part of `torch.cuda.get_device_name()`."""


def peak_flops(device_name: str | None, precision: str) -> float | None:
    """Peak FLOP/s of one device in bf16, or None where it is not known: a CPU, another device, another precision."""
    if device_name is None or precision != "bf16":
        return None
    return next((flops for name, flops in PEAK_BF16_FLOPS if name in device_name), None)


class StepMeter:
    """Times the optimizer steps of one rank; what lies between two steps (evaluation, saving) is not counted.

    Calls go around each step: `start_step`, `data_ready`, `end_step`; `read` gives the means since the last `read`.
    """

    def __init__(
        self,
        plan: Plan,
        flops: ModelFlops,
        device: torch.device,
        peak_flops_per_rank: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._world_size = plan.world_size
        self._device = device
        self._flops_per_token = flops.per_token(plan.context_size)
        self._peak_flops_per_rank = peak_flops_per_rank
        self._clock = clock
        self._started = clock()
        self.longest_step_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        self._steps, self._tokens, self._step_seconds, self._data_seconds = 0, 0, 0.0, 0.0

    def start_step(self) -> None:
        """The step begins: its rows are asked for."""
        self._started = self._clock()

    def data_ready(self) -> None:
        """The rows are there: what passed since `start_step` was waiting for data."""
        self._data_seconds += self._clock() - self._started

    def end_step(self, tokens: int) -> None:
        """The update is done. `tokens`: those of the step without padding, all ranks together."""
        seconds = self._clock() - self._started
        self.longest_step_seconds = max(self.longest_step_seconds, seconds)
        self._step_seconds += seconds
        self._steps += 1
        self._tokens += tokens

    def read(self) -> dict[str, float | None]:
        """Means over the steps since the last call, then start anew.

        tokens_per_sec counts all ranks' tokens; mfu is the model's share of the devices' peak, None where that is
        unknown; step_seconds and data_seconds are this rank's, for one optimizer step; memory_gib as `peak_memory_gib`.
        A rate is None if no time was measured.
        """
        seconds, steps = self._step_seconds, self._steps
        rate = self._tokens / seconds if seconds > 0 else None
        per_rank = None if rate is None else rate / self._world_size
        readings = {
            "tokens_per_sec": rate,
            "tokens_per_sec_per_rank": per_rank,
            "mfu": self._utilisation(per_rank),
            "step_seconds": seconds / steps if steps else None,
            "data_seconds": self._data_seconds / steps if steps else None,
            "memory_gib": peak_memory_gib(self._device),
        }
        self._reset()
        return readings

    def _utilisation(self, tokens_per_sec_per_rank: float | None) -> float | None:
        if tokens_per_sec_per_rank is None or self._peak_flops_per_rank is None:
            return None
        return tokens_per_sec_per_rank * self._flops_per_token / self._peak_flops_per_rank


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in GiB that this process has used: of the GPU as torch allocated it, else of the host (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return _peak_resident_bytes() / GIB


def _peak_resident_bytes() -> int:
    """From /proc, since getrusage also counts what a parent held before it started this program."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
