"""The run files for real models train, with nothing replaced but the model, the data, and how much of them."""

import json
from pathlib import Path

import pytest

from tests.house.tree import ROOT
from tests.nano import make_nano
from tests.ranks.training import metrics, train

TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }} {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


@pytest.mark.parametrize(("name", "engine"), [("sft", "deepspeed"), ("cpt", "fsdp")])
def test_a_run_file_for_a_real_model_trains(name: str, engine: str, tmp_path: Path) -> None:
    nano = make_nano(tmp_path).parent
    (nano / "template.jinja").write_text(TEMPLATE)
    records = [json.loads(line) for line in (nano / "train.jsonl").read_text().splitlines()]
    turns = [
        [{"role": "user", "content": record["instruction"]}, {"role": "assistant", "content": record["output"]}]
        for record in records
    ]
    lines = [
        json.dumps({"messages": turn, "text": record["output"]}) for turn, record in zip(turns, records, strict=True)
    ]
    for part in ("new", "old"):
        (nano / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    data = ["new.jsonl"] if name == "sft" else ["0.9:new.jsonl", "0.1:old.jsonl"]
    data = [word.replace("new", f"{nano}/new").replace("old", f"{nano}/old") for word in data]
    small = ["--context_size", "64", "--global_batch_size", "4", "--max_steps", "8", "--validation_split", "0.1"]
    flags = ["--config", str(ROOT / "examples" / f"{name}.yaml"), "--engine", engine, *small]
    flags += [
        "--model_name",
        str(nano / "model"),
        "--train_data",
        *data,
        "--save_checkpoint_path",
        str(tmp_path / "run"),
    ]
    if name == "sft":
        flags += ["--chat_template", str(nano / "template.jinja")]
    ended = train(2, *flags, outputs=tmp_path / "outputs")
    assert ended.statuses == (0, 0), ended.text
    assert "warning" not in ended.text, ended.text
    lines = metrics(tmp_path / "run")
    assert max(line["lr"] for line in lines.values() if "lr" in line) <= 3e-5
    assert (tmp_path / "run" / "iter_0000008" / "manifest.json").exists()
