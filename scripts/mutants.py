"""Breaks the privacy code on purpose, one mistake at a time, and asks whether the privacy tests notice.

Each mutant (mutants_table.py) is one edit of today's source. It is made in a copy of the four source roots and the
tests, and the privacy tests that the mutant names, a file or a part of one, run against that copy until the first
failure, for at most LIMIT_S seconds. Naming makes a kill harder, never easier, and the failure one that says what is
wrong.

    killed    a test failed, by an assertion or by an error that penchant raises
    survived  all of them passed
    error     anything else: the edit does not apply, nothing collected, a time-out, a crash (any other exception), or
              a run that did not load the mutated file from the copy

First every privacy test must pass in a copy without a mutant.

    python -m scripts.mutants                all; exits with 1 unless every one is killed
    python -m scripts.mutants --only NAME    one, after its tests passed without it
    python -m scripts.mutants --write        all, and the table in docs/privacy.md
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from scripts.mutants_table import MUTANTS, PRIVACY_TESTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "privacy.md"
BEGIN, END = "<!-- mutants -->\n", "<!-- /mutants -->\n"
SOURCES = ("common", "client", "server", "simulations")
LIMIT_S = 60
AT_ONCE = 2


@dataclass(frozen=True)
class Outcome:
    """What came of one run: "killed", "survived" or "error"; `by` the first failing test, or why there is none."""

    status: str
    by: str
    seconds: float


# Loaded by the pytest of a run: another status than 0 or 1 where what was tested is not the copy.
_GUARD = """\
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def pytest_sessionfinish(session):
    paths = [getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if name[:9] == "penchant."]
    loaded = {Path(path).resolve() for path in paths if path}
    if not loaded or any(HERE not in path.parents for path in loaded):
        session.exitstatus = 90
    elif MUTATED is not None and HERE / MUTATED not in loaded:
        session.exitstatus = 91
"""
_STATUS = {2: "collection failed", 90: "the code did not come from the copy", 91: "no test loaded the mutated file"}
_FAILED = re.compile(r"AssertionError\b|assert |Failed: |penchant\.common\.errors\.")  # pytest.raises says "Failed"


def snapshot(folder: Path) -> None:
    """Copies what a run needs, so that all of them see the same."""
    for name in (*SOURCES, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def run(source: Path, tests: Sequence[str], mutant: Mutant | None = None) -> Outcome:
    """Runs test files against a copy of a snapshot, with the mutant's edit if there is one."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder).resolve()
        shutil.copytree(source, copy, dirs_exist_ok=True)
        try:
            mutated = mutant and mutant.apply(copy)
        except ValueError as error:
            return Outcome("error", str(error), time.perf_counter() - began)
        (copy / "mutant_guard.py").write_text(f"{_GUARD}\n\nMUTATED = {mutated!r}\n", encoding="utf-8")
        status, by = verdict(_pytest(copy, tests, LIMIT_S if mutant else 5 * LIMIT_S), copy / "report.xml")
    return Outcome(status, by, time.perf_counter() - began)


def _pytest(copy: Path, tests: Sequence[str], limit_s: float) -> int | None:
    """The exit status; None where it took longer."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "mutant_guard", "--basetemp=tmp", "--junitxml=report.xml"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"} | {
        "PYTHONPATH": os.pathsep.join(str(copy / name) for name in (*SOURCES, ".")),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=copy,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that what a test started ends with it
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def verdict(status: int | None, report: Path) -> tuple[str, str]:
    """What a run showed: its outcome's status and `by`.

    Args:
        status: of pytest; None where it ran out of time.
        report: what it wrote as JUnit XML.
    """
    if status is None:
        return "error", "out of time"
    if status == 0:
        return "survived", ""
    if status != 1:
        return "error", _STATUS.get(status, f"pytest's exit status was {status}")
    for case in ElementTree.parse(report).iter("testcase"):
        module, _, group = case.get("classname", "").removeprefix("tests.").partition(".Test")
        name = case.get("name", "").split("[")[0]
        test = f"{module.rpartition('.')[2]}.py::" + (f"Test{group}::{name}" if group else name)
        if (failure := case.find("failure")) is not None:
            message = failure.get("message", "")
            return ("killed", test) if _FAILED.match(message) else ("error", f"{test} crashed: {message.split(':')[0]}")
        if case.find("error") is not None:
            return "error", f"{test} could not be set up"
    return "error", "pytest reports no failed test"


def table(outcomes: dict[Mutant, Outcome]) -> str:
    """What docs/privacy.md shows."""
    rows = [f"| `{m.name}` | {m.mistake} | `{Path(m.file).name}` | `{o.by}` |\n" for m, o in outcomes.items()]
    return (
        f"{len(rows)} mutants, all killed.\n\n"
        "| mutant | the mistake | made in | killed by |\n|---|---|---|---|\n" + "".join(rows)
    )


def write(outcomes: dict[Mutant, Outcome]) -> None:
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}{table(outcomes)}{END}{rest.split(END)[1]}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs the privacy tests against each mutant of the privacy code.")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only", metavar="NAME", choices=[m.name for m in MUTANTS], help="run this mutant")
    only.add_argument("--write", action="store_true", help="write the table in docs/privacy.md if all are killed")
    asked = parser.parse_args(arguments)
    mutants = [m for m in MUTANTS if asked.only in (None, m.name)]
    tests = [mutants[0].test] if asked.only else PRIVACY_TESTS

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        source = Path(folder)
        snapshot(source)
        for test, outcome in zip(tests, pool.map(lambda test: run(source, [test]), tests), strict=True):
            if outcome.status != "survived":
                print(f"without a mutant: {test}: {outcome.status} {outcome.by}")
                return 1
        print(f"without a mutant: {len(tests)} test files pass\n\nmutant | mistake | killed by | seconds", flush=True)
        outcomes = {}
        for mutant, outcome in zip(mutants, pool.map(lambda m: run(source, [m.test], m), mutants), strict=True):
            outcomes[mutant] = outcome
            by = outcome.by if outcome.status == "killed" else f"{outcome.status.upper()} {outcome.by}".strip()
            print(f"{mutant.name} | {mutant.mistake} | {by} | {outcome.seconds:.1f}", flush=True)
    killed = sum(outcome.status == "killed" for outcome in outcomes.values())
    print(f"\n{killed} of {len(mutants)} mutants killed")
    if killed < len(mutants):
        return 1
    if asked.write:
        write(outcomes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
