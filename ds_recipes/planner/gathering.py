"""Which parameters ZeRO-3 holds whole at a time: DeepSpeed's own rules of fetching and letting go, followed module by module.

The rules are those of `PartitionedParameterCoordinator` (deepspeed/runtime/zero/partitioned_param_coordinator.py, 0.19.8), once it
has recorded a step: fetch a module's parameters, prefetch the next ones up to a bucket and to `max_live_parameters`, keep after
use what is used again within `max_reuse_distance`.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ds_recipes.planner.architecture import Architecture, Parameter


@dataclass(frozen=True)
class Limits:
    """In elements, by DeepSpeed's names without `stage3_`."""

    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000


@dataclass(frozen=True)
class Gathered:
    """Elements that are whole on a rank, the small ones that always are left out."""

    head_forward: int
    head_backward: int
    block_backward: tuple[int, ...]  # at the worst module of each block
    embedding_backward: int


@dataclass(frozen=True)
class _Use:
    """One module's turn: its parameters by number, with their elements."""

    parameters: Mapping[int, int]
    phase: str
    block: int = -1


@lru_cache(maxsize=64)  # it does not depend on the number of ranks, over which a smallest cluster is looked for
def gathered(model: Architecture, limits: Limits, segments: tuple[int, ...] | None) -> Gathered:
    """Follow one micro-step. `segments` has a segment's number for each block whose forward is done again; None: none is."""
    uses = list(_uses(model, limits, segments))
    phases: dict[tuple[str, int], int] = defaultdict(int)
    for use, elements in zip(uses, _held(uses, limits), strict=True):
        phases[use.phase, use.block] = max(phases[use.phase, use.block], elements)
    return Gathered(
        head_forward=phases["head forward", -1],
        head_backward=phases["head backward", -1],
        block_backward=tuple(phases["backward", block] for block in range(len(model.blocks))),
        embedding_backward=phases["embedding backward", -1],
    )


def _uses(model: Architecture, limits: Limits, segments: Sequence[int] | None) -> Iterator[_Use]:
    numbers: dict[int, int] = {}

    def sharded(parameters: Sequence[Parameter]) -> dict[int, int]:
        return {
            numbers.setdefault(id(one), len(numbers)): one.numel
            for one in parameters
            if one.numel > limits.param_persistence_threshold
        }

    head = (*(model.embeddings[:1] if model.tied else ()), *model.head)
    blocks = [[sharded(module) for module in block.modules] for block in model.blocks]
    yield _Use(sharded(model.embeddings), "forward")
    for modules in blocks:
        yield from (_Use(module, "forward") for module in modules)
    yield _Use(sharded(model.last), "forward")
    yield _Use(sharded(head), "head forward")
    yield _Use(sharded(head), "head backward")
    yield _Use(sharded(model.last), "head backward")
    done: set[int] = set()
    for block in reversed(range(len(blocks))):
        if segments is not None and segments[block] not in done:
            done.add(segments[block])
            for again in (other for other in range(len(blocks)) if segments[other] == segments[block]):
                yield from (_Use(module, "backward", again) for module in blocks[again])
        yield from (_Use(module, "backward", block) for module in reversed(blocks[block]))
    yield _Use(sharded(model.embeddings), "embedding backward")


def _held(uses: Sequence[_Use], limits: Limits) -> Iterator[int]:
    """For each use the elements that are whole while it runs, what is being copied out of a common buffer counted twice."""
    state = _Coordinator(uses, limits)
    for step, use in enumerate(uses):
        yield state.fetch(step, use)
        state.release(step + 1, use)


class _Coordinator:
    """DeepSpeed's bookkeeping. `held` maps a parameter to its elements."""

    def __init__(self, uses: Sequence[_Use], limits: Limits) -> None:
        self._uses, self._limits = uses, limits
        self._held: dict[int, int] = {}
        self._elements = 0
        self._in_flight: dict[int, dict[int, int]] = {}  # parameter: the others of its common buffer
        self._queue = deque((number, step) for step, use in enumerate(uses) for number in use.parameters)
        self._numel = {number: numel for use in uses for number, numel in use.parameters.items()}
        self._fetched_for: dict[int, float] = defaultdict(lambda: float("-inf"))

    def fetch(self, step: int, use: _Use) -> int:
        """Elements held at the worst moment of this use."""
        self._take({number: numel for number, numel in use.parameters.items() if number not in self._held})
        copied = [self._in_flight.pop(number) for number in use.parameters if number in self._in_flight]
        for group in copied:
            for number in group:
                self._in_flight.pop(number, None)
        while_copied = self._elements + max((sum(group.values()) for group in copied if len(group) > 1), default=0)
        self._prefetch(step, use)
        return max(while_copied, self._elements)

    def _take(self, parameters: Mapping[int, int]) -> None:
        self._held.update(parameters)
        self._elements += sum(parameters.values())
        self._in_flight.update({key: dict(parameters) for key in parameters})

    def _prefetch(self, step: int, use: _Use) -> None:
        expected = {number for number in use.parameters if self._fetched_for[number] < step}
        met: set[int] = set()
        while self._queue and len(met) < len(expected):
            number, at = self._queue.popleft()
            self._fetched_for[number] = at
            met.add(number)
        most = min(self._limits.max_live_parameters - self._elements, self._limits.prefetch_bucket_size)
        taken: dict[int, int] = {}
        while self._queue and sum(taken.values()) < most:
            number, at = self._queue.popleft()
            self._fetched_for[number] = max(self._fetched_for[number], at)
            if number not in self._held:
                taken[number] = self._numel[number]
        self._take(taken)

    def release(self, step: int, use: _Use) -> None:
        """Let go of what is not needed again soon; `step` is the next one."""
        leaving = {number for number in use.parameters if self._fetched_for[number] <= step}
        traversed = 0
        for later in self._uses[step:]:
            if traversed >= self._limits.max_reuse_distance or not leaving:
                break
            leaving -= later.parameters.keys()
            traversed += sum(later.parameters.values())
        for number in leaving & self._held.keys():
            self._elements -= self._held.pop(number)
