"""Accuracy against ε: cells are rows of simulate, nothing is computed twice, and no ε stands without its guarantee."""

from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.common.cli import main
from penchant.common.errors import InvalidConfig
from penchant.common.privacy import gaussian
from penchant.simulations import frontier, frontier_page
from penchant.simulations.evaluation import paired_difference, paired_ratio
from penchant.simulations.frontier import FrontierConfig, cells, learner_options, promises
from penchant.simulations.results import FrontierStudy, frontier_table, studies
from penchant.simulations.runs import RunFolder
from penchant.simulations.settings import SimulationConfig
from penchant.simulations.simulate import simulate

TINY = SimulationConfig(data="synthetic:users=24,items=40,interactions=10,topics=8,seed=0", nodes=1)
SMALL = FrontierConfig(
    base=TINY,
    learners=("cooccurrence", "fedavg:mf:rounds=3"),
    epsilons=(1.0, 8.0, math.inf),
    seeds=2,
    references=("ease", "truth"),
)
SCALED = FrontierConfig(
    base=TINY, learners=("cooccurrence",), epsilons=(1.0, math.inf), seeds=1, references=(), as_if_users=480
)
Record = Mapping[str, Any]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small frontier."""
    folder = tmp_path_factory.mktemp("frontier") / "run"
    frontier.run(SMALL, folder)
    frontier.write(folder, frontier.record(SMALL, folder))
    return folder


@pytest.fixture(scope="module")
def found(path: Path) -> Record:
    record: Record = json.loads((path / "frontier.json").read_text(encoding="utf-8"))
    return record


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """One whose noise is that of twenty times as many people."""
    folder = tmp_path_factory.mktemp("scaled") / "run"
    frontier.run(SCALED, folder)
    record: Record = json.loads(json.dumps(frontier.record(SCALED, folder)))
    return record


def line(found: Record, name: str, epsilon: float | None = None) -> dict[str, Any]:
    (one,) = [row for row in found["rows"] if row["name"] == name and row["epsilon"] == epsilon]
    return dict(one)


def files(path: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in path.rglob("*.npz")}


# ------------------------------------------------------------------------------------------------------------- cells


def test_a_cell_is_the_row_that_simulate_gives(path: Path, tmp_path: Path) -> None:
    for cell in list(cells(SMALL, 24))[1::4]:
        folder = RunFolder(tmp_path / cell.place)
        (row,) = [run for run in simulate(cell.settings, folder)["runs"] if run["name"] == cell.row.name]
        kept = RunFolder(path / cell.place).read_row(cell.row.name)
        assert kept is not None
        assert (kept["metrics"], kept["privacy_note"]) == (row["metrics"], row["privacy_note"])
        assert kept["against_floors"] == row["against_floors"]


def test_without_privacy_the_same_learner_runs_with_unit_none_and_the_options_that_still_mean_something() -> None:
    made = list(cells(replace(SMALL, learners=("fedavg:gru:rounds=3:clip=0.5",)), 24))
    assert [cell.epsilon for cell in made] == [1.0, 1.0, 8.0, 8.0, math.inf, math.inf]
    assert [cell.settings.seed for cell in made] == [0, 1] * 3
    assert [cell.settings.unit for cell in made] == ["user"] * 4 + ["none"] * 2
    assert {cell.settings.clip for cell in made[:4]} == {0.5}
    assert made[-1].settings.clip is None
    assert {(cell.settings.rounds, cell.settings.model) for cell in made} == {(3, "gru")}


def test_floors_and_references_are_fitted_once_and_a_cell_has_its_own_row_only(path: Path) -> None:
    kept = {p.stem for p in (path / "references" / "rows").glob("*.json")}
    assert kept == {"popularity", "no-sharing", "ease", "truth"}
    for cell in cells(SMALL, 24):
        assert [p.stem for p in (path / cell.place / "rows").glob("*.json")] == [cell.row.name]


def test_what_is_finished_is_not_run_again_and_what_is_missing_is(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(path, folder)
    before = files(folder)
    frontier.run(SMALL, folder)
    assert files(folder) == before
    gone = next(iter(cells(SMALL, 24)))
    npz = next((folder / gone.place / "rows").glob("*.npz"))
    expected = npz.read_bytes()
    shutil.rmtree(folder / gone.place)
    with pytest.raises(InvalidConfig, match="is not finished: go on with penchant frontier --resume"):
        frontier.record(SMALL, folder)
    frontier.run(SMALL, folder)
    assert npz.read_bytes() == expected
    assert {k for k, v in files(folder).items() if before[k] != v} == {str(npz)}


def test_a_frontier_may_grow_and_may_not_change_under_its_cells(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    one = replace(SMALL, learners=("cooccurrence",), epsilons=(1.0,), references=())
    frontier.run(one, folder)
    before = files(folder)
    more = replace(one, epsilons=(1.0, 2.0), seeds=3)
    frontier.run(more, folder)
    assert before.items() <= files(folder).items()
    assert frontier.read_config(folder) == more
    for other in (replace(more, as_if_users=100), replace(more, base=replace(TINY, delta=1e-6))):
        with pytest.raises(InvalidConfig, match="other data or settings: take another folder"):
            frontier.run(other, folder)


def test_two_processes_leave_what_one_does(path: Path, tmp_path: Path) -> None:
    wanted = replace(SMALL, learners=("cooccurrence",), epsilons=(1.0, math.inf), references=())
    frontier.run(wanted, tmp_path / "run", jobs=2)
    for cell in cells(wanted, 24):
        one, two = (RunFolder(p / cell.place).per_user(cell.row.name) for p in (path, tmp_path / "run"))
        assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learners": ("coocurrence",)}, "did you mean 'cooccurrence'?"),
        ({"learners": ("fedavg:gruu",)}, "did you mean 'gru'?"),
        ({"learners": ("fedavg:rouns=3",)}, "did you mean 'rounds'?"),
        ({"learners": ("fedavg:rounds=x",)}, "rounds cannot be 'x'"),
        ({"learners": ("fedavg:epsilon=3",)}, "epsilon is no option of a learner"),
        ({"learners": ()}, "learners must be at least one"),
        ({"epsilons": (1.0, 1.0)}, "epsilons must be at least one, each once"),
        ({"epsilons": (0.0,)}, "epsilons must be positive, or inf"),
        ({"epsilons": (math.nan,)}, "epsilons must be positive"),
        ({"seeds": 0}, "seeds must be a whole number ≥ 1"),
        ({"references": ("easy",)}, "did you mean 'ease'?"),
        ({"base": replace(TINY, unit="user")}, "decides unit for each cell"),
    ],
)
def test_what_cannot_be_a_frontier_is_refused_in_one_line(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        replace(SMALL, **given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_written_where_a_cell_or_a_reference_cannot_be(tmp_path: Path) -> None:
    for wanted in (
        replace(SMALL, learners=("cooccurrence:rounds=3",)),
        replace(SMALL, learners=("fedavg:cohort=25",)),
        replace(SMALL, base=replace(TINY, delta=0.05)),
    ):
        with pytest.raises(InvalidConfig):
            frontier.run(wanted, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_option_has_the_kind_of_its_field() -> None:
    assert learner_options("fedavg:row-clip=0.5:local_epochs=2:sampling=poisson") == {
        "learner": "fedavg",
        "row_clip": 0.5,
        "local_epochs": 2,
        "sampling": "poisson",
    }


# ----------------------------------------------------------------------------------------------------------- figures


def test_figures_are_paired_over_people_and_seeds(path: Path, found: Record) -> None:
    def values(epsilon: float) -> np.ndarray[Any, Any]:
        own = [c for c in cells(SMALL, 24) if (c.learner, c.epsilon) == ("cooccurrence", epsilon)]
        return np.stack([RunFolder(path / c.place).per_user(c.row.name)["ndcg@10"] for c in own])

    floor = RunFolder(path / "references").per_user("popularity")["ndcg@10"]
    one = line(found, "cooccurrence", 1.0)
    expected = paired_difference(values(1.0), floor, seed=0)
    assert one["against_floors"]["popularity"] == pytest.approx(
        {"mean": expected.mean, "low": expected.low, "high": expected.high}
    )
    kept = paired_ratio(values(1.0), values(math.inf), seed=0)
    assert one["kept"] == pytest.approx({"mean": kept.mean, "low": kept.low, "high": kept.high})
    assert one["ndcg@10"]["mean"] == pytest.approx(values(1.0).mean())
    assert line(found, "cooccurrence")["kept"] is None


def test_both_floors_stand_first_and_every_other_row_against_both(found: Record) -> None:
    assert [row["name"] for row in found["rows"][:4]] == ["popularity", "no-sharing", "ease", "truth"]
    assert [row["kind"] for row in found["rows"][:4]] == ["floor", "floor", "reference", "reference"]
    assert all(row["against_floors"].keys() == {"popularity", "no-sharing"} for row in found["rows"][2:])


def test_the_truth_scores_best_of_all_and_is_not_known_of_other_data(found: Record, tmp_path: Path) -> None:
    best = max(found["rows"], key=lambda row: row["ndcg@10"]["mean"])
    assert best["name"] == "truth"
    log = tmp_path / "log.csv"
    log.write_text("user,item\n" + "".join(f"p{u},i{(u + t) % 9}\n" for u in range(5) for t in range(4)))
    with pytest.raises(InvalidConfig, match="the truth of log is not known: drop the reference truth"):
        frontier.run(replace(SMALL, base=SimulationConfig(data=str(log))), tmp_path / "run")


def test_a_row_has_the_largest_epsilon_of_its_seeds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = RunFolder.read_row

    def dearer(self: RunFolder, name: str) -> dict[str, Any] | None:
        row = read(self, name)
        if row and row["privacy"] and self.path.name == "seed-1":
            row["privacy"] = {**row["privacy"], "epsilon": 9.5}  # a round of it was charged twice
        return row

    monkeypatch.setattr(RunFolder, "read_row", dearer)
    assert line(frontier.record(SMALL, path), "cooccurrence", 8.0)["privacy"]["epsilon"] == 9.5


# --------------------------------------------------------------------------------------------------------- guarantees

BESIDE = ("δ = 1e-05", "unit user (add/remove one profile)", "sampling none (", "accountant GDP", "trust server")


def test_the_shared_part_and_a_rows_own_are_its_whole_guarantee(found: Record) -> None:
    shared, own = promises(found["rows"])
    for row, words in zip(found["rows"], own, strict=True):
        if row["privacy"] is None:
            assert words == ""
            continue
        whole = f"{shared}, {words}"
        for piece in (*BESIDE, *row["privacy"]["uncharged"]):
            assert piece in whole
    sums = {row["name"]: words for row, words in zip(found["rows"], own, strict=True) if words}
    assert "2 of 2 sums" in sums["cooccurrence"]
    assert "sums per profile" not in shared  # what differs is nobody else's


def test_what_one_row_alone_leaves_uncharged_is_said_of_that_row_only(found: Record) -> None:
    lines = [dict(row) for row in found["rows"]]
    odd = next(i for i, row in enumerate(lines) if row["privacy"])
    lines[odd]["privacy"] = {**lines[odd]["privacy"], "uncharged": ["settings were tuned on somebody"]}
    shared, own = promises(lines)
    assert "somebody" in own[odd]
    assert "somebody" not in shared + "".join(own[:odd] + own[odd + 1 :])


def test_every_place_that_shows_an_epsilon_shows_all_that_goes_with_it(path: Path, found: Record) -> None:
    page = (path / "frontier.html").read_text(encoding="utf-8")
    svg = " ".join((path / "frontier.svg").read_text(encoding="utf-8").split())
    section = frontier_table(study(), found)
    text = {"page": page, "section": section, "figure": re.sub(r"<[^>]*>|\s+", " ", svg)}
    for name, shown in text.items():
        shown = re.sub(r"\s+", " ", shown)
        for piece in (*BESIDE, "not charged: ", "(at most 2 of 2 sums per profile)"):
            assert piece in shown, (name, piece)


def study() -> FrontierStudy:
    return FrontierStudy("frontier-tiny", "Accuracy against ε: twenty-four people", "Small.", SMALL)


def test_noise_for_other_people_is_called_that_wherever_it_is_shown_and_epsilon_stays_that_of_the_people_here(
    scaled: Record,
) -> None:
    row = line(scaled, "cooccurrence", 1.0)
    real = gaussian.epsilon_of(20 * gaussian.mu_of(1.0, 1e-5), 1e-5)
    assert row["privacy"]["epsilon"] == pytest.approx(real)
    assert row["as_if"]["users"] == 480
    shown = frontier.epsilon_words(row)
    assert float(shown) >= real > 20
    svg = re.sub(r"<[^>]*>|\s+", " ", frontier_page.figure(scaled, "svg").decode())
    assert f"({shown})" in svg
    section = frontier_table(study(), scaled)
    assert f"| cooccurrence | 1 | {shown} |" in section
    for text in (svg, section, frontier_page.render(scaled)):
        assert "oise as for 480 people" in text
        assert "research figure" in text


# --------------------------------------------------------------------------------------------- figure, page and table


def test_the_figure_names_every_learner_and_floor_and_has_infinity_as_its_last_tick(found: Record) -> None:
    root = ET.fromstring(frontier_page.figure(found, "svg"))
    texts = ["".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text")]
    for name in ("cooccurrence", "fedavg:mf:rounds=3", "popularity (floor)", "no-sharing (floor)"):
        assert name in texts
    ticks = [text for text in texts if text in ("1", "8", "∞")]
    assert ticks[-1] == "∞"


def test_the_same_record_gives_the_same_bytes(found: Record) -> None:
    for kind in ("svg", "png"):
        assert frontier_page.figure(found, kind) == frontier_page.figure(found, kind)
    assert frontier_page.render(found) == frontier_page.render(found)


def test_the_page_loads_nothing_and_takes_its_colours_from_its_style(path: Path) -> None:
    page = (path / "frontier.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link rel=\"stylesheet|img)|src=|url\(http", page)
    assert "default-src 'none'" in page
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()


def test_one_epsilon_or_none_but_infinity_is_drawn(found: Record) -> None:
    for keep in ({1.0}, {None}, {1.0, None}):
        some = [row for row in found["rows"] if row["kind"] != "learner" or row["epsilon"] in keep]
        assert frontier_page.figure({**found, "rows": some}, "svg")


def test_the_section_has_a_line_for_each_row_both_floors_and_each_distinct_guarantee_once(found: Record) -> None:
    text = frontier_table(study(), found)
    table = [row for row in text.splitlines() if row.startswith("| ") and not row.startswith("| learner")]
    assert len(table) == len(found["rows"])
    assert table[0].startswith("| popularity (floor) |")
    assert table[1].startswith("| no-sharing (floor) |")
    assert re.findall(r"^\((\d)\)", text, flags=re.MULTILINE) == ["1", "2"]
    assert "(figures/frontier-tiny.svg)" in text


def test_the_frontiers_of_the_page_are_at_every_epsilon_for_every_learner_over_five_seeds() -> None:
    made = [one for one in studies() if isinstance(one, FrontierStudy)]
    assert {"embedded", "ml-100k"} <= {one.config.base.data for one in made}
    assert {6000, 50_000} <= {int(u[1]) for one in made if (u := re.search(r"users=(\d+)", one.config.base.data))}
    for one in made:
        assert one.config.epsilons == (0.5, 1.0, 2.0, 4.0, 8.0, math.inf)
        assert one.config.seeds >= 5
        assert (one.config.base.delta, one.config.base.split) == (1e-5, "leave-last-out")
        assert not one.config.base.data.startswith("synthetic") or "seed=" in one.config.base.data
        assert ("research figure" in one.title) == (one.config.as_if_users is not None)
        assert {"cooccurrence", "als"} < {*one.config.learners}
        assert any(name.startswith("fedavg") for name in one.config.learners)
        made_of = [(cell.learner, cell.epsilon, cell.settings.seed) for cell in cells(one.config, 610)]
        assert len(set(made_of)) == len(made_of) == len(one.config.learners) * 6 * one.config.seeds


# ------------------------------------------------------------------------------------------------------- command line


def test_the_command_writes_everything_resumes_and_says_it_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    asked = ["frontier", "--data", TINY.data, "--learners", "cooccurrence", "--epsilons", "1,inf", "--seeds", "1"]
    asked += ["--references", "none", "--nodes", "1"]
    assert main([*asked, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert {"frontier.json", "frontier.html", "frontier.svg", "frontier.png", "frontier.toml"} <= {
        p.name for p in out.iterdir()
    }
    shown = re.sub(r"\s+", " ", said.out)
    for piece in (*BESIDE, "popularity", "no-sharing", "cooccurrence"):
        assert piece in shown
    assert main([*asked, "--out", str(out)]) == 2
    assert "already holds a frontier" in capsys.readouterr().err
    assert main(["frontier", "--resume", str(out), "--seeds", "2"]) == 2
    assert "give no other option" in capsys.readouterr().err
    before = files(out)
    assert main(["frontier", "--resume", str(out), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "frontier.json").read_text(encoding="utf-8"))
    assert files(out) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epsilons", "1,two"], "epsilons must be numbers or inf, not 'two'"),
        (["--learners", "ease"], "unknown learner 'ease'"),
        (["--jobs", "0"], "jobs must be ≥ 1"),
    ],
)
def test_a_wrong_option_exits_2_with_one_line_and_writes_nothing(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["frontier", "--data", TINY.data, "--out", str(tmp_path / "run"), *argv]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
