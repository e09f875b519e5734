"""Every learner keeps one contract, and each can be named in a plan and built on a device."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from penchant.common import config
from penchant.common.arrays import Arrays, Float64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig, MalformedContribution
from penchant.common.interactions import History, Interactions
from penchant.common.learners import registry
from penchant.common.learners.als import Als, AlsConfig
from penchant.common.learners.contract import Learner, State
from penchant.common.learners.cooccurrence import Cooccurrence, CooccurrenceConfig, TransitionConfig
from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig, ServerStep
from penchant.common.learners.neural.models import MODELS, ModelConfig, reads_history
from penchant.common.learners.neural.strengths import NeuralStrengths, NeuralStrengthsConfig
from penchant.common.learners.strengths import Strengths, StrengthsConfig
from penchant.common.learners.training import LocalTraining
from penchant.common.privacy import sums
from penchant.common.privacy.plan import DeviceNoise
from penchant.common.privacy.sums import Clip
from penchant.common.streams import Streams

N_ITEMS = 18
CATALOGUE = Catalogue(
    ids=tuple(str(i) for i in range(N_ITEMS)),
    titles=tuple(f"Film {i} ({1960 + 3 * i})" for i in range(N_ITEMS)),
    topics=tuple(("even",) if i % 2 == 0 else () for i in range(N_ITEMS)),
)
HISTORIES: tuple[list[int], ...] = (
    [4, 9, 2, 17],
    [],
    [8],
    [3, 3, 3],  # one item again and again
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],  # longer than a sequence model reads
    [5, 0, 5, 16, 0],
    [11, 12],
    list(range(N_ITEMS)),  # nothing left to draw against
    [14, 2, 9, 4, 6, 6],
    [0],
)
PEOPLE = Interactions.of(HISTORIES, N_ITEMS)
LOCAL = LocalTraining(epochs=2, batch=3, lr=0.3, negatives=3, fold_in_steps=3, fold_in_lr=1.0)
DEVICE = DeviceNoise(clip_norm=0.5, noise_multiplier=0.8, rate=0.7, steps=2, divisor=4.0, min_history=2)


@dataclass(frozen=True)
class Case:
    """One learner in one phase of its rounds.

    Attributes:
        make: builds it afresh, for another catalogue if given one.
        keeps_scores: to the last digits, whatever items come; others fit a person against the whole catalogue.
        draws: its contributions depend on the random stream.
        noisy: so does that of an empty history.
        n_applied: private sums its state has seen.
    """

    make: Callable[..., Learner]
    draws: bool = True
    noisy: bool = False
    n_applied: int = 0
    keeps_scores: bool = False

    def state(self, learner: Learner, seed: int = 0) -> State:
        state = learner.init(Streams(seed))
        for number in range(self.n_applied):
            state = learner.apply(state, some_sum(learner, state, number), 5.0)
        return state


def some_sum(learner: Learner, state: State, seed: int) -> dict[str, np.ndarray]:
    """A noised sum as it could be released: some entries above, some below zero."""
    random = np.random.default_rng([seed, 77])
    return {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in sorted(learner.shapes(state).items())
    }


def cooccurrence(catalogue: Catalogue = CATALOGUE, *, head: int = 12) -> Learner:
    config = CooccurrenceConfig(
        head=head, window=3, dims=4, noise_stddev=0.05, transitions=TransitionConfig(dims=3, noise_stddev=0.05)
    )
    return Cooccurrence(catalogue, config)


def als(catalogue: Catalogue = CATALOGUE) -> Learner:
    start = CooccurrenceConfig(head=12, window=3, dims=3, noise_stddev=0.05)
    return Als(catalogue, AlsConfig(start=start, stretch=3, noise_stddev=0.05))


def strengths(catalogue: Catalogue = CATALOGUE) -> Learner:
    start = CooccurrenceConfig(head=12, window=3, dims=3, noise_stddev=0.05)
    return Strengths(catalogue, StrengthsConfig(start=start, strengths_stddev=0.05, outcomes_stddev=0.05))


def neural_strengths(catalogue: Catalogue = CATALOGUE) -> Learner:
    start = CooccurrenceConfig(head=12, window=3, dims=3, noise_stddev=0.05)
    small = NeuralStrengthsConfig(start=start, encoded=3, hidden=4, rounds=2, lr=0.1)
    return NeuralStrengths(catalogue, replace(small, strengths_stddev=0.05, outcomes_stddev=0.05))


def fedavg(
    name: str, catalogue: Catalogue = CATALOGUE, *, optimizer: Any = "adam", proximal: float = 0.0, **fields: Any
) -> FedAvg:
    model = ModelConfig(name=name, dim=4, hidden=8 if name != "mf" else None, max_length=6)
    local, server = replace(LOCAL, proximal=proximal), ServerStep(optimizer=optimizer)
    warm = CooccurrenceConfig(head=12, window=3, dims=3, noise_stddev=0.05)
    return FedAvg(catalogue, FedAvgConfig(model=model, local=local, server=server, cooccurrence=warm, **fields))


WARM = partial(fedavg, "mf", start="co-occurrence")

CASES = {
    "als counts": Case(als, draws=False),
    "als matrix": Case(als, draws=False, n_applied=1),
    "als statistics": Case(als, draws=False, n_applied=2),
    "als released": Case(als, draws=False, n_applied=3),
    "cooccurrence counts": Case(cooccurrence, draws=False),
    "cooccurrence matrix": Case(cooccurrence, draws=False, n_applied=1),
    "cooccurrence transitions": Case(cooccurrence, draws=False, n_applied=2),
    "cooccurrence released": Case(cooccurrence, draws=False, n_applied=3),
    "cooccurrence, all in the head": Case(partial(cooccurrence, head=50), draws=False, n_applied=1),
    **{f"fedavg {name}": Case(partial(fedavg, name), keeps_scores=reads_history(name)) for name in MODELS},
    "strengths counts": Case(strengths, draws=False),
    "strengths matrix": Case(strengths, draws=False, n_applied=1),
    "strengths of items": Case(strengths, draws=False, n_applied=2),
    "strengths at scores": Case(strengths, draws=False, n_applied=3),
    "strengths released": Case(strengths, draws=False, n_applied=4),
    "neural strengths of items": Case(neural_strengths, draws=False, n_applied=2),
    "neural strengths, first update": Case(neural_strengths, draws=False, n_applied=3),
    "neural strengths, second update": Case(neural_strengths, draws=False, n_applied=4),
    "neural strengths at scores": Case(neural_strengths, draws=False, n_applied=5),
    "fedavg mf later, sgd": Case(partial(fedavg, "mf", optimizer="sgd"), n_applied=2),
    "fedavg mlp": Case(partial(fedavg, "mlp")),
    "fedavg neumf later": Case(partial(fedavg, "neumf"), n_applied=2),
    "fedavg mf with device noise": Case(partial(fedavg, "mf", device=DEVICE), noisy=True),
    "fedavg neumf with device noise": Case(partial(fedavg, "neumf", device=DEVICE), noisy=True),
    "fedavg mf frozen with device noise": Case(
        partial(fedavg, "mf", device=DEVICE, freeze=("bias.weight",)), noisy=True
    ),
    "fedavg mf later, momentum": Case(partial(fedavg, "mf", optimizer="momentum"), n_applied=2),
    "fedavg mf proximal": Case(partial(fedavg, "mf", proximal=2.0), n_applied=1),
    "fedavg gru proximal": Case(partial(fedavg, "gru", proximal=2.0), keeps_scores=True),
    "fedavg mf frozen": Case(partial(fedavg, "mf", freeze=("bias",))),
    "fedavg transformer frozen": Case(partial(fedavg, "transformer", freeze=("item", "blocks.0")), keeps_scores=True),
    **{
        f"fedavg {name} adapter": Case(
            partial(fedavg, name, adapter=2, optimizer="sgd"), keeps_scores=reads_history(name), n_applied=1
        )
        for name in MODELS
    },
    "fedavg mf adapter at first, half frozen": Case(partial(fedavg, "mf", adapter=4, freeze=("item.down",))),
    "fedavg gru from content": Case(partial(fedavg, "gru", start="content"), keeps_scores=True),
    "fedavg mf warm, counts": Case(WARM, draws=False),
    "fedavg mf warm, matrix": Case(WARM, draws=False, n_applied=1),
    "fedavg mf warm, first update": Case(WARM, n_applied=2),
    "fedavg mf warm, later": Case(WARM, n_applied=4),
    "fedavg transformer warm, adapter": Case(
        partial(fedavg, "transformer", start="co-occurrence", adapter=2), n_applied=3, keeps_scores=True
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@dataclass(frozen=True)
class Ready:
    """A learner, its state and everybody's contribution; what is computed once for all tests of a case."""

    learner: Learner
    state: State
    contributions: tuple[Arrays, ...]


@cache
def ready(case: Case) -> Ready:
    learner = case.make()
    state = case.state(learner)
    everybody = tuple(learner.contribution(state, history, stream(u)) for u, history in enumerate(PEOPLE))
    return Ready(learner, state, everybody)


def stream(user: int, seed: int = 0) -> Streams:
    return Streams(seed).scope("local", 1, user)


def same(a: Arrays, b: Arrays, atol: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(np.allclose(a[key], b[key], rtol=0, atol=atol) for key in a)


def warms_up(learner: Learner, n_applied: int = 0) -> bool:
    """Whether after so many sums its state is still one of co-occurrence."""
    return isinstance(learner, FedAvg) and learner.config.start == "co-occurrence" and n_applied < 2


def clipped_sum(contributions: list[Arrays], bound: float) -> dict[str, Float64]:
    """Σ clip(contribution) by the definition, in float64."""
    total: dict[str, Float64] = {key: np.zeros(values.shape) for key, values in contributions[0].items()}
    for one in contributions:
        length = np.sqrt(sum(float((values.astype(np.float64) ** 2).sum()) for values in one.values()))
        for key, values in one.items():
            total[key] += values.astype(np.float64) * min(1.0, bound / max(length, 1e-30))
    return total


def bounds(contributions: tuple[Arrays, ...]) -> tuple[float, float]:
    """One bound that clips about half of them and one that clips all."""
    lengths = [length for one in contributions if (length := sums.norm(one)) > 0]
    return float(np.median(lengths)), 0.4 * min(lengths)


class TestEveryLearner:
    def test_a_contribution_is_what_the_round_asks_for(self, case: Case) -> None:
        at = ready(case)
        for one in at.contributions:
            sums.check(one, at.learner.shapes(at.state))
            assert all(values.dtype == np.float32 for values in one.values())
        name, values = next(iter(at.contributions[0].items()))
        for wrong in ({}, {name: values[1:]}, {**at.contributions[0], "server/step": values}):
            with pytest.raises(MalformedContribution):
                sums.check(wrong, at.learner.shapes(at.state))

    def test_a_contribution_depends_on_one_person_only(self, case: Case) -> None:
        at, fresh = ready(case), case.make()
        state = case.state(fresh)
        torch.manual_seed(987)  # nor on what the program draws elsewhere
        for user in (8, 4, 0, 4):  # in another order, with others left out, on a learner that has met nobody
            found = fresh.contribution(state, History.of(HISTORIES[user]), stream(user))
            assert same(found, at.contributions[user])
            assert not same(found, at.contributions[(user + 5) % 10])

    def test_a_contribution_leaves_the_state_and_the_history_as_they_were(self, case: Case) -> None:
        learner = case.make()
        state, histories = case.state(learner), PEOPLE.items.copy()
        before = {name: values.copy() for name, values in state.items()}
        learner.contribution(state, PEOPLE.history(0), stream(0))
        learner.partial_sum(state, PEOPLE, Clip(0.1), stream)
        learner.scores(state, PEOPLE)
        assert same(before, state)
        np.testing.assert_array_equal(histories, PEOPLE.items)

    def test_an_empty_history_adds_nothing_but_noise(self, case: Case) -> None:
        at = ready(case)
        empty, full = at.contributions[1], at.contributions[0]
        assert any(values.any() for values in empty.values()) == case.noisy
        assert any(values.any() for values in full.values())

    def test_a_partial_sum_is_the_sum_of_clipped_contributions(self, case: Case) -> None:
        at = ready(case)
        half, all_of = bounds(at.contributions)
        for bound in (np.inf, half, all_of):
            found = at.learner.partial_sum(at.state, PEOPLE, Clip(bound), stream)
            expected = clipped_sum(list(at.contributions), bound)
            sums.check(found, at.learner.shapes(at.state))
            # Alone or together, sequence models are up to 2e-5 from what float64 gives, and 5e-6 from each other.
            assert same(found, expected, atol=1e-5)
            # the same comparison sees a person left out, and a clip left out
            assert not same(found, clipped_sum(list(at.contributions[1:]), bound), atol=1e-5)
            clips = any(sums.norm(one) > bound * (1 + 1e-5) for one in at.contributions)
            assert same(found, clipped_sum(list(at.contributions), np.inf), atol=1e-5) != clips
        assert clips

    def test_a_partial_sum_does_not_depend_on_order_or_on_who_is_summed_with_whom(self, case: Case) -> None:
        at = ready(case)
        bound, _ = bounds(at.contributions)

        def part(users: list[int]) -> Arrays:
            return at.learner.partial_sum(at.state, PEOPLE.select(users), Clip(bound), lambda row: stream(users[row]))

        whole = part(list(range(10)))
        assert same(part([6, 1, 8, 4, 0, 9, 7, 3, 5, 2]), whole, atol=3e-6)
        parts = [part(users) for users in ([4], [0, 8, 2], [1], [9, 3, 5, 6, 7])]
        for some, right in ((parts, True), (parts[1:], False)):
            assert same({key: np.sum([p[key] for p in some], axis=0) for key in whole}, whole, atol=3e-6) == right

    def test_a_partial_sum_of_nobody_is_zero(self, case: Case) -> None:
        at = ready(case)
        found = at.learner.partial_sum(at.state, PEOPLE.select([]), Clip(1.0), stream)
        sums.check(found, at.learner.shapes(at.state))
        assert not any(values.any() for values in found.values())

    def test_the_same_stream_gives_the_same_and_another_another(self, case: Case) -> None:
        at = ready(case)
        for user in (0, 4):
            history = PEOPLE.history(user)
            assert same(at.learner.contribution(at.state, history, stream(user)), at.contributions[user])
            other = at.learner.contribution(at.state, history, stream(user, seed=1))
            assert same(other, at.contributions[user]) != case.draws

    def test_the_first_state_repeats_and_is_finite(self, case: Case) -> None:
        learner = case.make()
        state, other = learner.init(Streams(3)), learner.init(Streams(4))
        assert same(case.make().init(Streams(3)), state)
        assert all(np.isfinite(values).all() for values in state.values())
        assert same(other, state) == isinstance(learner, Cooccurrence | Als | Strengths)  # which start from nothing
        memory = {name for name in state if name.startswith("server/")}
        assert learner.released(state).keys() == state.keys() - memory
        assert bool(memory) == warms_up(learner)  # weights to come; nothing else is kept back

    def test_a_sum_that_is_applied_gives_the_next_state(self, case: Case) -> None:
        at = ready(case)
        total = some_sum(at.learner, at.state, 5)
        before = {name: values.copy() for name, values in at.state.items()}
        once = at.learner.apply(at.state, total, 5.0)
        assert same(before, at.state)
        assert all(np.isfinite(values).all() for values in once.values())
        ends_start = warms_up(at.learner, case.n_applied) and not warms_up(at.learner, case.n_applied + 1)
        assert (at.learner.released(once).keys() >= at.learner.released(at.state).keys()) != ends_start
        for name in at.learner.released(at.state).keys() & once.keys():
            values = at.state[name]
            assert once[name].dtype == values.dtype
            assert once[name].shape[:1] == values.shape[:1]
        twice = at.learner.apply(once, some_sum(at.learner, once, 6), 5.0)
        later = at.learner.apply(twice, some_sum(at.learner, twice, 7), 5.0)
        last = at.learner.apply(later, some_sum(at.learner, later, 8), 5.0)
        assert at.learner.shapes(last).keys() == at.learner.shapes(later).keys()
        assert np.isfinite(at.learner.scores(twice, PEOPLE)).all()
        other = at.learner.apply(at.state, {name: -values for name, values in total.items()}, 5.0)
        assert not same(at.learner.released(other), at.learner.released(once))

    def test_an_extreme_sum_still_gives_a_finite_state(self, case: Case) -> None:
        at = ready(case)
        shapes = at.learner.shapes(at.state)
        for value in (0.0, -1e6, 1e6):
            total = {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}
            after = at.learner.apply(at.state, total, 1.0)
            assert all(np.isfinite(values).all() for values in after.values())
            assert np.isfinite(at.learner.scores(after, PEOPLE)).all()

    def test_what_is_released_has_no_server_memory_and_scores_like_the_whole(self, case: Case) -> None:
        at = ready(case)
        state = at.learner.apply(at.state, some_sum(at.learner, at.state, 5), 5.0)
        released = at.learner.released(state)
        assert not any(name.startswith("server/") for name in released)
        just_started = warms_up(at.learner, case.n_applied) and case.n_applied == 1
        is_fedavg = isinstance(at.learner, FedAvg)
        steps = is_fedavg or (isinstance(at.learner, NeuralStrengths) and case.n_applied > 2)
        assert any(name.startswith("server/") for name in state) == (steps and not just_started)  # something to leave
        if is_fedavg and not warms_up(at.learner):
            assert released.keys() == at.learner.init(Streams(0)).keys()
        np.testing.assert_array_equal(at.learner.scores(released, PEOPLE), at.learner.scores(state, PEOPLE))

    def test_a_state_read_back_from_a_file_scores_and_trains_the_same(self, case: Case) -> None:
        at = ready(case)
        read = safetensors.numpy.load(safetensors.numpy.save(dict(at.learner.released(at.state))))
        device = case.make()  # which has only the file and its own history
        scores = at.learner.scores(at.state, PEOPLE)
        np.testing.assert_array_equal(device.scores(read, PEOPLE), scores)
        assert same(device.contribution(read, PEOPLE.history(0), stream(0)), at.contributions[0])
        other = case.state(device, seed=1)
        if not isinstance(device, Cooccurrence | Als | Strengths) and not warms_up(device, case.n_applied):
            assert not np.array_equal(device.scores(other, PEOPLE), scores)

    def test_scores_are_finite_and_equal_for_equal_histories(self, case: Case) -> None:
        at = ready(case)
        found = at.learner.scores(at.state, PEOPLE)
        assert found.shape == (10, N_ITEMS)
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        again = at.learner.scores(at.state, Interactions.of([HISTORIES[4], [], HISTORIES[0], HISTORIES[4]], N_ITEMS))
        np.testing.assert_array_equal(again[0], again[3])
        np.testing.assert_allclose(again, found[[4, 1, 0, 4]], atol=1e-5)  # whoever else is asked about
        assert np.abs(again[0] - again[2]).max() > 1e-4
        assert np.abs(again[0] - again[1]).max() > 1e-4

    def test_items_outside_the_catalogue_are_as_if_they_had_not_been(self, case: Case) -> None:
        at = ready(case)
        stranger = History.of([N_ITEMS, *HISTORIES[0][:2], -1, *HISTORIES[0][2:], 10**6])
        assert same(at.learner.contribution(at.state, stranger, stream(0)), at.contributions[0])
        people = Interactions.of([stranger.items.tolist()], 10**6 + 1)
        expected = at.learner.scores(at.state, PEOPLE.select([0]))
        np.testing.assert_allclose(at.learner.scores(at.state, people), expected, atol=1e-6)
        alone = at.learner.partial_sum(at.state, PEOPLE.select([0]), Clip(0.5), stream)
        assert same(at.learner.partial_sum(at.state, people, Clip(0.5), stream), alone)

    def test_a_retired_item_is_never_recommended_and_no_other_score_moves(self, case: Case) -> None:
        at = ready(case)
        learner = case.make()
        learner.catalogue = replace(CATALOGUE, retired=frozenset({"4", "9"}))
        before, after = at.learner.scores(at.state, PEOPLE), learner.scores(at.state, PEOPLE)
        assert np.isneginf(after[:, [4, 9]]).all()
        stays = np.setdiff1d(np.arange(N_ITEMS), [4, 9])
        np.testing.assert_array_equal(after[:, stays], before[:, stays])

    def test_in_a_larger_catalogue_old_items_score_as_before_and_new_ones_by_content(self, case: Case) -> None:
        at = ready(case)
        state = at.learner.apply(at.state, some_sum(at.learner, at.state, 5), 5.0)
        new = ("even twin", "odd twin")  # of items 4 and 5, with their topics and decade; one stands first
        larger = Catalogue(
            ids=(new[0], *CATALOGUE.ids, new[1]),
            titles=("Twin (1972)", *CATALOGUE.titles, "Twin (1975)"),
            topics=(("even",), *CATALOGUE.topics, ()),
        )
        grown = case.make(larger)
        adopted = grown.adopt(state, CATALOGUE)
        shapes = {name: np.shape(values) for name, values in adopted.items()}
        total = grown.partial_sum(adopted, PEOPLE, Clip(1.0), stream)  # rounds that are left go on
        assert {name: np.shape(values) for name, values in total.items()} == dict(grown.shapes(adopted))
        twice = grown.apply(adopted, some_sum(grown, adopted, 6), 5.0)
        if not warms_up(grown, case.n_applied + 1):  # whose vectors become weights of the model
            assert {name: np.shape(values) for name, values in twice.items()}.keys() >= shapes.keys()
        moved = Interactions.of([[i + 1 for i in h] for h in HISTORIES], N_ITEMS + 2)
        before, after = at.learner.scores(state, PEOPLE), grown.scores(adopted, moved)
        assert np.isfinite(after).all()
        if case.keeps_scores:
            np.testing.assert_allclose(after[:, 1:-1], before, atol=1e-4)
        assert np.corrcoef(after[:, 1:-1].ravel(), before.ravel())[0, 1] > 0.9
        assert np.corrcoef(after[:, :-2].ravel(), before.ravel())[0, 1] < 0.9  # and see a shift by one
        # nobody has met a twin: its score is what its content predicts, and so differs with the person
        assert np.ptp(after[:, 0]) > 1e-6
        same_content = case.make(replace(larger, ids=("other", *larger.ids[1:])))
        np.testing.assert_allclose(same_content.scores(same_content.adopt(state, CATALOGUE), moved), after, atol=1e-6)
        back = case.make(Catalogue(ids=CATALOGUE.ids[1:]))
        with pytest.raises(InvalidConfig, match="retired"):
            back.adopt(state, CATALOGUE)

    def test_scoring_is_the_same_after_training(self, case: Case) -> None:
        fresh = case.make()
        state = case.state(fresh)
        before = fresh.scores(state, PEOPLE)
        fresh.contribution(state, PEOPLE.history(0), stream(0))
        np.testing.assert_array_equal(fresh.scores(state, PEOPLE), before)

    def test_it_is_built_from_its_name_and_plain_settings(self, case: Case) -> None:
        at = ready(case)
        assert isinstance(at.learner, FedAvg | Cooccurrence | Als | Strengths)
        settings = json.loads(json.dumps(config.encode(at.learner.config)))
        built = registry.build(at.learner.name, settings, CATALOGUE)
        assert isinstance(built, FedAvg | Cooccurrence | Als | Strengths)
        assert built.config == at.learner.config
        assert same(built.contribution(at.state, PEOPLE.history(0), stream(0)), at.contributions[0])


def test_what_other_threads_build_does_not_reach_a_contribution() -> None:
    learner, stop = fedavg("gru"), threading.Event()
    state = learner.init(Streams(0))
    expected = [learner.contribution(state, PEOPLE.history(u), stream(u)) for u in range(10)]

    def build_others() -> None:
        while not stop.is_set():
            fedavg("gru").init(Streams(1))

    other = threading.Thread(target=build_others)
    other.start()
    try:
        for _ in range(5):
            for user in range(10):  # building draws from a stream that all of torch shares
                assert same(learner.contribution(state, PEOPLE.history(user), stream(user)), expected[user])
    finally:
        stop.set()
        other.join()
    assert not same(learner.contribution(state, PEOPLE.history(0), stream(0, seed=1)), expected[0])


class TestWarmStart:
    def run(self, learner: FedAvg, rounds: int) -> State:
        """After so many exact sums of everybody."""
        state = learner.init(Streams(0))
        for _ in range(rounds):
            state = learner.apply(state, learner.partial_sum(state, PEOPLE, Clip(1.0), stream), 10.0)
        return state

    def test_its_first_rounds_are_those_of_co_occurrence_to_the_last_digit(self) -> None:
        learner = fedavg("mf", start="co-occurrence")
        alone = Cooccurrence(CATALOGUE, learner.config.cooccurrence)
        state, own = learner.init(Streams(0)), alone.init(Streams(0))
        for _ in range(2):
            assert learner.shapes(state) == alone.shapes(own)
            one = alone.contribution(own, PEOPLE.history(0), stream(0))
            assert same(learner.contribution(state, PEOPLE.history(0), stream(0)), one)
            np.testing.assert_array_equal(learner.scores(state, PEOPLE), alone.scores(own, PEOPLE))
            total = alone.partial_sum(own, PEOPLE, Clip(1.0), stream)
            assert same(learner.partial_sum(state, PEOPLE, Clip(1.0), stream), total)
            state, own = learner.apply(state, total, 10.0), alone.apply(own, total, 10.0)
        assert learner.shapes(state) == fedavg("mf").shapes(fedavg("mf").init(Streams(0)))

    @pytest.mark.parametrize("name", ["mf", "transformer"])
    def test_item_vectors_then_keep_the_angles_of_co_occurrence_at_a_length_that_the_model_hears(
        self, name: str
    ) -> None:
        warm = CooccurrenceConfig(head=N_ITEMS, window=3, dims=3, content=0.0)
        config = FedAvgConfig(model=ModelConfig(name=name, dim=8), start="co-occurrence", cooccurrence=warm)
        learner = FedAvg(CATALOGUE, config)
        factors = Cooccurrence(CATALOGUE, warm)
        own = factors.init(Streams(0))
        for _ in range(2):
            own = factors.apply(own, factors.partial_sum(own, PEOPLE, Clip(1.0), stream), 10.0)
        released = own["vectors"]
        found = self.run(learner, 2)["item.weight"][:N_ITEMS]
        filled = found[:, : released.shape[1]]
        scale = np.linalg.norm(filled, axis=1).mean() / np.linalg.norm(released, axis=1).mean()
        np.testing.assert_allclose(filled @ filled.T, scale**2 * released @ released.T, atol=1e-4 * scale**2)
        random = replace(config, start="random")
        usual = FedAvg(CATALOGUE, random).init(Streams(0))["item.weight"][:N_ITEMS]
        length = 1.0 if reads_history(name) else np.linalg.norm(usual, axis=1).mean()
        assert np.linalg.norm(filled, axis=1).mean() == pytest.approx(length, rel=1e-4)
        np.testing.assert_allclose(found[:, released.shape[1] :], 0.1 * usual[:, released.shape[1] :], atol=1e-6)

    def test_content_alone_asks_nobody_and_puts_items_of_one_kind_together(self) -> None:
        learner = fedavg("mf", start="content")
        state = learner.init(Streams(0))
        assert learner.shapes(state) == fedavg("mf").shapes(state)
        vectors = state["item.weight"]
        even, odd = vectors[8:18:2], vectors[9:18:2]
        within = np.linalg.norm(even[:, None] - even, axis=2).mean()
        assert np.linalg.norm(even.mean(0) - odd.mean(0)) > within
        bare = FedAvg(Catalogue(ids=CATALOGUE.ids), FedAvgConfig(start="content"))
        random = FedAvg(Catalogue(ids=CATALOGUE.ids), FedAvgConfig())
        assert same(bare.init(Streams(0)), random.init(Streams(0)))  # nothing is known of these items

    def test_a_sum_of_nothing_starts_from_random_weights_of_content(self) -> None:
        learner = fedavg("mf", start="co-occurrence")
        state = learner.init(Streams(0))
        for _ in range(2):
            zeros = {name: np.zeros(shape, np.float32) for name, shape in learner.shapes(state).items()}
            state = learner.apply(state, zeros, 10.0)
        assert same(state, fedavg("mf", start="content").init(Streams(0)))

    def test_biases_rank_items_as_their_released_popularity_does(self) -> None:
        learner = fedavg("mf", start="co-occurrence")
        popularity = self.run(learner, 1)["popularity"]
        biases = self.run(learner, 2)["bias.weight"][:, 0]
        np.testing.assert_array_equal(np.argsort(popularity, kind="stable"), np.argsort(biases, kind="stable"))
        assert np.exp(biases).mean() == pytest.approx(1.0, rel=1e-4)
        assert np.exp(biases.max()) == pytest.approx((1 / popularity.mean() + 1) / 2, rel=1e-4)  # of the best known


class TestServerStep:
    def step(self, step: ServerStep, totals: list[float], divisor: float) -> list[float]:
        """The bias of item 0 after each of these sums at every coordinate, from 0."""
        learner = FedAvg(CATALOGUE, FedAvgConfig(model=ModelConfig(name="mf", dim=4), server=step))
        state, found = learner.init(Streams(0)), []
        for total in totals:
            same_everywhere = {n: np.full(s, total, np.float32) for n, s in learner.shapes(state).items()}
            state = learner.apply(state, same_everywhere, divisor)
            found.append(float(state["bias.weight"][0, 0]))
        return found

    def test_plain_adds_the_sum_over_the_divisor_with_a_decaying_step(self) -> None:
        found = self.step(ServerStep(optimizer="sgd", lr=0.5, decay=1.0), [8.0, 8.0, -4.0], divisor=4.0)
        np.testing.assert_allclose(found, [1.0, 1.5, 1.5 - 0.5 / 3], rtol=1e-6)

    def test_momentum_adds_what_it_remembers_of_earlier_means(self) -> None:
        found = self.step(ServerStep(optimizer="momentum", lr=0.5, momentum=0.8), [8.0, 8.0, -4.0], divisor=4.0)
        first = 2.0
        second = 0.8 * first + 2.0
        third = 0.8 * second - 1.0
        np.testing.assert_allclose(found, 0.5 * np.cumsum([first, second, third]), rtol=1e-6)

    def test_adam_moves_as_its_source_says(self) -> None:
        rule = ServerStep(lr=0.1, momentum=0.5, second=0.75, floor=0.01)
        found = self.step(rule, [8.0, 8.0, -4.0], divisor=4.0)
        first = second = at = 0.0
        expected = []
        for t, mean in enumerate((2.0, 2.0, -1.0), 1):
            first, second = 0.5 * first + 0.5 * mean, 0.75 * second + 0.25 * mean**2
            at += 0.1 * (first / (1 - 0.5**t)) / ((second / (1 - 0.75**t)) ** 0.5 + 0.01)
            expected.append(at)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert not np.allclose(found, self.step(rule, [8.0, 8.0, 4.0], divisor=4.0))

    @pytest.mark.parametrize(
        "fields",
        [
            {"optimizer": "adagrad"},
            {"lr": 0.0},
            {"lr": np.nan},
            {"decay": -1.0},
            {"second": 1.0},
            {"floor": 0.0},
            {"momentum": 1.0},
        ],
    )
    def test_a_setting_out_of_range_is_refused(self, fields: dict[str, Any]) -> None:
        (name,) = fields
        with pytest.raises(InvalidConfig, match=name):
            ServerStep(**fields)


class TestRegistry:
    @pytest.mark.parametrize(
        ("name", "settings", "hint"),
        [
            ("fedavgg", {}, "fedavg"),
            ("cooccurrence", {"haed": 5}, "head"),
            ("cooccurrence", {"taste": {"deacy": 0.5}}, "decay"),
            ("fedavg", {"model": {"name": "nuemf"}}, "neumf"),
        ],
    )
    def test_a_wrong_name_or_key_is_refused_with_the_nearest(
        self, name: str, settings: dict[str, Any], hint: str
    ) -> None:
        with pytest.raises(InvalidConfig, match=f"did you mean '{hint}'"):
            registry.build(name, settings, CATALOGUE)

    def test_what_is_left_out_takes_its_default(self) -> None:
        built = registry.build("cooccurrence", {"taste": {"ridge": 0.5}}, CATALOGUE)
        assert isinstance(built, Cooccurrence)
        assert built.config.taste.ridge == 0.5
        assert built.config.head == CooccurrenceConfig().head

    def test_where_it_runs_is_no_part_of_its_settings(self) -> None:
        built = registry.build("fedavg", {}, CATALOGUE, where="cpu")
        assert isinstance(built, FedAvg)
        assert built.config == FedAvgConfig()
        assert registry.build("cooccurrence", {}, CATALOGUE, where="cpu").name == "cooccurrence"
        with pytest.raises(InvalidConfig, match="where"):
            registry.build("fedavg", {"where": "cpu"}, CATALOGUE)
