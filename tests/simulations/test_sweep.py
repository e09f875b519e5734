"""Choosing settings: on validation alone, the same again after a stop, and said beside every ε that follows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from penchant.common import config
from penchant.common.cli import main
from penchant.common.errors import InvalidConfig, MissingExtra
from penchant.simulations import sweep as module
from penchant.simulations.runs import read_config
from penchant.simulations.settings import LearnerName, SimulationConfig, rows
from penchant.simulations.simulate import Prepared, on_validation, plan_of, prepare
from penchant.simulations.sweep import SPACES, Range, SweepConfig, public, sweep

TINY = SimulationConfig(
    data="synthetic:users=40,items=40,interactions=10,topics=8,seed=0",
    learner="cooccurrence",
    unit="user",
    nodes=1,
    epsilon=8.0,
    delta=1e-5,
)
WANTED = SweepConfig(base=TINY, trials=5)
Found = Mapping[str, Any]
pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "run"
    sweep(WANTED, folder)
    return folder


@pytest.fixture(scope="module")
def found(path: Path) -> Found:
    record: Found = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
    return record


def log_of(where: Path) -> Path:
    log = where / "diary.csv"
    log.write_text("user,item\n" + "".join(f"p{u},i{(3 * u + 5 * t) % 11}\n" for u in range(12) for t in range(6)))
    return log


# ------------------------------------------------------------------------------------------------------------ choosing


def test_the_best_is_the_best_value_of_all_and_its_config_gives_that_value(path: Path, found: Found) -> None:
    values = [trial["value"] for trial in found["trials"]]
    assert len(values) == 5
    assert found["best"]["value"] == max([found["own"], *values])
    settings = read_config(path / "best.toml")
    assert settings == config.decode(SimulationConfig, found["best"]["simulation"])
    prepared = prepare(settings)
    assert on_validation(rows(settings)[-1], settings, prepared, "ndcg@10") == found["best"]["value"]
    assert len(set(values)) > 1


def test_where_no_trial_is_better_the_rows_own_settings_stay_and_it_is_still_said_that_others_were_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "on_validation", lambda row, settings, *_: 0.5 if settings.settings is None else 0.25)
    found = sweep(replace(WANTED, trials=2), tmp_path / "run")
    settings = read_config(tmp_path / "run" / "best.toml")
    assert replace(settings, tuned=None) == TINY
    assert (found["best"]["value"], found["best"]["settings"]) == (0.5, {})
    assert settings.tuned is not None
    assert "2 trials, not charged" in settings.tuned


def test_no_target_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Found) -> None:
    def blind(settings: SimulationConfig) -> Prepared:
        made = prepare(settings)
        nothing = made.split.targets.select([])
        return replace(made, split=replace(made.split, targets=nothing, history=nothing))

    monkeypatch.setattr(module, "prepare", blind)
    assert sweep(WANTED, tmp_path / "run")["trials"] == found["trials"]


def test_a_sweep_that_was_stopped_finds_what_it_would_have_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, stop_at = 0, 0

    def value(row: object, settings: SimulationConfig, *_: object) -> float:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return 0.5 if settings.settings is None else 1 / settings.settings["head"]

    monkeypatch.setattr(module, "on_validation", value)
    wanted = replace(WANTED, trials=16)  # after ten the proposals follow what was found
    never = sweep(wanted, tmp_path / "never")
    calls, stop_at = 0, 14
    with pytest.raises(KeyboardInterrupt):
        sweep(wanted, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "sweep.json").exists()
    assert sweep(wanted, tmp_path / "stopped") == never
    assert calls == 17 + 1  # the row's own and sixteen trials, and the one that was stopped
    assert sweep(replace(wanted, base=replace(TINY, seed=1)), tmp_path / "other")["trials"] != never["trials"]


def test_more_trials_go_on_from_those_there_are_and_another_sweep_does_not(tmp_path: Path, found: Found) -> None:
    journal = tmp_path / "elsewhere" / "journal.log"
    few = sweep(replace(WANTED, trials=2), tmp_path / "few", storage=journal)
    assert few["trials"] == found["trials"][:2]
    assert sweep(WANTED, tmp_path / "more", storage=journal)["trials"] == found["trials"]
    for other in (replace(WANTED, metric="hr@10"), replace(WANTED, base=replace(TINY, epsilon=1.0))):
        with pytest.raises(InvalidConfig, match="is of another sweep: take another --out or --storage"):
            sweep(other, tmp_path / "other", storage=journal)


def test_a_setting_that_was_given_is_not_chosen(tmp_path: Path) -> None:
    fixed = sweep(replace(WANTED, base=replace(TINY, counts_share=0.3), trials=2), tmp_path / "run")
    assert all("counts_share" not in trial["settings"] for trial in fixed["trials"])
    assert read_config(tmp_path / "run" / "best.toml").counts_share == 0.3


def test_a_trial_that_the_learner_refuses_is_told_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPACES, "cooccurrence", (Range(name="settings.window", low=-3, high=0),))
    found = sweep(replace(WANTED, trials=2), tmp_path / "run")
    assert [trial["value"] for trial in found["trials"]] == [None, None]
    assert all("window and dims ≥ 1" in trial["refused"] for trial in found["trials"])
    assert found["best"]["settings"] == {}


@pytest.mark.parametrize("unit", ["user", "none"])
@pytest.mark.parametrize("learner", sorted(SPACES))
def test_both_ends_of_every_range_can_be_run_so(learner: str, unit: str) -> None:
    private: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5} if unit == "user" else {"epsilon": None, "delta": None}
    base = replace(TINY, learner=learner, unit=unit, **private)
    (row,) = [row for row in rows(base) if row.kind == "federated"]
    prepared = prepare(base)
    space = [one for one in SPACES[learner] if unit in one.units]
    assert len({one.name for one in space}) == len(space)
    for one in space:
        for end in (one.low, one.high):
            plan = plan_of(row, one.applied(base, end), prepared)
            assert plan.plan.guarantee() is None or plan.plan.guarantee().epsilon <= 8.0  # type: ignore[union-attr]  # it is there, or the test fails
            assert plan != plan_of(row, base, prepared) or one.name in ("rounds", "local_epochs", "lr")


def test_every_space_is_of_a_learner_that_there_is() -> None:
    assert set(SPACES) <= set(get_args(LearnerName))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learner": None}, "no learner: sweep has a space for cooccurrence and fedavg"),
        ({"settings": {"window": 3}}, "start from a config without settings"),
        ({"tuned": "by me"}, "start from a config without settings"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_one_line(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        replace(WANTED, base=replace(TINY, **given))
    assert words in str(caught.value)


def test_nothing_is_written_of_a_sweep_that_cannot_be(tmp_path: Path) -> None:
    for wanted in (
        replace(WANTED, metric="ndgc@10"),
        replace(WANTED, base=replace(TINY, delta=0.05)),
        replace(WANTED, base=replace(TINY, learner="fedavg", unit=None)),
        replace(WANTED, base=replace(TINY, learner="fedavg", unit="interaction")),
    ):
        with pytest.raises(InvalidConfig):
            sweep(wanted, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_without_optuna_the_install_line_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"optuna is not installed; run: pip install 'penchant\[sweep\]'"):
        sweep(WANTED, tmp_path / "run")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- what it costs


def test_tuning_on_somebodys_file_is_said_beside_every_epsilon_of_a_run_with_that_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    asked = ["--data", str(log_of(tmp_path)), "--learner", "cooccurrence", "--nodes", "1", "--trials", "3"]
    assert main(["sweep", *asked, "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    note = "settings were tuned on the validation set of diary: 3 trials, not charged"
    assert (said["uncharged"], said["data"]["public"]) == (note, False)
    assert note in said["best"]["privacy_note"]
    run = ["simulate", "--config", str(out / "best.toml"), "--out", str(tmp_path / "run"), "--json", "-q"]
    assert main(run) == 0
    row = json.loads(capsys.readouterr().out)["runs"][-1]
    assert note in row["privacy"]["uncharged"]
    assert note in row["privacy_note"]
    assert note in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    manifest = json.loads((tmp_path / "run" / "models" / "co-occurrence.json").read_text(encoding="utf-8"))
    assert note in manifest["plan"]
    for name, value in said["best"]["settings"].items():
        if name.startswith("settings.") and name.count(".") == 1:
            assert manifest["settings"][name.removeprefix("settings.")] == value


def test_public_data_is_called_that_and_a_path_never_is(found: Found) -> None:
    assert found["uncharged"] == (
        "settings were tuned on the validation set of synthetic-40x40 (public research data): 5 trials, not charged"
    )
    assert [public(name) for name in ("embedded", "ml-100k", "synthetic", "synthetic:seed=3")] == [True] * 4
    assert not any(public(name) for name in ("./embedded", "ml-100k.csv", "/data/synthetic", "synthetic.csv", ""))


def test_the_command_says_what_was_found_and_how_to_use_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sweep", "--data", TINY.data, "--learner", "cooccurrence", "--trials", "1", "--nodes", "1"]
    assert main([*asked, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    for piece in ("co-occurrence on validation", "ε = 8 at δ = 1e-05", "tuned on the validation", "best.toml"):
        assert piece in said.out
    assert "trial 1: " in said.err
    assert "[I" not in said.err  # Optuna's own log
    assert main([*asked, "--metric", "ndgc@10", "--out", str(tmp_path / "other")]) == 2
    assert "did you mean 'ndcg@10'" in capsys.readouterr().err
