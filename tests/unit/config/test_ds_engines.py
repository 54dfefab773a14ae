"""What a DeepSpeed JSON means for one engine: what it honours, what it refuses, what it has no counterpart of."""

import subprocess
import sys
from typing import Any

import pytest

from tests.house.tree import ROOT
from tests.unit.config.ds_trees import NOTHING, ZERO, offload, said, zero

CPU_BOTH = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("both", zero(1)),
    ("both", zero("3")),
    ("both", zero(2.0)),
    ("deepspeed", zero(3, zero_hpz_partition_size=8)),
    ("both", zero(3, zero_hpz_partition_size=1)),
    ("both", zero(3, **CPU_BOTH)),
    ("both", zero(3) | {"communication_data_type": "fp16", "data_types": {"grad_accum_dtype": "fp32"}}),
    ("both", zero(3) | {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 12, "hysteresis": 2}}),
    (
        "both",
        zero(3) | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    ),
    ("both", zero(2) | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    (
        "both",
        zero(3) | {"activation_checkpointing": {"cpu_checkpointing": True, "number_checkpoints": 4, "profile": False}},
    ),
    ("both", zero(3) | {"flops_profiler": {"enabled": False, "profile_step": 1}, "wandb": {"enabled": False}}),
    ("both", zero(3) | {"wall_clock_breakdown": False, "data_efficiency": {"enabled": False}}),
    ("both", zero(3) | {"gradient_clipping": None, "train_batch_size": "auto"}),
    ("deepspeed", zero(3, reduce_bucket_size="auto", stage3_prefetch_bucket_size="auto", sub_group_size=1e9)),
    ("deepspeed", zero(3, zero_quantized_weights=True, zero_quantized_gradients=True, zero_hpz_partition_size=8)),
    ("deepspeed", zero(2, allgather_bucket_size=2e8, round_robin_gradients=True, overlap_comm=True)),
    (
        "deepspeed",
        zero(
            3,
            offload_optimizer={"device": "nvme", "nvme_path": "/local", "buffer_count": 4, "pipeline_read": True},
            offload_param={"device": "nvme", "nvme_path": "/local", "buffer_size": 1e8, "max_in_cpu": 0},
        )
        | {"aio": {"block_size": 262144, "queue_depth": 32, "single_submit": False}},
    ),
    ("deepspeed", zero(3, leaf_module={"classes": ["my.Block"]})),
    (
        "deepspeed",
        zero(3)
        | {"torch_autocast": {"enabled": True, "dtype": "bf16", "lower_precision_safe_modules": ["torch.nn.Linear"]}},
    ),
]

ONE_SAYS: list[tuple[str, dict[str, Any], dict[str, list[str]]]] = [
    ("deepspeed", zero(3, overlap_comm=True), {}),
    (
        "fsdp",
        zero(3, overlap_comm=True, contiguous_gradients=True, stage3_prefetch_bucket_size=1e7, sub_group_size="auto"),
        {
            "lacking": [
                f"{ZERO}.{name}" for name in ("overlap_comm", "contiguous_gradients", "stage3_prefetch_bucket_size")
            ]
        },
    ),
    ("fsdp", zero(2, allgather_bucket_size=1), {"lacking": [f"{ZERO}.allgather_bucket_size"]}),
    ("fsdp", zero() | {"wall_clock_breakdown": True}, {"lacking": ["wall_clock_breakdown"]}),
    (
        "fsdp",
        zero(3, zero_quantized_weights=True),
        {
            "unsupported": [
                (
                    "zero_optimization.zero_quantized_weights is true: FSDP2 has no quantised communication: leave it out, or use "
                    "--engine deepspeed"
                )
            ]
        },
    ),
    (
        "fsdp",
        offload(device="nvme", nvme_path="/x"),
        {
            "lacking": [f"{ZERO}.offload_optimizer.nvme_path"],
            "unsupported": [
                (
                    'zero_optimization.offload_optimizer.device is "nvme": FSDP2 cannot offload to NVMe: offload to the CPU, or '
                    "use --engine deepspeed"
                )
            ],
        },
    ),
    (
        "fsdp",
        offload(device="cpu", pin_memory=True),
        {
            "notes": [
                (
                    "zero_optimization.offload_optimizer is for both on FSDP2: parameters and the optimizer's state go to the CPU "
                    "together"
                )
            ]
        },
    ),
    (
        "fsdp",
        zero(3, zero_hpz_partition_size=8),
        {
            "notes": [
                (
                    "zero_optimization.zero_hpz_partition_size is HSDP on FSDP2: the optimizer's state is sharded within a group "
                    "too, which takes more memory than hpZ"
                )
            ]
        },
    ),
    (
        "fsdp",
        zero() | {"data_types": {"grad_accum_dtype": "bf16"}},
        {
            "unsupported": [
                (
                    'data_types.grad_accum_dtype is "bf16": FSDP2 adds gradients up in the master weights\' dtype. Write "fp32", '
                    "or use --engine deepspeed"
                )
            ]
        },
    ),
    ("deepspeed", zero() | {"data_types": {"grad_accum_dtype": "bf16"}}, {}),
    (
        "fsdp",
        zero()
        | {"torch_autocast": {"enabled": True, "dtype": "bf16", "lower_precision_safe_modules": ["torch.nn.Linear"]}},
        {
            "unsupported": [
                (
                    'torch_autocast.lower_precision_safe_modules is ["torch.nn.Linear"]: FSDP2 reduces all gradients in one dtype: '
                    "set communication_data_type and leave it out"
                )
            ]
        },
    ),
    (
        "deepspeed",
        offload(device="nvme"),
        {
            "problems": [
                'zero_optimization.offload_optimizer.nvme_path is missing: "device": "nvme" needs a folder on a fast local disk'
            ]
        },
    ),
    (
        "deepspeed",
        offload(stage=2, device="nvme", nvme_path="/x"),
        {"notes": ['zero_optimization.offload_optimizer.device is "nvme": at stage 2 DeepSpeed takes the CPU']},
    ),
    (
        "deepspeed",
        offload(device="cpu", ratio=0.5),
        {
            "unsupported": [
                (
                    "zero_optimization.offload_optimizer.ratio is 0.5: partial offload needs DeepSpeed's own CPU Adam, and torch's "
                    "AdamW steps here: leave it out"
                )
            ]
        },
    ),
    (
        "deepspeed",
        offload(stage=2, device="cpu", ratio=0.5),
        {
            "problems": [
                "zero_optimization.offload_optimizer.ratio is 0.5: DeepSpeed refuses that below stage 3, leave it out"
            ],
            "notes": ["zero_optimization.offload_optimizer.ratio has no effect at stage 2: it is for stage 3"],
        },
    ),
    (
        "deepspeed",
        offload(device="cpu")
        | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
        {
            "unsupported": [
                (
                    "bf16.bf16_optimizer_states with offload_optimizer needs DeepSpeed's own CPU Adam, and torch's AdamW steps "
                    "here: leave one out, or use --engine fsdp"
                )
            ]
        },
    ),
    (
        "deepspeed",
        zero(1)
        | {
            "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        {
            "unsupported": [
                (
                    'bf16.bf16_master_weights_and_grads does not go with grad_accum_dtype "fp32" at stage 1: write "bf16" or leave '
                    "it out"
                )
            ]
        },
    ),
]


@pytest.mark.parametrize(("engine", "tree"), ACCEPTED, ids=str)
def test_what_an_engine_honours_goes_without_a_word(engine: str, tree: dict[str, Any]) -> None:
    for each in ("deepspeed", "fsdp") if engine == "both" else (engine,):
        assert said(tree, each) == NOTHING, each


@pytest.mark.parametrize(("engine", "tree", "expected"), ONE_SAYS, ids=str)
def test_what_is_said_for_one_engine(engine: str, tree: dict[str, Any], expected: dict[str, list[str]]) -> None:
    assert said(tree, engine) == NOTHING | expected


def test_the_check_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; from ds_recipes.config.ds.check import check_tree; check_tree({'zero_optimization': {'stage': 3}}, 'fsdp')\n"
        "assert not {'torch', 'deepspeed', 'pydantic', 'hjson'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
