"""Errors for users, each with the exit status that the job ends with.

A message says what was found, where (file, line or flag), and what to do about it.
"""

from collections.abc import Sequence
from typing import ClassVar

STOPPED_EARLY = 75
"""Exit status of a launch that stopped on request: with a durable checkpoint, or before its first step (EX_TEMPFAIL)."""


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


class NoRecordsError(InputError):
    """A data file is fine and holds no record. It is left out where a folder or a pattern stands for it."""


class WorldError(DsRecipesError):
    """The launcher's environment is contradictory, incomplete, or not the world that was expected."""

    exit_status: ClassVar[int] = 2


class CheckpointError(DsRecipesError):
    """A checkpoint cannot be used: damaged, of another model, or not resumable as asked."""

    exit_status: ClassVar[int] = 2


class UnreadableError(CheckpointError):
    """A file of a checkpoint cannot be read just now, which says nothing of whether it is damaged: no older one is taken."""


class StartError(DsRecipesError):
    """The ranks did not find each other in time."""


class TrainingError(DsRecipesError):
    """The run cannot go on: non-finite steps in a row, a step without targets."""


class DeviceError(TrainingError):
    """A GPU, its driver or a kernel failed on some rank, or a GPU's memory was not enough."""


class SaveError(TrainingError):
    """A checkpoint could not be written. Those before it are whole."""


class StoppedEarly(DsRecipesError):
    """A launch was asked to stop before its first step. Nothing was trained; what was tokenised stays. Queue it again."""

    exit_status: ClassVar[int] = STOPPED_EARLY

    def __init__(self, reason: str, phase: str) -> None:
        """`reason`: who asked (a signal, the deadline, the file STOP); `phase`: what the ranks were doing."""
        self.reason = reason
        super().__init__(
            f"Stopped before the first step: {reason}, during {phase}. Nothing was trained; what was tokenised stays."
        )


class LauncherGone(DsRecipesError):
    """The launcher of the ranks has died, or what stands for it on this host. They do not go on without it."""

    def __init__(self, launcher: str, pid: int, host: str) -> None:
        super().__init__(
            f"The launcher {launcher} (process {pid} on {host}) is gone, so the ranks leave.\n"
            "Start again: the run continues from its newest checkpoint."
        )


class PeerFailure(DsRecipesError):
    """Another rank failed first; its error has been shown there."""


class HangError(DsRecipesError):
    """Some rank no longer came further, so all ranks were ended."""


class HubError(DsRecipesError):
    """The hub cannot be reached, does not do what it is asked, or does not hold what was sent to it."""
