"""Does it fit, what would make it fit, and on how few GPUs does it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ds_recipes.config.engine_settings import Checkpointing
from ds_recipes.planner.architecture import Architecture
from ds_recipes.planner.machine import needed_bytes
from ds_recipes.planner.memory import Moment
from ds_recipes.planner.peak import moments, worst
from ds_recipes.planner.situation import Situation, with_batch
from ds_recipes.planner.storage import offload_bytes

MOST_NODES = 512
SMALL_BUCKET = 10_000_000
LONG_CONTEXT = 2048  # tokens from which sdpa's masks are worth a word

Change = Callable[[Situation], Situation]


@dataclass(frozen=True)
class Suggestion:
    """One change of the settings, by itself or with all before it, and what a GPU would need then."""

    what: str
    needed: float
    fits: bool
    host: float  # bytes of host memory a node that it takes for what it offloads


@dataclass(frozen=True)
class Cluster:
    """The fewest GPUs on which the same settings fit, or None."""

    nodes: int
    gpus_per_node: int
    needed: float


def peak(model: Architecture, situation: Situation) -> Moment:
    """The worst moment of a step."""
    return worst(moments(model, situation))


def needed(model: Architecture, situation: Situation) -> float:
    """Bytes that a GPU must have."""
    return needed_bytes(peak(model, situation).parts.total)


def smallest_cluster(model: Architecture, situation: Situation, gpus_per_node: int, memory: float) -> Cluster | None:
    """Fewest GPUs of one node, else fewest nodes, with the same rows a rank and nothing else changed."""

    def fits(gpus: int) -> bool:
        if situation.settings.sharding.group_size and gpus % min(situation.settings.sharding.group_size, gpus):
            return False
        return needed(model, _on(situation, gpus, gpus_per_node)) <= memory

    for gpus in range(1, gpus_per_node + 1):
        if fits(gpus):
            return Cluster(1, gpus, needed(model, _on(situation, gpus, gpus_per_node)))
    if not fits(MOST_NODES * gpus_per_node):
        return None
    least, most = 1, MOST_NODES  # one node does not fit, so many do
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle * gpus_per_node) else (middle, most)
    return Cluster(most, gpus_per_node, needed(model, _on(situation, most * gpus_per_node, gpus_per_node)))


def _on(situation: Situation, gpus: int, gpus_per_node: int) -> Situation:
    return replace(situation, world_size=gpus, ranks_per_host=min(gpus, gpus_per_node))


def suggestions(model: Architecture, situation: Situation, memory: float) -> list[Suggestion]:
    """Changes in the order of what they cost, each by itself; then all of them together, as far as is needed."""
    found: list[Suggestion] = []
    together, before = situation, needed(model, situation)
    for what, change in _changes(situation):
        alone = _suggestion(what, model, change(situation), memory)
        if alone.needed >= before:
            continue
        found.append(alone)
        if alone.fits:
            return found
        together = change(together)
        both = _suggestion("all of these together", model, together, memory)
        if len(found) > 1 and both.fits:
            return [*found, both]
    return found


def _suggestion(what: str, model: Architecture, changed: Situation, memory: float) -> Suggestion:
    then = needed(model, changed)
    return Suggestion(what, then, then <= memory, offload_bytes(model, changed)[0] * changed.ranks_per_host)


def _changes(situation: Situation) -> Iterator[tuple[str, Change]]:
    batch, sharding = situation.batch, situation.settings.sharding
    if situation.settings.checkpointing is None:
        yield "--activation_checkpointing", checkpointed
    if batch.attention == "eager" or (batch.attention == "sdpa" and batch.context_size >= LONG_CONTEXT):
        yield (
            "--attn_implementation flash_attention_2",
            lambda now: with_batch(now, attention="flash_attention_2"),
        )
    if batch.rows > 1:
        yield (
            f"--batch_size_training 1 (now {batch.rows}; the global batch stays with more micro-steps)",
            lambda now: replace(with_batch(now, rows=1), micro_steps=now.micro_steps * batch.rows),
        )
    if sharding.stage < 3:
        yield '"stage": 3', _stage_3
    if situation.engine == "deepspeed" and sharding.stage == 3:
        yield (
            '"stage3_max_live_parameters", "stage3_max_reuse_distance" and the buckets 1e7',
            _little_gathered,
        )
        yield "--engine fsdp", lambda now: replace(now, engine="fsdp")
    if sharding.optimizer_on == "device":
        yield '"offload_optimizer": {"device": "cpu"}', lambda now: _placed(now, optimizer_on="cpu")
    if sharding.parameters_on == "device" and sharding.stage == 3:
        yield '"offload_param": {"device": "cpu"}', lambda now: _placed(now, parameters_on="cpu")
    yield '"cpu_checkpointing": true with --activation_checkpointing', _inputs_on_host


def _placed(situation: Situation, **places: str) -> Situation:
    settings = situation.settings
    return replace(situation, settings=replace(settings, sharding=replace(settings.sharding, **places)))  # type: ignore[arg-type]


def checkpointed(situation: Situation) -> Situation:
    wanted = Checkpointing(None, on_cpu=False, contiguous=False, synchronize=False, profile=False)
    return replace(situation, settings=replace(situation.settings, checkpointing=wanted))


def _inputs_on_host(situation: Situation) -> Situation:
    before = situation.settings.checkpointing
    number = None if before is None else before.number_checkpoints
    wanted = Checkpointing(number, on_cpu=True, contiguous=False, synchronize=False, profile=False)
    return replace(situation, settings=replace(situation.settings, checkpointing=wanted))


def _stage_3(situation: Situation) -> Situation:
    sharding = replace(situation.settings.sharding, stage=3)
    return replace(situation, settings=replace(situation.settings, sharding=sharding))


def _little_gathered(situation: Situation) -> Situation:
    if situation.engine != "deepspeed":
        return situation
    limits = replace(
        situation.limits,
        max_live_parameters=SMALL_BUCKET,
        max_reuse_distance=SMALL_BUCKET,
        prefetch_bucket_size=SMALL_BUCKET,
    )
    return replace(situation, limits=limits, buckets=replace(situation.buckets, reduce=SMALL_BUCKET))
