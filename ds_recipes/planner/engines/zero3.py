"""ZeRO-3: everything sharded, parameters gathered for a while."""

from collections.abc import Iterator

from ds_recipes.planner.architecture import Architecture
from ds_recipes.planner.gathering import gathered
from ds_recipes.planner.memory import BETWEEN_STEPS, Activations, Moment, Parts, bucket_bytes, scaled, shard
from ds_recipes.planner.situation import Situation


def moments(model: Architecture, situation: Situation, activations: Activations) -> Iterator[Moment]:
    """The head's forward and backward, each block's backward, the embedding's, and the optimizer's step."""
    size, sharding = situation.parameter_bytes, situation.settings.sharding
    local = sum(shard(parameter, situation.world_size) for parameter in model.parameters)
    still = resident(model, situation, local)
    whole = gathered(model, situation.limits, situation.segments(model))
    head = model.head_numel
    yield Moment(BETWEEN_STEPS, still)
    bucket, reduced = situation.buckets.reduce, situation.reduction_bytes
    yield Moment(
        "the head's forward",
        scaled(
            still,
            parameters=whole.head_forward * size,
            activations=activations.at_head,
            logits=activations.head.forward,
        ),
    )
    yield Moment(
        "the head's backward",
        scaled(
            still,
            parameters=whole.head_backward * size,
            activations=activations.at_head,
            logits=activations.head.backward,
        ),
    )
    tied = head * size if model.tied else 0  # it waits for the embedding's part
    for number, block in enumerate(model.blocks):
        yield Moment(
            f"the backward of block {number + 1}",
            scaled(
                still,
                parameters=whole.block_backward[number] * size,
                activations=activations.during[number],
                gradients=bucket_bytes(block, bucket, size, reduced) + tied,
            ),
        )
    table = model.embeddings[0].numel
    converted = table * reduced if table > bucket and size != reduced else 0
    yield Moment(
        "the embedding's backward",
        scaled(
            still,
            parameters=whole.embedding_backward * size,
            activations=activations.at_embedding,
            gradients=table * size + converted + tied,
        ),
    )
    if sharding.optimizer_on == "device":  # a sub-group's gradients are laid end to end for the optimizer
        copied = min(local, situation.buckets.sub_group + largest_shard(model, situation.world_size))
        yield Moment("the optimizer's step", scaled(still, gradients=copied * situation.master_bytes))


def largest_shard(model: Architecture, ranks: int) -> int:
    return max(shard(parameter, ranks) for parameter in model.parameters)


def resident(model: Architecture, situation: Situation, local: int) -> Parts:
    """What lies on the device all the time."""
    size, sharding = situation.parameter_bytes, situation.settings.sharding
    threshold = situation.limits.param_persistence_threshold
    small = sum(parameter.numel for parameter in model.parameters if parameter.numel <= threshold)
    second = sum(shard(one, situation.group_size) for one in model.parameters) if sharding.group_size else 0
    on_device = sharding.optimizer_on == "device"
    return Parts(
        parameters=size * (small + second + (local if sharding.parameters_on == "device" else 0)),
        gradients=situation.gradient_bytes * local if on_device else 0.0,
        optimizer=(situation.master_bytes + situation.moment_bytes) * local if on_device else 0.0,
        buffers=float(situation.buckets.reduce * situation.reduction_bytes),
    )
