"""The audit of a whole run: what it writes, that it changes nothing else, and what the command line says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.common.arrays import Float64
from penchant.common.cli import EXIT_PRIVACY, EXIT_USAGE, main
from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.privacy.noise import Noise
from penchant.simulations.audit.audit import audit
from penchant.simulations.runs import RunFolder
from penchant.simulations.settings import SimulationConfig
from penchant.simulations.simulate import simulate

DATA = "synthetic:users=60,items=200,interactions=12,topics=8,seed=0"
SETTINGS = SimulationConfig(data=DATA, rounds=2)
PRIVATE = ["fedavg+opacus", "fedavg+user-dp", "co-occurrence"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("audit") / "run")
    simulate(SETTINGS, folder)
    return folder


def digests(folder: RunFolder) -> dict[str, str]:
    """Of every file that an audit must leave alone."""
    return {
        str(path.relative_to(folder.path)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.path.rglob("*"))
        if path.is_file() and path.name not in ("audit.json", "report.html")
    }


def report(folder: RunFolder) -> str:
    return (folder.path / "report.html").read_text(encoding="utf-8")


def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: Noise, total: Float64, stddev: float) -> Float64:
        return np.asarray(total, np.float64)

    monkeypatch.setattr(Noise, "add", add)


def test_an_audit_tells_of_every_private_row_and_changes_nothing_but_the_report(run: RunFolder) -> None:
    before = digests(run)
    assert 'id="audit"' not in report(run)
    names: list[str] = []
    record = audit(run, canaries=1000, told=names.append)
    assert digests(run) == before
    assert names == [row["name"] for row in record["rows"]] == PRIVATE
    assert run.read_audit() == json.loads(json.dumps(record))
    for row in record["rows"]:
        seen, claim = row["canaries"], row["privacy"]
        assert row["holds"]
        assert 0 < seen["epsilon_lower"] <= claim["epsilon"] < seen["epsilon_ceiling"]
        assert 0 < seen["one_run"] <= seen["one_run_ceiling"]
        assert seen["confidence"] == record["confidence"] == 0.999
        assert all(claim[word] for word in ("unit", "neighbours", "sampler", "accountant", "trust", "delta"))
        assert "too few" in row["membership"]["note"]
    assert [row["canaries"]["canaries"] for row in record["rows"]] == [1000, 1000, 200]  # co-occurrence has 200 counts
    page = report(run)
    assert page.count("within its promise") == 3
    assert "shows more than promised" not in page


def test_the_same_seed_gives_the_same_audit_and_another_seed_another(run: RunFolder) -> None:
    a, b, c = (audit(run, row="co-occurrence", seed=seed)["rows"] for seed in (1, 1, 2))
    assert a == b != c


def test_going_on_with_an_audited_run_keeps_the_audit_in_its_report(run: RunFolder) -> None:
    audit(run, row="co-occurrence")
    simulate(SETTINGS, run)
    assert 'id="audit"' in report(run)


def test_simulate_with_an_audit_gives_the_same_results_as_without(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ["--data", DATA, "--rounds", "2", "--out", str(out), "--audit", "--json"]
    assert main(["simulate", *options]) == 0
    printed = json.loads(capsys.readouterr().out)  # one object: the audit is in its file
    assert [row["name"] for row in json.loads((out / "audit.json").read_text())["rows"]] == PRIVATE

    def lasting(results: dict[str, Any]) -> list[dict[str, Any]]:
        clocks = ("seconds", "clients_per_second", "peak_rss_mb")
        return [{k: v for k, v in row.items() if k not in clocks} for row in results["runs"]]

    assert lasting(printed) == lasting(run.read_results())
    ours, theirs = digests(RunFolder(out)), digests(run)
    same = [name for name in ours if name.endswith(".safetensors") or name in ("config.toml",)]
    assert len(same) == 5
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


def test_a_broken_mechanism_is_refused_with_everything_written(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_noise(monkeypatch)
    assert main(["audit", "--run", str(run.path), "--canaries", "1000"]) == EXIT_PRIVACY
    captured = capsys.readouterr()
    assert "BROKEN" in captured.out
    assert "shows more than it claims" in captured.err
    record = run.read_audit()
    assert record is not None
    assert [row["holds"] for row in record["rows"]] == [False, False, False]
    assert report(run).count("shows more than promised") == 3


def test_the_command_prints_a_table_or_json(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["audit", "--run", str(run.path), "--row", "co-occurrence"]
    assert main(command) == 0
    captured = capsys.readouterr()
    for words in ("co-occurrence", "holds", "unit: user", "99.9 %"):
        assert words in captured.out
    assert "auditing co-occurrence" in captured.err
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == run.read_audit()
    assert main([*command, "-q"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--row", "fedavg"], "no private row 'fedavg'"),
        (["--row", "co-ocurrence"], "no private row"),
        (["--canaries", "1"], "2 canaries"),
        (["--confidence", "1"], "confidence"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_what_cannot_be_audited_is_said_in_one_line(
    run: RunFolder, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "--run", str(run.path), *options]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_audit_of_what_promises_nothing_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["simulate", "--data", DATA, "--unit", "none", "--audit", "--out", str(out)]) == EXIT_USAGE
    assert "drop --audit" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no finished run"):
        audit(RunFolder(tmp_path))


def test_a_damaged_audit_is_refused_and_an_absent_one_is_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_audit() is None
    (tmp_path / "audit.json").write_text("{")
    with pytest.raises(MalformedData, match="damaged"):
        folder.read_audit()
