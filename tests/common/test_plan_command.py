"""`penchant plan`: golden values through the command, its two outputs, its picture, and one line for every mistake."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from penchant.common import cli
from penchant.common.errors import InvalidConfig
from penchant.common.privacy import plan_command
from penchant.common.privacy.events import decode
from penchant.common.privacy.plan import PrivacyPlan

MOVIES = ("--users", "6040", "--cohort", "100", "--rounds", "100", "--noise-multiplier", "1", "--delta", "1e-5")
SMALL = ("--users", "1000", "--rounds", "8", "--noise-multiplier", "5", "--delta", "1e-5")


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["plan", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(capsys, *argv, "--json"))
    return found


def test_the_command_is_installed() -> None:
    assert "plan" in cli.parser().format_help()


# dp-accounting 0.6.0, δ = 1e-5, σ = 1, 100 rounds: PLDAccountant, and for 91.82 the closed form as well
@pytest.mark.parametrize(
    ("argv", "epsilon", "accountant", "rate"),
    [
        ((), 1.187, "PLD", 100 / 6040),
        (("--sampling", "none", "--max-participations", "100"), 91.82, "GDP", None),
    ],
)
def test_golden_plans_through_the_command(
    argv: tuple[str, ...], epsilon: float, accountant: str, rate: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, *MOVIES, *argv)
    assert found["epsilon"] == pytest.approx(epsilon, rel=5e-4)
    assert found["accountant"] == accountant
    assert found["rate"] == rate
    assert found["noise_to_signal"]["per_round"] == pytest.approx(1 / 100)
    assert found["noise_to_signal"]["over_rounds"] == pytest.approx(1 / 1000)


def test_json_carries_everything_without_which_an_epsilon_means_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *SMALL, "--max-participations", "2", "--size", "100", "--clip", "0.5")
    expected = {
        "schema_version": 1,
        "delta": 1e-5,
        "noise_multiplier": 5.0,
        "rounds": 8,
        "users": 1000,
        "cohort": 250,
        "rate": None,
        "unit": "user",
        "neighbours": "add/remove one profile",
        "sampling": "none",
        "max_participations": 2,
        "enforced_by": "roster and device",
        "accountant": "GDP",
        "clip": 0.5,
        "divisor": 250.0,
        "trust": "server",
        "solved_for": "epsilon",
        "assumed": ["sampling none", "a cohort of 250"],
    }
    assert {name: found[name] for name in expected} == expected
    assert found["noise_to_signal"] == pytest.approx(
        {"size": 100, "per_round": 0.02, "vector": 0.2, "over_rounds": 0.02 / 8**0.5}
    )
    plan = PrivacyPlan.from_json(json.dumps(found["plan"]))
    assert found["plan_digest"] == plan.digest
    assert tuple(decode(event) for event in found["events"]) == plan.events()
    assert found["uncharged"] == list(plan.uncharged)
    assert found["uncharged"]
    promise = plan.guarantee()
    assert promise is not None
    assert (found["epsilon"], found["guarantee"]) == (promise.epsilon, str(promise))
    after = {one["rounds"]: one["epsilon"] for one in found["epsilon_after"]}
    assert list(after) == [1, 2, 4, 8]
    assert after[1] < after[2] == after[4] == after[8] == promise.epsilon  # nobody is in more than 2


def test_words_say_the_whole_guarantee_what_was_solved_and_what_was_assumed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = said(capsys, "--users", "1000", "--rounds", "8", "--epsilon", "2", "--delta", "1e-5")
    found = as_json(capsys, "--users", "1000", "--rounds", "8", "--epsilon", "2", "--delta", "1e-5")
    assert found["guarantee"] in out.splitlines()
    (solved,) = [line for line in out.splitlines() if "solved for" in line]
    assert solved.split() == ["noise", "multiplier", "σ", f"{found['noise_multiplier']:g}", "<-", "solved", "for"]
    assert "Assumed: sampling none; a cohort of 1,000; up to one participation in every round." in out
    assert "Better: with 4 rounds" in out
    rows = [line.split() for line in out.splitlines()]
    table = rows[rows.index(["after", "round", "ε"]) + 1 :][:4]
    assert [row[0] for row in table] == ["1", "2", "4", "8"]
    assert float(table[-1][1]) == 2.0
    assert not any(line != line.rstrip() for line in out.splitlines())


def test_a_plan_of_devices_names_their_steps_and_whom_it_trusts(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *SMALL, "--unit", "interaction", "--steps", "3", "--cohort", "10", "--clip", "0.25")
    assert (found["steps"], found["rate"], found["trust"], found["clip"]) == (3, 1.0, "own device", 0.25)
    assert "3 steps a round, rate 1" in said(capsys, *SMALL, "--unit", "interaction", "--steps", "3")


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("--users", "1000", "--delta", "1e-5", "--rounds", "8"), 2, "two of"),
        ((*SMALL, "--epsilon", "1"), 2, "two of"),
        (("--users", "1000", "--delta", "0.001", "--rounds", "8", "--epsilon", "1"), 2, "one over the users"),
        (("--users", "0", "--delta", "1e-5", "--rounds", "8", "--epsilon", "1"), 2, "n_users"),
        ((*SMALL, "--open-fleet", "--max-participations", "2"), 2, "nothing enforces a cap of 2"),
        ((*SMALL, "--sampling", "poisson", "--max-participations", "2"), 2, "cap"),
        ((*SMALL, "--cohort", "900", "--max-participations", "2"), 2, "raise max_participations"),
        ((*SMALL, "--plot", "epsilon.pdf"), 2, ".png or .svg"),
        ((*SMALL, "--plot", "no/such/folder/epsilon.png"), 2, "cannot write"),
        (("--users", "1000", "--delta", "1e-5", "--rounds", "1", "--noise-multiplier", "1e-200"), 4, "finite"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_on_stdout(
    argv: tuple[str, ...], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_plans_without_sampling_need_no_extra_and_others_say_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("dp_accounting", "opacus", "scipy", "matplotlib", "rich", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "GDP" in said(capsys, "--users", "1001", "--rounds", "9", "--epsilon", "2", "--delta", "1e-5")
    assert cli.main(["plan", *SMALL, "--cohort", "77"]) == 2
    assert "pip install 'penchant[train]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["plan", *SMALL, "--plot", str(tmp_path / "epsilon.svg")]) == 2
    assert "pip install 'penchant[simulations]'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- plots


def test_a_plot_is_a_picture_of_the_kind_that_its_ending_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    png, svg = tmp_path / "epsilon.png", tmp_path / "epsilon.SVG"
    said(capsys, *SMALL, "--plot", str(png))
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert width > height > 500
    said(capsys, *SMALL, "--plot", str(svg))
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_a_plot_says_unit_delta_sampler_and_accountant_and_marks_the_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self))
    said(capsys, *SMALL, "--max-participations", "2", "--plot", str(tmp_path / "epsilon.png"))
    found = as_json(capsys, *SMALL, "--max-participations", "2")
    assert isinstance(drawn[0], figure)
    (axes,) = drawn[0].axes
    for words in ("unit user", "δ = 1e-05", "sampling none (at most 2 of 8", "accountant GDP"):
        assert words in axes.get_title(loc="left")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rounds", "ε at δ = 1e-05")
    curve, mark = axes.get_lines()
    assert mark.get_xydata().tolist() == [[8, found["epsilon"]]]
    assert curve.get_xydata()[-1].tolist() == [8, found["epsilon"]]
    assert 2 in curve.get_xdata()  # where the cap bends it
    assert "8 rounds" in axes.get_legend().get_texts()[0].get_text()


def test_what_is_no_picture_is_refused_before_anything_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.common.privacy.planning.solve", lambda **_: pytest.fail("solved"))
    args = cli.parser().parse_args(["plan", *SMALL, "--plot", "epsilon"])
    with pytest.raises(InvalidConfig, match="without ending"):
        plan_command.plan.run(args)
