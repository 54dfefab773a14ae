"""Parameters without a gradient under ZeRO: DeepSpeed 0.19 steps them with zeros, or with what an earlier step left behind.

Its optimizers step flat tensors, in which many parameters lie end to end. So a step takes views of those parts that have a
gradient, with state of their own: torch's optimizer steps the parts as it would the parameters.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ds_recipes.engine.optimizer import MOMENTUM_NAMES
from ds_recipes.engine.unused import Usage
from ds_recipes.engine.zero3.experts import is_filled_in
from ds_recipes.errors import TrainingError

GRADIENT_PARTITIONS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


def watch_gradients(model: nn.Module, usage: Usage) -> None:
    """Let autograd say which parameters it has a gradient for, before DeepSpeed puts zeros in place of the missing ones."""

    def note(name: str, gradient: torch.Tensor | None) -> None:
        if gradient is not None and not is_filled_in(gradient):
            usage.mark(name)

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(note, name))


@dataclass(frozen=True)
class Part:
    """Elements [start, end) of a flat tensor, which are a parameter's; with the padding behind them."""

    name: str
    start: int
    end: int


@dataclass
class _Run:
    """Neighbouring parts that have taken equally many steps, `missed` fewer than the optimizer."""

    start: int
    end: int
    missed: int


class PartwiseSteps:
    """Steps an optimizer's flat tensors part by part where they have to be told apart, and else as they are."""

    def __init__(self, optimizer: torch.optim.Optimizer, usage: Usage, parts: dict[torch.Tensor, list[Part]]) -> None:
        """`parts` are those of each flat tensor, in the order in which they lie there."""
        self._optimizer = optimizer
        self._usage = usage
        self._parts = parts
        self._unused: frozenset[str] = frozenset()
        self._steps_before = 0
        self._plain: Callable[[], Any] = optimizer.step
        optimizer.step = self._step  # type: ignore[method-assign,assignment]

    def begin(self, unused: frozenset[str], steps_before: int) -> None:
        """The next step leaves these parameters alone; the optimizer has taken so many steps."""
        self._unused, self._steps_before = unused, steps_before

    def _step(self, closure: None = None) -> None:
        """In place of the optimizer's `step`, which DeepSpeed calls once or for each sub-group."""
        groups, state = self._optimizer.param_groups, self._optimizer.state
        whole = [group["params"] for group in groups]
        views: list[torch.Tensor] = []
        try:
            for group in groups:
                group["params"] = [one for master in group["params"] for one in self._to_step(master, views)]
            self._plain()
        finally:
            for group, masters in zip(groups, whole, strict=True):
                group["params"] = masters
            for view in views:
                state.pop(view, None)

    def _to_step(self, master: torch.Tensor, views: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The flat tensor itself, or views of its runs, which `views` takes up."""
        state, runs = self._optimizer.state.get(master, {}), list(self._runs(master))
        if "step" in state:
            state["step"].fill_(self._steps_before - (runs[0].missed if len(runs) == 1 else 0))
        if [(run.start, run.end) for run in runs] == [(0, master.numel())]:
            yield master
            return
        assert master.grad is not None
        for run in runs:
            view = master.detach()[run.start : run.end]
            view.grad = master.grad[run.start : run.end]
            part = {name: state[name][run.start : run.end] for name in MOMENTUM_NAMES if name in state}
            if "step" in state:
                part["step"] = torch.full_like(state["step"], self._steps_before - run.missed)
            self._optimizer.state[view] = part
            views.append(view)
            yield view

    def _runs(self, master: torch.Tensor) -> Iterator[_Run]:
        """What to step of a flat tensor. One run where all parts are used and have missed equally many steps."""
        missed, parts = self._usage.missed, self._parts[master]
        if not self._unused and not missed:
            yield _Run(0, master.numel(), 0)
            return
        run: _Run | None = None
        has_gap = False
        for part in parts:
            if part.start == part.end:
                continue
            if part.name in self._unused:
                has_gap = True
            elif run is not None and not has_gap and run.missed == missed.get(part.name, 0):
                run.end = part.end
            else:
                if run is not None:
                    yield run
                run, has_gap = _Run(part.start, part.end, missed.get(part.name, 0)), False
        if run is not None:
            yield run


def check_used_alike(partly: Sequence[str], filled_in: Collection[str]) -> None:
    """See that no parameter had a gradient on some ranks alone, but for those of blocks that fill in zeros.

    Raises:
        TrainingError: one had. Its rank's gradients were added to those of other parameters.
    """
    wrong = [name for name in partly if name not in filled_in]
    if wrong:
        raise TrainingError(
            f"{wrong[0]} got a gradient on some ranks and none on others in this step"
            f"{f', and so did {len(wrong) - 1} other parameters' if len(wrong) > 1 else ''}. Below stage 3 DeepSpeed then adds "
            "gradients of different parameters to each other. Use --engine fsdp, or give every rank data of each kind in each "
            "step."
        )


def forget_old_gradients(zero: Any, stage: int) -> Callable[[], None]:
    """Keep DeepSpeed from taking an earlier step's gradient for this one's; call what is returned before each step.

    Stage 3, and CPU offload below it, keep each parameter's gradient in a buffer that the first micro-step of a step writes
    and later ones add to. One without a gradient in the first micro-step is added to what the buffer held before, and one
    without any is counted into the norm with it.
    """
    if stage == 3:
        buffers: dict[int, torch.Tensor] = getattr(zero, GRADIENT_PARTITIONS)
        stale = _Stale(lambda number: buffers[number].zero_())
        plain = zero.partition_grads

        def partition_grads(parameters: Any, gradients: Any) -> Any:
            stale.use([parameter.ds_id for parameter in parameters], is_first=zero.micro_step_id == 0)
            return plain(parameters, gradients)

        zero.partition_grads = partition_grads
        return stale.end
    if not getattr(zero, "cpu_offload", False):
        return lambda: None
    stale = _Stale(lambda number: zero.accumulated_grads_in_cpu[number].zero_())
    accumulate = zero.async_accumulate_grad_in_cpu_via_gpu

    def accumulate_in_cpu(parameter: Any) -> None:
        stale.use([zero.get_param_id(parameter)], is_first=zero.micro_step_id == 0)
        accumulate(parameter)

    zero.async_accumulate_grad_in_cpu_via_gpu = accumulate_in_cpu
    return stale.end


class _Stale:
    """Numbers of the parameters whose buffer holds a gradient of an earlier step."""

    def __init__(self, clear: Callable[[int], object]) -> None:
        self._clear = clear
        self._stale: set[int] = set()
        self._used: set[int] = set()

    def use(self, numbers: list[int], is_first: bool) -> None:
        """A micro-step writes these buffers, if it is the first of its step, or adds to them."""
        for number in numbers:
            if number not in self._used:
                if not is_first and number in self._stale:
                    self._clear(number)
                self._used.add(number)

    def end(self) -> None:
        """The step's last micro-step is over."""
        for number in self._stale - self._used:
            self._clear(number)
        self._stale, self._used = self._used, set()
