"""Compiled training of a cohort: the plain path's result, whoever shares a thread; and its law where noise is added."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from penchant.common import draws
from penchant.common.arrays import Arrays, Float64
from penchant.common.catalogue import Catalogue
from penchant.common.interactions import Interactions
from penchant.common.learners.neural import fused
from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig
from penchant.common.learners.neural.fused import kernels
from penchant.common.learners.neural.fused.cohort import Cohort
from penchant.common.learners.neural.models import ModelConfig
from penchant.common.learners.training import LocalTraining
from penchant.common.privacy.plan import DeviceNoise
from penchant.common.privacy.sums import Clip, norm
from penchant.common.streams import Streams

N_ITEMS = 60
CATALOGUE = Catalogue(ids=tuple(str(i) for i in range(N_ITEMS)))
EVERY = pytest.mark.parametrize("name", ["mf", "mlp", "neumf"])
DIMS = pytest.mark.parametrize("dim", [16, 20, 5])  # a whole vector, more than one, less than one
LOCAL = LocalTraining(epochs=2, batch=7, lr=0.1, negatives=3, fold_in_steps=3, fold_in_lr=0.5)
DEVICE = DeviceNoise(clip_norm=0.05, noise_multiplier=1e-9, rate=0.4, steps=5, divisor=3.0, min_history=2)


def people(n: int = 20, longest: int = 30, seed: int = 0) -> Interactions:
    """Histories of every length, some empty, one with repeats, one of the whole catalogue."""
    random = np.random.default_rng(seed)
    some = [random.choice(N_ITEMS, random.integers(0, longest), replace=False).tolist() for _ in range(n)]
    return Interactions.of([*some, [], [3, 3, 5, 3], list(range(N_ITEMS)), [7]], N_ITEMS)


def pair(name: str, dim: int = 16, threads: int = 2, **fields: Any) -> tuple[FedAvg, FedAvg, dict[str, Any]]:
    """A learner on the plain path, the same with kernels, and a state with weights so large that all of them matter."""
    config = FedAvgConfig(model=ModelConfig(name=name, dim=dim), **{"local": LOCAL, **fields})
    plain, compiled = FedAvg(CATALOGUE, config), FedAvg(CATALOGUE, config, threads=threads)
    random = np.random.default_rng(5)
    state = {
        key: (values + 0.3 * random.standard_normal(values.shape)).astype(np.float32)
        for key, values in plain.init(Streams(1)).items()
    }
    return plain, compiled, state


def own(row: int) -> Streams:
    return Streams(2).scope("person", row)


def own_of(user: int, row: int) -> Streams:
    return own(user)


def close(found: Arrays, expected: Arrays, atol: float) -> bool:
    return found.keys() == expected.keys() and all(
        np.allclose(found[name], expected[name], rtol=0, atol=atol) for name in expected
    )


@EVERY
@DIMS
@pytest.mark.parametrize("bound", [0.05, np.inf])
def test_a_cohort_s_sum_is_that_of_the_plain_path(name: str, dim: int, bound: float) -> None:
    plain, compiled, state = pair(name, dim)
    histories, one, other = people(), Clip(bound), Clip(bound)
    expected = plain.partial_sum(state, histories, one, own)
    found = compiled.partial_sum(state, histories, other, own)
    assert close(found, expected, atol=5e-6)
    assert all(np.abs(values).max() > 1e-3 for values in expected.values())  # so that 5e-6 says something
    assert vars(other) == vars(one)


@settings(max_examples=25, deadline=None)
@given(
    histories=st.lists(st.lists(st.integers(0, N_ITEMS - 1), max_size=12), max_size=6),
    training=st.builds(
        LocalTraining,
        epochs=st.integers(1, 3),
        batch=st.integers(1, 9),
        negatives=st.integers(1, 5),
        fold_in_steps=st.integers(0, 2),
        fold_in_lr=st.just(0.5),
        lr=st.just(0.05),
    ),
    name=st.sampled_from(["mf", "mlp", "neumf"]),
    seed=st.integers(0, 1000),
)
def test_any_histories_and_settings_train_as_on_the_plain_path(
    histories: list[list[int]], training: LocalTraining, name: str, seed: int
) -> None:
    plain, compiled, state = pair(name, local=training)
    data = Interactions.of(histories, N_ITEMS)

    def streams(row: int) -> Streams:
        return Streams(seed).scope("person", row)

    expected = plain.partial_sum(state, data, Clip(1.0), streams)
    # A person is cut to length 1. Rounding may put one relu on its other side, for 1 person in 10,000: a small part.
    assert close(compiled.partial_sum(state, data, Clip(1.0), streams), expected, atol=2e-3)


@EVERY
@pytest.mark.parametrize(("bound", "device"), [(0.1, None), (np.inf, None), (np.inf, DEVICE)])
def test_bits_do_not_depend_on_threads_or_company(name: str, bound: float, device: DeviceNoise | None) -> None:
    _, one, state = pair(name, threads=1, device=device)
    _, three, _ = pair(name, threads=3, device=device)
    data = people(200)
    whole = one.partial_sum(state, data, Clip(bound), own)
    for _ in range(3):
        assert close(three.partial_sum(state, data, Clip(bound), own), whole, atol=0.0)
    if device is not None:  # what nobody reads of the noise is drawn for each sum
        return
    total = {key: np.zeros(values.shape) for key, values in whole.items()}
    for u in range(data.n_users):
        for key, values in one.partial_sum(state, data.select([u]), Clip(bound), partial(own_of, u)).items():
            total[key] += values
    assert close(total, whole, atol=0.0)


@EVERY
def test_what_is_frozen_stays_and_is_in_no_sum(name: str) -> None:
    held = {"mf": "bias.weight", "mlp": "first", "neumf": "item_product"}[name]
    plain, compiled, state = pair(name, freeze=(held,))
    expected = plain.partial_sum(state, people(), Clip(0.05), own)
    found = compiled.partial_sum(state, people(), Clip(0.05), own)
    assert not any(key.startswith(held) for key in found)
    assert close(found, expected, atol=5e-6)


def test_one_person_who_cannot_be_bounded_adds_nothing_and_takes_nobody_along() -> None:
    plain, compiled, state = pair("mlp", local=LocalTraining(lr=0.1, fold_in_steps=0))
    poisoned = dict(state, **{"item.weight": state["item.weight"].copy()})
    poisoned["item.weight"][0] = 3e38  # what it meets overflows
    data = Interactions.of([[0, 1, 2], [4, 5, 6]], N_ITEMS)

    def streams(row: int) -> Streams:  # under these the other does not draw item 0
        return own(row + 50)

    clip, alone, reference = Clip(0.1), Clip(0.1), Clip(0.1)
    found = compiled.partial_sum(poisoned, data, clip, streams)
    kept = compiled.partial_sum(poisoned, data.select([1]), alone, lambda _: streams(1))
    assert (clip.n, clip.refused, alone.refused) == (2, 1, 0)
    assert close(found, kept, atol=0.0)
    assert np.abs(found["item.weight"]).max() > 0
    assert close(plain.partial_sum(poisoned, data, reference, streams), found, atol=5e-6)
    assert vars(reference) == vars(clip)


@EVERY
def test_who_has_nearly_everything_trains_as_on_the_plain_path(name: str) -> None:
    plain, compiled, state = pair(name)
    data = Interactions.of([[*range(31)], [*range(N_ITEMS - 1)], [*range(30)], [5, 5, *range(40), 5]], N_ITEMS)
    assert close(
        compiled.partial_sum(state, data, Clip(0.5), own), plain.partial_sum(state, data, Clip(0.5), own), atol=5e-6
    )


@pytest.mark.parametrize("bound", [1e-35, 1e47, 1e300])
def test_a_bound_that_float32_cannot_divide_by_is_kept_too(bound: float) -> None:
    plain, compiled, state = pair("mlp")
    found = compiled.partial_sum(state, people(), Clip(bound), own)
    assert close(found, plain.partial_sum(state, people(), Clip(bound), own), atol=1e-5 * min(1.0, bound))
    assert all(np.isfinite(values).all() for values in found.values())


@EVERY
def test_kernels_draw_the_examples_of_the_plain_path(name: str) -> None:
    counters = np.arange(50)
    assert [kernels.word(9, c) for c in counters] == draws.words(9, counters).tolist()
    assert [kernels.below(9, c, 17) for c in counters] == draws.below(9, counters, 17).tolist()


def test_without_numba_or_a_kernel_people_train_on_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    _, compiled, state = pair("mf")
    assert isinstance(compiled._cohort, Cohort)
    expected = compiled.partial_sum(state, people(), Clip(0.05), own)
    assert pair("mlp", local=LocalTraining(proximal=0.1))[1]._cohort is None
    assert pair("mf", adapter=2)[1]._cohort is None
    assert pair("gru")[1]._cohort is None
    monkeypatch.setitem(sys.modules, "numba", None)
    for module in [name for name in sys.modules if name.startswith(f"{fused.__name__}.")]:
        monkeypatch.delitem(sys.modules, module)
        monkeypatch.delattr(fused, module.rpartition(".")[2], raising=False)
    _, without, _ = pair("mf")
    assert without._cohort is None
    assert close(without.partial_sum(state, people(), Clip(0.05), own), expected, atol=5e-6)


class Replayed:
    """Gives `DeviceSgd` the coins and negatives that the kernel draws."""

    def __init__(self, streams: Streams, rate: float) -> None:
        self.coins, self.pool, self.rate, self.step = streams.word("coins"), streams.word("pool"), rate, -1

    def spawn(self, n: int) -> list[np.random.Generator]:
        return [np.random.default_rng(0)]

    def random(self, n: int) -> Float64:
        self.step += 1
        # the kernel counts the interactions that are left out too
        self.size = n + DEVICE.min_history - 1 if n else 0
        self.at = self.step * self.size + np.arange(self.size - n, self.size)
        self.drawn = draws.uniform(self.coins, self.at)
        return self.drawn

    def integers(self, low: int, high: int, shape: tuple[int, int]) -> Any:
        chosen = self.at[self.drawn < self.rate]
        return draws.below(self.pool, chosen[:, None] * shape[1] + np.arange(shape[1]), high)


@EVERY
@DIMS
@pytest.mark.parametrize("bound", [0.05, 100.0])
def test_dp_sgd_of_a_cohort_is_opacus_for_each_but_for_the_noise(name: str, dim: int, bound: float) -> None:
    device = DeviceNoise(**{**vars(DEVICE), "clip_norm": bound, "noise_multiplier": 1e-9 / bound})
    _, compiled, state = pair(name, dim, device=device)
    data, sgd, weights = people(), compiled._device_sgd, compiled._weights(state)
    assert sgd is not None
    random: Any = [Replayed(own(u), device.rate) for u in range(data.n_users)]
    changes = [sgd.train(weights, history, random[u]) for u, history in enumerate(data)]
    expected = {key: np.sum([change[key] for change in changes], axis=0) for key in changes[0]}
    found = compiled.partial_sum(state, data, Clip(np.inf), own)
    assert close(found, expected, atol=1e-5)
    assert all(np.abs(values).max() > 3e-4 for values in expected.values())


def sums_of(name: str, device: DeviceNoise, n: int, *, plain: bool = False) -> dict[str, Float64]:
    """n sums of three people by DP-SGD, float64[n, …] by name."""
    learner, compiled, state = pair(name, 4, device=device, local=LocalTraining(lr=0.2), threads=1)
    data = Interactions.of([[1, 2], [], [2, 1]], N_ITEMS)
    found = []
    for seed in range(n):
        streams = Streams(seed)
        one = learner if plain else compiled
        found.append(one.partial_sum(state, data, Clip(np.inf), partial(streams.scope, "local")))
    return {key: np.array([sums[key] for sums in found]) for key in found[0]}


@pytest.mark.parametrize("size", [1e2, 1e3, 5e3, 2e4])
def test_a_group_whose_gradient_nearly_cancels_is_cut_to_its_own_length(size: float) -> None:
    # A positive and a negative with all but equal large vectors: their gradients are large and opposite.
    device = DeviceNoise(clip_norm=1.0, noise_multiplier=1e-12, rate=1.0, steps=1, divisor=1.0)
    _, compiled, state = pair("mlp", 8, device=device, local=LocalTraining(lr=1.0, negatives=1))
    random = np.random.default_rng(3)
    state["item.weight"] = (size * (1 + 1e-4 * random.standard_normal((N_ITEMS, 8)))).astype(np.float32)
    for seed in range(40):
        data = Interactions.of([[seed]], N_ITEMS)
        change = compiled.partial_sum(state, data, Clip(np.inf), partial(Streams(seed).scope, "person"))
        assert norm(change) <= 1.0 + 1e-5


def test_who_cannot_be_bounded_still_sends_noise() -> None:
    device = DeviceNoise(clip_norm=1.0, noise_multiplier=1.0, rate=1.0, steps=4, divisor=1.0)
    _, compiled, state = pair("mlp", 8, device=device, local=LocalTraining(lr=1.0), threads=1)
    state["item.weight"][7] = 3e38  # finite, and what it meets overflows
    data, variance = Interactions.of([[1, 2, 3, 7]] * 50, N_ITEMS), 50 * 4
    sums = [  # of a single number 600 of χ²: out by 3.5 of its σ
        compiled.partial_sum(state, data, Clip(np.inf), partial(Streams(seed).scope, "local")) for seed in range(600)
    ]
    for key in sums[0]:
        spread = np.square([one[key] for one in sums])
        spread = spread[:, 8:] if key in ("item.weight", "bias.weight") else spread  # rows that gradients leave alone
        assert 0.8 * variance < spread.mean()


@EVERY
class TestNoise:
    def test_every_number_has_all_of_it_read_or_not(self, name: str) -> None:
        # Gradients of at most 1e-3 do not show, and noise of n numbers is χ²: out by 6 of its σ for 1 array in 10⁸.
        device = DeviceNoise(clip_norm=1e-3, noise_multiplier=500.0, rate=0.3, steps=6, divisor=2.0)
        variance = 3 * 6 * (0.2 * 0.5 / 2.0) ** 2
        for values in sums_of(name, device, 1500).values():
            parts = [values]
            if values.shape[1:2] == (N_ITEMS,):  # own items, which steps read; all others
                parts = [values[:, 1:3], np.delete(values, [1, 2], 1)]
            for part in parts:
                assert np.square(part).mean() == pytest.approx(variance, rel=6 * (2 / part.size) ** 0.5)
                assert np.abs(part.mean()) < 6 * (variance / part.size) ** 0.5 + 1e-3

    def test_sums_have_the_law_of_the_plain_path(self, name: str) -> None:
        # Kolmogorov and Smirnov on 12 projections of each array: a false alarm for 1 test in 10⁵ (Bonferroni).
        device = DeviceNoise(clip_norm=1.0, noise_multiplier=0.5, rate=0.5, steps=4, divisor=2.0)
        compiled, plain = sums_of(name, device, 800), sums_of(name, device, 100, plain=True)
        random = np.random.default_rng(0)
        for key in plain:
            for _ in range(12):
                along = random.standard_normal(plain[key].shape[1:])
                a, b = ((one[key] * along).reshape(len(one[key]), -1).sum(1) for one in (compiled, plain))
                found: Any = stats.ks_2samp(a, b)
                assert found.pvalue > 1e-5 / (12 * len(plain))

    def test_a_sum_that_something_else_looks_at_is_made_person_by_person(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("noise for a sum must not be in a change that is clipped")

        monkeypatch.setattr(Cohort, "private_sum", refuse)
        for clip in (Clip(5.0), Clip(np.inf, row_norm=1.0)):
            _, compiled, state = pair(name, device=DEVICE)
            compiled.partial_sum(state, people(3, 4), clip, own)
        held = {"mf": "bias", "mlp": "first", "neumf": "second"}[name]
        _, compiled, state = pair(name, device=DEVICE, freeze=(held,))
        compiled.partial_sum(state, people(3, 4), Clip(np.inf), own)
