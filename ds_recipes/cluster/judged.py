"""A launcher that somebody starts by hand, and the status that its run deserves: what job scripts do, without one.

    python tools/launch.py -- deepspeed --hostfile hostfile train.py --config run.yaml

The launcher gets no signal, which would lose the newest steps: the ranks are asked by the file STOP. A second Ctrl-C is for the
launcher, and ends at once. What is left of the ranks on this machine is ended; those elsewhere leave by themselves (docs/hangs.md).
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType

from ds_recipes.cluster.judge import Verdict, judge, launches_of
from ds_recipes.cluster.leftovers import GRACE_SECONDS, end_ranks
from ds_recipes.cluster.prepare import HERE, LAUNCH_VARIABLE
from ds_recipes.config.load import load_config
from ds_recipes.errors import ConfigError

TRAIN = "train.py"
SIGNALS = ("TERM", "INT", "HUP", "USR1", "USR2")
LAUNCHER_SECONDS = 60.0
"""How long a launcher may stay after its run has failed: it may wait for a host that is gone without a word, for hours."""

LEAVE_SECONDS = 10.0
"""Between the signals TERM and KILL to such a launcher."""

ASK_SECONDS = 5.0
"""Ranks that start after a STOP file was written take it for an old one, so it is written again this often."""


def run_judged(words: Sequence[str], env: Mapping[str, str], tool: Path) -> Verdict:
    """Start a launcher by the words of its command, wait for its end and its ranks', and judge the run.

    Args:
        tool: the program that ends ranks on other hosts; see `leftovers.end_ranks`.

    Raises:
        ConfigError: the command does not start train.py, its settings are wrong, or there is no such launcher.
    """
    run_folder = run_folder_of(words)
    launch = env.get(LAUNCH_VARIABLE) or f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    before = set(launches_of(run_folder))
    try:
        launcher = subprocess.Popen(
            words,
            env={**env, LAUNCH_VARIABLE: launch},
            start_new_session=True,  # so that Ctrl-C reaches this process alone
            preexec_fn=_hear_no_limit,
        )
    except OSError as error:
        raise ConfigError([f"{words[0]}: cannot be started ({error.strerror or error})"]) from error
    with _Asking(run_folder, launcher) as asking:
        status = _wait(launcher, lambda: _has_failed(run_folder, before))
        new = [found for found in launches_of(run_folder) if found not in before]
        if launch not in new and len(new) == 1:
            launch = new[0]  # this launcher does not hand variables on to the host of rank 0
        return settle(run_folder, launch, status if status >= 0 else 128 - status, asking.first, [HERE], tool)


def settle(
    run_folder: Path,
    launch: str,
    launcher_status: int,
    signal_name: str,
    hosts: Sequence[str],
    tool: Path,
    grace_seconds: float = GRACE_SECONDS,
) -> Verdict:
    """End what is left of the ranks of a launch that is not complete, judge it, and say why it deserves its status."""
    entry = launches_of(run_folder).get(launch, {})
    if launcher_status or signal_name or entry.get("state") != "complete":
        for line in end_ranks(launch, hosts, tool, grace_seconds):
            print(line, file=sys.stderr)
    verdict = judge(run_folder, launch, launcher_status, signal_name)
    print(f"launch {launch}: {' '.join(verdict.why.splitlines())}", file=sys.stderr)
    return verdict


def run_folder_of(words: Sequence[str]) -> Path:
    """The run folder of the train.py that a launcher's command starts; all its settings are checked on the way.

    Raises:
        ConfigError: it starts something else, or nothing would be trained.
    """
    at = next((number for number, word in enumerate(words) if Path(word).name == TRAIN), None)
    if at is None:
        raise ConfigError([f"{' '.join(words)}: starts no {TRAIN}, whose record says how a run went"])
    try:
        with contextlib.redirect_stdout(sys.stderr):
            config = load_config(words[at + 1 :])
    except SystemExit:
        raise ConfigError([f"With these flags {TRAIN} only prints something: start it without a launcher."]) from None
    if config.checkpoint.save_checkpoint_path is None:
        raise ConfigError(["--save_checkpoint_path is missing: how a run went is read from its folder"])
    return Path(config.checkpoint.save_checkpoint_path)


def _wait(launcher: "subprocess.Popen[bytes]", has_failed: Callable[[], bool]) -> int:
    """The launcher's status; one that stays long after its run has failed is ended, with all that it started."""
    since = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return launcher.wait(ASK_SECONDS)
        since = (since or time.monotonic()) if has_failed() else None
        if since is not None and time.monotonic() - since > LAUNCHER_SECONDS:
            break
    print(
        f"the run has failed {LAUNCHER_SECONDS:.0f} s ago, and its launcher is still there: it is ended",
        file=sys.stderr,
    )
    os.killpg(launcher.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return launcher.wait(LEAVE_SECONDS)
    os.killpg(launcher.pid, signal.SIGKILL)
    return launcher.wait()


def _has_failed(run_folder: Path, before: Collection[str]) -> bool:
    entries = launches_of(run_folder)
    return any(entry.get("state") == "failed" for launch, entry in entries.items() if launch not in before)


def _hear_no_limit() -> None:
    """In the launcher: a batch system may signal every process of a job, and what dies of that takes the ranks with it."""
    for name in ("USR1", "USR2"):
        signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)


class _Asking:
    """While it is entered, the first signal has the ranks asked to stop, until they are gone."""

    def __init__(self, run_folder: Path, launcher: "subprocess.Popen[bytes]") -> None:
        self.first = ""
        self._file, self._launcher = run_folder / "STOP", launcher
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> "_Asking":
        for name in SIGNALS:
            signal.signal(getattr(signal, f"SIG{name}"), self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self.first:
            self._thread.join()
            self._file.unlink(missing_ok=True)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name.removeprefix("SIG")
        if self.first:
            if name == "INT":
                print("\nOnce more: the launcher is told to end at once", file=sys.stderr)
                self._launcher.terminate()
            return
        self.first = name
        print(f"SIG{name}: the ranks are asked to save and to stop, by {self._file}", file=sys.stderr)
        self._thread.start()

    def _ask(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._file.touch()
            if self._ended.wait(ASK_SECONDS):
                return
