"""A pytest plugin for continuous integration (`-p ci_plugin`, MIXER_CI=1): a skipped test is a failed run.

The machine of `.ci/run` installs what the tests need, so a skip there means that something is broken. Only tests
marked `gpu` may skip. Without MIXER_CI in the environment the plugin does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

NEVER_SKIP = ("slurm", "ray", "s3", "gs", "compare")
MAY_SKIP = "gpu"
_PROPERTY = "mixer_markers"

_offenders: list[str] = []


def _active() -> bool:
    return bool(os.environ.get("MIXER_CI"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Sends the test's markers along with its report, also from xdist's workers."""
    report = yield
    if report.skipped:
        report.user_properties.append((_PROPERTY, sorted({m.name for m in item.iter_markers()})))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not _active() or not report.skipped or hasattr(report, "wasxfail"):
        return
    markers = {m for name, value in report.user_properties if name == _PROPERTY for m in value}
    if MAY_SKIP not in markers or markers.intersection(NEVER_SKIP):
        _offenders.append(f"{report.nodeid} [{', '.join(sorted(markers)) or 'no marker'}]")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A whole file that skips itself has no test whose markers could be asked."""
    if _active() and report.skipped:
        _offenders.append(f"{report.nodeid} [skipped as a whole]")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _offenders and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _offenders:
        terminalreporter.section("skipped, which counts as failed here", sep="=", red=True)
        for line in _offenders:
            terminalreporter.line(line)
