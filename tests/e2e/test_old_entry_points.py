"""Job scripts of Kotoba-Recipes: the paths of its programs still work, and a whole script runs with its paths edited."""

import json
import os
import sys
from pathlib import Path

import pytest

from ds_recipes.cluster.old_entry_points import TODAY
from tests.e2e.launchers import ROOT, run
from tests.nano import make_nano
from tests.ranks.training import metrics

REFUSED = {
    "train.py": (["--lr_min", "x"], "--lr_min must be a number, not 'x' (command line)"),
    "tools/convert_to_hf.py": (
        ["--model", "m", "--ckpt", "no/model.pt", "--out", "o"],
        "no/model.pt: there is no such checkpoint",
    ),
    "tools/upload_to_hub.py": (["--ckpt-path", "no_such", "--repo-name", "a/b"], "--path no_such:"),
}
"""Arguments of the old programs, and what today's say of them."""

JOB = """#!/bin/bash
#$ -l rt_AF=1
#$ -cwd
source {etc}/modules.sh
module load hpcx/2.12
export MASTER_ADDR=$(ip a show dev bond0 | awk '/inet / {{print $2}}' | cut -d/ -f1)
export MASTER_PORT=$((10000 + JOB_ID % 50000))
NUM_GPU_PER_NODE=2
NUM_GPUS=$((NHOSTS * NUM_GPU_PER_NODE))
mkdir -p hostfile
while read -r host; do echo "$host slots=$NUM_GPU_PER_NODE"; done <"$SGE_JOB_HOSTLIST" >"hostfile/$JOB_ID"
mpirun {mapping} -np $NUM_GPUS -hostfile hostfile/$JOB_ID -x MASTER_ADDR=$MASTER_ADDR -x MASTER_PORT=$MASTER_PORT -x PATH \\
  python {root}/examples/finetuning.py \\
  --enable_fsdp --low_cpu_fsdp --peft_method None --mixed_precision --pure_bf16 --num_epochs 1 \\
  --model_name {model} --tokenizer_name {model} --batch_size_training 2 --gradient_accumulation_steps 4 \\
  --lr 1e-4 --lr_min 1e-5 --lr_warmup 0.05 --lr_decay 0.80 --lr_decay_style cosine --weight_decay 0.1 \\
  --fsdp_activation_checkpointing --seed 42 --dataset alpaca_dataset --train_data {data} --context_size 64 \\
  --num_workers_dataloader 2 --save_model --save_optimizer --save_interval_iteration 100 --save_checkpoint_path RUN \\
  --load_checkpoint_path RUN --use_mpi --use_fast_kernels --run_validation --validation_data {validation} \\
  --wandb_entity ENTITY --wandb_project PROJECT --wandb_name NAME --wandb_mode disabled
"""


ALIKE = ("tools/checkpoint-convert/convert_ckpt.py", "tools/model-upload/upload.py")  # each as another path


@pytest.mark.parametrize("old", [pytest.param(old, marks=pytest.mark.slow if old in ALIKE else ()) for old in TODAY])
def test_an_old_path_runs_todays_program_and_names_it(old: str, tmp_path: Path) -> None:
    arguments, message = REFUSED[TODAY[old]]
    ended = run(["python", str(ROOT / old), *arguments], cwd=tmp_path)
    assert ended.status == 2, ended.output
    assert f"{old} is {TODAY[old]} here, which this starts." in ended.output
    assert message in ended.output


def test_only_rank_0_names_it(tmp_path: Path) -> None:
    for rank, times in (("0", 1), ("1", 0)):
        env = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        ended = run(["python", str(ROOT / "examples/finetuning.py"), "--lr_min", "x"], env=env, cwd=tmp_path)
        assert ended.output.count("is train.py here") == times


@pytest.mark.parametrize(
    "words", [["--sequence-length", "4096"], pytest.param(["--sequence-length=4096"], marks=pytest.mark.slow)]
)
def test_the_context_length_of_an_old_conversion_is_told(words: list[str], tmp_path: Path) -> None:
    arguments, message = REFUSED["tools/convert_to_hf.py"]
    ended = run(["python", str(ROOT / "tools/convert_ckpt.py"), *words, *arguments], cwd=tmp_path)
    assert ended.status == 2 and message in ended.output
    assert "--sequence-length 4096 is left out: max_position_embeddings stays" in ended.output


@pytest.mark.slow  # of every day: the same flags (tests/unit/config), mpirun (tests/clusters), and the paths above
def test_a_whole_job_script_runs_with_its_paths_edited(tmp_path: Path) -> None:
    nano = make_nano(tmp_path / "nano").parent
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "modules.sh").write_text("module() { :; }\n")
    (stubs / "ip").write_text("#!/bin/sh\necho '    inet 127.0.0.1/8 scope host bond0'\n")
    (stubs / "ip").chmod(0o755)
    (tmp_path / "hosts").write_text("localhost\n")
    job = tmp_path / "job.sh"
    mapping = "--allow-run-as-root --map-by ppr:2:node --bind-to none"
    job.write_text(
        JOB.format(
            etc=stubs,
            mapping=mapping,
            root=ROOT,
            model=nano / "model",
            data=nano / "train.jsonl",
            validation=nano / "validation.jsonl",
        )
    )
    env = {"JOB_ID": "4711", "NHOSTS": "1", "SGE_JOB_HOSTLIST": str(tmp_path / "hosts")}
    bin_path = f"{stubs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = run(["bash", str(job)], env={**env, "PATH": bin_path}, cwd=tmp_path)
    assert ended.status == 0, ended.output
    steps = metrics(tmp_path / "RUN")
    assert len(steps) > 3 and all(line["loss"] > 0 for line in steps.values() if "loss" in line)
    record = json.loads((tmp_path / "RUN" / "run.json").read_text())
    assert record["launches"][-1]["state"] == "complete"
