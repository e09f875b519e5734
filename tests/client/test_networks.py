"""Releases that are a network: lists in PyTorch's order, with all else of the SDK as for other releases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.client import Client
from penchant.client._releases import Shelf
from penchant.common import config
from penchant.common.arrays import Float32
from penchant.common.artifacts.bundle import Bundle, catalogue_bytes
from penchant.common.artifacts.release import Release
from penchant.common.catalogue import Catalogue
from penchant.common.errors import MalformedArtifact
from penchant.common.interactions import Interactions
from penchant.common.interests.exploration import Diverse, EpsilonGreedy, Greedy, LongTail, Policy, Thompson, UpperBound
from penchant.common.learners.contract import State
from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig
from penchant.common.learners.neural.models import MODELS, ModelConfig
from tests.client.apps import CATALOGUE, NOW, Operator

NETWORKS = [name for name in MODELS if name != "mf"]
FILMS = replace(CATALOGUE, retired=frozenset({"film:8", "film:44"}))
SEEN = ["film:3", "film:31", "film:7", "film:50"]


@dataclass
class Network:
    """A learner, and a state of it: random weights so large that the order of a list is clear."""

    learner: FedAvg
    state: State

    @classmethod
    def of(cls, name: str, seed: int = 0, catalogue: Catalogue = FILMS) -> Network:
        learner = FedAvg(catalogue, FedAvgConfig(model=ModelConfig(name=name, dim=8, hidden=12, max_length=6)))
        random = np.random.default_rng(seed)
        shapes = learner._shapes.items()
        return cls(learner, {name: (0.4 * random.standard_normal(of)).astype(np.float32) for name, of in shapes})

    @property
    def release(self) -> dict[str, Any]:
        """What an operator's `bundle` and `publish` take."""
        settings = config.encode(self.learner.config)
        return {"model": Release(self.state, None).to_bytes(), "learner": "fedavg", "settings": settings}

    def scores(self, items: list[str]) -> Float32:
        places = [self.learner.catalogue.index[item] for item in items]
        row: Float32 = self.learner.scores(self.state, Interactions.of([places], len(self.learner.catalogue)))[0]
        return row

    def ranked(self, items: list[str], without: list[str], n: int = 10) -> list[str]:
        scores = self.scores(items)
        scores[[self.learner.catalogue.index[item] for item in without]] = -np.inf
        return [self.learner.catalogue.ids[int(i)] for i in np.argsort(-scores, kind="stable")[:n]]


class World:
    """An operator whose first release is a network, and one device."""

    def __init__(self, tmp_path: Path, name: str = "gru") -> None:
        self.folder, self.state = tmp_path / "published", tmp_path / "state"
        self.network = Network.of(name)
        self.operator = Operator(distribution=self.folder.as_uri(), catalogue=FILMS)
        self.bundle = self.operator.bundle(tmp_path / "films.bundle", **self.network.release)

    def device(self) -> Client:
        return Client.open(self.state, bundle=self.bundle, now_ms=lambda: NOW)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def me(world: World) -> Iterator[Client]:
    with world.device() as client:
        for item in SEEN:
            client.observe(item, "watch")
        yield client


def shown(me: Client, n: int = 10, **options: Any) -> list[str]:
    return [one.item for one in me.recommend(n, **options)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_list_is_pytorchs_without_what_was_seen_or_retired(name: str, tmp_path: Path) -> None:
    world, own = World(tmp_path, name), list[str]()
    with world.device() as me:
        for item in [*SEEN, "film:0", "film:59", "film:12"]:  # in the end more than it reads
            me.observe(item, "watch")
            own.append(item)
            assert shown(me, 60) == world.network.ranked(own, own, 60 - 2 - len(own))
        me.observe("film:new", "watch")  # no item of this catalogue
        assert shown(me, 10) == world.network.ranked(own, own)
    with world.device() as me:
        assert shown(me, 10) == world.network.ranked(own, own)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_new_install_has_a_whole_list_that_says_it_knows_nothing(name: str, tmp_path: Path) -> None:
    with World(tmp_path, name).device() as me:
        found = me.recommend(100)
        assert len(found) == 58
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        assert len({one.score for one in found}) > 50  # not in the order of the catalogue
        assert me.explain(found[0].item).sentence().startswith("Nothing is known of you yet")
        assert len(me.interests().topics) == 3


def test_what_the_person_dislikes_is_gone_and_nothing_that_the_network_reads(world: World, me: Client) -> None:
    before = shown(me, 56)
    me.feedback(before[0], "dislike")
    assert shown(me, 56) == before[1:]
    me.feedback(before[1], "like")
    assert shown(me, 10) == world.network.ranked([*SEEN, before[1]], [*SEEN, *before[:2]])


def test_what_the_person_refuses_is_hidden_until_it_is_allowed(world: World, me: Client) -> None:
    before = shown(me, 54)
    me.feedback(before[0], "not_this_item")
    assert shown(me, 53) == before[1:]
    me.allow(before[0])
    topic = me.feedback(before[0], "not_this_topic")
    assert shown(me, 60) == [item for item in before if topic not in FILMS.topics[FILMS.index[item]]]
    me.allow(topic)
    assert shown(me, 54) == before == world.network.ranked(SEEN, SEEN, 54)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_reason_is_what_the_score_would_lose_without_it(name: str, tmp_path: Path) -> None:
    world = World(tmp_path, name)
    with world.device() as me:
        for item in SEEN:
            me.observe(item, "watch")
        for item in shown(me, 5):
            found, place = me.explain(item), FILMS.index[item]
            assert found.basis == "without"
            score = world.network.scores(SEEN)[place]
            assert found.score == pytest.approx(score, rel=1e-4, abs=1e-5)
            lost = {own: score - world.network.scores([other for other in SEEN if other != own])[place] for own in SEEN}
            wanted = sorted((own for own in SEEN if lost[own] > 1e-5), key=lambda own: -lost[own])[:3]
            assert [reason.item for reason in found.reasons] == wanted
            for reason in found.reasons:
                assert reason.part == pytest.approx(lost[reason.item], rel=1e-3, abs=1e-5)
            assert "Because you chose" not in found.sentence()


def test_interests_follow_the_events_and_are_the_same_after_a_restart(world: World) -> None:
    comedies = [f"film:{i}" for i in range(1, 31, 3)]
    with world.device() as me:
        general = {one.topic: one.share for one in me.interests().topics}
        for item in comedies:
            me.observe(item, "like")
        found, listed = me.interests(), shown(me)
        assert found.n_events == len(comedies)
        assert found.topics[0].topic == "Comedy"
        assert found.topics[0].share > general["Comedy"] + 0.05  # a random network predicts the others
        assert all(one.low <= one.share <= one.high for one in found.topics)
    with world.device() as me:
        assert me.interests() == found
        assert shown(me) == listed


@pytest.mark.parametrize("policy", [Thompson(strength=0), UpperBound(strength=0), EpsilonGreedy(chance=0), Greedy()])
def test_exploring_not_at_all_is_the_networks_list(policy: Policy, world: World, me: Client) -> None:
    assert shown(me, policy=policy) == world.network.ranked(SEEN, SEEN)


@pytest.mark.parametrize(
    "policy",
    [
        Thompson(strength=1.0),
        UpperBound(strength=1.0),
        EpsilonGreedy(chance=0.5),
        Diverse(Greedy(), weight=0.7),
        LongTail(Greedy(), head=np.arange(60) < 30, at_least=9),
    ],
)
def test_policies_move_a_networks_list_and_leave_its_best_above_most(policy: Policy, world: World, me: Client) -> None:
    lists = [shown(me, policy=policy, random=np.random.default_rng(seed)) for seed in range(20)]
    best, rest = world.network.ranked(SEEN, SEEN, 27), set(world.network.ranked(SEEN, SEEN, 54)[27:])
    assert any(one != best[:10] for one in lists)
    assert all(len(set(one)) == 10 and not {*SEEN, *FILMS.retired} & set(one) for one in lists)
    assert sum(len(rest & set(one)) for one in lists) < 100  # of 200: uncertainty is on the scale of the scores


def harmed(network: Network) -> dict[str, State]:
    state = network.state
    return {
        "wrong shape": {**state, "cell.weight_hh_l0": state["cell.weight_hh_l0"][:, 1:]},
        "missing": {name: values for name, values in state.items() if name != "out.bias"},
        "not a number": {**state, "out.bias": np.full_like(state["out.bias"], np.nan)},
        "too large": {**state, "item.weight": np.full_like(state["item.weight"], 3e38)},
        "another type": {**state, "out.weight": state["out.weight"].astype(np.float16)},
    }


@pytest.mark.parametrize("harm", harmed(Network.of("gru")))
def test_a_release_that_does_not_fit_its_network_is_not_taken_in(harm: str, world: World, me: Client) -> None:
    before = shown(me)
    bad = Network(world.network.learner, harmed(world.network)[harm])
    world.operator.publish(world.folder, 2, **bad.release)
    found = me.sync()
    assert (found.release, found.version) == ("failed", 1)
    assert found.why
    assert shown(me) == before
    better = Network.of("transformer", seed=5)
    world.operator.publish(world.folder, 3, **better.release)
    assert me.sync().version == 3
    assert shown(me) == better.ranked(SEEN, SEEN)


@pytest.mark.parametrize("harm", harmed(Network.of("gru")))
def test_one_on_the_disk_that_cannot_be_scored_with_gives_way_to_the_last_good_one(
    harm: str, world: World, tmp_path: Path
) -> None:
    here = Shelf(tmp_path / "releases", world.operator.app, lambda: Bundle.read(world.bundle), key=b"d" * 32)
    listed = catalogue_bytes(FILMS)
    good, bad = Network.of("lstm", seed=2), Network(world.network.learner, harmed(world.network)[harm])
    for version, network in ((2, good), (3, bad)):
        release = network.release
        here._write(world.operator.offer(version, **release), listed, release["model"])  # as a version without checks
    found = here.current()
    assert (found.manifest.version, found.damaged) == (2, 1)


def test_a_bundle_that_does_not_fit_its_network_is_a_typed_error(world: World, tmp_path: Path) -> None:
    bad = Network(world.network.learner, harmed(world.network)["wrong shape"])
    bundle = world.operator.bundle(tmp_path / "bad.bundle", **bad.release)
    with pytest.raises(MalformedArtifact, match="weight_hh_l0"):
        Client.open(tmp_path / "other", bundle=bundle)


def test_a_person_goes_from_vectors_to_a_network_and_back_with_all_their_events(world: World, me: Client) -> None:
    network = shown(me)
    world.operator.publish(world.folder, 2, seed=1)  # item vectors
    assert me.sync().version == 2
    assert me.explain("film:20").basis == "sum"
    assert shown(me) != network
    world.operator.publish(world.folder, 3, **world.network.release)
    assert me.sync().version == 3
    assert shown(me) == network
    assert me.interests().n_events == len(SEEN)


def test_a_network_that_has_no_finite_score_after_some_history_leaves_the_list_to_the_linear_model(
    me: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = me._person.profile
    assert profile.network is not None
    n = len(profile.catalogue)
    monkeypatch.setattr(type(profile.network), "scores_of", lambda self, person: np.full(n, np.nan, np.float32))
    monkeypatch.setattr(type(profile.network), "score_of", lambda self, person, item: float("nan"))
    me.observe("film:3", "like")
    found = me.recommend(10)
    assert len(found) == 10
    assert all(np.isfinite(one.score) for one in found)
    assert np.isfinite(profile.score(5))
