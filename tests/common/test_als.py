"""Least squares from private statistics: what a device sends is at most 1 long, the server's step is exact."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from penchant.common.arrays import Arrays, Float64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.learners import newcomers
from penchant.common.learners.als import RAREST, Als, AlsConfig, automatic, positive, split, symmetric, upper
from penchant.common.learners.contract import State
from penchant.common.learners.cooccurrence import CooccurrenceConfig
from penchant.common.privacy import sums
from penchant.common.privacy.sums import Clip
from penchant.common.streams import Streams

N_ITEMS, K, D = 9, 6, 3
HEAD = np.array([0, 1, 2, 4, 5, 8], np.int32)
CATALOGUE = Catalogue(ids=tuple(map(str, range(N_ITEMS))), topics=tuple((f"t{i % 3}",) for i in range(N_ITEMS)))
HISTORIES = st.lists(st.integers(0, N_ITEMS - 1), max_size=14)
PEOPLE = [[0, 1, 4], [8, 2, 2, 5, 0], [3], [], [1, 7, 5, 4, 8, 2, 0], [6, 4]]
SETTINGS = {"exponent": 0.5, "stretch": 2, "clip": 0.7, "unseen": 0.2}


def learner(**settings: Any) -> Als:
    return Als(CATALOGUE, AlsConfig(start=CooccurrenceConfig(head=K, dims=D, window=3), **{**SETTINGS, **settings}))


def some_state(seed: int = 0, length: float = 1.0) -> State:
    random = np.random.default_rng(seed)
    return {
        "popularity": random.uniform(0, 1, N_ITEMS).astype(np.float32),
        "head": HEAD,
        "vectors": (length * random.standard_normal((N_ITEMS, D))).astype(np.float32),
    }


def sent(made: Als, state: State, history: list[int]) -> Arrays:
    return made.contribution(state, History.of(history), Streams(0))


def summed(made: Als, state: State, histories: list[list[int]], clip_norm: float = 1.0) -> Arrays:
    people = Interactions.of(histories, len(made.catalogue))
    return made.partial_sum(state, people, Clip(clip_norm), Streams)


def half(u: Float64) -> Float64:
    """The upper triangle of u uᵀ, what is off the diagonal times √2, spelled out."""
    return np.array([u[i] * u[j] * (1 if i == j else math.sqrt(2)) for i in range(len(u)) for j in range(i, len(u))])


def person(made: Als, state: State, history: list[int]) -> tuple[float, list[tuple[Float64, list[tuple[int, float]]]]]:
    """s, and each stretch's taste with its items' (place in the head, w): the definition, read aloud."""
    config, v = made.config, state["vectors"].astype(np.float64)
    own = [item for at, item in enumerate(history) if item in HEAD and item not in history[at + 1 :]]
    weight = {i: max(RAREST, float(state["popularity"][i])) ** -config.exponent for i in own}
    m = math.ceil(len(own) / config.stretch)
    stretches = []
    for t in range(m):
        items = [item for at, item in enumerate(own) if at * m // len(own) == t]
        assert 0 < len(items) <= config.stretch
        left = config.prior * np.eye(v.shape[1]) + config.unseen * sum(np.outer(v[i], v[i]) for i in HEAD)
        left = left + sum(weight[i] * np.outer(v[i], v[i]) for i in items)
        u = np.linalg.inv(left) @ sum(weight[i] * v[i] for i in items)
        u = u * min(1.0, config.clip / np.linalg.norm(u))
        stretches.append((u, [(HEAD.tolist().index(i), weight[i]) for i in items]))
    return min(1 / math.sqrt(sum(w**2 for w in weight.values()) or 1), 1 / max(m, 1)), stretches


class TestContribution:
    @given(history=HISTORIES, seed=st.integers(0, 50), stretch=st.integers(1, 5))
    @example(history=[1, 1, 0, 3, 1], seed=0, stretch=1)  # each at its latest; item 3 is not in the head
    def test_it_is_what_the_definition_says(self, history: list[int], seed: int, stretch: int) -> None:
        made, state = learner(stretch=stretch), some_state(seed)
        (alpha, beta, gamma), c = made.parts, made.config.clip
        scale, stretches = person(made, state, history)
        gram, items = np.zeros(6), np.zeros((K, 6 + D))
        for u, own in stretches:
            gram += alpha * scale * half(u) / c**2
            for place, weight in own:
                items[place] = scale * weight * np.concatenate([beta * half(u) / c**2, gamma * u / c])
        found = sent(made, state, history)
        np.testing.assert_allclose(found["gram"], gram, atol=1e-6)
        np.testing.assert_allclose(found["items"], items, atol=1e-6)

    @given(
        history=HISTORIES,
        seed=st.integers(0, 50),
        length=st.floats(0, 1e6),
        stretch=st.integers(1, 9),
        exponent=st.floats(0, 3),
        clip=st.floats(1e-3, 1e3),
        prior=st.floats(1e-6, 10),
    )
    @example(history=[0, 1, 2, 4, 5, 8], seed=1, length=1e-3, stretch=1, exponent=0.0, clip=1e-3, prior=1e-6)
    def test_its_length_is_at_most_one_whatever_the_history(
        self, history: list[int], seed: int, length: float, **settings: Any
    ) -> None:
        found = sent(learner(**settings), some_state(seed, length), history)
        assert sums.norm(found) <= 1 + 1e-6

    def test_no_smaller_bound_would_do(self) -> None:
        state = {**some_state(), "popularity": np.ones(N_ITEMS, np.float32)}
        assert sums.norm(sent(learner(clip=1e-3), state, [4])) == pytest.approx(1.0, abs=1e-6)

    @pytest.mark.parametrize("stretch", [1, 2, 9])
    def test_each_part_keeps_to_its_share_and_long_histories_reach_that_of_items(self, stretch: int) -> None:
        made = learner(stretch=stretch, clip=1e-3, exponent=2.0)  # every taste is cut
        state, (alpha, beta, gamma) = some_state(3), made.parts
        found = sent(made, state, [0, 1, 2, 4, 5, 8])
        squares, rest = found["items"][:, :6].astype(np.float64), found["items"][:, 6:].astype(np.float64)
        assert np.linalg.norm(found["gram"]) <= alpha * (1 + 1e-6)
        assert np.linalg.norm(squares) == pytest.approx(beta, rel=1e-5)
        assert np.linalg.norm(rest) == pytest.approx(gamma, rel=1e-5)

    def test_many_stretches_keep_the_gram_to_its_share(self) -> None:
        made = learner(stretch=1, clip=1e-3, exponent=0.0)
        state = {**some_state(), "vectors": np.ones((N_ITEMS, D), np.float32)}  # all tastes alike, so their squares add
        found = sent(made, state, [0, 1, 2, 4, 5, 8])
        assert np.linalg.norm(found["gram"]) == pytest.approx(made.parts[0], rel=1e-5)

    @given(histories=st.lists(HISTORIES, min_size=1, max_size=5), data=st.data(), seed=st.integers(0, 20))
    def test_adding_or_removing_a_person_moves_a_sum_by_at_most_one(
        self, histories: list[list[int]], data: st.DataObject, seed: int
    ) -> None:
        made, state = learner(clip=0.05), some_state(seed)
        gone = data.draw(st.integers(0, len(histories) - 1))
        whole, fewer = (summed(made, state, h) for h in (histories, histories[:gone] + histories[gone + 1 :]))
        moved = sums.norm({name: whole[name] - fewer[name] for name in whole})
        assert moved <= 1 + 1e-6
        assert (moved > 0) == bool(set(histories[gone]) & set(HEAD.tolist()))

    def test_the_shares_are_those_that_lose_least(self) -> None:
        for a, c in ((0.1, 1.0), (0.5, 0.2)):
            shares = np.square(learner(unseen=a, clip=c).parts)
            assert shares.sum() == pytest.approx(1.0)
            variance = np.array([a**2 * c**4 / 2, c**4 / 2, c**2])
            least = (variance / shares).sum()
            for moved in np.eye(3) - 1 / 3:
                assert (variance / (shares + 1e-3 * moved)).sum() > least
                assert (variance / (shares - 1e-3 * moved)).sum() > least


class TestHalfVectors:
    @given(u=arrays(np.float64, st.integers(1, 8), elements=st.floats(-1e3, 1e3)))
    def test_the_norm_of_a_square_is_the_squared_length(self, u: Float64) -> None:
        found = upper(np.outer(u, u))
        np.testing.assert_allclose(found, half(u))
        assert np.linalg.norm(found) == pytest.approx(float(u @ u), rel=1e-9, abs=1e-150)
        plain = np.outer(u, u)[np.triu_indices(len(u))]
        if np.count_nonzero(np.abs(u) > 1e-3) > 1:
            assert np.linalg.norm(plain) < np.linalg.norm(found)  # without the √2 some of the budget would lie idle

    def test_a_matrix_comes_back_from_its_half(self) -> None:
        matrices = np.random.default_rng(0).standard_normal((4, 5, 5))
        matrices += np.swapaxes(matrices, -1, -2)
        np.testing.assert_allclose(symmetric(upper(matrices), 5), matrices)
        np.testing.assert_allclose(np.linalg.norm(upper(matrices), axis=-1), np.linalg.norm(matrices, axis=(-1, -2)))

    def test_the_projection_is_positive_nearest_and_leaves_what_is_positive(self) -> None:
        random = np.random.default_rng(1)
        noisy = symmetric(random.standard_normal((6, 10)), 4)
        found = positive(noisy)
        assert np.linalg.eigvalsh(noisy).min() < -0.5
        assert np.linalg.eigvalsh(found).min() > -1e-12
        np.testing.assert_allclose(positive(found), found, atol=1e-12)
        for _ in range(20):  # no other positive matrix is nearer
            root = random.standard_normal((6, 4, 4))
            other = found + random.uniform(0, 1) * (root @ np.swapaxes(root, -1, -2) - found)
            assert (np.linalg.norm(other - noisy, axis=(1, 2)) >= np.linalg.norm(found - noisy, axis=(1, 2))).all()


class TestSplit:
    @given(mu=st.floats(0.01, 10), sweeps=st.integers(1, 9), counts=st.floats(0.01, 0.4), matrix=st.floats(0.01, 0.4))
    def test_all_sums_together_are_exactly_mu(self, mu: float, sweeps: int, counts: float, matrix: float) -> None:
        plan = split(mu, sweeps, counts, matrix)
        assert [(spec.name, spec.rounds, spec.clip_norm) for spec in plan] == [
            ("counts", 1, 1.0),
            ("matrix", 1, 1.0),
            ("statistics", sweeps, 1.0),
        ]
        spent = [spec.rounds / spec.noise_multiplier**2 / mu**2 for spec in plan]
        assert spent == pytest.approx([counts, matrix, 1 - counts - matrix])
        assert math.fsum(spent) == pytest.approx(1.0, rel=1e-12)

    @pytest.mark.parametrize(
        ("mu", "sweeps", "shares"),
        [(0, 1, ()), (math.inf, 1, ()), (math.nan, 1, ()), (1, 0, ()), (1, 1, (0.5, 0.5)), (1, 1, (0.0, 0.5))],
    )
    def test_a_budget_or_share_out_of_range_is_refused(self, mu: float, sweeps: int, shares: Any) -> None:
        with pytest.raises(InvalidConfig, match="sweeps" if sweeps < 1 else "mu"):
            split(mu, sweeps, *shares)


class TestAutomatic:
    @given(n_users=st.integers(2, 10**7), mu=st.floats(0.01, 10))
    def test_settings_know_the_noise_of_their_sums_which_spend_mu(self, n_users: int, mu: float) -> None:
        config, plan = automatic(n_users, mu)
        assert math.sqrt(sum(s.rounds / s.noise_multiplier**2 for s in plan)) == pytest.approx(mu, rel=1e-12)
        stddev = (config.start.counts_stddev, config.start.noise_stddev, config.noise_stddev)
        assert stddev == tuple(s.noise_multiplier for s in plan)
        assert 50 <= config.start.head <= 1600
        assert 8 <= config.start.dims <= 16

    def test_more_people_or_budget_make_it_larger_and_people_times_budget_decides(self) -> None:
        made = [automatic(n, 1.0) for n in (10**3, 10**4, 10**6)]
        sizes = [(config.start.head, config.start.dims, plan[2].rounds) for config, plan in made]
        assert sizes == sorted(sizes)
        assert len(set(sizes)) == 3
        assert automatic(500, 2.0)[0].start.head == automatic(1000, 1.0)[0].start.head

    def test_an_exact_sum_has_no_noise_anywhere(self) -> None:
        config, plan = automatic(610, math.inf)
        assert [spec.noise_multiplier for spec in plan] == [0.0, 0.0, 0.0]
        assert config.start.noise_stddev == config.noise_stddev == 0.0


class TestSweep:
    def test_without_noise_it_is_the_least_squares_step(self) -> None:
        made, state = learner(), some_state(2)
        after = made.apply(state, summed(made, state, PEOPLE), 6.0)["vectors"][HEAD].astype(np.float64)
        a, b, gram = np.zeros((K, D, D)), np.zeros((K, D)), np.zeros((D, D))
        for history in PEOPLE:
            scale, stretches = person(made, state, history)
            for u, own in stretches:
                gram += scale * np.outer(u, u)
                for place, weight in own:
                    a[place] += scale * weight * np.outer(u, u)
                    b[place] += scale * weight * u
        left = a + made.config.unseen * gram + made.config.ridge * np.eye(D)
        expected = np.array([np.linalg.solve(left[i], b[i]) for i in range(K)])
        np.testing.assert_allclose(after, expected / math.sqrt((expected**2).sum() / K), atol=1e-5)
        assert np.square(after).sum() == pytest.approx(K, rel=1e-5)

    def test_the_objective_falls_with_every_sweep(self) -> None:
        # a small ridge and prior: releases are scaled to length 1, which only these two see
        made = learner(clip=30.0, ridge=1e-4, prior=1e-4, stretch=4)
        random = np.random.default_rng(0)
        histories = [random.permutation(N_ITEMS)[: random.integers(2, 7)].tolist() for _ in range(40)]

        def objective(state: State) -> float:
            v, total = state["vectors"][HEAD].astype(np.float64), 0.0
            for history in histories:
                scale, stretches = person(made, state, history)
                for u, own in stretches:
                    lost = sum(weight * (1 - u @ v[place]) ** 2 for place, weight in own)
                    total += scale * (lost + made.config.unseen * float(((v @ u) ** 2).sum()))
            return total

        state, found = some_state(4), []
        for _ in range(6):
            found.append(objective(state))
            state = made.apply(state, summed(made, state, histories, np.inf), 40.0)
        assert all(after <= before + 1e-4 for before, after in pairwise(found))
        assert found[-1] < 0.9 * found[0]

    def test_with_noise_it_is_nearer_when_it_knows_how_much(self) -> None:
        state, stddev = some_state(5), 4.0
        histories = [random.permutation(HEAD)[:3].tolist() for random in map(np.random.default_rng, range(300))]
        exact = summed(learner(), state, histories)
        target = learner().apply(state, exact, 300.0)["vectors"][HEAD]

        def error(told: float, seed: int) -> float:
            random = np.random.default_rng(seed)
            noisy = {n: (exact[n] + random.normal(0, stddev, exact[n].shape)).astype(np.float32) for n in sorted(exact)}
            after = learner(noise_stddev=told).apply(state, noisy, 300.0)["vectors"][HEAD]
            return float(np.square(after - target).sum())

        seeds = range(30)
        assert np.mean([error(stddev, s) for s in seeds]) < 0.8 * np.mean([error(0.0, s) for s in seeds])

    def test_items_outside_the_head_follow_their_content(self) -> None:
        made, state = learner(), some_state(6)
        after = made.apply(state, summed(made, state, PEOPLE), 6.0)["vectors"]
        known = np.isin(np.arange(N_ITEMS), HEAD)
        np.testing.assert_allclose(after, newcomers.from_content(after, known, CATALOGUE.content), atol=1e-6)
        assert np.abs(after[~known]).min() > 0

    def test_a_matrix_of_noise_leaves_one_direction_to_start_from(self) -> None:
        made = learner()
        state = {"popularity": np.ones(N_ITEMS, np.float32), "head": HEAD, "floor": np.array(0.1, np.float32)}
        after = made.apply(state, {"matrix": np.zeros(K * (K + 1) // 2, np.float32)}, 6.0)
        np.testing.assert_array_equal(after["vectors"][HEAD], np.ones((K, 1)))
        assert made.shapes(after) == {"gram": (1,), "items": (K, 2)}


def test_two_tastes_come_apart_within_one_release() -> None:
    random = np.random.default_rng(0)
    histories = [(random.permutation(10) + 10 * (user % 2)).tolist() for user in range(400)]
    start = CooccurrenceConfig(head=20, dims=4, window=5, noise_stddev=0.3)
    made = Als(Catalogue(ids=tuple(map(str, range(20)))), AlsConfig(start=start, noise_stddev=0.3))
    state = made.init(Streams(0))
    for _ in range(4):
        total = summed(made, state, histories)
        noisy = {n: (total[n] + random.normal(0, 0.3, total[n].shape)).astype(np.float32) for n in sorted(total)}
        state = made.apply(state, noisy, 400.0)
    scores = made.scores(state, Interactions.of([[0, 1], [10, 11]], 20))
    assert scores[0, 2:10].min() > scores[0, 10:].max()
    assert scores[1, 12:].min() > scores[1, :10].max()


@pytest.mark.parametrize(
    "settings",
    [
        {"exponent": -0.1},
        {"stretch": 0},
        {"clip": 0.0},
        {"clip": math.inf},
        {"unseen": 0.0},
        {"ridge": math.nan},
        {"prior": 0.0},
        {"noise_stddev": -1.0},
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(settings))):
        AlsConfig(**settings)
