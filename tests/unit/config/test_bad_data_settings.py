"""Settings of the data that cannot be meant are refused in one line, with where they come from."""

import pytest

from tests.unit.config.settings import problems_of

FLAGS = {
    "--dataset chta": (
        "--dataset is chta (command line): must be text, alpaca, chat, completion, tokens or path/to/file.py:function; did "
        "you mean chat?"
    ),
    "--dataset my/data.py": (
        "--dataset is my/data.py (command line): name a function of your own as path/to/file.py:function"
    ),
    "--validation_data 0.7:a.jsonl": (
        "--validation_data is 0.7:a.jsonl (command line): validation data take no weights. Name the path alone."
    ),
    "--validation_split 0.1 --validation_data v": (
        "--validation_split is 0.1 (command line), but --validation_data is v (command line). Leave one of them out."
    ),
    "--chat_targets last": "--chat_targets is last (command line) has no effect: dataset is text (default). Leave one of them out.",
    "--packing concat --truncation drop": (
        "--packing is concat (command line), but --truncation is drop (command line): a stream is cut where a row ends, so "
        "every long document is split. Leave truncation out, or use packing documents."
    ),
    "--skip_samples 9-3": "skip_samples must be positions such as 12000-12511, not '9-3' (command line)",
    "--added_tokens <a> <b> <a>": "added_tokens has '<a>' twice (command line). Name it once.",
    "--added_plain_tokens <a> <a>": "added_plain_tokens has '<a>' twice (command line). Name it once.",
    "--added_tokens <a> <b> --added_plain_tokens <c> <b>": (
        "added_tokens (command line) and added_plain_tokens (command line) both have '<b>'. A token is special or part of the "
        "text: name it in one of them."
    ),
    "--added_plain_tokens <a> --eos_token <a>": (
        "--eos_token is <a> (command line), but it is in added_plain_tokens (command line). A token that ends texts is special: "
        "name it in added_tokens."
    ),
    "--new_token_init random": (
        "--new_token_init is random (command line) has no effect: no rows are added. Name tokens with --added_tokens or "
        "--added_plain_tokens, or leave it out."
    ),
}

TRAIN_DATA = {
    "0.7:a b": (
        "--train_data is 0.7:a b (command line): b has no weight, but a has 0.7. Give every path one, "
        "or none; a path whose own name begins like a weight is written ./NAME."
    ),
    "0:a": "train_data has a weight of 0 in '0:a'; a weight must be above 0 (command line)",
    "a b a": (
        "--train_data is a b a (command line): a is named twice. Name it once; a weight makes it come more often."
    ),
    "hub:name": (
        "train_data must name a data set as hub:owner/name[@revision][:config][:split], not 'hub:name' (command line)"
    ),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_a_bad_flag_is_one_line(flags: str) -> None:
    assert problems_of(flags) == (FLAGS[flags],)


@pytest.mark.parametrize("words", TRAIN_DATA)
def test_training_data_that_cannot_be_meant_is_one_line(words: str) -> None:
    needed = ("--model_name", "m", "--save_checkpoint_path", "run", "--train_data", *words.split())
    assert problems_of("", needed) == (TRAIN_DATA[words],)
