"""A network beside the linear strengths: NumPy reads what torch trained, and the rounds find what is not linear."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from penchant.common.arrays import Arrays, Float64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.interests import correction
from penchant.common.interests.correction import KNOWN, Correction
from penchant.common.interests.intensity import Intensities, ItemTerms, outcomes
from penchant.common.learners.contract import State
from penchant.common.learners.cooccurrence import CooccurrenceConfig
from penchant.common.learners.neural.fedavg import ServerStep
from penchant.common.learners.neural.strengths import NeuralStrengths, NeuralStrengthsConfig, automatic, corrected
from penchant.common.privacy import gaussian
from penchant.common.privacy.sums import Clip
from penchant.common.streams import Streams

N_ITEMS, N_PEOPLE = 24, 40
CATALOGUE = Catalogue(ids=tuple(f"i{k}" for k in range(N_ITEMS)), topics=tuple((f"t{k % 3}",) for k in range(N_ITEMS)))
START = CooccurrenceConfig(head=8, dims=2)


def learner(catalogue: Catalogue = CATALOGUE, **fields: Any) -> NeuralStrengths:
    return NeuralStrengths(catalogue, NeuralStrengthsConfig(start=START, **fields))


def before_updates(made: NeuralStrengths) -> State:
    """A state whose item terms say nothing, of whom updates are asked next."""
    random = np.random.default_rng(5)
    state = {
        "popularity": np.ones(N_ITEMS, np.float32),
        "head": np.arange(8, dtype=np.int32),
        "floor": np.array(0.1, np.float32),
        "vectors": random.standard_normal((N_ITEMS, 2)).astype(np.float32),
    }
    after = made.apply(state, {"strengths": np.zeros((8, 2))}, N_PEOPLE)
    assert not after["terms"].any()
    return after


def people(gap: float) -> Interactions:
    """Who like what has topic t0 stronger by `gap`, whoever they are and however strongly they like things."""
    random = np.random.default_rng(2)
    rows = [random.choice(N_ITEMS, 10, replace=False) for _ in range(N_PEOPLE)]
    found = Interactions.of([row.tolist() for row in rows], N_ITEMS)
    own = np.repeat(random.uniform(0.3, 0.6, N_PEOPLE), 10)
    strengths = own + gap * (found.items % 3 == 0) + random.normal(0, 0.02, len(found))
    return replace(found, strengths=np.clip(strengths, 0, 1).astype(np.float32))


def trained(made: NeuralStrengths, data: Interactions) -> State:
    state = before_updates(made)
    while "last.bias" in made.shapes(state):
        total: Arrays = made.partial_sum(state, data, Clip(math.inf), lambda _: Streams(0))
        state = made.apply(state, {name: v.astype(np.float32) for name, v in total.items()}, data.n_users)
    return state


def random_weights(n_features: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = correction.shapes(n_features, 4, 5)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_device_without_torch_reads_the_network_as_it_was_trained() -> None:
    random = np.random.default_rng(1)
    content = random.standard_normal((9, 6)).astype(np.float32)
    known = random.standard_normal((4, KNOWN))
    weights, items = random_weights(6), np.array([8, 0, 3, 3])
    tensors = {name: torch.from_numpy(values) for name, values in weights.items()}
    expected = corrected(tensors, torch.from_numpy(content[items]), torch.from_numpy(known.astype(np.float32)))
    found = Correction(content, weights).at(items, known)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert np.ptp(found) > 0.1


def test_a_network_that_nobody_trained_corrects_nothing() -> None:
    made = learner()
    state = before_updates(made)
    own = people(0.3).history(0)
    side, terms = made.item_side(state), made.item_terms(state)
    network = made.correction(state)
    assert network is not None
    plain, with_it = (Intensities(side, terms, own.items, own.strengths, correction=c) for c in (None, network))
    np.testing.assert_array_equal(with_it.at([1, 5]).mean, plain.at([1, 5]).mean)
    np.testing.assert_array_equal(with_it.own().mean, plain.own().mean)
    other = replace(network, weights=random_weights(made.content.shape[1]))
    moved = Intensities(side, terms, own.items, own.strengths, correction=other)
    assert np.abs(moved.at([1, 5]).mean - plain.at([1, 5]).mean).max() > 0.01


def test_what_it_is_trained_on_is_what_it_will_read_of_an_item_not_had() -> None:
    made = learner()
    state = before_updates(made)
    likes, unsure = np.linspace(-0.1, 0.1, N_ITEMS), np.full(N_ITEMS, 0.01)
    side, terms = made.item_side(state), ItemTerms(0.5, likes.astype(np.float32), unsure.astype(np.float32))
    items, strengths = [4, 9, 4, 17], np.array([0.3, 0.9, 0.5, 0.7])
    known, off = Intensities(side, terms, items, strengths).examples()
    for k, item in enumerate(items):
        rest = [at for at in range(4) if items[at] != item]
        without = Intensities(side, terms, [items[at] for at in rest], strengths[rest])
        found = without._from_all(np.array([item]))
        np.testing.assert_allclose(known[k], without._known(found)[0], atol=1e-9)
        assert off[k] == pytest.approx(strengths[k] - found.mean[0], abs=1e-9)


def test_rounds_come_in_the_order_of_the_plan() -> None:
    made = learner(rounds=3)
    state, asked = made.init(Streams(0)), []
    for _ in range(7):
        shapes = made.shapes(state)
        asked.append("update" if "last.bias" in shapes else next(iter(shapes)))
        total: Arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        state = made.apply(state, total, 10.0)
    assert asked == ["counts", "matrix", "strengths", "update", "update", "update", "outcomes"]


def test_the_rounds_find_what_content_says_of_strength() -> None:
    made = learner(rounds=40, lr=0.05, server=ServerStep(optimizer="momentum", lr=1.0))
    for gap, lowest, highest in ((0.3, 0.12, 0.36), (0.0, -0.05, 0.05)):
        state = trained(made, people(gap))
        side, terms, network = made.item_side(state), made.item_terms(state), made.correction(state)
        nobody = Intensities(side, terms, [], [], correction=network).at(list(range(6))).mean
        apart = nobody[[0, 3]].mean() - nobody[[1, 2, 4, 5]].mean()
        assert lowest < apart < highest


def test_outcomes_are_counted_against_the_expectation_with_the_network_in() -> None:
    made = learner(rounds=2)
    state: State = {**before_updates(made), **fitting(made), "updates": np.array(2)}
    own = people(0.3).history(0)
    found = made.contribution(state, own, Streams(0))["outcomes"]
    side, terms, network = made.item_side(state), made.item_terms(state), made.correction(state)
    for one, same in ((network, True), (None, False)):
        person = Intensities(side, terms, own.items, own.strengths, correction=one)
        raw = outcomes(person.own().mean, own.strengths, 20, 5)
        assert np.allclose(found, raw / np.linalg.norm(raw), atol=1e-6) == same


def fitting(made: NeuralStrengths) -> dict[str, np.ndarray]:
    shapes = correction.shapes(made.content.shape[1], made.neural.encoded, made.neural.hidden)
    random = np.random.default_rng(3)
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_corrupt_strength_takes_nothing_else_with_it() -> None:
    made = learner()
    state = before_updates(made)
    good = History.of([3, 5])
    bad = replace(History.of([3, 5, 7, 9]), strengths=np.array([1.0, 1.0, math.nan, 7.0], np.float32))
    one, clean = (made.contribution(state, own, Streams(0)) for own in (bad, good))
    assert all(np.array_equal(one[name], clean[name]) for name in clean)
    assert any(values.any() for values in clean.values())


def test_in_a_larger_catalogue_old_items_are_corrected_as_before_and_new_ones_by_their_content() -> None:
    made = learner()
    state = {**before_updates(made), **fitting(made), "server/m/encoder.weight": fitting(made)["encoder.weight"]}
    ids, topics = ("twin", *CATALOGUE.ids, "new"), (("t1",), *CATALOGUE.topics, ("other topic",))
    grown = learner(Catalogue(ids=ids, topics=topics))
    adopted = grown.adopt(state, CATALOGUE)
    assert {n: adopted[n].shape for n in grown.shapes(adopted)} == dict(grown.shapes(adopted))
    assert adopted["server/m/encoder.weight"].shape == adopted["encoder.weight"].shape
    known: Float64 = np.tile(np.linspace(-1, 1, KNOWN), (N_ITEMS, 1))
    before, after = made.correction(state), grown.correction(adopted)
    assert before is not None
    assert after is not None
    expected = before.at(np.arange(N_ITEMS), known)
    np.testing.assert_allclose(after.at(np.arange(N_ITEMS) + 1, known), expected, atol=1e-5)
    assert after.at(np.array([0]), known[:1])[0] == pytest.approx(expected[1], abs=1e-5)
    assert np.ptp(expected) > 0.01


def test_the_sums_of_a_plan_cost_what_was_asked_for() -> None:
    mu = gaussian.mu_of(8.0, 1e-5)
    config, specs = automatic(943, mu)
    assert [spec.name for spec in specs][-3:] == ["strengths", "update", "outcomes"]
    assert specs[-2].rounds == config.rounds
    assert sum(spec.rounds * spec.noise_multiplier**-2 for spec in specs) == pytest.approx(mu**2)
    assert config.strengths_stddev == specs[-3].noise_multiplier
    assert config.outcomes_stddev == specs[-1].noise_multiplier
    assert all(spec.noise_multiplier == 0 for spec in automatic(943, math.inf)[1])
    with pytest.raises(InvalidConfig, match="share"):
        automatic(943, mu, share=1.0)


@pytest.mark.parametrize(
    "fields", [{"encoded": 0}, {"hidden": 2.5}, {"rounds": 0}, {"steps": 0}, {"lr": math.nan}, {"midpoint": 2.0}]
)
def test_a_setting_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(fields))):
        NeuralStrengthsConfig(**fields)
