"""At the end of the session: how far the engines are from the oracle, and from each other."""

import pytest

from tests.contract.differences import table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = table()
    if lines:
        terminalreporter.section("largest differences, engines against the oracle (tests/contract)")
        for line in lines:
            terminalreporter.write_line(line)
