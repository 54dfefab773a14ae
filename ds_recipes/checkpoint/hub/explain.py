"""What an answer of the hub means, and what to do: one line for each."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2  # what huggingface_hub speaks through
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ds_recipes.checkpoint.hub.credentials import HOW_TO_LOG_IN, hidden
from ds_recipes.errors import DsRecipesError, HubError, InputError

AGAIN = "Run the same command again: what has arrived is not sent a second time."

ADVICE = {
    400: "The hub takes a file, a name or a setting for wrong.",
    401: f"The hub does not accept the token. {HOW_TO_LOG_IN}",
    402: "The account's plan does not include this (private storage is limited, for one).",
    403: "The token may not write there: it needs write permission, and its owner must belong to the organisation.",
    404: "There is no such user, organisation, repository or branch, or the token may not see it. Look at --repo and --branch.",
    409: "Somebody else changes the same repository at this time, or the name is taken. Run the command again.",
    412: "The branch has moved since it was looked at: somebody else wrote to it. Look at it, then run the command again.",
    413: "A file or the commit is larger than the hub takes. Export with a smaller --max_shard_size.",
    422: "The hub takes a file, a name or a setting for wrong.",
    429: f"Too many requests. Wait some minutes. {AGAIN}",
}
WRONG_INPUT = {400, 401, 402, 403, 404, 422}
"""Answers that stay the same however often one asks."""


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turn whatever fails in the libraries below into an error for the user, without secrets.

    Raises:
        InputError: the hub refuses the token, the name or a file.
        HubError: anything else that went wrong on the way.
    """
    try:
        yield
    except DsRecipesError:
        raise
    except HFValidationError as error:
        raise InputError(f"--repo {repo}: {_line(error)}") from error
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _explain(error, repo) from error


def _explain(error: BaseException, repo: str) -> DsRecipesError:
    answer = _answer(error)
    if answer is None:
        if isinstance(error, json.JSONDecodeError):
            return HubError(
                f"{repo}: the answer is not one of the hub ({_line(error)}): is there a proxy or a log-in page between?"
            )
        if isinstance(error, ValueError):
            return InputError(f"{repo}: {_line(error)}")
        return HubError(f"{repo}: the transfer broke off ({_line(_first_cause(error))}). {AGAIN}")
    status = answer.response.status_code
    said = answer.server_message or ""
    advice = ADVICE.get(status) or f"The hub has a fault of its own (https://status.huggingface.co). Later: {AGAIN}"
    quoted = f", {_line(said)!r}" if said else ""
    line = f"{repo}: the hub answered {status}{quoted}. {advice}"
    return InputError(line) if status in WRONG_INPUT else HubError(line)


def _answer(error: BaseException | None) -> HfHubHTTPError | None:
    """The hub's answer at the bottom of an error, which libraries wrap."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(said: object) -> str:
    """On one line, without secrets, and not longer than a few lines of a terminal."""
    text = " ".join(hidden(str(said)).split())
    name = f"{type(said).__name__}: " if isinstance(said, BaseException) and not text else ""
    return (name + text)[:400]
