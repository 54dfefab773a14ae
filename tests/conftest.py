"""For every test: which of them share a worker, and where --allowed-skips names a list, that any other skip is a failure."""

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks of one test share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and asking it costs seconds

TOGETHER = ("tests/clusters/", "tests/house/")
"""Two hosts, a scheduler's daemons and what they load the machine with are had once at a time; house tests collect all once."""

Skip = tuple[str, str]
"""(name of the test, reason)."""

SKIPS = pytest.StashKey[list[Skip]]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers of `-n 2` take whole files, for what their tests share; one of them all files of each folder of `TOGETHER`."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid.split("::", 1)[0])

    return ByFile(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--allowed-skips",
        metavar="FILE",
        default=os.environ.get("ALLOWED_SKIPS"),
        help="fail if a test is skipped that this file does not name ('test name: reason' a line)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SKIPS] = []
    config.pluginmanager.register(SkipCollector(config.stash[SKIPS]))


class SkipCollector:
    """Notes each test, and each file of tests, that was skipped."""

    def __init__(self, skips: list[Skip]) -> None:
        self.skips = skips

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skips.append((report.nodeid, reason.removeprefix("Skipped: ")))


def unlisted_skips(config: pytest.Config) -> list[Skip]:
    """The skips of this session that the list of allowed ones does not name with their reason."""
    name = config.getoption("--allowed-skips")
    if not name:
        return []
    lines = (config.rootpath / Path(name)).read_text(encoding="utf-8").splitlines()
    allowed = {tuple(line.split(": ", 1)) for line in lines if line.strip() and not line.startswith("#")}
    return [skip for skip in config.stash[SKIPS] if skip not in allowed]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and unlisted_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, reason in unlisted_skips(config):
        terminalreporter.write_line(f"skipped, but not in the list of allowed skips: {name}: {reason}", red=True)
