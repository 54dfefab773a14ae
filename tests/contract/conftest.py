"""At the end of the session: how far the engines are from the oracle, and from each other."""

from typing import Any

import pytest

from tests.contract.differences import LARGEST, note, table


def pytest_sessionfinish(session: pytest.Session) -> None:
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["largest_differences"] = [[*kind, value] for kind, value in LARGEST.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for what, whose, value in getattr(node, "workeroutput", {}).get("largest_differences", ()):
        note(what, whose, value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = table()
    if lines:
        terminalreporter.section("largest differences, engines against the oracle (tests/contract)")
        for line in lines:
            terminalreporter.write_line(line)
