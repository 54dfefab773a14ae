"""Errors for users, each with the exit status that the job ends with.

A message says what was found, where (file, line or flag), and what to do about it.
"""

from collections.abc import Sequence
from typing import ClassVar


class DsRecipesError(Exception):
    """Base of every error that is meant for the user. Exit status 1 unless a subclass says otherwise."""

    exit_status: ClassVar[int] = 1


class ConfigError(DsRecipesError):
    """The settings are wrong; nothing was started.

    `problems` holds one line for each problem, in the order in which a reader would fix them.
    """

    exit_status: ClassVar[int] = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class InputError(DsRecipesError):
    """A data file, a model folder or a tokenizer is wrong; nothing was trained."""

    exit_status: ClassVar[int] = 2


class WorldError(DsRecipesError):
    """The launcher's environment is contradictory, incomplete, or not the world that was expected."""

    exit_status: ClassVar[int] = 2


class CheckpointError(DsRecipesError):
    """A checkpoint cannot be used: damaged, of another model, or not resumable as asked."""

    exit_status: ClassVar[int] = 2


class StartError(DsRecipesError):
    """The ranks did not find each other in time."""


class TrainingError(DsRecipesError):
    """The run cannot go on: non-finite steps in a row, a step without targets."""


class PeerFailure(DsRecipesError):
    """Another rank failed first; its error has been shown there."""
