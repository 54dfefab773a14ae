"""A model that was taught to end its turns stops there when plain transformers generates with its export."""

import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_recipes.checkpoint.export.whole import export
from tests.nano import WORDS, make_nano
from tests.ranks.training import train

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LIMIT = 24


def test_a_base_model_that_learned_a_chat_format_stops(tmp_path: Path) -> None:
    run_file = make_nano(tmp_path)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    records = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": f" {word} {word}"}]}
        for word in WORDS[:4]
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 10))
    given = {
        "config": run_file,
        "engine": "fsdp",
        "dataset": "chat",
        "chat_template": tmp_path / "chatml.jinja",
        "train_data": tmp_path / "chat.jsonl",
        "run_validation": "false",
        "global_batch_size": 4,
        "max_steps": 40,
        "lr": "3e-3",
        "save_interval_iteration": 0,
        "save_checkpoint_path": tmp_path / "run",
    }
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    tokens = ("--added_tokens", "<|im_start|>", "<|im_end|>")
    ended = train(1, *flags, *tokens, outputs=tmp_path / "outputs")
    assert ended.statuses == (0,), ended.text
    assert "end with <|im_end|>" in ended.text and "the model's files know only </s>" in ended.text, ended.text
    out = tmp_path / "hf"
    export(tmp_path / "run" / "iter_0000040", out)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == "</s>" and model.generation_config.eos_token_id == [1, end]
    assert f"</s> (1), <|im_end|> ({end})" in ModelCard.load(out / "README.md").content.replace(r"\|", "|")
    prompt = [{"role": "user", "content": WORDS[0]}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        written = model.generate(**ids, max_new_tokens=LIMIT, do_sample=False)[0, ids["input_ids"].shape[1] :]
        model.generation_config.eos_token_id = 1  # as the base model's files have it: it would go on
        longer = model.generate(**ids, max_new_tokens=LIMIT, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert written.tolist().index(end) == len(written) - 1 < LIMIT - 1
    assert len(longer) == LIMIT
