"""The command line's frame: help that is quick and light, errors of one line that say how to mend them, exit codes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from penchant.common import cli
from penchant.common.cli import Command, main
from penchant.common.errors import (
    BudgetExhausted,
    InvalidConfig,
    MalformedContribution,
    MalformedData,
    MissingExtra,
    PenchantError,
    PrivacyRefused,
)

COMMANDS = ("compare", "recommend", "simulate")


@dataclass
class Entry:
    """An entry point that holds a command of the test's own."""

    name: str
    command: Command

    def load(self) -> Command:
        return self.command


def install(monkeypatch: pytest.MonkeyPatch, run: Callable[[argparse.Namespace], int], name: str = "work") -> None:
    """Makes a command of this name the only one there is."""
    command = Command("Works.", f"  penchant {name} --times 3", configure, run)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry(name, command)])


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times", type=int, default=1)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the command line refuses these arguments with."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    said = capsys.readouterr()
    assert stopped.value.code == cli.EXIT_USAGE
    assert said.out == ""
    assert said.err.endswith("\n")
    assert said.err.count("\n") == 1
    return said.err


def python(code: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A fresh interpreter's answer and the processor time it took, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# ----------------------------------------------------------------------------------------------------------- help

HEAVY = ("torch", "polars", "flwr", "numpy", "scipy", "rich")
LOADED = f"""
import sys
from penchant.common.cli import main
try:
    main(["--help"])
except SystemExit as stopped:
    assert stopped.code == 0
print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)
"""


def test_help_is_quick_and_loads_nothing_heavy_and_a_heavy_import_would_be_seen() -> None:
    done, seconds = python(LOADED)
    assert done.stderr.strip() == "[]"
    assert all(f"\n    {name}" in done.stdout for name in COMMANDS)
    assert seconds < 0.5  # of one core, however busy the machine is
    slow, _ = python(LOADED.replace("import sys", "import sys, numpy", 1))
    assert slow.stderr.strip() == "['numpy']"


def test_the_installed_command_is_this_main() -> None:
    (script,) = [s for s in importlib.metadata.entry_points(group="console_scripts") if s.name == "penchant"]
    assert script.load() is main


def test_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"penchant {importlib.metadata.version('penchant')}\n"


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: penchant")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_in_its_help_and_each_of_them_parses(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    examples = [line.strip() for line in said.splitlines() if line.startswith(f"  penchant {name}")]
    assert "examples:" in said
    assert examples
    for example in examples:
        assert cli.parser().parse_args(shlex.split(example)[1:]).command == name


def test_the_commands_are_those_installed() -> None:
    assert {e.name for e in importlib.metadata.entry_points(group=cli.GROUP)} >= set(COMMANDS)


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["simulate", "--epslion", "3"], "unknown option --epslion; did you mean '--epsilon'?"),
        (["simulate", "--epslion=3"], "unknown option --epslion; did you mean '--epsilon'?"),
        (["simulate", "--eps", "3"], "unknown option --eps"),  # no abbreviations: they break when options are added
        (["simulate", "--zzz"], "unknown option --zzz; choose from --adapter, --as-if-users, --audit"),
        (["--versoin"], "unknown option --versoin; did you mean '--version'?"),
        (["compare", "a", "b", "c"], "unknown argument c (see penchant compare --help)"),
        (["compare", "a"], "the following arguments are required: B"),
        (["recommend", "--user", "1"], "the following arguments are required: --run"),
        (["simulat"], "unknown command 'simulat'; did you mean 'simulate'?"),
        (["qqq"], "unknown command 'qqq'; choose from "),
        (["simulate", "--rounds", "many"], "argument --rounds: invalid int value: 'many'"),
        (["simulate", "--rating-scale", "1"], "argument --rating-scale: expected 2 arguments"),
    ],
)
def test_a_mistyped_line_is_one_line_that_says_what_was_meant(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *argv)
    assert words in said
    assert said.rstrip().endswith("--help)")


# ------------------------------------------------------------------------------------------------------ exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PenchantError("other"), 1),
        (MalformedContribution("bad sum"), 1),
        (InvalidConfig("rounds must be ≥ 1"), 2),
        (MissingExtra("train", "torch"), 2),
        (MalformedData("log.csv, line 3"), 3),
        (PrivacyRefused("no"), 4),
        (BudgetExhausted("spent"), 4),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda e: type(e).__name__ if isinstance(e, BaseException) else None,
)
def test_each_error_has_its_exit_code_and_at_most_one_line(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    install(monkeypatch, run)
    assert main(["work"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == ("" if isinstance(error, KeyboardInterrupt) else f"penchant: {error}\n")


def test_what_a_command_returns_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda args: args.times)
    assert [main(["work"]), main(["work", "--times", "7"])] == [1, 7]


def test_a_module_of_an_extra_that_is_absent_becomes_its_install_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'polars'", name="polars")

    install(monkeypatch, run)
    assert main(["work"]) == cli.EXIT_USAGE
    assert capsys.readouterr().err == ("penchant: polars is not installed; run: pip install 'penchant[simulations]'\n")


def test_a_module_of_ours_that_is_absent_is_a_bug_and_not_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'penchant.gone'", name="penchant.gone")

    install(monkeypatch, run)
    with pytest.raises(ModuleNotFoundError):
        main(["work"])


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: argparse.Namespace) -> int:
        raise InvalidConfig("rounds must be ≥ 1")

    install(monkeypatch, run)
    assert main(["work"]) == cli.EXIT_USAGE
    with pytest.raises(InvalidConfig):
        main(["--debug", "work"])


# ------------------------------------------------------------------------------------------------------- extras

BLOCKED = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
from penchant.common.cli import main

code = main(["simulate", "--data", "synthetic:users=9,items=40,interactions=5", "--learner", "cooccurrence",
             "--out", sys.argv[2]])
print(json.dumps(code))
"""


@pytest.mark.parametrize("module", ["polars", "rich"])
def test_simulate_without_an_extra_prints_its_install_line_and_writes_nothing(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, module, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert json.loads(done.stdout) == cli.EXIT_USAGE
    assert done.stderr == f"penchant: {module} is not installed; run: pip install 'penchant[simulations]'\n"
    assert not list(tmp_path.iterdir())
