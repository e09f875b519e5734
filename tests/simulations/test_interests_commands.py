"""evaluate and profile as a person types them."""

from __future__ import annotations

import argparse
import importlib
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.common.catalogue import Catalogue
from penchant.common.cli import Command, main
from penchant.common.errors import InvalidConfig
from penchant.common.interests import Drift, InterestConfig, InterestProfile
from penchant.common.interests.intensity import Intensities, ItemTerms
from penchant.common.learners.cooccurrence import Cooccurrence, CooccurrenceConfig
from penchant.common.learners.strengths import Strengths
from penchant.common.taste import ItemSide, TasteConfig
from penchant.simulations.data.loaders import load
from penchant.simulations.interests import picture
from penchant.simulations.interests.releases import Table
from penchant.simulations.interests_commands import PARTS, evaluate, profile
from penchant.simulations.runs import RunFolder
from penchant.simulations.simulate import learner_of

TINY = "synthetic:users=24,items=40,interactions=10,topics=8,seed=0"
Capture = pytest.CaptureFixture[str]


def ran(command: Command, *argv: str | Path) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(word) for word in argv]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with one federated row."""
    path = tmp_path_factory.mktemp("finished") / "run"
    asked = ["simulate", "--data", TINY, "--learner", "cooccurrence", "--epsilon", "8", "--delta", "1e-3"]
    assert main([*asked, "--out", str(path), "-q"]) == 0
    return path


# ------------------------------------------------------------------------------------------------------ evaluate


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Two parts that say what they were asked, and two that are absent."""
    asked: list[dict[str, object]] = []

    def dynamic(*, data: str = "small", epsilon: float | None = None, seed: int = 0) -> Table:
        asked.append({"data": data, "epsilon": epsilon, "seed": seed})
        return Table("Question 1?", ("", "a"), [[f"on {data}", "[0.1, 0.2]"]], ["A note."])

    def again() -> Table:
        return Table("Question 2?", ("", "a"), [["x", "[0.1, 0.2]"]], ["A note."])

    def explore(*, seed: int = 0) -> Table:
        asked.append({"seed": seed})
        return Table("Exploring?", ("", "a"), [["x", "y"]])

    for name, run in (("dynamic", dynamic), ("explore", explore)):
        module = types.ModuleType(name)
        module.table, module.again = run, again  # type: ignore[attr-defined]  # a stand-in
        monkeypatch.setitem(sys.modules, f"penchant.simulations.interests.{name}", module)
    monkeypatch.setattr(
        "penchant.simulations.interests_commands.PARTS", {"dynamic": ("table", "again"), "explore": ("table",)}
    )
    return asked


def test_every_part_gets_the_options_it_takes_and_its_tables_are_shown_and_written(
    parts: list[dict[str, object]], tmp_path: Path, capsys: Capture
) -> None:
    assert ran(evaluate, "interests", "--data", "d", "--epsilon", "2", "--seed", "3", "--out", tmp_path / "new") == 0
    assert parts == [{"data": "d", "epsilon": 2.0, "seed": 3}, {"seed": 3}]
    said = " ".join(capsys.readouterr().out.split())
    assert all(words in said for words in ("Question 1?", "Question 2?", "Exploring?", "on d", "[0.1, 0.2]", "A note."))
    written = (tmp_path / "new" / "dynamic.md").read_text(encoding="utf-8")
    assert "| on d | [0.1, 0.2] |" in written
    assert written.count("A note.") == 2
    assert (tmp_path / "new" / "explore.md").exists()


def test_one_part_alone_is_run_and_refuses_what_it_does_not_take(parts: list[dict[str, object]]) -> None:
    assert ran(evaluate, "interests", "--part", "explore") == 0
    assert parts == [{"seed": 0}]
    with pytest.raises(InvalidConfig, match="part explore takes no --data: leave it out"):
        ran(evaluate, "interests", "--part", "explore", "--data", "ml-100k")
    with pytest.raises(InvalidConfig, match="--seed must be ≥ 0"):
        ran(evaluate, "interests", "--seed", "-1")
    assert len(parts) == 1


def test_what_a_part_measures_is_there() -> None:
    for part, functions in PARTS.items():
        module = importlib.import_module(f"penchant.simulations.interests.{part}")
        assert all(callable(getattr(module, name)) for name in functions)


def test_a_part_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.simulations.interests_commands.PARTS", {"nothing": ("table",)})
    with pytest.raises(InvalidConfig, match="no part nothing: update it, or take another --part"):
        ran(evaluate, "interests")


# ------------------------------------------------------------------------------------------------------- profile


def test_a_profile_shows_interests_and_the_list_with_bands_and_reasons(
    finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert ran(profile, "--run", finished, "--user", "u1", "-k", "4", "--plot", tmp_path / "p.svg") == 0
    said = capsys.readouterr().out
    found = picture.person(RunFolder(finished), "u1", n=4)
    assert "User u1 of synthetic-24x40" in said
    assert all(one.title in said for one in found.items)
    assert all(f"{one.intensity:.2f} ± {1.96 * one.stddev:.2f}" in said for one in found.items)
    assert "nothing was released of items' strengths" in " ".join(said.split())
    assert "add/remove one profile" in " ".join(said.split())
    assert next(iter(found.shares)) in said
    words = (tmp_path / "p.svg").read_text(encoding="utf-8")
    ET.fromstring(words)
    assert all(one.title in words for one in found.items)
    assert ran(profile, "--run", finished, "--user", "u1", "--plot", tmp_path / "p.png") == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_shown_is_the_profiles_own(finished: Path) -> None:
    data = load(TINY)
    state, manifest = RunFolder(finished).read_model("co-occurrence")
    side = learner_of(manifest, data.catalogue).item_side(state)
    assert side is not None
    unknown = np.full(len(data.catalogue), 0.12**2, np.float32)
    for place in (0, 5):
        one = InterestProfile.of(side, data.catalogue, data.interactions.history(place))
        found = picture.person(RunFolder(finished), data.interactions.users[place], n=5)
        wanted = one.recommend(5)
        assert [shown.title for shown in found.items] == [data.catalogue.titles[r.position] for r in wanted]
        own = float(np.mean(one.strengths))
        assert found.mean == own
        terms = ItemTerms(own, np.zeros_like(unknown), unknown)
        strength = Intensities.of(one, terms).at([r.position for r in wanted])
        np.testing.assert_allclose([shown.intensity for shown in found.items], strength.mean)
        np.testing.assert_allclose([shown.stddev for shown in found.items], strength.stddev)
        assert all(0 < share <= 1 for shown in found.items for _, share in shown.reasons)
        assert all([s for _, s in i.reasons] == sorted((s for _, s in i.reasons), reverse=True) for i in found.items)


def test_a_release_of_strengths_gives_the_intensities_and_their_calibration(tmp_path: Path) -> None:
    asked = ["simulate", "--data", TINY, "--learner", "strengths", "--unit", "none", "--out", str(tmp_path / "run")]
    assert main([*asked, "-q"]) == 0
    data, folder = load(TINY), RunFolder(tmp_path / "run")
    state, manifest = folder.read_model("strengths")
    learner = learner_of(manifest, data.catalogue)
    assert isinstance(learner, Strengths)
    one = InterestProfile.of(learner.item_side(state), data.catalogue, data.interactions.history(4))
    found = picture.person(folder, data.interactions.users[4])
    assert found.caution == ""
    person = Intensities.of(one, learner.item_terms(state))
    strength = person.at([r.position for r in one.recommend(10)])
    expected = learner.calibration(state).strength(strength.mean)
    np.testing.assert_allclose([shown.intensity for shown in found.items], expected)
    np.testing.assert_allclose([shown.stddev for shown in found.items], strength.stddev)
    assert np.abs(expected - strength.mean).max() > 1e-4


def test_shares_sum_to_one_and_weigh_events_as_the_memories_do(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterestProfile, "share", property(lambda _: 0.5))  # it adapts, and that is not asked here
    data = load(TINY)
    history = data.interactions.history(3)
    found = picture.person(RunFolder(finished), "u3")
    np.testing.assert_allclose(sum(found.shares.values()), np.ones(len(history)))
    ages = np.arange(len(history) - 1, -1, -1.0)
    expected: dict[str, float] = {}
    for keep in (InterestConfig.long, InterestConfig.recent):  # each half of the taste
        weight = keep**ages * history.strengths
        for item, part in zip(history.items.tolist(), (0.5 * weight / weight.sum()).tolist(), strict=True):
            for topic in data.catalogue.topics[item]:
                expected[topic] = expected.get(topic, 0.0) + part / len(data.catalogue.topics[item])
    assert {topic: float(share[-1]) for topic, share in found.shares.items()} == pytest.approx(expected)


def test_a_picture_neither_shows_nor_names_a_sensitive_topic() -> None:
    catalogue = Catalogue(
        ids=tuple(f"i{k}" for k in range(12)),
        titles=tuple(f"Film {k}" for k in range(12)),
        topics=tuple(("Health", "Drama") if k < 3 else ("Health",) if k < 6 else ("Drama",) for k in range(12)),
        sensitive=frozenset({"Health"}),
    )
    vectors = np.abs(np.random.default_rng(0).standard_normal((12, 3))).astype(np.float32)
    learner = Cooccurrence(catalogue, CooccurrenceConfig(content=0.0))
    state = {"vectors": vectors, "popularity": np.ones(12, np.float32)}
    profile = InterestProfile(ItemSide(vectors, np.ones(12, np.float32), TasteConfig()), catalogue)
    path = picture._Path(profile)
    for item in (0, 4, 7, 4):
        profile.update(item)
        path.note()
    assert path.shares().keys() == {"Drama"}
    found = list(picture._listed(profile, learner, state, 8))
    for listed in found:
        assert "Health" not in listed.topics
        assert {what for what, _ in listed.reasons} <= {"Film 7", "popularity", "what you named"}
    assert min(sum(part for _, part in listed.reasons) for listed in found) < 0.95  # what is not named has its part


def test_changes_that_a_profile_noticed_are_marked(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = picture.person(RunFolder(finished), "u2")
    assert not before.drifts
    assert b"change noticed" not in picture.figure(before, "svg")

    class Alert(InterestProfile):
        def update(self, item: int, **event: Any) -> None:
            super().update(item, **event)
            if len(self.items) in (2, 4):
                self.drifts.append(Drift(len(self.items) - 1))

    monkeypatch.setattr(picture, "InterestProfile", Alert)
    found = picture.person(RunFolder(finished), "u2")
    assert found.drifts == [2, 4]
    assert b"change noticed" in picture.figure(found, "svg")


def test_a_title_that_looks_like_mathematics_or_a_name_too_long_is_drawn_as_it_is() -> None:
    shares = {f"A topic with a name of many words {k}": np.array([0.1]) for k in range(10)}
    listed = picture.Listed("$\\frac{ & <b> [/b] _x_$ " + "long " * 20, (), 0.4, 0.9, 0.1, [("$^{", 1.0)])
    odd = picture.Person("$u$", "d", "r", "A $note", 1, shares, [], 0.5, "no $", [listed])
    assert "$u$" in picture.figure(odd, "svg").decode()
    empty = picture.Person("u", "d", "r", "", 0, {}, [], None, "", [])
    assert b"nothing yet" in picture.figure(empty, "svg")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--user", "u001"), "no user 'u001' in synthetic-24x40; did you mean 'u"),
        (("--user", "u1", "--row", "cooccurrence"), "did you mean 'co-occurrence'?"),
        (("--user", "u1", "-k", "0"), "-k must be ≥ 1, not 0"),
        (("--user", "u1", "--plot", "p.pdf"), "--plot must end in .svg or .png, not 'p.pdf'"),
    ],
)
def test_what_is_not_there_or_cannot_be_drawn_is_refused(
    argv: tuple[str, ...], words: str, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidConfig) as refused:
        ran(profile, "--run", finished, *argv)
    assert words in str(refused.value)
    with pytest.raises(InvalidConfig, match="holds no finished run"):
        ran(profile, "--run", tmp_path, "--user", "u1")


def test_a_row_without_item_vectors_is_refused_with_what_to_do(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cooccurrence, "item_side", lambda *_: None)  # as FedAvg's models without a linear head
    with pytest.raises(InvalidConfig, match="released no item vectors to make a profile of: simulate with --learner"):
        picture.person(RunFolder(finished), "u1")
