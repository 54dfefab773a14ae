"""From settings to the format that they name."""

from pathlib import Path
from typing import TYPE_CHECKING

from ds_recipes.config.data_settings import FORMATS
from ds_recipes.config.own_function import split_own
from ds_recipes.data.formats.alpaca import AlpacaFormat
from ds_recipes.data.formats.chat import ChatFormat
from ds_recipes.data.formats.own import OwnFormat
from ds_recipes.data.formats.sample import Format, FormatSettings
from ds_recipes.data.formats.text import CompletionFormat, TextFormat
from ds_recipes.data.formats.token_ids import TokensFormat
from ds_recipes.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_format(settings: FormatSettings, tokenizer: "PreTrainedTokenizerBase | None") -> Format:
    """The format that the settings name. `tokenizer` may be None where `needs_tokenizer` says so.

    Raises:
        InputError: a template or a user's file is missing or wrong.
    """
    if needs_tokenizer(settings):
        assert tokenizer is not None
        if settings.dataset == "chat":
            return ChatFormat(tokenizer, _path(settings.chat_template), settings.chat_targets)
        return OwnFormat(settings, tokenizer)
    match settings.dataset:
        case "text":
            return TextFormat(settings.text_fields)
        case "alpaca":
            return AlpacaFormat(_path(settings.prompt_template))
        case "completion":
            return CompletionFormat()
        case "tokens":
            return TokensFormat()
    raise InputError(
        f"dataset {settings.dataset!r} is no format. It must be one of {', '.join(FORMATS)}, or "
        "path/to/file.py:function."
    )


def needs_tokenizer(settings: FormatSettings) -> bool:
    """True for conversations and for users' own functions."""
    return settings.dataset == "chat" or split_own(settings.dataset) is not None


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
