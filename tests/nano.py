"""A model, a tokenizer and records so small that a whole run takes a second: made on the spot, for tests of train.py."""

import json
import random
from pathlib import Path

WORDS = ("river", "stone", "cloud", "paper", "light", "table", "seven", "green", "quick", "silent", "東京", "学習")
CONTEXT = 64
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def make_nano(folder: Path, tied: bool = False, dropout: float = 0.0) -> Path:
    """Write model/, train.jsonl, validation.jsonl and run.yaml into `folder`; returns the run file.

    `dropout`: of the attention, so that each step draws random numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_records(folder / "train.jsonl", 150, seed=1)
    _write_records(folder / "validation.jsonl", 7, seed=2)
    _make_tokenizer(folder / "model")
    make_model(folder / "model", tied, dropout=dropout)
    settings = {
        "model_name": str(folder / "model"),
        "dataset": "alpaca",
        "train_data": str(folder / "train.jsonl"),
        "validation_data": str(folder / "validation.jsonl"),
        "context_size": CONTEXT,
        "precision": "fp32",
        "batch_size_training": 1,
        "global_batch_size": 12,
        "max_steps": 20,
        "lr": "1e-3",
        "save_interval_iteration": 10,
        "eval_interval": 10,
    }
    run_file = folder / "run.yaml"
    run_file.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()), encoding="utf-8")
    return run_file


def _write_records(path: Path, count: int, seed: int) -> None:
    """Every third record has an input; outputs are from one word to longer than a row."""
    chosen = random.Random(seed)
    records = [
        {
            "instruction": chosen.choice(WORDS),
            "input": chosen.choice(WORDS) if number % 3 == 0 else "",
            "output": " ".join(chosen.choices(WORDS, k=chosen.choice((1, 4, 9, 60)))),
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _make_tokenizer(folder: Path) -> None:
    """One token a word of the Alpaca prompt and of `WORDS`, bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from ds_recipes.data.formats.alpaca import WITH_INPUT

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WITH_INPUT, *(f" {word} {word}" for word in WORDS)] * 3, trainer)
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS).save_pretrained(folder)


def make_model(folder: Path, tied: bool, hidden_size: int = 40, dropout: float = 0.0) -> None:
    """Odd sizes, so that few parameters divide evenly over 2, 3 or 4 ranks."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)) + 3,
        hidden_size=hidden_size,
        intermediate_size=51,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
