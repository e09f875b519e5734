"""The windowed co-occurrence sum: entries where the definition says, length 1, noise dropped, signal kept."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement, groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penchant.common.arrays import Float32, Float64, Int32, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.learners import cooccurrence
from penchant.common.learners.contract import State
from penchant.common.learners.cooccurrence import (
    Cooccurrence,
    CooccurrenceConfig,
    TransitionConfig,
    automatic,
    pair_keys,
    split,
    transition_keys,
)
from penchant.common.privacy.sums import Clip
from penchant.common.streams import Streams
from penchant.common.taste import TasteConfig

N_ITEMS = 9
HEAD = np.array([1, 2, 4, 5, 8], np.int32)
HISTORIES = st.lists(st.integers(0, N_ITEMS - 1), max_size=14)
WINDOWS = st.integers(1, 16)


def catalogue(n_items: int = N_ITEMS) -> Catalogue:
    return Catalogue(ids=tuple(str(i) for i in range(n_items)))


PLAIN = {"whiten": 0.0, "even": 0.0, "tail": 0.0}
"""Vectors as they come out of the matrix, up to one factor for all."""


def learner(n_items: int = N_ITEMS, **settings: Any) -> Cooccurrence:
    return Cooccurrence(catalogue(n_items), CooccurrenceConfig(**{"head": len(HEAD), **PLAIN, **settings}))


def with_head(head: Int32 | Int64 = HEAD, n_items: int = N_ITEMS, popularity: Float32 | None = None) -> State:
    same = np.ones(n_items, np.float32)
    return {
        "popularity": same if popularity is None else popularity,
        "head": head.astype(np.int32),
        "floor": np.array(0.1, np.float32),
    }


def contribution(made: Cooccurrence, state: State, history: list[int]) -> Float64:
    (values,) = made.contribution(state, History.of(history), Streams(0)).values()
    return values.astype(np.float64)


def summed(made: Cooccurrence, state: State, histories: list[list[int]], clip_norm: float = 1.0) -> Float32:
    people = Interactions.of(histories, len(made.catalogue))
    (values,) = made.partial_sum(state, people, Clip(clip_norm), Streams).values()
    return values


def oracle(history: list[int], window: int) -> Float64:
    """The definition, read aloud: a double loop over the ordered head items, once for each run of the same."""
    ordered = [item for item, _ in groupby(item for item in history if item in HEAD)]
    pairs = {(item, item) for item in ordered}
    for here in range(len(ordered)):
        for there in range(len(ordered)):
            if 0 < there - here <= window:
                pairs.add((min(ordered[here], ordered[there]), max(ordered[here], ordered[there])))
    entries = list(combinations_with_replacement(HEAD.tolist(), 2))  # the upper triangle, row by row
    return np.array([(entry in pairs) / math.sqrt(max(len(pairs), 1)) for entry in entries])


class TestContribution:
    @given(history=HISTORIES, window=WINDOWS)
    @example(history=[1, 0, 0, 0, 2], window=1)  # items outside the head take no room in the window
    @example(history=[1, 1, 1], window=2)
    def test_entries_are_where_the_definition_says(self, history: list[int], window: int) -> None:
        found = contribution(learner(window=window), with_head(), history)
        np.testing.assert_allclose(found, oracle(history, window), atol=1e-7)

    def test_a_wider_window_sees_more_and_the_oracle_tells_the_difference(self) -> None:
        history = [1, 2, 4, 5, 8]
        for window in (1, 2, 3):
            found = contribution(learner(window=window), with_head(), history)
            assert np.count_nonzero(found) == 5 + sum(5 - gap for gap in range(1, window + 1))
            assert not np.allclose(found, oracle(history, window + 1))

    @given(history=HISTORIES, window=WINDOWS)
    def test_its_length_is_one_or_it_is_empty(self, history: list[int], window: int) -> None:
        length = np.linalg.norm(contribution(learner(window=window), with_head(), history))
        assert length == pytest.approx(1.0 if set(history) & set(HEAD.tolist()) else 0.0, abs=1e-6)

    @given(history=HISTORIES)
    def test_a_count_is_one_over_root_n_at_each_different_item(self, history: list[int]) -> None:
        made = learner()
        found = contribution(made, made.init(Streams(0)), history)
        expected = np.zeros(N_ITEMS)
        expected[list(set(history))] = 1 / math.sqrt(max(len(set(history)), 1))
        np.testing.assert_allclose(found, expected, atol=1e-7)
        assert np.linalg.norm(found) == pytest.approx(1.0 if history else 0.0, abs=1e-6)

    @pytest.mark.parametrize("phase", ["counts", "matrix", "transitions"])
    @given(histories=st.lists(HISTORIES, min_size=1, max_size=6), data=st.data())
    def test_adding_or_removing_a_person_moves_a_sum_by_at_most_one(
        self, phase: str, histories: list[list[int]], data: st.DataObject
    ) -> None:
        made = learner(window=3, transitions=TransitionConfig(window=2, fade=0.6))
        state = made.init(Streams(0)) if phase == "counts" else with_head()
        if phase == "transitions":
            state = {**state, "vectors": np.zeros((N_ITEMS, 1), np.float32)}
        assert made.shapes(state).keys() == {phase}
        gone = data.draw(st.integers(0, len(histories) - 1))
        fewer = histories[:gone] + histories[gone + 1 :]
        moved = np.linalg.norm(summed(made, state, histories) - summed(made, state, fewer).astype(np.float64))
        assert moved <= 1 + 1e-5
        items = set(histories[gone]) if phase == "counts" else set(histories[gone]) & set(HEAD.tolist())
        assert moved == pytest.approx(float(len(items) > (phase == "transitions")), abs=1e-5)  # and no less

    @pytest.mark.parametrize("phase", ["counts", "matrix", "transitions"])
    @pytest.mark.parametrize("bound", [1.0, 0.3])
    @given(histories=st.lists(HISTORIES, max_size=6), cells=st.integers(1, 60), block=st.integers(1, 20))
    def test_a_sum_is_that_of_clipped_contributions_to_the_last_bit_however_people_are_tabled(
        self, phase: str, bound: float, histories: list[list[int]], cells: int, block: int
    ) -> None:
        made = learner(window=3, transitions=TransitionConfig(window=2, fade=0.6))
        state = made.init(Streams(0)) if phase == "counts" else with_head()
        if phase == "transitions":
            state = {**state, "vectors": np.zeros((N_ITEMS, 1), np.float32)}
        clip, alone = Clip(bound), Clip(bound)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cooccurrence, "CELLS", cells)
            patch.setattr(cooccurrence, "BLOCK", block)
            found = made.partial_sum(state, Interactions.of(histories, N_ITEMS), clip, Streams)
        assert found.keys() == {phase}
        expected = np.zeros(made.shapes(state)[phase])
        for history in histories:
            expected += alone(made.contribution(state, History.of(history), Streams(0)))[phase]
        np.testing.assert_array_equal(found[phase], expected)
        assert (clip.n, clip.within, clip.refused) == (alone.n, alone.within, alone.refused)

    def test_a_head_whose_pairs_need_wider_numbers_has_them_where_the_definition_says(self) -> None:
        own, head = np.array([[0, 69_999, 2, 69_999]], np.int32), 70_000
        pairs = sorted((min(a, b), max(a, b)) for a, b in [(0, 0), (2, 2), (0, 69_999), (2, 69_999), (69_999, 69_999)])
        expected = [a * head - a * (a - 1) // 2 + b - a for a, b in pairs]
        assert np.unique(pair_keys(own, window=1, head=head)).tolist() == expected
        assert transition_keys(own, window=1, head=head).tolist() == [[69_999, 69_999 * head + 2, 2 * head + 69_999]]

    def test_plain_counts_would_move_it_by_more(self) -> None:
        made, history = learner(), [1, 2, 4, 5]
        plain = np.bincount(history, minlength=N_ITEMS)
        assert np.linalg.norm(plain) == 2.0
        assert np.linalg.norm(contribution(made, made.init(Streams(0)), history)) == pytest.approx(1.0)

    def test_positions_cover_the_upper_triangle_once(self) -> None:
        size = 7
        (everything,) = pair_keys(np.arange(size, dtype=np.int32)[None], window=size, head=size)
        np.testing.assert_array_equal(np.sort(everything), np.arange(size * (size + 1) // 2))
        i, j = np.triu_indices(size)
        for at, (a, b) in enumerate(zip(i, j, strict=True)):
            assert at == pair_keys(np.array([[b, a]], np.int32), window=1, head=size)[0, 2]


class TestSplit:
    @given(mu=st.floats(0.01, 10), share=st.floats(0.01, 0.5), third=st.one_of(st.just(0.0), st.floats(0.01, 0.45)))
    def test_the_sums_together_are_exactly_mu(self, mu: float, share: float, third: float) -> None:
        sums = split(mu, share, third)
        assert len(sums) == 2 + (third > 0)
        assert math.hypot(*(1 / spec.noise_multiplier for spec in sums)) == pytest.approx(mu, rel=1e-12)
        assert 1 / sums[0].noise_multiplier ** 2 == pytest.approx(share * mu**2, rel=1e-12)
        free = math.hypot(*(1 / spec.noise_multiplier for spec in sums[:-1]), mu)  # the last as if the first were free
        assert free != pytest.approx(mu, rel=1e-12)

    def test_the_plan_asks_for_each_sum_once_at_clip_one(self) -> None:
        plan = [(spec.name, spec.rounds, spec.clip_norm) for spec in split(1.0, 0.2, 0.3)]
        assert plan == [("counts", 1, 1.0), ("matrix", 1, 1.0), ("transitions", 1, 1.0)]
        assert [spec.name for spec in split(1.0)] == ["counts", "matrix"]

    def test_an_infinite_budget_has_no_noise(self) -> None:
        assert [spec.noise_multiplier for spec in split(math.inf, 0.2, 0.2)] == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize(
        ("mu", "share", "third"),
        [(0, 0.1, 0), (math.nan, 0.1, 0), (1, 0, 0), (1, 1, 0), (1, -0.1, 0), (1, 0.5, 0.5), (1, 0.5, -0.1)],
    )
    def test_a_budget_or_share_out_of_range_is_refused(self, mu: float, share: float, third: float) -> None:
        with pytest.raises(InvalidConfig, match="mu"):
            split(mu, share, third)


class TestAutomatic:
    @given(n=st.integers(1, 10**7), mu=st.floats(1e-3, 20))
    def test_its_noise_is_the_plans_and_the_plan_is_mu(self, n: int, mu: float) -> None:
        config, sums = automatic(n, mu)
        stddev = {spec.name: spec.noise_multiplier for spec in sums}
        assert math.hypot(*(1 / s for s in stddev.values())) == pytest.approx(mu, rel=1e-12)
        assert (config.counts_stddev, config.noise_stddev) == (stddev["counts"], stddev["matrix"])
        third = config.transitions.noise_stddev if config.transitions else None
        assert third == stddev.get("transitions")

    def test_it_depends_on_n_times_mu_only_and_grows_with_it(self) -> None:
        heads = [automatic(n, mu)[0].head for n, mu in ((1000, 0.5), (100, 5.0), (10_000, 1.0), (10**7, 1.0))]
        assert heads[0] == heads[1] == round(8 * math.sqrt(500))
        assert heads[1] < heads[2] < heads[3] == 1600
        assert [len(automatic(n, 1.0)[1]) for n in (1000, 2000, 3000, 10_000)] == [2, 2, 3, 3]

    def test_without_noise_it_takes_all_there_is(self) -> None:
        config, sums = automatic(500, math.inf)
        assert config.head == 1600
        assert config.transitions is not None
        assert {spec.noise_multiplier for spec in sums} == {0.0}
        with pytest.raises(InvalidConfig, match="n_users"):
            automatic(0, 1.0)


class TestTransitions:
    @given(history=HISTORIES, window=st.integers(1, 6), fade=st.floats(0.1, 1))
    @example(history=[1, 1, 2, 1, 2], window=2, fade=0.5)  # runs, and a pair that comes twice
    def test_entries_and_values_are_what_the_definition_says(
        self, history: list[int], window: int, fade: float
    ) -> None:
        made = learner(transitions=TransitionConfig(window=window, fade=fade))
        found = contribution(made, {**with_head(), "vectors": np.zeros((N_ITEMS, 1), np.float32)}, history)
        ordered = [HEAD.tolist().index(item) for item, _ in groupby(item for item in history if item in HEAD)]
        best: dict[tuple[int, int], float] = {}
        for here, a in enumerate(ordered):
            for gap, b in enumerate(ordered[here + 1 : here + 1 + window]):
                if a != b:
                    best[a, b] = max(best.get((a, b), 0.0), fade**gap)
        length = math.sqrt(sum(v * v for v in best.values()))
        expected = {a * len(HEAD) + b: v / length for (a, b), v in best.items()}
        assert np.flatnonzero(found).tolist() == sorted(expected)
        np.testing.assert_allclose(found[sorted(expected)], [expected[i] for i in sorted(expected)], rtol=1e-6)

    def test_what_comes_next_is_recommended_and_what_came_before_is_not(self) -> None:
        random = np.random.default_rng(0)
        histories = []
        for _ in range(300):  # everybody walks round a circle of 12 from some place, and so meets each pair both ways
            start = int(random.integers(12))
            histories.append([(start + step) % 12 for step in range(int(random.integers(4, 10)))])
        config = CooccurrenceConfig(head=12, dims=4, transitions=TransitionConfig(window=1, noise_stddev=0.5))
        made = Cooccurrence(catalogue(12), config)
        state = made.init(Streams(0))
        for name in ("counts", "matrix", "transitions"):
            assert made.shapes(state).keys() == {name}
            total = summed(made, state, histories)
            state = made.apply(state, {name: (total + random.normal(0, 0.5, total.shape)).astype(np.float32)}, 300.0)
        scores = made.scores(state, Interactions.of([[3, 4, 5]], 12))[0]
        assert np.setdiff1d(np.argsort(-scores), [3, 4, 5], assume_unique=True)[0] == 6
        back = {**state, "leave": state["arrive"], "arrive": state["leave"]}  # the same, read the other way round
        assert made.scores(back, Interactions.of([[3, 4, 5]], 12))[0].argmax() != 6

    def test_an_item_outside_the_head_neither_leaves_nor_arrives(self) -> None:
        made = learner(transitions=TransitionConfig())
        state = {**with_head(), "vectors": np.zeros((N_ITEMS, 1), np.float32)}
        after = made.apply(state, {"transitions": summed(made, state, [[1, 0, 2, 4], [5, 3, 8]])}, 2.0)
        for name in ("leave", "arrive"):
            assert after[name][HEAD].any()
            assert not after[name][[0, 3, 6, 7]].any()
        head = after["leave"][HEAD]
        assert np.mean((head**2).sum(1)) == pytest.approx(1.0, rel=1e-5)


class TestHead:
    def test_it_is_the_top_of_the_noised_counts_in_the_order_of_the_catalogue(self) -> None:
        counts = np.array([0.5, 9, 7, -3, 5, 8, 0, 4, 6], np.float32)
        after = learner().apply({"popularity": np.zeros(N_ITEMS, np.float32)}, {"counts": counts}, 10.0)
        assert after["head"].tolist() == [1, 2, 4, 5, 8]
        assert after["head"].dtype == np.int32
        np.testing.assert_allclose(after["popularity"], np.clip(counts / 9, 0, 1), rtol=1e-6)

    def test_counts_that_are_all_noise_below_zero_still_give_a_head_and_no_popularity(self) -> None:
        after = learner().apply({}, {"counts": np.full(N_ITEMS, -1, np.float32)}, 10.0)
        assert after["head"].tolist() == [0, 1, 2, 3, 4]
        assert not after["popularity"].any()

    def test_one_larger_than_the_catalogue_is_the_whole_catalogue(self) -> None:
        made = learner(head=1000, window=2)
        histories = [[0, 1, 2], [8, 3], [5], []]
        state = made.apply(made.init(Streams(0)), {"counts": summed(made, made.init(Streams(0)), histories)}, 4.0)
        assert state["head"].tolist() == list(range(N_ITEMS))
        assert made.shapes(state) == {"matrix": (N_ITEMS * (N_ITEMS + 1) // 2,)}
        state = made.apply(state, {"matrix": summed(made, state, histories)}, 4.0)
        scores = made.scores(state, Interactions.of([[0, 1], []], N_ITEMS))
        assert np.isfinite(scores).all()
        assert scores[0, 2] > scores[0, 3]


class TestFactors:
    """All heads are whole catalogues here, unless said otherwise."""

    n = 12
    basis: Float64 = np.linalg.qr(np.random.default_rng(5).standard_normal((12, 12)))[0]
    values: Float64 = np.array([30, 17, 12, 10.5, 9.5, 6, 3, 0.2, 0, -2, -8, -40])

    def factors(self, values: Float64, **settings: int | float) -> Float64:
        """F of a symmetric matrix with these eigenvalues."""
        made = learner(self.n, head=self.n, **settings)
        matrix = (self.basis * values) @ self.basis.T
        upper = {"matrix": matrix[np.triu_indices(self.n)].astype(np.float32)}
        vectors: Float64 = made.apply(with_head(np.arange(self.n), self.n), upper, 1.0)["vectors"].astype(np.float64)
        return vectors

    def test_eigenvalues_below_the_edge_are_dropped_and_those_above_are_shrunk(self) -> None:
        noise = 10 / (2 * math.sqrt(self.n))  # t = 10
        factors = self.factors(self.values, dims=self.n, noise_stddev=noise)
        kept = self.values[self.values > 10]
        assert factors.shape == (self.n, 4)
        found = (factors**2).sum(0)  # the columns are orthogonal
        shrunk = kept - 100 / kept
        np.testing.assert_allclose(found, self.n * shrunk / shrunk.sum() * (1 - (10 / 30) ** 2), rtol=1e-4)
        assert not np.allclose(found, self.n * kept / kept.sum(), rtol=0.01)
        np.testing.assert_allclose(factors.T @ factors, np.diag(found), atol=1e-4)
        cosines = np.abs((factors / np.sqrt(found) * self.basis[:, :4]).sum(0))
        np.testing.assert_allclose(cosines, 1, atol=1e-4)

    @pytest.mark.parametrize("dims", [1, 3, 6, 12])
    def test_without_noise_they_are_the_best_positive_approximation_of_their_rank(self, dims: int) -> None:
        factors = self.factors(self.values, dims=dims)
        best = np.where((np.arange(self.n) < dims) & (self.values > 0), self.values, 0)
        wanted = (self.basis * best) @ self.basis.T * (self.n / best.sum())  # of mean square length 1
        np.testing.assert_allclose(factors @ factors.T, wanted, atol=1e-4)
        by_size = np.argsort(-np.abs(self.values))[:dims]  # an SVD would take −40 for a signal
        wrong = np.where(np.isin(np.arange(self.n), by_size), np.abs(self.values), 0)
        assert not np.allclose(
            factors @ factors.T, (self.basis * wrong) @ self.basis.T * (self.n / wrong.sum()), atol=0.01
        )

    def test_pure_noise_keeps_almost_nothing_and_an_understated_noise_much(self) -> None:
        # The largest eigenvalue is t (1 + x K^(−2/3) / 2) with x of Tracy and Widom's law, which exceeds 5 for 1 seed
        # in 10⁵; what is kept of it is below x K^(−2/3), as a share of all K vectors' square length.
        size, stddev = 120, 3.0
        for seed in range(3):
            noise = np.random.default_rng(seed).normal(0, stddev, size * (size + 1) // 2).astype(np.float32)
            kept = []
            for believed in (stddev, stddev / 2):
                made = learner(size, head=size, dims=size, noise_stddev=believed)
                vectors = made.apply(with_head(np.arange(size), size), {"matrix": noise}, 1.0)["vectors"]
                kept.append((vectors.shape[1], (vectors.astype(np.float64) ** 2).sum(0).max(initial=0)))
            (n_kept, largest), (n_wrong, largest_wrong) = kept
            assert n_kept <= 3
            assert largest < 5 * size ** (-2 / 3) * size
            assert not n_kept or n_kept * largest < 0.5 * size  # and not scaled up to a signal
            assert n_wrong > 15
            assert largest_wrong > 0.03 * size

    def test_a_signal_above_the_noise_is_found_in_it(self) -> None:
        size, stddev = 200, 1.0
        random = np.random.default_rng(0)
        direction = random.standard_normal(size)
        direction /= np.linalg.norm(direction)
        edge = 2 * stddev * math.sqrt(size)
        matrix = 4 * edge * np.outer(direction, direction)
        noisy = matrix[np.triu_indices(size)] + random.normal(0, stddev, size * (size + 1) // 2)
        made = learner(size, head=size, dims=4, noise_stddev=stddev)
        vectors = made.apply(with_head(np.arange(size), size), {"matrix": noisy.astype(np.float32)}, 1.0)["vectors"]
        first = vectors[:, 0] / np.linalg.norm(vectors[:, 0])
        assert abs(first @ direction) > 0.95  # theory: √(1 − t²/(4θ²)) = 0.992
        assert abs(first @ np.roll(direction, 1)) < 0.5

    def test_items_outside_the_head_have_no_vector(self) -> None:
        made = learner(dims=5, window=4)
        state = made.apply(with_head(), {"matrix": summed(made, with_head(), [[1, 2, 4, 0], [5, 8, 3]])}, 2.0)
        has = np.abs(state["vectors"]).sum(1) > 1e-6
        assert np.flatnonzero(has).tolist() == HEAD.tolist()

    def test_a_matrix_of_noise_below_the_edge_leaves_popularity(self) -> None:
        made = learner(noise_stddev=100.0)
        state = made.apply(with_head(), {"matrix": np.ones(15, np.float32)}, 1.0)
        state = {**state, "popularity": np.linspace(0, 1, N_ITEMS, dtype=np.float32)}
        assert state["vectors"].shape == (N_ITEMS, 0)
        scores = made.scores(state, Interactions.of([[1, 2], []], N_ITEMS))
        np.testing.assert_allclose(scores, np.tile(np.float32(0.3) * state["popularity"], (2, 1)), rtol=1e-6)


def test_a_new_item_gets_what_an_old_one_outside_the_head_with_the_same_features_has() -> None:
    topics = (*[("a",)] * 3, *[("b",)] * 3, ("a",))  # the last of each kind stays outside the head
    old = Catalogue(ids=tuple("012345x"), topics=topics)
    new = Catalogue(ids=(*old.ids, "y"), topics=(*topics, ("a",)))
    config = CooccurrenceConfig(head=6, dims=3, window=3)
    before, after = Cooccurrence(old, config), Cooccurrence(new, config)
    state = with_head(np.arange(6), 7)
    state = before.apply(state, {"matrix": summed(before, state, [[0, 1, 2], [3, 4, 5], [0, 2, 1]])}, 3.0)
    found = after.adopt(state, old)["vectors"]
    np.testing.assert_allclose(found[7], found[6], atol=1e-6)
    np.testing.assert_array_equal(found[:7], state["vectors"])
    assert np.abs(found[7]).max() > 0.01


def test_two_tastes_come_apart_within_one_release() -> None:
    random = np.random.default_rng(0)
    histories = [(random.permutation(10) + 10 * (user % 2)).tolist() for user in range(200)]
    made = learner(20, head=20, dims=4, window=5, noise_stddev=0.1)
    state = made.init(Streams(0))
    for _ in range(2):
        total = summed(made, state, histories)
        ((name, _),) = made.shapes(state).items()
        noised = total + random.normal(0, 0.1, total.shape)
        state = made.apply(state, {name: noised.astype(np.float32)}, 200.0)
    scores = made.scores(state, Interactions.of([[0, 1], [10, 11]], 20))
    assert scores[0, 2:10].min() > scores[0, 10:].max()
    assert scores[1, 12:].min() > scores[1, :10].max()


@pytest.mark.parametrize(
    "settings",
    [{"head": 1}, {"window": 0}, {"dims": 0}, {"content": -1.0}, {"noise_stddev": -1.0}, {"noise_stddev": math.inf}],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(settings))):
        CooccurrenceConfig(**settings)  # type: ignore[arg-type]  # by name
    assert CooccurrenceConfig(taste=TasteConfig())
