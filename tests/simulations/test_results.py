"""The page of results: Markdown tables whose figures are those of the runs, each with its interval and guarantee."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from penchant.common.errors import InvalidConfig, MissingExtra
from penchant.simulations import results
from penchant.simulations.frontier import FrontierConfig
from penchant.simulations.results import FrontierStudy, Study, page, run, studies, table
from penchant.simulations.runs import RunFolder
from penchant.simulations.settings import SimulationConfig, rows

TINY = Study(
    "tiny",
    "Twenty-four people",
    "Small enough for a test.",
    SimulationConfig(data="synthetic:users=24,items=40,interactions=10,topics=8,seed=0", rounds=2, nodes=2),
    seeds=2,
    ratios=(("fedavg", "central"),),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """Two seeds of every row."""
    return run(TINY, tmp_path_factory.mktemp("results"), lambda words: None)


def cells(text: str) -> dict[str, list[str]]:
    """The cells of each row of the table, by the row's name."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| row")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in split}


def figures(pattern: str, cell: str) -> list[float]:
    """The numbers of a cell that looks like the pattern."""
    found = re.fullmatch(pattern, cell)
    assert found is not None, cell
    return [float(x) for x in found.groups()]


def test_the_table_has_a_line_for_each_row_with_the_mean_over_seeds_and_its_interval(folders: list[RunFolder]) -> None:
    found = cells(table(TINY, folders))
    assert list(found) == [row.name for row in rows(TINY.config)]
    for name, (ndcg, hr, *_) in found.items():
        mean, low, high = figures(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", ndcg)
        both = [folder.per_user(name) for folder in folders]
        assert mean == pytest.approx(100 * np.mean([b["ndcg@10"].mean() for b in both]), abs=0.006)
        assert float(hr) == pytest.approx(100 * np.mean([b["hr@10"].mean() for b in both]), abs=0.06)
        assert low < mean < high
    one = cells(table(replace(TINY, seeds=1), folders[:1]))
    assert one["ease"][0].split()[0] == found["ease"][0].split()[0]  # no seed moves it
    assert one["fedavg"][0].split()[0] != found["fedavg"][0].split()[0]


def test_differences_from_the_floors_are_paired_and_have_signs(folders: list[RunFolder]) -> None:
    found = cells(table(TINY, folders))
    assert found["popularity"][2] == found["no-sharing"][3] == "–"
    for name, row in found.items():
        for floor, cell in zip(("popularity", "no-sharing"), row[2:4], strict=True):
            if name == floor:
                continue
            mean, low, high = figures(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]", cell)
            values = [folder.per_user(name)["ndcg@10"] - folder.per_user(floor)["ndcg@10"] for folder in folders]
            assert mean == pytest.approx(100 * np.mean(values), abs=0.006)
            assert low <= mean <= high


def test_each_private_row_has_one_note_that_holds_its_whole_guarantee_and_no_other_row_has(
    folders: list[RunFolder],
) -> None:
    text = table(TINY, folders)
    marks = {name: row[-1] for name, row in cells(text).items()}
    notes = dict(re.findall(r"^\((\d)\) (.*)$", text, flags=re.MULTILINE))
    assert [marks[name] for name in ("fedavg+opacus", "fedavg+user-dp", "co-occurrence")] == ["(1)", "(2)", "(3)"]
    assert list(notes) == ["1", "2", "3"]
    assert {mark for name, mark in marks.items() if not re.fullmatch(r"\(\d\)", mark)} == {"none: exact"}
    for name, mark in marks.items():
        if mark == "none: exact":
            continue
        (row,) = [row for row in folders[0].read_results()["runs"] if row["name"] == name]
        assert notes[mark.strip("()")] == row["privacy_note"]
        for word in ("ε = 8 at δ = 1e-05", "unit", "add/remove one", "sampling", "accountant", "trust", "not charged"):
            assert word in row["privacy_note"]


def test_a_ratio_is_given_with_its_interval(folders: list[RunFolder]) -> None:
    text = table(TINY, folders)
    found = re.search(r"Ratio fedavg / central .* \*\*([\d.]+) \[([\d.]+), ([\d.]+)\]\*\*", text)
    assert found is not None
    ratio, low, high = map(float, found.groups())
    one, two = (np.mean([f.per_user(name)["ndcg@10"].mean() for f in folders]) for name in ("fedavg", "central"))
    assert ratio == pytest.approx(one / two, abs=0.0006)
    assert low <= ratio <= high
    assert "Ratio" not in table(replace(TINY, ratios=()), folders)


def test_rows_of_another_study_stand_in_the_table_too(folders: list[RunFolder], tmp_path: Path) -> None:
    config = replace(TINY.config, learner="cooccurrence", rounds=None)
    beside = ("tiny", ("fedavg",))
    small = replace(TINY, name="small", config=config, ratios=(("co-occurrence", "fedavg"),), beside=beside)
    text = table(small, run(small, tmp_path, lambda words: None), folders)
    (line,) = re.findall(r"^\| fedavg \|.*$", table(TINY, folders), re.M)
    assert line in text.splitlines()
    assert "Ratio co-occurrence / fedavg" in text
    assert "| central |" not in text


def test_seeds_that_were_run_on_different_data_are_not_put_in_one_table(
    folders: list[RunFolder], tmp_path: Path
) -> None:
    other = replace(TINY, seeds=1, config=replace(TINY.config, data=TINY.config.data.replace("seed=0", "seed=1")))
    (stranger,) = run(other, tmp_path, lambda words: None)
    with pytest.raises(InvalidConfig, match="different data"):
        table(TINY, [folders[0], stranger])
    assert table(TINY, folders)


def test_finished_seeds_are_kept_and_the_missing_ones_run(folders: list[RunFolder]) -> None:
    told: list[str] = []
    root = folders[0].path.parents[1]
    before = (folders[0].path / "results.json").stat().st_mtime_ns
    more = replace(TINY, seeds=3, config=replace(TINY.config, learner="cooccurrence", rounds=None))
    again = run(more, root, told.append)
    assert [folder.path.name for folder in again] == ["seed-0", "seed-1", "seed-2"]
    assert (folders[0].path / "results.json").stat().st_mtime_ns == before
    assert told == ["tiny, seed 0", "tiny, seed 1", "tiny, seed 2", "  popularity", "  no-sharing", "  co-occurrence"]
    assert again[2].read_config().seed == 2


def test_the_page_holds_every_section_after_what_its_figures_are(folders: list[RunFolder]) -> None:
    text = page([table(TINY, folders), "## Another\n"])
    assert text.startswith("# Results\n")
    assert text.index("95 % bootstraps") < text.index("## Twenty-four people") < text.index("## Another")


def test_main_writes_the_page_only_when_it_is_whole_and_prints_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(TINY, seeds=1, ratios=(), config=replace(TINY.config, learner="cooccurrence", rounds=None))
    other, absent = replace(small, name="other", title="Other"), replace(small, name="absent", title="Absent")
    monkeypatch.setattr(results, "studies", lambda: (small, other, absent))
    original = results.run

    def without(study: Study, *rest: object) -> list[RunFolder]:
        if study.name == "absent":
            raise MissingExtra("simulations", "its data")
        return original(study, *rest)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(results, "run", without)
    out = tmp_path / "results.md"
    where = ["--runs", str(tmp_path), "--out", str(out)]
    assert results.main(["--only", "tiny", *where]) == 0
    said = capsys.readouterr()
    assert "## Twenty-four people" in said.out
    assert "## Other" not in said.out
    assert results.main(where) == 1
    assert "absent is left out: its data is not installed" in capsys.readouterr().err
    assert not out.exists()  # a page without one of its studies would hide that it is missing
    monkeypatch.setattr(results, "studies", lambda: (small, other))
    assert results.main(where) == 0
    assert "## Other" in out.read_text(encoding="utf-8")


def test_the_studies_have_names_of_their_own_and_the_same_data_for_every_seed() -> None:
    found = studies()
    assert len({study.name for study in found}) == len(found)
    for study in found:
        if isinstance(study, FrontierStudy):
            continue
        assert not study.config.data.startswith("synthetic") or "seed=" in study.config.data
        names = [row.name for row in rows(study.config)]
        if study.beside is not None:
            name, borrowed = study.beside
            other = next(one for one in found if one.name == name)
            assert isinstance(other, Study)
            assert (other.config.data, other.seeds) == (study.config.data, study.seeds)
            assert {*borrowed} <= {row.name for row in rows(other.config)} - {*names}
            names += borrowed
        assert all(name in names for ratio in study.ratios for name in ratio)


def test_a_frontier_is_a_study_whose_figure_stands_beside_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = SimulationConfig(data="synthetic:users=24,items=40,interactions=10,topics=8,seed=0", nodes=1)
    config = FrontierConfig(base=base, learners=("cooccurrence",), epsilons=(8.0, math.inf), seeds=2, references=())
    monkeypatch.setattr(results, "studies", lambda: (FrontierStudy("frontier-tiny", "Tiny", "Small.", config),))
    out = tmp_path / "docs" / "results.md"
    where = ["--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert results.main(["--only", "frontier-tiny", *where]) == 0
    printed = capsys.readouterr().out
    assert not out.parent.exists()
    assert results.main(where) == 0
    text = out.read_text(encoding="utf-8")
    assert printed.strip() in text
    (figure,) = re.findall(r"\((figures/[^)]*)\)", text)
    assert (out.parent / figure).read_text(encoding="utf-8").startswith("<?xml")
    with pytest.raises(SystemExit):
        results.main(["--only", "frontier-tinny", *where])
    assert "did you mean 'frontier-tiny'" in capsys.readouterr().err
