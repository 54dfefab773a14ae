"""What is special to FSDP2: how it shards and gathers, groups that are replicas of each other, offload, precision, experts."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from ds_recipes.config.engine_settings import LossScaling
from ds_recipes.engine.fsdp2.build import sharding_units
from ds_recipes.engine.loss_scale import LossScaler
from ds_recipes.models.loss_head import install_loss_head, learn_transform
from tests.contract.fsdp2_engines import MODELS, ROWS, How, TwoExperts, source
from tests.contract.fsdp2_ranks import (
    counts,
    disturbed,
    gathered_blocks,
    gradients,
    memory,
    overflows,
    refusals,
    resume,
    train_and_save,
)
from tests.contract.oracle import Oracle, global_batch
from tests.ranks.launch import run_ranks

EXACT = {
    "tied, computed again": How(model="tied", checkpointing=True),
    "untied, computed again": How(checkpointing=True),
    "stage 2": How(stage=2),
    "stage 1, tied": How(stage=1, model="tied", rows_per_rank=3),
    "offload": How(offload=True),
    "replicas": How(group_size=2),
    "replicas, stage 2, tied, computed again": How(group_size=2, stage=2, model="tied", checkpointing=True),
    "replicas, one micro-step": How(group_size=2, rows_per_rank=3),
    "replicas, offload": How(group_size=2, offload=True),
    "clipped": How(group_size=2, clip=0.5),
    "Mixtral": How(model="mixtral", group_size=2, checkpointing=True),
    "Qwen2-MoE": How(model="qwen2_moe"),
    "frozen block": How(frozen="layers.0."),
    "frozen embedding, computed again": How(frozen="embed", checkpointing=True),
}
PRECISION = {
    "bf16": How(parameters="bfloat16"),
    "bf16, reduced in it": How(parameters="bfloat16", reduction="bfloat16", group_size=2),
    "bf16 masters": How(parameters="bfloat16", master="bfloat16"),
    "autocast": How(autocast="bfloat16", model="tied"),
}
UNUSUAL = {"experts": How(model="two_experts"), "shared between blocks": How(model="shared", checkpointing=True)}
CLOSE = 0.03  # relative, of a gradient taken in bfloat16 with 8 bits of mantissa
SCALING = LossScaling(static=None, initial_power=24, window=1000, hysteresis=2, consecutive_hysteresis=False, least=1.0)
FP16 = How(parameters="float16", scaling=SCALING, rows_per_rank=3, group_size=2)


@cache
def reports() -> list[dict[str, dict[str, Any]]]:
    """Every case on four ranks in one start, by rank."""
    hows = EXACT | PRECISION | UNUSUAL
    return [dict(zip(hows, seen, strict=True)) for seen in run_ranks(gradients, 4, list(hows.values()), timeout=240)]


def report(case: str) -> dict[str, Any]:
    return reports()[0][case]


def relative(mine: torch.Tensor, reference: torch.Tensor) -> float:
    return float((mine.double() - reference.double()).norm() / reference.double().norm())


def oracle(how: How, before: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    loss, gradient = Oracle(MODELS[how.model](), before, "sgd").gradients(global_batch(0, ROWS))
    return loss, {name: one for name, one in gradient.items() if how.frozen is None or how.frozen not in name}


def norm_of(gradient: dict[str, torch.Tensor]) -> float:
    return torch.cat([one.flatten() for one in gradient.values()]).double().norm().item()


@pytest.mark.parametrize("case", EXACT)
def test_the_first_gradient_and_its_norm_equal_the_oracles(case):
    how, seen = EXACT[case], report(case)
    loss, gradient = oracle(how, seen["before"])
    assert seen["loss"] == pytest.approx(loss, rel=1e-6)
    assert all(rank[case]["result"] == seen["result"] for rank in reports())
    assert seen["result"].grad_norm == pytest.approx(norm_of(gradient), rel=1e-6)
    share = how.clip / norm_of(gradient) if how.clip else 1.0
    assert share <= 1
    for name, one in gradient.items():
        assert relative(seen["gradient"][name], share * one) < 1e-6, name
    assert seen["left_over"] == 0


@pytest.mark.parametrize("case", ["frozen block", "frozen embedding, computed again"])
def test_frozen_parameters_keep_their_values_and_have_no_moments(case):
    frozen = EXACT[case].frozen or ""
    names = {name for name in report(case)["before"] if frozen in name}
    assert names
    assert all(not report(case)["gradient"][name].any() for name in names)
    assert not any(report(case)["moments"][name] for name in names)


@pytest.mark.parametrize("case", UNUSUAL)
def test_models_that_transformers_lacks_equal_one_process(case):
    """An expert that gets no token on a rank, and blocks that share a module and so are left to the root."""
    how, seen = UNUSUAL[case], report(case)
    model, with_buffers = (source(how).skeleton(torch.float32, "sdpa", torch.device("cpu")) for _ in range(2))
    model.to_empty(device="cpu")
    model.model.rotary_emb = with_buffers.model.rotary_emb
    model.load_state_dict(seen["before"], strict=False)
    install_loss_head(model)
    learn_transform(model, lambda: model(*2 * (torch.arange(8)[None],)))
    rows = global_batch(0, ROWS)
    for number, row in enumerate(rows):
        TwoExperts.route = number % 2
        loss = model(row.input_ids, row.position_ids, target_index=row.target_index, target_ids=row.target_ids)
        (loss / sum(one.num_target_tokens for one in rows)).backward()
    for name, parameter in model.named_parameters():
        assert relative(seen["gradient"][name], parameter.grad) < 1e-6, name


@pytest.mark.parametrize("case", PRECISION)
def test_lower_precision_stays_close_and_says_what_it_is(case):
    how, seen = PRECISION[case], report(case)
    _, gradient = oracle(how, seen["before"])
    assert max(relative(seen["gradient"][name], one) for name, one in gradient.items()) < CLOSE
    keys = ("parameters", "master", "moments", "gradient_accumulation", "reduction", "autocast")
    wanted = (how.parameters, how.master, how.master, how.master, how.reduction, how.autocast)
    assert [seen["description"][key] for key in keys] == list(wanted)


def test_buffers_keep_their_dtype_and_values():
    skeleton = source(How()).skeleton(torch.float32, "sdpa", torch.device("cpu"))
    theirs = {name: (str(value.dtype), value.sum().item()) for name, value in skeleton.named_buffers()}
    assert theirs
    for case in ("bf16", "bf16 masters", "offload"):
        assert report(case)["buffers"] == theirs, case


def test_the_description_says_in_words_how_it_is_sharded():
    said = {case: report(case)["description"]["sharding"] for case in ("stage 2", "replicas", "untied, computed again")}
    assert said == {
        "stage 2": "FSDP2 over 4 ranks, parameters kept for the whole step",
        "replicas": "FSDP2 with HSDP: 2 replicas over 2 ranks each, parameters resharded after forward",
        "untied, computed again": "FSDP2 over 4 ranks, parameters resharded after forward",
    }
    assert report("offload")["description"]["optimizer_device"] == "cpu"


@pytest.mark.parametrize("case", ["untied, computed again", "replicas"])
def test_each_rank_gives_about_an_equal_share_of_a_checkpoint(case):
    shares = [rank[case]["elements"] for rank in reports()]
    whole = sum(tensor.numel() for tensor in report(case)["before"].values())
    assert sum(shares) == whole
    assert max(shares) < 0.3 * whole


GROUPS = 3  # two blocks and the root
MICRO_STEPS = 3  # of one row on four ranks


@cache
def others() -> dict[str, Any]:
    """Everything else that four ranks can show in one start."""
    return run_ranks(all_others, 4, timeout=240)


def all_others(world: Any) -> dict[str, Any]:
    return {
        "stage 3": counts(world, How(parameters="bfloat16")),
        "stage 2": counts(world, How(stage=2)),
        "replicas": counts(world, How(group_size=2)),
        "whole, stage 3": gathered_blocks(world, How(model="four_blocks", rows_per_rank=3)),
        "whole, stage 2": gathered_blocks(world, How(model="four_blocks", rows_per_rank=3, stage=2)),
        "disturbed": [disturbed(world, How(optimizer="adamw", stage=stage, group_size=2)) for stage in (2, 3)],
        "overflows": overflows(world, FP16, 40),
        "memory": memory(world, How(model="deep")),
        "refusals": refusals(world),
    }


def number_of(case: str, collective: str) -> int:
    return len(others()[0][case][collective])


def test_stage_3_gathers_again_for_backward_all_but_the_last_block_and_the_root():
    assert number_of("stage 3", "gather") == MICRO_STEPS * (GROUPS + 1)


def test_below_stage_3_parameters_are_gathered_once_a_step():
    assert number_of("stage 2", "gather") == GROUPS
    assert number_of("stage 2", "scatter") == MICRO_STEPS * GROUPS


def test_replicas_add_up_their_gradients_once_a_step():
    assert number_of("replicas", "scatter") == MICRO_STEPS * GROUPS
    assert number_of("replicas", "reduce") == GROUPS


def test_bf16_parameters_travel_as_such_and_gradients_in_the_reduction_dtype():
    seen = others()[0]["stage 3"]
    assert {dtype for dtype, _ in seen["gather"]} == {"torch.bfloat16"}
    assert {dtype for dtype, _ in seen["scatter"]} == {"torch.float32"}


def test_only_the_block_at_work_is_whole_at_stage_3():
    assert others()[0]["whole, stage 3"] == [[0], [1], [2], [3]]
    assert others()[0]["whole, stage 2"] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_a_forward_alone_leaves_no_trace_in_later_steps_or_loads():
    assert others()[0]["disturbed"] == [{"steps": True, "load": True}] * 2


def test_fp16_steps_that_overflow_are_not_applied_on_any_rank():
    seen = others()[0]["overflows"]
    assert all(str(rank["overflows"]["results"]) == str(seen["results"]) for rank in others())  # nan is no nan
    applied = [result.applied for result in seen["results"]]
    assert applied == [False] * (len(applied) - 1) + [True] and len(applied) > 3
    assert seen["untouched"] == [not one for one in applied]
    scaler, scales = LossScaler(SCALING), []
    for one in applied:
        scales.append(scaler.scale)
        scaler.update(overflow=not one)
    assert [result.loss_scale for result in seen["results"]] == scales
    assert seen["state"] == scaler.state()
    _, gradient = oracle(FP16, seen["before"])
    assert seen["results"][-1].grad_norm == pytest.approx(norm_of(gradient), rel=CLOSE)
    assert max(relative(seen["gradient"][name], one) for name, one in gradient.items()) < CLOSE


def test_no_rank_holds_the_whole_model():
    for rank in others():
        whole, grown = rank["memory"]
        assert grown < 0.4 * whole, "a quarter is its share"


def test_what_cannot_be_sharded_is_refused_in_one_line():
    group, scalar, moments = others()[0]["refusals"]
    assert group.startswith("ConfigError: zero_hpz_partition_size is 3, but 4 ranks do not divide into groups of 3.")
    assert scalar.startswith("InputError: model.layers.1.gain is a single number, which FSDP2 cannot shard.")
    assert moments.startswith("ConfigError: master weights in bfloat16 with moments in float32 are not possible")
    assert not any("\n" in message for message in (group, scalar, moments))


def test_blocks_that_share_a_parameter_are_left_to_the_root():
    model = source(How()).skeleton(torch.float32, "sdpa", torch.device("cpu"))
    layers = list(model.model.layers)
    assert sharding_units(model) == layers
    layers[1].input_layernorm.weight = model.model.norm.weight
    assert sharding_units(model) == layers[:1]
    shared = nn.Parameter(torch.empty(60, device="meta"))
    layers[0].input_layernorm.weight = layers[1].input_layernorm.weight = shared
    assert sharding_units(model) == []


REPLICAS = How(group_size=2, optimizer="adamw", clip=1.0)
STEPS = 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float]]:
    """A checkpoint of four ranks in two groups, after `STEPS` steps, and the losses of twice as many."""
    folder = str(tmp_path_factory.mktemp("replicas"))
    return folder, run_ranks(train_and_save, 4, REPLICAS, folder, STEPS)[0]


@pytest.mark.parametrize(
    "ranks, how",
    [
        (1, How(optimizer="adamw", clip=1.0)),
        (2, How(optimizer="adamw", clip=1.0, stage=2)),
        (3, How(optimizer="adamw", clip=1.0, offload=True)),
        (4, REPLICAS),
    ],
)
def test_a_checkpoint_of_replicas_goes_on_over_any_number_of_ranks(saved, ranks, how):
    folder, losses = saved
    resumed = run_ranks(resume, ranks, how, folder, STEPS)[0]
    if how is REPLICAS:
        assert resumed == losses[STEPS:], "not bit for bit on the same ranks"
    assert resumed == pytest.approx(losses[STEPS:], rel=1e-6)
