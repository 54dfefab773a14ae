"""Tokenizers are found, checked and named by content; an unknown one costs seconds at most."""

import copy
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tokenizers import processors

from ds_recipes.data.encode import Encoder
from ds_recipes.data.formats.sample import Parts, Rendered
from ds_recipes.data.sources.record import Record
from ds_recipes.data.tokenizer import load_tokenizer, tokenizer_fingerprint, tokens_before
from ds_recipes.errors import InputError
from ds_recipes.hub_probe import ensure_hub_reachable_or_offline
from tests.unit.data.made import make_tokenizer


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "0")
        yield


def test_loads_a_folder(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    assert tokenizer("a dog").input_ids == make_tokenizer()("a dog").input_ids
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(make_tokenizer())


def test_fingerprint_is_of_the_tokenizer_not_of_its_use() -> None:
    tokenizer = make_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a dog", "a"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(make_tokenizer(adds_bos=False)) != before


@pytest.mark.parametrize(
    "template, expected",
    [("$A", ()), ("<s> $A", (0,)), ("<s> $A </s>", (0,)), ("[gMASK] <sop> $A", (300, 301)), ("$A </s>", ())],
)
@pytest.mark.parametrize("bos", ["<s>", None])
def test_a_text_begins_with_what_the_tokenizer_puts_before_it(
    template: str, expected: tuple[int, ...], bos: str | None
) -> None:
    """GLM's are no BOS, and some settings do not name the BOS that the post-processor adds."""
    tokenizer = copy.deepcopy(make_tokenizer(adds_bos=False))
    tokenizer.add_tokens(["[gMASK]", "<sop>"], special_tokens=True)
    tokenizer.bos_token = bos
    names = [name for name in template.split() if name != "$A"]
    specials = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    assert tokens_before(tokenizer) == expected
    samples = [Parts((("the", False), (" fox", True))), Rendered("a fox", ((1, 5),), False)]
    encoded = Encoder.of(tokenizer, 400).encode([Record("a", 1, n, {}) for n in range(2)], samples)
    parts = [
        *expected,
        *(token for text in ("the", " fox") for token in tokenizer(text, add_special_tokens=False).input_ids),
        1,
    ]
    rendered = [*tokenizer("a fox", add_special_tokens=False).input_ids, 1]
    assert encoded.ids.tolist() == parts + rendered


def test_refuses_a_tokenizer_without_eos(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token"', '"other"'))
    with pytest.raises(InputError, match=r"has no EOS token.* --eos_token"):
        load_tokenizer(str(tmp_path), trust_remote_code=False)


@pytest.mark.parametrize(
    "file, section, change, message",
    [
        ("tokenizer.json", "model", {"dropout": 0.1}, r"has a dropout of 0\.1, so a text gets other tokens each time"),
        ("tokenizer_config.json", None, {"split_special_tokens": True}, "has split_special_tokens true"),
    ],
)
def test_refuses_a_tokenizer_that_reads_a_text_otherwise_each_time_or_elsewhere(
    tmp_path: Path, file: str, section: str | None, change: dict[str, Any], message: str
) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / file).read_text())
    (content if section is None else content[section]).update(change)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load_tokenizer(str(tmp_path), trust_remote_code=False)
    (content if section is None else content[section]).update(dict.fromkeys(change, 0.0 if section else False))
    (tmp_path / file).write_text(json.dumps(content))
    load_tokenizer(str(tmp_path), trust_remote_code=False)


def test_truncation_and_padding_that_a_file_keeps_have_no_effect(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 1, "pad_type_id": 0, "pad_token": "</s>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    sample = Parts((("the quick brown fox jumps", True),))
    made = [
        Encoder.of(tokenizer, 300).encode([Record("a", 1, 0, {})], [sample]).ids.tolist()
        for tokenizer in (make_tokenizer(), load_tokenizer(str(tmp_path), trust_remote_code=False))
    ]
    assert made[0] == made[1] and len(made[0]) > 4


@pytest.mark.parametrize("name", ["./none", "/none", "a/b/c"])
def test_refuses_a_folder_that_is_missing(name: str) -> None:
    with pytest.raises(InputError, match=r"no such folder \(looked in .*\)\. Set --tokenizer_name to one\."):
        load_tokenizer(name, trust_remote_code=False)


def test_refuses_a_folder_without_or_with_a_damaged_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder has no tokenizer \(no tokenizer\.json\)\."):
        load_tokenizer(str(tmp_path), trust_remote_code=False)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot be loaded \(.*\)\. Check its tokenizer files\."):
        load_tokenizer(str(tmp_path), trust_remote_code=False)


@pytest.mark.usefixtures("silent_hub")
def test_an_unknown_name_without_network_is_refused_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=r"the hub could not be reached, and it is not in the cache\."):
        load_tokenizer("nobody-at-all/nothing", trust_remote_code=False)
    assert time.monotonic() - started < 8
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    started = time.monotonic()
    assert not ensure_hub_reachable_or_offline()
    assert time.monotonic() - started < 0.5
