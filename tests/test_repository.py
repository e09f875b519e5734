"""Rules for the repository itself: its files, its documentation, its pins, its Makefile and its own test hook."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [p for name in ("README.md", "CONTRIBUTING.md", "docs/**/*.md") for p in sorted(ROOT.glob(name))]
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())

# ------------------------------------------------------------------------------------------------------- files

MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|Users|home/\w+)/[\w.]")
UNFINISHED = re.compile(r"\b(?:TO[D]O|FIX[M]E)\b")


def texts() -> Iterator[tuple[str, str]]:
    """Path and content of every text file that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in sorted(filter(None, listed.split("\0"))):
        try:
            yield name, (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # binary, or deleted and not yet committed
            continue


def faults(name: str, text: str) -> list[str]:
    """What is wrong with a file's text, as "name:line: fault"."""
    found = [
        f"{name}:{number}: {fault}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, fault in ((MACHINE_PATH, "a path of one machine"), (UNFINISHED, "an unfinished mark"))
        if pattern.search(line)
    ]
    return found if not text or text.endswith("\n") else [*found, f"{name}: no newline at its end"]


def test_no_file_names_a_machine_is_unfinished_or_ends_without_a_newline() -> None:
    assert [fault for name, text in texts() for fault in faults(name, text)] == []


def test_a_fault_in_a_file_is_found() -> None:
    assert faults("a", 'open("/ho' + 'me/ada/x")\n# TO' + "DO later\nno end") == [
        "a:1: a path of one machine",
        "a:2: an unfinished mark",
        "a: no newline at its end",
    ]
    assert faults("a", "/usr/bin/env, https://example.org/work/a, ./work/a\n") == []


def test_the_changelog_has_a_place_for_the_next_change() -> None:
    assert re.search(r"^## \[?Unreleased\]?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


# ----------------------------------------------------------------------------------------------- documentation


@dataclass(frozen=True, kw_only=True)
class Fence:
    """One code block of a document.

    Attributes:
        line: number of the line that opens it.
        language: the word after the backticks.
        code: its lines, at their indentation.
        not_run: the reason given above it for not running it; "" when it runs.
    """

    line: int
    language: str
    code: str
    not_run: str


_FENCE = re.compile(r"^```(?P<language>\w*)[^\n`]*\n(?P<code>.*?)^```[ ]*$", re.M | re.S)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>\S.*?) -->\n\Z")


def fences(text: str) -> list[Fence]:
    """The code blocks of a document in Markdown, in order."""
    return [
        Fence(
            line=text.count("\n", 0, found.start()) + 1,
            language=found["language"],
            code=found["code"],
            not_run=mark["reason"] if (mark := _NOT_RUN.search(text[: found.start()])) else "",
        )
        for found in _FENCE.finditer(text)
    ]


def execute(document: str, blocks: Iterable[Fence]) -> None:
    """Runs the Python blocks in order in one namespace; a traceback names the document's own lines."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.language == "python" and not block.not_run:
            exec(compile("\n" * block.line + block.code, document, "exec"), namespace)


def commands(block: Fence) -> list[list[str]]:
    """The simple commands of a shell block as words, without what assigns variables or stands before `penchant`."""
    found: list[list[str]] = []
    for line in block.code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("();<>|&"):
                found += [words] if words else []
                words = []
            elif words or not re.fullmatch(r"\w+=.*", word):
                words.append(word)
    return found


def refusals(blocks: Iterable[Fence], parser: argparse.ArgumentParser, targets: set[str]) -> list[str]:
    """Commands in shell blocks that `penchant` would not parse or `make` has no rule for, as "line: command"."""
    found = []
    for block in blocks:
        if block.language != "sh" or block.not_run:
            continue
        for program, *words in commands(block):
            if Path(program).name == "penchant":
                try:
                    parser.parse_args(words)
                except SystemExit as stop:
                    if stop.code:
                        found.append(f"{block.line}: {shlex.join([program, *words])}")
            elif program == "make" and not {w for w in words if not re.match(r"-|\w+=", w)} <= targets:
                found.append(f"{block.line}: {shlex.join([program, *words])}")
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


@documents
def test_python_in_a_document_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = fences(document.read_text(encoding="utf-8"))
    execute(str(document), blocks)
    assert all(block.language for block in blocks), "every code block names its language"


@documents
def test_shell_in_a_document_names_commands_and_options_that_exist(document: Path) -> None:
    from penchant.common.cli import parser  # here, so that the tests above run without the command line

    assert refusals(fences(document.read_text(encoding="utf-8")), parser(), make_targets()) == []


PLANTED = """\
```python
x = 1
```
<!-- not run: needs a server -->
```python
x = unknown
```
```python
assert x == 2, "the first block ran"
```
```sh
# the first thing to try
penchant simulate --rounds 3 | tee out.txt && .venv/bin/penchant privacy
A=1 penchant simulate \\
    --round-count 3
make demo PYTHON=python3.12 -j2; make coffee
penchant --help > "help me.txt"
pip install penchant
```
"""


def test_a_wrong_line_of_python_in_a_document_is_caught_at_its_own_line() -> None:
    blocks = fences(PLANTED)
    assert [block.not_run for block in blocks] == ["", "needs a server", "", ""]
    with pytest.raises(AssertionError, match="the first block ran") as caught:
        execute("planted.md", blocks)
    assert caught.traceback[-1].lineno + 1 == PLANTED.splitlines().index('assert x == 2, "the first block ran"') + 1


def test_a_wrong_command_in_a_document_is_caught() -> None:
    parser = argparse.ArgumentParser("penchant", allow_abbrev=False)
    simulate = parser.add_subparsers(required=True).add_parser("simulate", allow_abbrev=False)
    simulate.add_argument("--rounds", type=int)
    assert refusals(fences(PLANTED), parser, {"demo"}) == [
        "11: .venv/bin/penchant privacy",
        "11: penchant simulate --round-count 3",
        "11: make coffee",
    ]


# ------------------------------------------------------------------------------------------ pins and the Makefile


def pins() -> dict[str, str]:
    """Version of each name in constraints.txt; anything but `name==version` in it is an error."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line) for line in lines if not line.startswith("#")]
    assert all(found), "constraints.txt: only exact versions, without the suffix of a local build"
    return {pin[1]: pin[2] for pin in found if pin}


def test_constraints_pin_every_requirement_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    wanted = [r for r in map(Requirement, [*project["dependencies"], *extras]) if r.name != "penchant"]
    pinned = pins()
    assert wanted
    assert [str(r) for r in wanted if pinned.get(canonicalize_name(r.name), "0") not in r.specifier] == []


def test_constraints_take_no_package_of_a_gpu_maker() -> None:
    assert [name for name in pins() if name.startswith(("nvidia", "cuda", "triton"))] == []


def make(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON", "PIP_ARGS")}
    return subprocess.run(["make", *args], cwd=cwd, env=clean, capture_output=True, text=True, check=False)


def fake_python(folder: Path, version: str) -> Path:
    """An interpreter that only writes its arguments to log.txt; `-m venv` puts a copy and a `penchant` in the venv."""
    major, minor = version.split(".")
    program = folder / "python"
    program.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Python {version}"; exit 0;; esac\n'
        f'case "$2" in *version_info*) [ {major} -gt 3 ] || [ {minor} -ge 11 ]; exit $?;; esac\n'
        'echo "$(basename "$0") $*" >> log.txt\n'
        'case "$2" in venv) mkdir -p "$3/bin"; for n in python penchant; do cp "$0" "$3/bin/$n"; done;; esac\n'
    )
    program.chmod(0o755)
    return program


def test_make_lists_every_target_that_a_person_calls() -> None:
    listed = set(re.findall(r"^  make ([a-z-]+)", make().stdout, re.M))
    assert listed == make_targets() - {"check-python"}


def test_make_refuses_an_old_python_in_one_line(tmp_path: Path) -> None:
    old = make("check-python", f"PYTHON={fake_python(tmp_path, '3.10')}")
    assert old.returncode != 0
    assert "penchant needs Python 3.11 or newer" in old.stderr.splitlines()[0]
    assert make("check-python", f"PYTHON={fake_python(tmp_path, '3.12')}").returncode == 0


def test_a_second_demo_installs_nothing(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python, log = fake_python(tmp_path, "3.11"), tmp_path / "log.txt"
    for _ in range(2):
        done = make("demo", f"PYTHON={python}", "PIP_ARGS=--no-index", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    first, install, *runs = log.read_text().splitlines()
    assert first == "python -m venv .venv"
    assert re.fullmatch(
        r"python -m pip install .* --no-index -c constraints.txt -e \.\[simulations\] \./movielens", install
    )
    assert runs == ["penchant simulate", "penchant simulate"]


# ---------------------------------------------------------------------------------------------- the test hook

SKIPS = """
import pytest

def test_needs_a_program(require):
    require("penchant_no_such_thing")

def test_needs_a_package_of_a_missing_package(require):
    require("penchant_no_such.thing")

@pytest.mark.skip(reason="later")
def test_marked():
    pass

def test_needs_hardware():
    pytest.skip("no CUDA device here")

@pytest.mark.xfail(strict=True)
def test_expected_to_fail():
    assert False

def test_has_all_it_needs(require):
    require("json")
    require("xml.dom")
    require("make")
"""


def outcomes(pytester: pytest.Pytester, *, require_all: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts of a run of SKIPS, with a module beside it that skips itself, under this repository's conftest.

    Outside a test's own call, as at import and for a mark, pytest counts a failure as an error.
    """
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(test_skips=SKIPS, test_whole="import pytest\npytest.importorskip('penchant_no_such_thing')")
    monkeypatch.setenv("PENCHANT_REQUIRE_ALL", require_all)
    run = pytester.runpytest("-p", "no:cacheprovider", "-p", "no:xdist", "--continue-on-collection-errors")
    return dict(run.parseoutcomes())


def test_a_skip_is_a_skip_on_a_person_s_machine(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = outcomes(pytester, require_all="", monkeypatch=monkeypatch)
    assert counts == {"skipped": 5, "xfailed": 1, "passed": 1}


def test_a_skip_fails_where_all_is_required_unless_hardware_is_missing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = outcomes(pytester, require_all="1", monkeypatch=monkeypatch)
    assert counts == {"failed": 2, "errors": 2, "skipped": 1, "xfailed": 1, "passed": 1}
