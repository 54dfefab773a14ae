"""The small files that every checkpoint carries, so that it becomes a Hugging Face model without its origin."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from ds_recipes.checkpoint.export.transformers4 import TOKENIZER_CONFIG, TOKENIZER_JSON, portable_tokenizer_config
from ds_recipes.data.tokenizer_file import first_difference
from ds_recipes.errors import InputError
from ds_recipes.models.end_tokens import GENERATION_CONFIG, EndTokens
from ds_recipes.models.load import ModelSource
from ds_recipes.models.parts import PROCESSOR_FILES


def model_files(
    source: ModelSource, skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: EndTokens
) -> dict[str, bytes]:
    """config.json, generation_config.json and the tokenizer's files, by name; a remote-code model's Python files too."""
    config = source.config_copy()
    config.architectures = [type(skeleton).__name__]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        (folder / GENERATION_CONFIG).write_bytes(ends.generation_config())
        # Several templates go into tokenizer_config.json: every version of transformers reads them there.
        tokenizer.save_pretrained(folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    if source.folder is not None:
        kept = [source.folder / name for name in PROCESSOR_FILES]
        files |= {path.name: path.read_bytes() for path in kept if path.is_file()}
    if source.trust_remote_code and source.folder is not None:
        files |= {path.name: path.read_bytes() for path in sorted(source.folder.glob("*.py"))}
    return _tokenizer_of(tokenizer, source.trust_remote_code) | files | _tokenizer_config(tokenizer, files)


def _tokenizer_config(tokenizer: PreTrainedTokenizerBase, files: dict[str, bytes]) -> dict[str, bytes]:
    """tokenizer_config.json with the class that the tokenizer's own folder names, where transformers keeps to it."""
    origin = _origin(tokenizer)
    given = {}
    if origin is not None and (origin / TOKENIZER_CONFIG).is_file():
        given = json.loads((origin / TOKENIZER_CONFIG).read_bytes())
    python_files = [name for name in files if name.endswith(".py")]
    written, tokens = files[TOKENIZER_CONFIG], files.get(TOKENIZER_JSON)
    return {TOKENIZER_CONFIG: portable_tokenizer_config(written, tokens, python_files, given.get("tokenizer_class"))}


def _tokenizer_of(tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool) -> dict[str, bytes]:
    """What other programs want of the tokenizer's own folder and transformers does not write: the SentencePiece model."""
    origin = _origin(tokenizer)
    patterns = ("*.model", "*.py") if trust_remote_code else ("*.model",)
    found = [] if origin is None else [path for pattern in patterns for path in sorted(origin.glob(pattern))]
    return {path.name: path.read_bytes() for path in found}


def _origin(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The folder that a tokenizer was read from; of a hub id the one in the cache."""
    folder = Path(tokenizer.name_or_path)
    if not tokenizer.name_or_path or folder.is_dir():
        return folder if tokenizer.name_or_path else None
    found = cached_file(
        tokenizer.name_or_path,
        TOKENIZER_CONFIG,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found).parent


def check_tokenizer_comes_back(
    files: Mapping[str, bytes], tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
) -> None:
    """See that transformers reads these files as the tokenizer that they were made from.

    Raises:
        InputError: it makes another one of them, with both results: models of some types get their own tokenizer's class,
            whatever the files say.
    """
    if type(tokenizer).__module__.startswith("transformers_modules"):  # its code decides, which is not read here
        return
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, local_files_only=True)
    difference = first_difference(tokenizer.backend_tokenizer, loaded.backend_tokenizer)
    if difference is None:
        return
    other, origin = type(loaded).__name__, tokenizer.name_or_path
    rebuilt = f"{Path(origin).name}-rebuilt"
    raise InputError(
        f"tokenizer {origin}: transformers {transformers.__version__} loads the tokenizer of such a model as {other}, whatever its "
        f"files say: {difference}. What is trained here would be used with other tokens. Train on those that transformers makes: "
        f"python -c \"from transformers import {other} as T; T.from_pretrained('{origin}').save_pretrained('{rebuilt}')\", then "
        f"--tokenizer_name {rebuilt}"
    )
