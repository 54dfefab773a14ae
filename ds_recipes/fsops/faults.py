"""Faults on demand: what stands at the point of `calls.py` when an environment variable asks for it. For tests.

    FAULT_TEST=1 DS_RECIPES_FAULTS="kill@12 rank=1; fail:ENOSPC@3x2 path=*iter_0000002*; delay:0.5@1x99 kind=fsync"

Faults are parted by semicolons; each is an action, and conditions that all must hold for a call to be counted:

    kill@K           end this process by SIGKILL before the K-th call
    tear@K           the same, but after the first half of the bytes, if it is a write
    fail:NAME@K      let the K-th call fail with this error (ENOSPC, EIO, ESTALE, ...); half of a write is written first
    delay:S@K        wait S seconds before the K-th call
    signal:NAME@K    send this process a signal (TERM, USR1, STOP, ...) before the K-th call
    log:FILE@K       append a line (number, kind, path) to FILE, and make the call
    ...@KxN          N calls in a row, from the K-th on; without it one, for log all
    rank=R  kind=K  path=PATTERN     only this rank (RANK in the environment), kind of call, path (or its target)
    within=saving    only calls that change the disk

What is tested is what ships: the same code runs with and without faults. Without FAULT_TEST=1 the variable is refused,
so that no run meets a fault by a forgotten export.
"""

import errno
import fnmatch
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ds_recipes.errors import ConfigError
from ds_recipes.fsops import calls
from ds_recipes.fsops.calls import Call

VARIABLE = "DS_RECIPES_FAULTS"
PERMISSION = "FAULT_TEST"
READING = ("open", "stat", "list")
FOREVER = 1 << 62

_ACTION = re.compile(
    r"(?P<name>kill|tear|fail|delay|signal|log)(:(?P<argument>[^@ ]+))?@(?P<first>\d+)(x(?P<count>\d+))?"
)


@dataclass
class Fault:
    """One action, and which calls it counts and acts on: matching ones number `first` to `first + count - 1`, from 1."""

    action: Callable[[Call, int], None]
    first: int
    count: int
    conditions: Mapping[str, str]
    seen: int = field(default=0)

    def matches(self, call: Call) -> bool:
        names = [str(call.path), *([str(call.target)] if call.target is not None else [])]
        wanted = self.conditions
        return (
            ("rank" not in wanted or os.environ.get("RANK", "0") == wanted["rank"])
            and ("kind" not in wanted or call.kind == wanted["kind"])
            and ("within" not in wanted or call.kind not in READING)
            and ("path" not in wanted or any(fnmatch.fnmatch(name, wanted["path"]) for name in names))
        )


class Faults:
    """The interceptor: counts calls, of all threads, and acts when one is due."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults
        self._lock = threading.Lock()

    def __call__(self, call: Call) -> None:
        due = []
        with self._lock:
            for fault in self._faults:
                if fault.matches(call):
                    fault.seen += 1
                    if fault.first <= fault.seen < fault.first + fault.count:
                        due.append((fault, fault.seen))
        for fault, number in due:
            fault.action(call, number)


def arm_from_environment() -> None:
    """Stand at the point if the environment asks for it.

    Raises:
        ConfigError: it asks without the permission, or for something that does not exist.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return
    if os.environ.get(PERMISSION) != "1":
        raise ConfigError(
            [
                f"{VARIABLE} is set in the environment: it makes this program fail on purpose, for tests of it. Unset it "
                f"(tests set {PERMISSION}=1 as well)."
            ]
        )
    calls.interceptor = Faults(parse(text))


def parse(text: str) -> list[Fault]:
    """The faults of a text.

    Raises:
        ConfigError: not of the form that this module's docstring shows.
    """
    return [_parse_one(part.split()) for part in text.split(";") if part.strip()]


def _parse_one(words: list[str]) -> Fault:
    match = _ACTION.fullmatch(words[0])
    conditions = dict(word.partition("=")[::2] for word in words[1:])
    if match is None or not conditions.keys() <= {"rank", "kind", "path", "within"}:
        raise ConfigError([f"{VARIABLE}: {' '.join(words)!r} is no fault"])
    name, argument = match["name"], match["argument"] or ""
    try:
        action = _ACTIONS[name](argument)
    except (ValueError, AttributeError) as error:
        raise ConfigError([f"{VARIABLE}: {words[0]!r}: {error}"]) from error
    count = int(match["count"]) if match["count"] else (FOREVER if name == "log" else 1)
    return Fault(action, int(match["first"]), count, conditions)


def _kill(_: str) -> Callable[[Call, int], None]:
    return lambda call, number: os.kill(os.getpid(), signal.SIGKILL)


def _tear(_: str) -> Callable[[Call, int], None]:
    def tear(call: Call, number: int) -> None:
        _write_half(call)
        os.kill(os.getpid(), signal.SIGKILL)

    return tear


def _fail(name: str) -> Callable[[Call, int], None]:
    code: int = getattr(errno, name)

    def fail(call: Call, number: int) -> None:
        _write_half(call)
        raise OSError(code, os.strerror(code), str(call.path))

    return fail


def _delay(seconds: str) -> Callable[[Call, int], None]:
    pause = float(seconds)
    return lambda call, number: time.sleep(pause)


def _signal(name: str) -> Callable[[Call, int], None]:
    number: signal.Signals = getattr(signal, f"SIG{name}")
    return lambda call, _: os.kill(os.getpid(), number)


def _log(file: str) -> Callable[[Call, int], None]:
    def log(call: Call, number: int) -> None:
        line = f"{number} {call.kind} {call.path}\n".encode()
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    return log


def _write_half(call: Call) -> None:
    if call.data is not None and call.descriptor is not None:
        os.write(call.descriptor, bytes(call.data[: len(call.data) // 2]))


_ACTIONS: dict[str, Callable[[str], Callable[[Call, int], None]]] = {
    "kill": _kill,
    "tear": _tear,
    "fail": _fail,
    "delay": _delay,
    "signal": _signal,
    "log": _log,
}
