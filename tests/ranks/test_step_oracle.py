"""One step and one evaluation of train.py against plain transformers, computed here: records apart, one after the other.

The records' shares of targets are very unequal, so that a mean over tokens, rows, micro-batches or ranks is another number.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.nano import CONTEXT, WORDS, make_nano
from tests.ranks.training import metrics, train

CONTEXT_SIZE = 2 * CONTEXT
RECORDS = 12
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class Plain:
    """What plain transformers computes: nats a target token, and the L2 norm of the whole gradient. `tokens`: of documents."""

    loss: float
    grad_norm: float
    target_tokens: int
    tokens: int


def records(count: int, shift: int) -> list[dict[str, str]]:
    """Answers of 1 to 60 words, in no order of their lengths."""
    lengths = [1 + (7 * number * number + 11 * shift) % 60 for number in range(count)]
    return [
        {"instruction": WORDS[(number + shift) % len(WORDS)], "output": " ".join(WORDS[i % 12] for i in range(length))}
        for number, length in enumerate(lengths)
    ]


def plain(model_folder: Path, file: Path) -> Plain:
    """Over all records of a file: the sum of the targets' losses divided by their number, and its gradient."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    total, targets, tokens = torch.zeros(()), 0, 0
    for line in file.read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer(PROMPT.format(**record)).input_ids
        answer = [*tokenizer(record["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *answer]])
        logits = model(ids[:, :-1]).logits[0, len(prompt) - 1 :]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        targets += len(answer)
        tokens += ids.shape[1]
    (total / targets).backward()
    norm = torch.stack([parameter.grad.double().norm() for parameter in model.parameters()]).norm()
    return Plain(float(total.detach()) / targets, float(norm), targets, tokens)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_file = make_nano(tmp_path_factory.mktemp("nano"))
    for name, count, shift in (("train", RECORDS, 0), ("validation", 5, 3)):
        lines = [json.dumps(record) for record in records(count, shift)]
        (run_file.parent / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return run_file


@pytest.fixture(scope="module")
def oracle(nano: Path) -> dict[str, Plain]:
    return {name: plain(nano.parent / "model", nano.parent / f"{name}.jsonl") for name in ("train", "validation")}


@pytest.mark.parametrize("packing", ["off", "documents"])
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_and_an_evaluation_are_those_of_plain_transformers(
    nano: Path, oracle: dict[str, Plain], tmp_path: Path, ranks: int, engine: str, packing: str
) -> None:
    """The step takes all records there are, the rate is next to nothing: the evaluation sees the same weights."""
    flags: dict[str, Any] = {
        "config": nano,
        "save_checkpoint_path": tmp_path / "run",
        "engine": engine,
        "packing": packing,
        "context_size": CONTEXT_SIZE,
        "batch_size_training": 2,
        "global_batch_size": RECORDS,
        "num_epochs": 1,
        "eval_interval": 1,
        "lr": 1e-12,
    }
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    ended = train(ranks, *argv, outputs=tmp_path / "outputs")
    assert ended.statuses == (0,) * ranks, ended.text
    step, evaluation = metrics(tmp_path / "run")[1], metrics(tmp_path / "run", "eval_loss")[1]
    wanted, wanted_evaluation = oracle["train"], oracle["validation"]
    counted = (RECORDS, wanted.tokens, wanted.target_tokens)
    assert (step["samples"], step["tokens"], step["target_tokens"]) == counted
    for name, of in (("training", wanted), ("validation", wanted_evaluation)):
        told = (
            rf"^{name} data: .*; {of.target_tokens:,} target tokens, {100 * of.target_tokens / of.tokens:.1f} % of all$"
        )
        assert len(re.findall(told, ended.text, re.MULTILINE)) == 1, ended.text
    assert step["loss"] == pytest.approx(wanted.loss, rel=1e-6)
    assert step["grad_norm"] == pytest.approx(wanted.grad_norm, rel=1e-5)
    assert evaluation["eval_loss"] == pytest.approx(wanted_evaluation.loss, rel=1e-6)
    assert evaluation["eval_target_tokens"] == wanted_evaluation.target_tokens
