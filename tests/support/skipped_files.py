"""Option of pytest that fails a run in which all tests of a file were skipped: such a file tests nothing."""

from __future__ import annotations

import pytest

FLAG = "--fail-on-skipped-files"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FLAG, action="store_true", help="Fail if all tests of a file are skipped, and name the file.")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption(FLAG):
        config.pluginmanager.register(SkippedFiles())


class SkippedFiles:
    """Collects the files of which nothing but skips is seen."""

    def __init__(self) -> None:
        self.skipped: set[str] = set()
        self.ran: set[str] = set()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.add(_file_of(report.nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.add(_file_of(report.nodeid))
        elif report.when == "call":
            self.ran.add(_file_of(report.nodeid))

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        # A run of the slow tests leaves the quick ones of a file to another run.
        self.ran |= {_file_of(item.nodeid) for item in items if "slow" not in item.keywords}

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped - self.ran and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for file in sorted(self.skipped - self.ran):
            terminalreporter.line(f"ERROR {file}: all of its tests were skipped ({FLAG})", red=True)


def _file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]
