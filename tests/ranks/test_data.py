"""Whatever the data are, every number of ranks trains the same rows to the same losses, and a resumed run goes on in them."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.nano import WORDS, make_nano
from tests.ranks.training import Ended, metrics, train

STEPS = 8
SAME = ("tokens", "target_tokens", "samples", "epoch", "data_hash")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file, and beside it three sources of uneven size: chat.jsonl, text.jsonl and few.jsonl."""
    folder = tmp_path_factory.mktemp("nano")
    run_file = make_nano(folder)
    chosen = random.Random(3)

    def words(most: int) -> str:
        return " ".join(chosen.choices(WORDS, k=chosen.randint(1, most)))

    def turns(count: int) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[turn % 2], "content": words(12)} for turn in range(2 * count)]

    write(folder / "chat.jsonl", [{"messages": turns(chosen.randint(1, 3))} for _ in range(70)])
    write(folder / "text.jsonl", [{"text": words(80)} for _ in range(60)])
    write(folder / "few.jsonl", [{"text": words(80)} for _ in range(5)])
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    return run_file


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def launch(nano: Path, folder: Path, ranks: int, *flags: str) -> Ended:
    steps = () if "--max_steps" in flags else ("--max_steps", str(STEPS))
    argv = ("--config", str(nano), "--save_checkpoint_path", str(folder), *steps, *flags)
    return train(ranks, *argv, outputs=nano.parent / f"outputs-{folder.name}")


def mixture(nano: Path) -> tuple[str, ...]:
    paths = [f"{weight}:{nano.parent / name}" for weight, name in ((0.6, "text.jsonl"), (0.4, "few.jsonl"))]
    return ("--dataset", "text", "--train_data", *paths, "--validation_data", str(nano.parent / "text.jsonl"))


def chat(nano: Path, packing: str = "concat") -> tuple[str, ...]:
    return (
        *("--dataset", "chat", "--chat_template", str(nano.parent / "chat.jinja"), "--packing", packing),
        *("--train_data", str(nano.parent / "chat.jsonl"), "--validation_data", str(nano.parent / "chat.jsonl")),
        *("--run_validation", "false"),
    )


def alike(mine: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> None:
    assert mine.keys() <= theirs.keys() and mine
    for step, line in mine.items():
        assert line["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-6), step
        names = [name for name in line if name in SAME or name.startswith(("epoch/", "tokens/"))]
        assert {name: line[name] for name in names} == {name: theirs[step][name] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("data", [mixture, chat])
def test_ranks_workers_and_a_resume_change_nothing(nano: Path, tmp_path: Path, data: Any) -> None:
    flags = (*data(nano), "--optimizer_type", "sgd", "--lr", "0.1")
    if data is mixture:
        flags += ("--run_validation", "false")
    plain = tmp_path / "plain"
    ended = launch(nano, plain, 1, *flags, "--num_workers_dataloader", "0")
    assert ended.statuses == (0,), ended.text
    expected = metrics(plain)
    assert sorted(expected) == list(range(1, STEPS + 1))
    for ranks, workers, save_every in ((2, 1, 3), (3, 3, 5), (4, 0, 7)):
        folder = tmp_path / f"on{ranks}"
        how = (*flags, "--num_workers_dataloader", str(workers), "--save_interval_iteration", str(save_every))
        ended = launch(nano, folder, ranks, *how)
        assert ended.statuses == (0,) * ranks, ended.text
        alike(metrics(folder), expected)
        shutil.rmtree(folder / f"iter_{STEPS:07d}")  # as a kill after the earlier save leaves it
        (folder / "metrics.jsonl").unlink()
        ended = launch(nano, folder, 5 - ranks, *how)
        assert ended.statuses == (0,) * (5 - ranks), ended.text
        again = metrics(folder)
        assert min(again) == save_every * ((STEPS - 1) // save_every) + 1
        alike(again, expected)


def test_a_source_that_repeats_is_told(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repeats"
    ended = launch(nano, folder, 1, *mixture(nano), "--run_validation", "false")
    assert ended.statuses == (0,), ended.text
    assert "few.jsonl has been seen once in full; it repeats with a new shuffle each time" in ended.text
    assert "weight 0.4, 40.00 % of the tokens" in ended.text
    last = metrics(folder)[STEPS]
    few = str(nano.parent / "few.jsonl")
    assert last[f"epoch/{few}"] > 1 and 0 < last[f"tokens/{few}"] < last["tokens"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_uneven_data_never_hang_and_give_the_losses_of_one_rank(nano: Path, tmp_path: Path, seed: int) -> None:
    """Fewer rows than ranks, rows without any target (a prompt that fills a row of a stream), hardly any validation."""
    chosen = random.Random(seed)
    records = [
        {
            "instruction": " ".join(chosen.choices(WORDS, k=chosen.choice((1, 100)))),
            "output": " ".join(chosen.choices(WORDS, k=chosen.choice((1, 5, 70)))),
        }
        for _ in range(chosen.randint(1, 6))
    ]
    path = write(tmp_path / "uneven.jsonl", records)
    validation = write(tmp_path / "validation.jsonl", [{"instruction": "seven", "output": "stone"}])
    flags = (
        "--train_data",
        str(path),
        "--validation_data",
        str(validation),
        "--packing",
        "concat",
        "--num_epochs",
        "2",
    )
    seen = {}
    for ranks in (1, 2, 4):
        folder = tmp_path / f"on{ranks}"
        ended = launch(nano, folder, ranks, *flags, "--max_steps", "3", "--eval_interval", "1")
        assert ended.statuses == (0,) * ranks, ended.text
        seen[ranks] = (metrics(folder), metrics(folder, "eval_loss"))
    for ranks in (2, 4):
        alike(seen[ranks][0], seen[1][0])
        for step, line in seen[ranks][1].items():
            assert line["eval_loss"] == pytest.approx(seen[1][1][step]["eval_loss"], rel=1e-6)


def test_streaming_trains_the_same(nano: Path, tmp_path: Path) -> None:
    flags = chat(nano, "documents")
    assert launch(nano, tmp_path / "stored", 2, *flags).statuses == (0, 0)
    ended = launch(nano, tmp_path / "streamed", 2, *flags, "--streaming", "--num_workers_dataloader", "2")
    assert ended.statuses == (0, 0), ended.text
    template = tmp_path / "streamed" / f"iter_{STEPS:07d}" / "chat_template.jinja"
    assert template.read_text() == CHAT_TEMPLATE, "an exported model must be asked as it was trained"
    stored, streamed = metrics(tmp_path / "stored"), metrics(tmp_path / "streamed")
    assert [line["loss"] for line in stored.values()] == [line["loss"] for line in streamed.values()]
    alike(streamed, stored)


def test_changed_data_are_refused_with_both_fingerprints(nano: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    shutil.copy(nano.parent / "train.jsonl", path)
    flags = ("--train_data", str(path), "--run_validation", "false", "--lr_decay_style", "constant")
    assert launch(nano, tmp_path / "run", 1, *flags, "--max_steps", "1").statuses == (0,)
    moved = tmp_path / "moved.jsonl"
    shutil.copy(path, moved)
    assert launch(nano, tmp_path / "run", 1, "--train_data", str(moved), *flags[2:], "--max_steps", "2").statuses == (
        0,
    )
    write(path, [{"instruction": "seven", "output": "stone"}] * 20)
    refused = launch(nano, tmp_path / "run", 1, *flags, "--max_steps", "3")
    assert refused.statuses == (2,)
    assert "data: the checkpoint has " in refused.text
    assert f"{path}: not there then, " in refused.text
    moved.write_bytes(path.read_bytes())
    refused = launch(nano, tmp_path / "run", 1, "--train_data", str(moved), *flags[2:], "--max_steps", "3")
    assert f"{moved}: " in refused.text and " then, " in refused.text and " now" in refused.text, refused.text


@pytest.mark.slow
def test_skipped_rows_are_remembered_by_the_checkpoint(nano: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    constant = ("--lr_decay_style", "constant")
    skip = ("--skip_samples", "30-65", "80", *constant)
    assert launch(nano, whole, 1, *skip).statuses == (0,)
    assert launch(nano, resumed, 2, *skip, "--max_steps", "3").statuses == (0, 0)
    ended = launch(nano, resumed, 1, *constant)
    assert ended.statuses == (0,), ended.text
    alike(metrics(resumed), metrics(whole))
    plain = tmp_path / "plain"
    assert launch(nano, plain, 1, "--max_steps", "4").statuses == (0,)
    assert metrics(plain)[2]["data_hash"] == metrics(whole)[2]["data_hash"]
    assert metrics(plain)[3]["data_hash"] != metrics(whole)[3]["data_hash"]
    late = launch(nano, resumed, 1, *constant, "--skip_samples", "1-2", "--max_steps", "9")
    assert "warning: --skip_samples 1-2: positions below" in late.text


def test_bad_records_are_skipped_on_request_and_named(nano: Path, tmp_path: Path) -> None:
    lines = (nano.parent / "train.jsonl").read_text().splitlines()
    lines[3], lines[40] = '{"instruction": "x"', '{"instruction": "x", "output": ""}'
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    flags = ("--train_data", str(path), "--run_validation", "false", "--max_steps", "2")
    refused = launch(nano, tmp_path / "run", 2, *flags)
    assert refused.statuses == (2, 2) and f"{path}:4: not JSON" in refused.text and "bad.jsonl:41" not in refused.text
    skipped = launch(nano, tmp_path / "run", 2, *flags, "--bad_records", "skip")
    assert skipped.statuses == (0, 0), skipped.text
    assert "2 records cannot be used and were skipped" in skipped.text
    assert f"{path}:4: not JSON" in skipped.text and f"{path}:41: 'output' is empty" in skipped.text
