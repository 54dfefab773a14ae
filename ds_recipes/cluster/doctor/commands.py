"""Programs of the machine that the doctor asks: with a time limit, and never a question to a terminal."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ASK_SECONDS = 10.0


@dataclass(frozen=True)
class Answer:
    """A program's status and output. A status of None: it did not end in time, or could not be started."""

    status: int | None
    output: str
    errors: str

    @property
    def good(self) -> bool:
        return self.status == 0

    @property
    def reason(self) -> str:
        """The last line that it said, for messages."""
        lines = [line for line in (self.errors or self.output).splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"status {self.status}"


def ask(
    words: Sequence[str], limit_seconds: float = ASK_SECONDS, env: Mapping[str, str] | None = None, give: str = ""
) -> Answer:
    """Run a program in a process group of its own, and kill the whole group when its time is over."""
    try:
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.PIPE if give else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=None if env is None else dict(env),
            start_new_session=True,
        )
    except OSError as failure:
        return Answer(None, "", f"{words[0]}: {failure.strerror}")
    try:
        output, errors = process.communicate(give or None, timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return Answer(None, "", f"{words[0]} did not answer within {limit_seconds:.0f} s")
    return Answer(process.returncode, output, errors)
