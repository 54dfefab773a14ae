"""Loading a tokenizer, and what of it a run depends on."""

import json
from collections.abc import Sequence
from pathlib import Path

import xxhash
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from ds_recipes.data.tokenizer_file import load_as_in_file
from ds_recipes.errors import InputError
from ds_recipes.hub_probe import ensure_hub_reachable_or_offline

VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")


def load_tokenizer(name: str, trust_remote_code: bool, eos_token: str | None = None) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a folder or of a hub id, with the tokens of its tokenizer.json; see `tokenizer_file.py`.

    With `eos_token` it needs no EOS token of its own; see `use_eos`.

    Raises:
        InputError: there is no such tokenizer, it has no fast version, no end-of-text (EOS) token, reads a text otherwise each
            time, or cannot be loaded as its tokenizer.json says.
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
    _refuse_unsteady(tokenizer, name)
    if tokenizer.eos_token_id is None and eos_token is None:
        raise InputError(
            f"tokenizer {name}: has no EOS token, so a model could not learn to stop. Name the token of its vocabulary that "
            "ends a text with --eos_token, such as --eos_token '</s>'."
        )
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerBase, special: Sequence[str], plain: Sequence[str] = ()) -> int:
    """Add tokens that are never split, with ids in the given order behind the tokenizer's own; returns how many were new.

    One that the vocabulary has already keeps its id. `plain` ones are part of the text: decoding without special tokens shows
    them.

    Raises:
        InputError: a token is empty, stands there twice or is not valid Unicode, a plain one is the tokenizer's BOS or the like,
            or the id would be another token's.
    """
    given = [("--added_tokens", token) for token in special] + [("--added_plain_tokens", token) for token in plain]
    names = {str(token): name for name, token in tokenizer.special_tokens_map.items()}
    seen: set[str] = set()
    for flag, token in given:
        if not token:
            raise InputError(f"{flag}: token {len(seen) + 1} of {len(given)} is empty. Leave it out.")
        if token in seen:
            raise InputError(f"{flag}: {token!r} stands there twice. Name it once.")
        if any("\ud800" <= character <= "\udfff" for character in token):
            raise InputError(f"{flag}: {token!r} is not valid Unicode. Write it in UTF-8.")
        if flag == "--added_plain_tokens" and token in names:
            raise InputError(f"{flag}: {token!r} is the tokenizer's {names[token]}, which is special. Leave it out.")
        seen.add(token)
    before = tokenizer.get_vocab()
    for tokens, is_special in ((special, True), (plain, False)):
        added = [AddedToken(token, normalized=False, special=is_special) for token in tokens]
        tokenizer.add_tokens(added, special_tokens=is_special)
    after, taken = tokenizer.get_vocab(), set(before.values())
    for flag, token in given:
        if token not in before and after[token] in taken:
            raise InputError(
                f"{flag}: {token!r} would get id {after[token]}, which another token has: the vocabulary of tokenizer "
                f"{tokenizer.name_or_path} leaves ids out, and tokens cannot be added to it."
            )
    return len(after) - len(before)


def use_eos(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Make a token of the vocabulary the one that ends a text.

    Raises:
        InputError: the vocabulary does not have it.
    """
    if token not in tokenizer.get_vocab():
        raise InputError(
            f"--eos_token {token}: tokenizer {tokenizer.name_or_path} has no such token. Check its spelling, or add it with "
            "--added_tokens."
        )
    tokenizer.eos_token = token


def rows_for(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for every id of the tokenizer; more than its tokens where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def check_special_ids(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> None:
    """See that the tokens that begin, end and pad a text have a row in the embedding.

    Raises:
        InputError: one has none.
    """
    for kind in ("bos", "eos", "pad"):
        number: int | None = getattr(tokenizer, f"{kind}_token_id")
        if number is not None and number >= vocabulary_size:
            raise InputError(
                f"tokenizer {tokenizer.name_or_path}: its {kind.upper()} token {getattr(tokenizer, f'{kind}_token')} has id "
                f"{number:,}, but the model has embeddings for ids below {vocabulary_size:,}. Set --tokenizer_name to the "
                f"model's own tokenizer, or give the model more rows (--pad_vocabulary_to 64)."
            )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """xxh3-128 of all that decides a text's tokens: vocabulary, merges, normalisation, special tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of the latest call, not of the tokenizer
        backend.pop(state, None)
    identity = [backend, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return str(xxhash.xxh3_128(json.dumps(identity, sort_keys=True).encode()).hexdigest())


def tokens_before(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text: nothing, BOS, or what else its post-processor has there ([gMASK]<sop>)."""
    text, given = (tokenizer("a", add_special_tokens=adds).input_ids for adds in (False, True))
    start = next((i for i in range(len(given)) if given[i : i + len(text)] == text), 0)
    return tuple(given[:start])


def _refuse_unsteady(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that reads a text otherwise each time, or otherwise than it is read here."""
    dropout = getattr(tokenizer.backend_tokenizer.model, "dropout", None)
    if dropout:
        raise InputError(
            f"tokenizer {name}: its tokenizer.json has a dropout of {dropout:g}, so a text gets other tokens each time. Set "
            "dropout in its model section to null."
        )
    if tokenizer.split_special_tokens:
        raise InputError(
            f"tokenizer {name}: its tokenizer_config.json has split_special_tokens true, so a turn's end in a text would be "
            "read as letters where the model is used, and as one token here. Set it to false."
        )


def _check_folder(folder: Path) -> None:
    """transformers makes a tokenizer without a vocabulary where a folder has only a model."""
    if not any(found for pattern in VOCABULARY_FILES for found in folder.glob(pattern)):
        raise InputError(
            f"tokenizer {folder}: the folder has no tokenizer (no tokenizer.json). Copy the tokenizer's files there, "
            "or set --tokenizer_name to a folder or hub id that has them."
        )


def _load(name: str, trust_remote_code: bool, local_files_only: bool, advice: str) -> PreTrainedTokenizerBase:
    try:
        return load_as_in_file(name, trust_remote_code, local_files_only)
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower for a file that it cannot read
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"tokenizer {name}: cannot be loaded ({first_line}). {advice}") from error
