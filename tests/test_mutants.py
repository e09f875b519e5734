"""The mutants still fit today's code, and nothing but a failed test counts as a kill. `make mutants` runs them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from scripts import mutants
from scripts.mutants_table import MUTANTS, PRIVACY_TESTS, Mutant

ROOT = Path(__file__).resolve().parent.parent


def source_of(mutant: Mutant, folder: Path) -> Path:
    """A copy of the file that the mutant edits, below `folder`."""
    file = folder / mutant.file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text((ROOT / mutant.file).read_text(encoding="utf-8"), encoding="utf-8")
    return file


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_applies_to_the_source_exactly_once(mutant: Mutant, tmp_path: Path) -> None:
    file = source_of(mutant, tmp_path)
    before = file.read_text(encoding="utf-8")
    assert mutant.apply(tmp_path) == mutant.file
    after = file.read_text(encoding="utf-8")
    assert after != before
    compile(after, mutant.file, "exec")  # a mistake, not a torn file


@pytest.mark.parametrize("old", ["no such line", "import"])
def test_an_edit_that_does_not_apply_or_applies_twice_is_refused(old: str, tmp_path: Path) -> None:
    mutant = dataclasses.replace(MUTANTS[0], old=old)
    source_of(mutant, tmp_path)
    with pytest.raises(ValueError, match="not once"):
        mutant.apply(tmp_path)
    outcome = mutants.run(tmp_path, [], mutant)
    assert outcome.status == "error"
    assert "not once" in outcome.by


def test_every_mutant_has_a_name_of_its_own_and_names_privacy_tests_that_exist() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        file, *parts = mutant.test.split("::")
        assert file in PRIVACY_TESTS
        text = (ROOT / file).read_text(encoding="utf-8")
        assert all(re.search(rf"(class|def) {part}\b", text) for part in parts)


def test_the_table_in_the_documentation_names_exactly_the_mutants() -> None:
    text = mutants.DOCUMENT.read_text(encoding="utf-8")
    written = text.split(mutants.BEGIN)[1].split(mutants.END)[0]
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| `(\w+\.py)` \| `(test_\w+\.py(?:::\w+)+)` \|$", written, re.M)
    assert [row[:3] for row in rows] == [(m.name, m.mistake, Path(m.file).name) for m in MUTANTS]
    for mutant, row in zip(MUTANTS, rows, strict=True):
        assert row[3].split("::")[0] == Path(mutant.test.split("::")[0]).name


def failed(message: str, kind: str = "failure") -> str:
    case = f'<testcase classname="tests.common.test_sums.TestClip" name="test_x[1-a]"><{kind} message="{message}"/>'
    return f'<testsuites><testsuite><testcase classname="a" name="b"/>{case}</testcase></testsuite></testsuites>'


@pytest.mark.parametrize(
    ("status", "report", "expected"),
    [
        (1, failed("assert 2 &lt;= 1"), "killed"),
        (1, failed("penchant.common.errors.InvalidConfig: no receipt"), "killed"),
        (1, failed("Failed: DID NOT RAISE"), "killed"),
        (0, "", "survived"),
        (None, "", "error"),  # out of time
        (2, "", "error"),  # nothing could be collected
        (4, "", "error"),  # no such test
        (90, failed("assert 2 &lt;= 1"), "error"),  # not the copy's code
        (91, failed("assert 2 &lt;= 1"), "error"),
        (1, failed("NameError: name 'x' is not defined"), "error"),  # broken, not wrong
        (1, failed("TypeError: f() takes 1"), "error"),
        (1, failed("no fixture", kind="error"), "error"),
    ],
)
def test_only_a_failed_test_is_a_kill(status: int | None, report: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    file.write_text(report, encoding="utf-8")
    found, by = mutants.verdict(status, file)
    assert found == expected
    assert (by == "test_sums.py::TestClip::test_x") == (expected == "killed")


def test_a_run_whose_code_does_not_come_from_its_copy_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import penchant.common.errors\n\n\ndef test_it() -> None:\n    assert False\n", encoding="utf-8"
    )
    outcome = mutants.run(tmp_path, ["test_it.py"])  # there is nothing but this test: the installed code is found
    assert (outcome.status, outcome.by) == ("error", "the code did not come from the copy")


def test_a_run_that_never_loads_the_mutated_file_is_an_error(tmp_path: Path) -> None:
    for name in ("common/penchant/common/errors.py", "common/penchant/common/unused.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("ONE = 1\n", encoding="utf-8")
    (tmp_path / "test_it.py").write_text(
        "from penchant.common.errors import ONE\n\n\ndef test_it() -> None:\n    assert ONE == 2\n", encoding="utf-8"
    )
    unused = dataclasses.replace(MUTANTS[0], file="common/penchant/common/unused.py", old="1", new="2")
    outcome = mutants.run(tmp_path, ["test_it.py"], unused)
    assert (outcome.status, outcome.by) == ("error", "no test loaded the mutated file")
    used = dataclasses.replace(unused, file="common/penchant/common/errors.py", new="3")
    outcome = mutants.run(tmp_path, ["test_it.py"], used)
    assert (outcome.status, outcome.by) == ("killed", "test_it.py::test_it")
    mended = dataclasses.replace(used, new="2")
    assert mutants.run(tmp_path, ["test_it.py"], mended).status == "survived"
