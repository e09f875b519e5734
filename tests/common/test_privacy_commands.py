"""`penchant privacy`: what was spent, with all that an ε needs; whether it is whole; and all of it, for others."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from penchant.common import cli
from penchant.common.privacy import commands
from penchant.common.privacy.events import Gaussian
from penchant.common.privacy.ledger import Ledger

DELTA = 1e-5
EVENT = Gaussian(noise_multiplier=2.0)
ROOT = Path(__file__).resolve().parents[2]


class Entry:
    name = "privacy"

    def load(self) -> cli.Command:
        return commands.privacy


@pytest.fixture(autouse=True)
def only_this_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry()])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two ledgers: one with a budget and a repeat, and one that a device would keep."""
    path = tmp_path / "run" / "ledgers"
    with Ledger("readers", delta=DELTA, budget=4.0, app_id="shop", path=path / "a.sqlite") as ledger:
        for number in (1, 2, 2):
            ledger.released(ledger.charge(number, EVENT), "abc")
    with Ledger("phones", delta=1e-6, path=path / "b.sqlite") as ledger:
        for profile in (1, 1, 2):
            ledger.participate(profile, 1, 0, EVENT)
    return tmp_path / "run"


def said(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    """What the command prints; where it fails, its one line."""
    assert cli.main(["privacy", *map(str, argv)]) == code
    found = capsys.readouterr()
    if code:
        assert found.err.count("\n") == 1
        return found.err
    assert found.err == ""
    return found.out


# ------------------------------------------------------------------------------------------------------------- show


def test_show_tells_of_every_ledger_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "show", run)
    first, second, note = out.split("\n\n")
    with Ledger.open(run / "ledgers" / "a.sqlite") as ledger:
        head = ledger.head
    assert first.splitlines() == [
        str(run / "ledgers" / "a.sqlite"),
        "  population      readers of app shop",
        # μ = √3/2: dp-accounting 0.6.0 (PLD, three Gaussians of σ = 2) gives 3.70863; rounded up
        "  spent           ε = 3.71 at δ = 1e-05, unit user (add/remove one profile), accountant GDP",
        "  budget          ε ≤ 4 at δ = 1e-05, unit user (add/remove one profile), accountant GDP; left 0.291",
        "  charges         3 for 2 rounds, 1 of them repeats",
        "  releases        3",
        "  participations  0 of 0 profiles, in 0 tries",
        f"  head            {head}",
    ]
    assert "δ = 1e-06, unit interaction (add/remove one interaction)" in second
    assert "  budget          none" in second
    assert "  participations  3 of 2 profiles" in second
    assert "each ε holds where only that one's releases are given out" in note


def test_no_epsilon_is_printed_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in said(capsys, "show", run).splitlines():
        if "ε " in line and "each ε holds" not in line:
            assert all(word in line for word in ("δ = ", "unit ", "add/remove one ", "accountant "))
    for record in json.loads(said(capsys, "show", run, "--json")):
        assert {"epsilon", "delta", "unit", "neighbours", "accountant"} <= record.keys()


def test_show_as_json_is_the_same_for_programs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "show", run / "ledgers", "--json"))
    first, second = found
    assert [record["population"] for record in found] == ["readers", "phones"]
    assert (first["charges"], first["rounds"], first["repeats"], first["releases"], first["entries"]) == (3, 2, 1, 3, 6)
    assert first["left"] == pytest.approx(4.0 - first["epsilon"])
    assert (second["left"], second["budget"], second["unit"]) == (None, None, "interaction")
    (alone,) = json.loads(said(capsys, "show", run / "ledgers" / "b.sqlite", "--json"))
    assert alone == second
    with Ledger.open(run / "ledgers" / "b.sqlite") as ledger:  # as much as the profile that spent most
        assert second["epsilon"] == ledger.spent(1).epsilon > ledger.spent(2).epsilon


def test_show_where_there_is_no_ledger_says_so_and_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no ledger" in said(capsys, "show", tmp_path, code=cli.EXIT_USAGE)
    assert "no ledger" in said(capsys, "show", tmp_path / "gone.sqlite", code=cli.EXIT_USAGE)
    (tmp_path / "words.sqlite").write_text("no ledger\n" * 100)
    assert "restore it from a copy" in said(capsys, "show", tmp_path, code=cli.EXIT_DATA)
    assert [p.name for p in tmp_path.iterdir()] == ["words.sqlite"]


# ----------------------------------------------------------------------------------------------------------- verify


def test_verify_says_ok_for_each_ledger_that_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "verify", run).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"OK {run / 'ledgers' / name}.sqlite" for name in "ab"]
    assert ": 6 entries, head " in lines[0]


def test_verify_stops_at_the_first_fault(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db = sqlite3.connect(run / "ledgers" / "b.sqlite", isolation_level=None)
    db.execute("UPDATE charges SET n = 1 WHERE n = 2")
    db.close()
    fault = said(capsys, "verify", run / "ledgers" / "b.sqlite", code=cli.EXIT_PRIVACY)
    assert "b.sqlite: the charges of its summary are not what its entries add up to" in fault
    said(capsys, "verify", run, code=cli.EXIT_PRIVACY)
    said(capsys, "verify", run / "ledgers" / "a.sqlite")


def test_verify_holds_a_ledger_against_a_head_noted_earlier(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "ledgers" / "a.sqlite"
    with Ledger.open(path) as ledger:
        noted = ledger.records()[2][1]
    assert said(capsys, "verify", path, "--head", noted).startswith("OK ")
    assert "entries are gone" in said(capsys, "verify", path, "--head", "0" * 64, code=cli.EXIT_PRIVACY)
    assert "name the one" in said(capsys, "verify", run, "--head", noted, code=cli.EXIT_USAGE)


# ----------------------------------------------------------------------------------------------------------- export


def test_what_export_prints_is_verified_without_any_code_of_ours(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in said(capsys, "export", run / "ledgers" / "a.sqlite").splitlines()]
    before = ""
    for line in lines:
        assert hashlib.sha256((before + line["record"]).encode()).hexdigest() == line["hash"]
        before = line["hash"]
    assert json.loads(lines[0]["record"])["population"] == "readers"
    assert [json.loads(line["record"])["kind"] for line in lines[1:]] == ["charge", "release"] * 3
    with Ledger.open(run / "ledgers" / "a.sqlite") as ledger:
        assert ledger.head == before


# ------------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["privacy"], "the following arguments are required: COMMAND"),
        (["privacy", "shwo", "a"], "unknown command 'shwo'; did you mean 'show'?"),
        (["privacy", "show"], "the following arguments are required: PATH"),
        (["privacy", "show", "a", "--jsn"], "unknown option --jsn; did you mean '--json'?"),
        (["privacy", "export", "a", "b"], "unknown argument b (see penchant privacy export --help)"),
    ],
)
def test_a_mistyped_line_says_what_was_meant(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    found = capsys.readouterr().err
    assert (stopped.value.code, found.count("\n")) == (cli.EXIT_USAGE, 1)
    assert words in found


def test_every_example_parses_and_the_package_registers_the_command() -> None:
    parser = argparse.ArgumentParser()
    commands.privacy.configure(parser)
    for line in commands.privacy.examples.splitlines():
        parser.parse_args(line.split()[2:])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["penchant.commands"]["privacy"] == f"{commands.__name__}:privacy"


def test_to_import_the_command_loads_nothing_heavy() -> None:
    code = "import sys, penchant.common.privacy.commands; print({'numpy', 'sqlite3', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
