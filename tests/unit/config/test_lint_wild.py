"""The linter's verdict on files of the kinds that public projects have, and DeepSpeed's own verdict on each."""

import pytest

from ds_recipes.config.ds.check import check_tree
from ds_recipes.config.ds.read import read_json
from ds_recipes.config.lint.report import ERROR, NOTE, UNSUPPORTED, WARNING, lint_file
from tests.unit.config.lint_oracle import WILD, deepspeed_says

SOURCES: dict[str, dict[str, tuple[str, str]]] = {
    "huggingface/accelerate": {
        "accelerate_stage2": ("examples/deepspeed_config_templates/zero_stage2_offload_config.json", ""),
        "accelerate_ulysses": ("examples/alst_ulysses_sequence_parallelism/sp-alst.ds-config.json", ""),
        "accelerate_zero3_model": ("tests/deepspeed/ds_config_zero3_model_only.json", ""),
    },
    "tatsu-lab/stanford_alpaca": {
        "alpaca_offload": ("configs/default_offload_opt_param.json", ""),
    },
    "OpenAccess-AI-Collective/axolotl": {
        "axolotl_zero2": ("deepspeed_configs/zero2.json", ""),
        "axolotl_zero3": ("deepspeed_configs/zero3.json", ""),
        "axolotl_zero3_params": ("deepspeed_configs/zero3_bf16_cpuoffload_params.json", ""),
    },
    "bigscience-workshop/Megatron-DeepSpeed": {
        "bigscience_bf16": ("tests/ds_config_bf16.json", ""),
        "bigscience_curriculum": ("tests/ds_config_cl.json", "curriculum_learning"),
    },
    "THUDM/ChatGLM-6B": {
        "chatglm": ("ptuning/deepspeed.json", ""),
    },
    "deepseek-ai/DeepSeek-Coder": {
        "deepseek_coder": ("finetune/configs/ds_config_zero3.json", ""),
    },
    "deepspeedai/DeepSpeed": {
        "deepspeed_deepcompile": ("tests/torch_compile/ds_config_z3_deepcompile_no_persist.json", ""),
        "deepspeed_gpt2_offload": ("tests/model/Megatron_GPT2/ds_config_func_bs8_zero2_offload.json", ""),
        "deepspeed_gpt2_scheduler": ("tests/model/Megatron_GPT2/ds_config_func_scheduler.json", ""),
        "deepspeed_hybrid": ("tests/hybrid_engine/hybrid_engine_config.json", ""),
        "deepspeed_moq": (
            "tests/model/BingBertSquad/deepspeed_bsz24_fp16_eigenvalue_quantize_config.json",
            "eigenvalue quantize_training",
        ),
    },
    "databrickslabs/dolly": {
        "dolly_v100": ("config/v100_config.json", ""),
    },
    "microsoft/DeepSpeedExamples": {
        "examples_1bit_adam": (
            "training/BingBertSquad/1-bit_adam/nccl/deepspeed_onebitadam_bsz96_config.json",
            "optimizer.type",
        ),
        "examples_1bit_lamb": (
            "training/bing_bert/1-bit_lamb/nccl/deepspeed_bsz64k_onebitlamb_config_seq128_nccl.json",
            "optimizer.type",
        ),
        "examples_autotuning": ("training/autotuning/hf/dsconfigs/ds_config_fp16_tune.json", ""),
        "examples_compression": ("compression/gpt2/config/ds_config_W8A8_Qgroup64_fp16.json", "compression_training"),
        "examples_imagenet": ("training/imagenet/config/ds_fp16_z1_config.json", ""),
        "examples_infinity": (
            "Megatron-LM-v1.1.5-ZeRO3/examples/ds_zero_stage_infinity_config.json",
            "zero_optimization.stage3_param_persitance_threshold",
        ),
        "examples_lamb": ("training/bing_bert/deepspeed_bsz32k_lamb_config_seq512.json", ""),
        "examples_offload_10b": (
            "Megatron-LM/scripts/ds_zero-offload_10B_config.json",
            "zero_optimization.comm_overlap",
        ),
        "examples_onecycle": ("QANet-Pytorch/ds_bsz512_1cycle.json", ""),
        "examples_pipeline": ("training/pipeline_parallelism/ds_config.json", ""),
        "examples_pld": (
            "training/bing_bert/deepspeed_bsz4k_progressive_layer_drop_config_seq128.json",
            "progressive_layer_drop",
        ),
        "examples_random_ltd": (
            "training/data_efficiency/gpt_finetuning/config/ds_config_gpt_medium_random_ltd.json",
            "",
        ),
        "examples_template": (
            "training/data_efficiency/gpt_finetuning/finetune/ds_config_gpt2_TEMPLATE.json",
            "train_batch_size train_micro_batch_size_per_gpu",
        ),
    },
    "lm-sys/FastChat": {
        "fastchat_s2": ("playground/deepspeed_config_s2.json", ""),
        "fastchat_s3": ("playground/deepspeed_config_s3.json", ""),
    },
    "IDEA-Research/hana": {
        "hana": ("config/deepspeed.py", ""),
    },
    "OpenGVLab/InternVL": {
        "internvl_01adam": ("segmentation/zero_configs/adam_zero3_fp16.json", "optimizer.type"),
        "internvl_amp": ("segmentation/zero_configs/adam_zero1_amp.json", "amp"),
        "internvl_log": ("segmentation/zero_configs/adam_zero2_bf16.json", ""),
        "internvl_stage1": ("internvl_chat/zero_stage1_config.json", ""),
        "internvl_stage3_100b": ("internvl_chat/zero_stage3_config_100b_1e7_offload.json", ""),
    },
    "kotoba-tech/kotoba-recipes": {
        "kotoba_mixtral": ("scripts/abci/mixtral/mixtral-config.json", ""),
    },
    "hiyouga/LLaMA-Factory": {
        "llamafactory_autotp": ("examples/deepspeed/ds_z2_autotp_config.json", ""),
        "llamafactory_fp8": ("examples/deepspeed/ds_z3_fp8_config.json", ""),
        "llamafactory_z0": ("examples/deepspeed/ds_z0_config.json", ""),
    },
    "haotian-liu/LLaVA": {
        "llava_zero2": ("scripts/zero2.json", ""),
        "llava_zero3_offload": ("scripts/zero3_offload.json", ""),
    },
    "OptimalScale/LMFlow": {
        "lmflow_eval": ("configs/archive/ds_config_eval.json", ""),
        "lmflow_zero0": ("configs/deepspeed/zero0_no_offload.json", ""),
    },
    "EleutherAI/gpt-neox": {
        "neox_tune": ("configs/autotuning_configs/tune_6-7B.json", "fp16.fp16 zero_optimization.stage"),
    },
    "QwenLM/Qwen": {
        "qwen_zero2": ("finetune/ds_config_zero2.json", ""),
        "qwen_zero3": ("finetune/ds_config_zero3.json", ""),
    },
    "HenryCai11/LLM-Self-Control": {
        "selfcontrol": ("self_control/prefix_control/configs/deepspeed.py", "sparse_attention"),
    },
    "modelscope/ms-swift": {
        "swift_zero3": ("swift/config/zero3.json", ""),
    },
    "huggingface/transformers": {
        "transformers_zero3": ("tests/deepspeed/ds_config_zero3.json", "zero_optimization.reduce_bucket_size"),
    },
    "InternLM/xtuner": {
        "xtuner_zero1": ("xtuner/configs/deepspeed/deepspeed_zero1.json", ""),
        "xtuner_zero3_offload": ("xtuner/configs/deepspeed/deepspeed_zero3_offload.json", ""),
    },
}
"""Repository: file here: path of the file there, and the keys of the linter's errors.

The files here were written for this test: the keys and kinds of values of those there, in another order and with other numbers.
"""

FILES = {name: (path, keys.split()) for files in SOURCES.values() for name, (path, keys) in files.items()}

AT_START = {"examples_1bit_adam", "examples_1bit_lamb", "internvl_01adam"}
"""DeepSpeed reads these and stops when it looks for the optimizer in torch.optim."""

UNSUPPORTED_KEYS = {
    "examples_lamb": "optimizer.type",
    "examples_onecycle": "scheduler.type",
    "examples_random_ltd": "data_efficiency",
    "examples_autotuning": "autotuning",
    "examples_imagenet": "cuda_visible_devices",
    "internvl_log": "log",
    "llamafactory_fp8": "comms_config",
    "llamafactory_autotp": "tensor_parallel",
    "lmflow_zero0": "zero_optimization.stage",
    "deepspeed_gpt2_offload": "activation_checkpointing.contiguous_memory_optimization",
}
"""One key each that DeepSpeed takes or ignores and train.py refuses."""

WARNED = {"kotoba_mixtral": "bf16.enabled"}
NOTED = {
    "examples_infinity": "aio.thread_count",
    "examples_offload_10b": "zero_optimization.cpu_offload",
    "axolotl_zero3": "fp16.initial_scale_power",
    "deepspeed_hybrid": "zero_optimization.offload_param",
    "llamafactory_autotp": "_comment",
    "hana": "scheduler.params",
    "transformers_zero3": "zero_optimization.stage3_gather_fp16_weights_on_model_save",
    "fastchat_s2": "zero_optimization.offload_optimizer",
}


def path_of(name: str) -> str:
    return str(WILD / f"{name}.json")


def keys_of(name: str, level: str, engine: str = "deepspeed") -> list[str]:
    return [line.key for line in lint_file(path_of(name), engine).of(level)]


def test_there_are_enough_of_them_and_each_has_a_source() -> None:
    assert {file.stem for file in WILD.iterdir()} == set(FILES)
    assert len(FILES) >= 50 and len(SOURCES) >= 18
    assert len({(source, path) for source, files in SOURCES.items() for path, _ in files.values()}) == len(FILES)


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_the_errors_are_those_of_the_list(engine: str) -> None:
    found = {name: sorted(keys_of(name, ERROR, engine)) for name in FILES}
    assert found == {name: keys for name, (_, keys) in FILES.items()}


def test_no_error_on_what_deepspeed_accepts_and_one_on_what_it_refuses() -> None:
    says = deepspeed_says()
    refused = {name for name, (_, keys) in FILES.items() if keys}
    assert {name for name, accepts in says["wild"].items() if not accepts} == refused - AT_START
    assert {name for name, is_there in says["optimizers"].items() if not is_there} == AT_START
    assert 10 < len(refused) < len(FILES) / 2


def test_what_is_an_error_is_refused_by_train_py() -> None:
    for name, (_, keys) in FILES.items():
        if keys:
            tree, _ = read_json(path_of(name))
            assert check_tree(tree).problems, name


@pytest.mark.parametrize(
    "level, expected",
    [(UNSUPPORTED, UNSUPPORTED_KEYS), (WARNING, WARNED), (NOTE, NOTED)],
    ids=["refused", "warned", "noted"],
)
def test_other_findings(level: str, expected: dict[str, str]) -> None:
    missing = {name: (key, found) for name, key in expected.items() if key not in (found := keys_of(name, level))}
    assert not missing


def test_every_line_says_where_it_stands() -> None:
    for name in FILES:
        text = (WILD / f"{name}.json").read_text(encoding="utf-8").splitlines()
        for line in lint_file(path_of(name)).lines:
            names = line.key.split(".")[-2:]  # an old name's line is that of its section
            assert line.line or not line.key or "is missing" in line.text, (name, line)
            assert not line.line or any(part in text[line.line - 1] for part in names), (name, line)
