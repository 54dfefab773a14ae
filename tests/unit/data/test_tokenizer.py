"""Tokenizers are found, checked and named by content; an unknown one costs seconds at most."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from ds_recipes.data.tokenizer import adds_bos, load_tokenizer, tokenizer_fingerprint
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


def test_knows_whether_the_tokenizer_adds_bos() -> None:
    assert adds_bos(make_tokenizer())
    assert not adds_bos(make_tokenizer(adds_bos=False))


def test_refuses_a_tokenizer_without_eos(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token"', '"other"'))
    with pytest.raises(InputError, match=r"has no EOS token.* --eos_token"):
        load_tokenizer(str(tmp_path), trust_remote_code=False)


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
