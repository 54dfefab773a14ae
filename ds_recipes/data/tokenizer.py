"""Loading a tokenizer, and what of it a run depends on."""

import json
from pathlib import Path

import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ds_recipes.errors import InputError
from ds_recipes.hub_probe import ensure_hub_reachable_or_offline

VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a folder or of a hub id.

    Raises:
        InputError: there is no such tokenizer, it has no fast version, or no end-of-text (EOS) token.
    """
    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder)
        tokenizer = _load(name, trust_remote_code, True, "Check its tokenizer files.")
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise InputError(f"tokenizer {name!r}: no such folder (looked in {Path.cwd()}). Set --tokenizer_name to one.")
    else:
        offline = not ensure_hub_reachable_or_offline()
        where = (
            "the hub could not be reached, and it is not in the cache" if offline else "the hub gave no such tokenizer"
        )
        advice = f"There is no such folder; {where}. Check --tokenizer_name" + (
            ", or pass a folder." if offline else "."
        )
        tokenizer = _load(name, trust_remote_code, offline, advice)
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {name}: has no fast version (tokenizer.json). Convert it, or use another one.")
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {name}: has no EOS token, so a model could not learn to stop. Set eos_token in its "
            'tokenizer_config.json to the token that ends a text, such as "eos_token": "</s>".'
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """xxh3-128 of all that decides a text's tokens: vocabulary, merges, normalisation, special tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of the latest call, not of the tokenizer
        backend.pop(state, None)
    identity = [backend, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return str(xxhash.xxh3_128(json.dumps(identity, sort_keys=True).encode()).hexdigest())


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer itself puts a begin-of-text (BOS) token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def _check_folder(folder: Path) -> None:
    """transformers makes a tokenizer without a vocabulary where a folder has only a model."""
    if not any(found for pattern in VOCABULARY_FILES for found in folder.glob(pattern)):
        raise InputError(
            f"tokenizer {folder}: the folder has no tokenizer (no tokenizer.json). Copy the tokenizer's files there, "
            "or set --tokenizer_name to a folder or hub id that has them."
        )


def _load(name: str, trust_remote_code: bool, local_files_only: bool, advice: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )
    except Exception as error:  # the tokenizers library raises nothing narrower for a file that it cannot read
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"tokenizer {name}: cannot be loaded ({first_line}). {advice}") from error
    return tokenizer
