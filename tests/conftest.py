"""What every test may use: `require`, and the rule that turns skips into failures.

A skip hides a test that nobody runs. With PENCHANT_REQUIRE_ALL=1, as in CI, a skip fails, unless its reason starts
with "no CUDA device": a missing package or program is ours to install, missing hardware is not.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Generator

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester"]

Require = Callable[[str], None]

# The same examples every time, and no clock: what a shared machine does must not fail a test.
settings.register_profile("penchant", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("penchant")

ALLOWED = "no CUDA device"


@pytest.fixture(scope="session")
def require() -> Require:
    """`require("ray")` skips the test where there is neither a module nor a program of that name."""
    return _require


def _require(name: str) -> None:
    if not _has_module(name) and shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent of a dotted name
        return False


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Makes a skipped report a failed one where all is required; expected failures and missing hardware stay."""
    if os.environ.get("PENCHANT_REQUIRE_ALL") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"skipped although PENCHANT_REQUIRE_ALL=1: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield  # a module that skips itself never reaches the hook above
    _refuse_skip(report)
    return report
