"""Where generation stops: the end tokens that a model's files name, and those that training teaches besides."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ds_recipes.errors import InputError

GENERATION_CONFIG = "generation_config.json"
KEY = "eos_token_id"


@dataclass(frozen=True)
class EndTokens:
    """`settings` is the content of the model's generation_config.json, `own` the ids that stop it, `taught` further ones."""

    settings: dict[str, Any]
    own: tuple[int, ...]
    taught: tuple[int, ...]

    def generation_config(self) -> bytes:
        """generation_config.json of a checkpoint: the model's own, which stops at the taught tokens too."""
        ids = [*self.own, *self.taught]
        settings = self.settings | ({KEY: ids if len(ids) > 1 else ids[0]} if self.taught else {})
        return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()

    def note(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """What to tell the user where generation will stop at more tokens than the model's files name."""
        if not self.taught:
            return None
        eos = tokenizer.eos_token_id
        keeps = (
            ""
            if eos in self.taught
            else f" The tokenizer's eos_token stays {tokenizer.eos_token}; --eos_token sets it."
        )
        own = (
            f"the model's files know only {_named(self.own, tokenizer)}" if self.own else "the model's files name none"
        )
        return (
            f"the data teach answers that end with {_named(self.taught, tokenizer)}; {own}. Generation has to stop there, so "
            f"checkpoints and exports name all of them as eos_token_id in {GENERATION_CONFIG}.{keeps}"
        )


def find_end_tokens(hf_config: PretrainedConfig, folder: Path | None, learned: Sequence[int]) -> EndTokens:
    """The end tokens of a model; `folder` is the model's, `learned` are the ids that the data teach.

    Raises:
        InputError: the folder's generation_config.json cannot be read.
    """
    path = None if folder is None else folder / GENERATION_CONFIG
    if path is not None and path.exists():
        settings = _read(path)
    else:
        settings = json.loads(GenerationConfig.from_model_config(hf_config).to_json_string())
    places = (settings.get(KEY), getattr(hf_config, KEY, None), getattr(hf_config.get_text_config(), KEY, None))
    own = next((ids for value in places if (ids := _ids(value))), ())
    return EndTokens(settings, own, tuple(token for token in learned if token not in own))


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        _ids(settings.get(KEY))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as generation settings ({error}). Copy the file again.") from error
    found: dict[str, Any] = settings
    return found


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(map(int, value)) if isinstance(value, list) else (int(value),)


def _named(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(number)} (id {number:,})" for number in ids)
