"""The token: where it comes from, and how it stays out of everything that is printed."""

import os
import re
import sys
from pathlib import Path
from typing import TextIO, cast

from ds_recipes.errors import InputError

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
HIDDEN = "[hidden]"

SECRETS = {
    "a Hugging Face token": re.compile(rb"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a key of Amazon's services": re.compile(rb"(?<![A-Z0-9])AKIA[A-Z0-9]{16}(?![A-Z0-9])"),
}

SIGNED_ADDRESS = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")
"""Addresses of storage carry a signature that lets anyone write there for an hour."""

HOW_TO_LOG_IN = (
    "Make one with write permission at https://huggingface.co/settings/tokens, then run `hf auth login`, set HF_TOKEN, or "
    "name a file that holds it with --token_file."
)


def secret_in(content: bytes) -> str | None:
    """What kind of secret the content holds, if any."""
    return next((kind for kind, pattern in SECRETS.items() if pattern.search(content)), None)


def read_token_file(path: Path) -> str:
    """Raises: InputError if the file cannot be read or holds more or less than one token."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token_file {path}: cannot be read ({type(error).__name__})") from error
    if len(words) != 1:
        raise InputError(f"--token_file {path}: holds {len(words)} words; a token is one")
    hide(words[0])
    return words[0]


def find_token(file: Path | None) -> str:
    """The token of the file if one is named, else that of the environment or of `hf auth login`.

    Raises:
        InputError: there is none.
    """
    from huggingface_hub import get_token

    token = read_token_file(file) if file is not None else get_token()
    if not token:
        raise InputError(f"no token for the hub was found. {HOW_TO_LOG_IN}")
    hide(token)
    if not re.fullmatch("[!-~]+", token):
        raise InputError(
            f"the token that was found is none: it has characters that a token cannot have. {HOW_TO_LOG_IN}"
        )
    return token


class _Printed:
    """A stream without secrets: tracebacks, logs and progress bars of all libraries pass through it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(hidden(text))
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


_secrets: list[str] = []


def hide_secrets_in_output() -> None:
    """From now on nothing that this process prints shows a token. Called before any library keeps the streams."""
    for variable in TOKEN_VARIABLES:
        hide(os.environ.get(variable, ""))
    sys.stdout, sys.stderr = cast(TextIO, _Printed(sys.stdout)), cast(TextIO, _Printed(sys.stderr))


def hide(secret: str) -> None:
    """Hide this text from now on."""
    secret = secret.strip()
    if secret and secret not in _secrets:
        _secrets.append(secret)


def hidden(text: str) -> str:
    """The text without tokens and without signatures of addresses."""
    for secret in _secrets:
        text = text.replace(secret, HIDDEN)
    for pattern in SECRETS.values():
        text = re.sub(pattern.pattern.decode(), HIDDEN, text)
    return SIGNED_ADDRESS.sub(r"\1?...", text)
