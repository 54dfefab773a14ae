"""FSDP2: master weights sharded by rows, blocks gathered one by one, the rest at the root for the whole micro-step."""

from collections.abc import Iterator

from ds_recipes.planner.architecture import Architecture
from ds_recipes.planner.memory import BETWEEN_STEPS, Activations, Moment, Parts, rows_shard, scaled
from ds_recipes.planner.situation import Situation


def moments(model: Architecture, situation: Situation, activations: Activations) -> Iterator[Moment]:
    """The head's forward and backward, each block's backward, the root's reduction, and the optimizer's step."""
    size, reduced, ranks = situation.parameter_bytes, situation.reduction_bytes, situation.group_size
    on_device = situation.settings.sharding.optimizer_on == situation.settings.sharding.parameters_on == "device"
    local = sum(rows_shard(parameter, ranks) for parameter in model.parameters)
    held = situation.master_bytes + situation.moment_bytes
    still = Parts(optimizer=held * local if on_device else 0.0)
    yield Moment(BETWEEN_STEPS, still)
    gradients = situation.master_bytes * local if on_device else 0.0
    earlier = gradients if situation.micro_steps > 1 else 0.0
    root = sum(one.numel for one in (*model.embeddings, *model.last, *model.head))
    blocks = [block.numel for block in model.blocks]
    kept = situation.stage < 3
    copies = 2 if situation.batch.device == "cpu" else 1  # gloo reduces a copy
    last = blocks[-1] if blocks else 0
    at_head = root + (sum(blocks) if kept else last)
    forward = scaled(
        still,
        parameters=at_head * size,
        gradients=earlier,
        activations=activations.at_head,
        buffers=last * size,  # what the last block was copied out of
    )
    yield Moment("the head's forward", scaled(forward, logits=activations.head.forward))
    yield Moment("the head's backward", scaled(forward, logits=activations.head.backward))
    of_head = model.head_numel * size  # the root's gradients wait for the embedding's
    reduced_so_far = 0
    for number in reversed(range(len(blocks))):
        own = blocks[number]
        whole = sum(blocks) if kept else own
        ahead = blocks[number - 1] * size if number and not kept else 0
        waiting = blocks[number + 1] * reduced if number + 1 < len(blocks) else 0
        shards = situation.master_bytes * reduced_so_far / ranks if on_device and not earlier else 0.0
        common = scaled(still, parameters=(root + whole) * size, buffers=ahead, gradients=earlier + shards + of_head)
        yield Moment(
            f"the backward of block {number + 1}",
            scaled(common, activations=activations.during[number], gradients=own * size, buffers=waiting),
        )
        yield Moment(
            f"the reduction of block {number + 1}",
            scaled(
                common,
                parameters=0 if kept else -own * size,  # let go before the reduction
                activations=activations.after[number],
                gradients=own * size,
                buffers=own * reduced * (copies + 1 / ranks),
            ),
        )
        reduced_so_far += own
    left = sum(blocks) * size if kept and situation.micro_steps > 1 else 0
    shards = situation.master_bytes * sum(blocks) / ranks if on_device and not earlier else earlier
    yield Moment(
        "the root's copy for the reduction",
        scaled(still, parameters=left, gradients=shards + root * size, buffers=root * reduced),
    )
    yield Moment(
        "the root's reduction",
        scaled(still, parameters=left, gradients=gradients + of_head, buffers=root * reduced * copies),
    )
    yield Moment("the optimizer's step", scaled(still, gradients=gradients))
