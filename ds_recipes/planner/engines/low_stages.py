"""ZeRO-1 and ZeRO-2: whole parameters on every rank."""

from collections.abc import Iterator

from ds_recipes.planner.architecture import Architecture
from ds_recipes.planner.memory import BETWEEN_STEPS, Activations, Moment, Parts, bucket_bytes, scaled
from ds_recipes.planner.situation import Situation

FLOAT64 = 8  # the norm of a gradient is taken in it
ALL_REDUCE_ELEMENTS = 500_000_000
"""Elements that BF16_Optimizer reduces at a time (deepspeed/runtime/engine.py, MEMORY_OPT_ALLREDUCE_SIZE)."""


def moments(model: Architecture, situation: Situation, activations: Activations) -> Iterator[Moment]:
    """The head's forward and backward, each block's backward, the embedding's, and the optimizer's step."""
    return (
        _all_gradients(model, situation, activations)
        if situation.stage == 1
        else _sharded_gradients(model, situation, activations)
    )


def _resident(model: Architecture, situation: Situation) -> Parts:
    local = -(-model.numel // situation.world_size)
    on_device = situation.settings.sharding.optimizer_on == "device"
    state = (situation.master_bytes + situation.moment_bytes) * local
    return Parts(parameters=situation.parameter_bytes * model.numel, optimizer=state if on_device else 0)


def _sharded_gradients(model: Architecture, situation: Situation, activations: Activations) -> Iterator[Moment]:
    size, reduced = situation.parameter_bytes, situation.reduction_bytes
    local = -(-model.numel // situation.world_size)
    on_device = situation.settings.sharding.optimizer_on == "device"
    summed = situation.gradient_bytes * local if on_device else 0.0
    still, bucket = _resident(model, situation), situation.buckets.reduce
    yield Moment(BETWEEN_STEPS, still)
    before = scaled(still, gradients=summed if situation.micro_steps > 1 else 0.0)
    yield Moment("the head's forward", scaled(before, activations=activations.at_head, logits=activations.head.forward))
    filled = scaled(before, buffers=bucket * reduced * (2 if situation.buckets.overlapped else 1))
    yield Moment(
        "the head's backward", scaled(filled, activations=activations.at_head, logits=activations.head.backward)
    )
    if situation.micro_steps == 1:
        filled = scaled(filled, gradients=summed)
    tied = model.head_numel * size if model.tied else 0
    for number, block in enumerate(model.blocks):
        yield Moment(
            f"the backward of block {number + 1}",
            scaled(
                filled,
                activations=activations.during[number],
                gradients=bucket_bytes(block, bucket, size, reduced) + tied,
            ),
        )
    table = model.embeddings[0].numel
    converted = table * reduced if table > bucket and size != reduced else 0
    yield Moment(
        "the embedding's backward",
        scaled(filled, activations=activations.at_embedding, gradients=table * size + converted + tied),
    )
    if on_device:
        largest = min(local, max(parameter.numel for parameter in model.parameters))
        # where the sums have the parameters' dtype they are laid end to end for the optimizer
        more = FLOAT64 * largest if size < situation.gradient_bytes else max(summed, FLOAT64 * largest)
        yield Moment("the optimizer's step", scaled(still, gradients=summed + more))


def _all_gradients(model: Architecture, situation: Situation, activations: Activations) -> Iterator[Moment]:
    """In bfloat16 BF16_Optimizer keeps float32 sums of all gradients, beside the gradients themselves."""
    size = situation.parameter_bytes
    is_half = size < situation.gradient_bytes
    sums = situation.gradient_bytes * model.numel if is_half else 0
    still = scaled(_resident(model, situation), gradients=sums)
    yield Moment(BETWEEN_STEPS, still)
    own = model.numel * size
    earlier = own if situation.micro_steps > 1 else 0
    yield Moment(
        "the head's forward",
        scaled(still, gradients=earlier, activations=activations.at_head, logits=activations.head.forward),
    )
    yield Moment(
        "the head's backward",
        scaled(still, gradients=earlier, activations=activations.at_head, logits=activations.head.backward),
    )
    done = model.head_numel
    for number in reversed(range(len(model.blocks))):
        done += model.blocks[number].numel
        yield Moment(
            f"the backward of block {number + 1}",
            scaled(still, gradients=max(earlier, done * size), activations=activations.during[number]),
        )
    reduced = min(model.numel, ALL_REDUCE_ELEMENTS) * situation.gradient_bytes
    yield Moment("the reduction", scaled(still, gradients=own, buffers=reduced))
