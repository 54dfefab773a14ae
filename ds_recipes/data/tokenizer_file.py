"""Loading a tokenizer so that it gives the tokens of its tokenizer.json.

transformers 5 rebuilds some tokenizers (Qwen2, GPTNeoX, CodeLlama, Llama, T5 and others) from their class: of tokenizer.json it
takes the vocabulary, and normalizer and pre-tokenizer are the class's own. Over a file of another make, such as DeepSeek's split
in a Qwen2 model or digits cut one by one, the tokens are others than those that the model was trained with. So texts that
show how a tokenizer works are encoded with the `tokenizers` library from the file, and compared.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"

PROBES = (
    "The quick brown fox", "the  quick   brown fox\n\n\tjumps \r\n over", " leading and trailing ", "\nline", "a\n\n\nb\n",
    "In 2024, 12345 + 6.789 = 12351.789", "don't WE'LL they've I'M x's", "def f(x):\n    return x**2  # [a_b]\n",
    "https://a.b/c?d=e&f", "été naïve Straße ﬁ Ⅷ ① e\u0301", "日本語の文章です。ｶﾀｶﾅ 全角\u3000空白", "中文，标点。 한국어 русский",
    "العربية हिन्दी ไทย ελληνικά", "🙂\U0001f469\u200d\U0001f469\u200d\U0001f467 ∑ ≠ ™", "a\u00a0b\u200bc\u2028d",
    "<a> [b] {c} <|d|> </e>", "▁a Ġb ##c",
)  # fmt: skip

MOST_SPECIALS = 64
SHOWN_TOKENS = 12
LOADING_NOTE = "_loading_note"


def load_as_in_file(name: str, trust_remote_code: bool, local_files_only: bool) -> PreTrainedTokenizerBase:
    """What AutoTokenizer gives, if it makes the tokens of tokenizer.json; else the tokenizer of that file, with a note.

    What tokenizer_config.json itself demands (more tokens, `add_prefix_space`) is no difference. A tokenizer
    without tokenizer.json, or of remote code, is taken as it is.

    Raises:
        Exception: what transformers raises for files that it cannot load.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )
    except Exception as error:
        path = _find(name, TOKENIZER_FILE)
        if path is None or "auto_map" in _settings(name):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return _of_file(name, local_files_only, f"transformers cannot load it by its class ({first_line})")
    path = _find(name, TOKENIZER_FILE)
    is_of_file = type(tokenizer) is PreTrainedTokenizerFast or not tokenizer.is_fast
    if path is None or is_of_file or type(tokenizer).__module__.startswith("transformers_modules"):
        return tokenizer
    differences = [first_difference(one, tokenizer.backend_tokenizer) for one in _as_written(path, _settings(name))]
    if None in differences:
        return tokenizer
    reason = f"transformers {transformers.__version__} rebuilds it as {type(tokenizer).__name__}: {differences[0]}"
    found = _of_file(name, local_files_only, reason)
    demanded = first_difference(found.backend_tokenizer, tokenizer.backend_tokenizer) is None
    return tokenizer if demanded else found


def loading_note(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the user should know of how a tokenizer was loaded."""
    note: str | None = getattr(tokenizer, LOADING_NOTE, None)
    return note


def bos_note(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the user should know where tokenizer_config.json and tokenizer.json disagree on BOS: the latter wins."""
    setting = _settings(tokenizer.name_or_path).get("add_bos_token") if tokenizer.name_or_path else None
    adds = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if not isinstance(setting, bool) or setting == adds:
        return None
    return (
        f"tokenizer {tokenizer.name_or_path}: {CONFIG_FILE} has add_bos_token {str(setting).lower()}, but transformers goes by "
        f"the post-processor of {TOKENIZER_FILE}, which {'adds BOS' if adds else 'adds no BOS'}, and so does this run. To change "
        "that, change the post-processor."
    )


def first_difference(wanted: Tokenizer, other: Tokenizer) -> str | None:
    """The first probe that two tokenizers read differently, with both results; None if there is none."""
    specials = [token.content for token in wanted.get_added_tokens_decoder().values()][:MOST_SPECIALS]
    for text in (*PROBES, *(f"a{special} b {special}c" for special in specials)):
        for adds_special in (False, True):
            one, two = (each.encode(text, add_special_tokens=adds_special).tokens for each in (wanted, other))
            if one != two:
                at = next(
                    (i for i, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]),
                    min(len(one), len(two)),
                )
                return f"it reads {text!r} as {_around(two, at)}, {TOKENIZER_FILE} as {_around(one, at)}"
    return None


def _around(tokens: list[str], at: int) -> str:
    """Some tokens from the one before the first that differs."""
    start, stop = max(at - 1, 0), at - 1 + SHOWN_TOKENS
    return f"{'... ' * (start > 0)}{' '.join(tokens[start:stop])}{' ...' * (len(tokens) > stop)}"


def _of_file(name: str, local_files_only: bool, reason: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
        name, local_files_only=local_files_only
    )
    note = f"tokenizer {name} is read from its {TOKENIZER_FILE} as it is: {reason}. Checkpoints and exports name the class "
    setattr(tokenizer, LOADING_NOTE, f"{note}PreTrainedTokenizerFast, which does the same.")
    return tokenizer


def _as_written(path: Path, settings: dict[str, Any]) -> Iterator[Tokenizer]:
    """The file's tokenizer, and the same with the `add_prefix_space` that the settings name, which some classes obey."""
    yield Tokenizer.from_file(str(path))
    prefix, content = settings.get("add_prefix_space"), path.read_text(encoding="utf-8")
    if isinstance(prefix, bool):
        other = re.sub(r'("add_prefix_space"\s*:\s*)(true|false)', rf"\g<1>{str(prefix).lower()}", content)
        if other != content:
            yield Tokenizer.from_str(other)


def _settings(name: str) -> dict[str, Any]:
    path = _find(name, CONFIG_FILE)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    return found


def _find(name: str, file: str) -> Path | None:
    """A file of a tokenizer's folder; of a hub id in the cache, where it is once the tokenizer was loaded."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    found = cached_file(
        name,
        file,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)
