"""DP-SGD on the device: one interaction moves a step's sum by at most C, and the noise is what was promised."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from torch import Tensor
from torch.autograd import backward, grad
from torch.nn import functional as F

from penchant.common.arrays import Arrays, Float64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History
from penchant.common.learners.neural.device_sgd import DeviceSgd
from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig
from penchant.common.learners.neural.models import MODELS, InterestModel, ModelConfig, build, group_loss
from penchant.common.learners.training import LocalTraining
from penchant.common.privacy.noise import Noise
from penchant.common.privacy.plan import DeviceNoise
from penchant.common.streams import Streams

N_ITEMS = 8
LOCAL = LocalTraining(lr=0.5, negatives=4)
SILENT = 1e-9  # a noise multiplier must be positive
NOISE = DeviceNoise(clip_norm=0.3, noise_multiplier=SILENT, rate=0.6, steps=3, divisor=2.0)
ONE_STEP = dataclasses.replace(NOISE, rate=1.0, steps=1)
HISTORY = [5, 2, 2, 7, 0, 1]
ITEMS = st.lists(st.integers(0, N_ITEMS - 1), max_size=6)
BOTH = pytest.mark.parametrize("name", ["mf", "mlp", "neumf"])

Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[Float64]:
    """What each step has summed over all parameters before noise, one flat vector to a step."""
    seen: list[Float64] = []
    clipped_sum = DeviceSgd._clipped_sum

    def spy(self: DeviceSgd, *args: Any) -> dict[str, Float64]:
        totals = clipped_sum(self, *args)
        seen.append(np.concatenate([values.ravel() for values in totals.values()]))
        return totals

    monkeypatch.setattr(DeviceSgd, "_clipped_sum", spy)
    return seen


def flat(tensors: list[Tensor]) -> Float64:
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors])


def loud(name: str, n_items: int = N_ITEMS, scale: float = 0.7) -> tuple[InterestModel, Weights]:
    """A model and weights so large that the gradients of most groups exceed the clip; zero scale: all weights zero."""
    model = build(ModelConfig(name=name, dim=4, hidden=None if name == "mf" else 4), n_items, 1)
    random = torch.Generator().manual_seed(2)
    return model, {n: scale * torch.randn(p.shape, generator=random) for n, p in model.named_parameters()}


def trained(
    name: str,
    items: list[int],
    noise: DeviceNoise,
    *,
    local: LocalTraining = LOCAL,
    seed: int = 0,
    n_items: int = N_ITEMS,
    scale: float = 0.7,
) -> Arrays:
    model, weights = loud(name, n_items, scale)
    return DeviceSgd(model, noise, local).train(weights, History.of(items), np.random.default_rng(seed))


def group_gradients(model: InterestModel, groups: np.ndarray) -> list[Float64]:
    """The flat gradient of each group's loss over all parameters, the person's vector among them, by autograd."""
    found = []
    for group in torch.from_numpy(groups).long():
        loss = group_loss(model(group[None, :0], group[None]))[0]
        found.append(flat(list(grad(loss, list(model.parameters()), materialize_grads=True))))
    return found


def drawn_group(name: str, item: int, seed: int, n_items: int = N_ITEMS) -> tuple[InterestModel, np.ndarray]:
    """The model with its weights and the group [1 + k] that one step with this one interaction draws."""
    model, weights = loud(name, n_items)
    model.load_state_dict(weights)
    random = np.random.default_rng(seed)
    random.random(1)
    return model, np.array([item, *random.integers(0, n_items, LOCAL.negatives)])


class Coupled(np.random.Generator):
    """Coins from a stream of their own, so that one more interaction does not move the draws of the others."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.PCG64(seed))
        self._coins = np.random.default_rng([seed, 1])

    def random(self, size: int) -> Float64:  # type: ignore[override]  # as it is used
        return self._coins.random(size)

    def spawn(self, n_children: int) -> list[np.random.Generator]:
        return self._coins.spawn(n_children)


def examples(model: InterestModel, group: np.ndarray) -> list[Float64]:
    """The flat gradient of each place of a group; together they are the group's."""
    found = []
    for place, item in enumerate(torch.from_numpy(group).long()):
        logit = model(item[None, None][:, :0], item[None, None])[0, 0]
        loss = (F.softplus(logit) - logit * (place == 0)) / len(group)
        found.append(flat(list(grad(loss, list(model.parameters()), materialize_grads=True))))
    return found


def clipped(gradient: Float64, bound: float) -> Float64:
    return gradient * min(1.0, bound / float(np.linalg.norm(gradient)))


def reference(name: str, items: list[int], noise: DeviceNoise, seed: int = 0, start: int = 0) -> Arrays:
    """The equations of the module's header, one group at a time, with the same draws.

    Args:
        start: place of the first interaction that takes part.
    """
    model, weights = loud(name)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
    random = np.random.default_rng(seed)
    stream = Noise(random.spawn(1)[0].bytes(32))
    known = np.array(items[start:], np.int64)
    for _ in range(noise.steps):
        chosen = known[random.random(len(known)) < noise.rate]
        drawn = random.integers(0, N_ITEMS, (len(chosen), LOCAL.negatives))
        total = np.zeros(sum(p.numel() for p in parameters.values()))
        for gradient in group_gradients(model, np.column_stack([chosen, drawn])):
            total += clipped(gradient, noise.clip_norm)
        parts = np.split(total, np.cumsum([p.numel() for p in parameters.values()])[:-1])
        stddev = noise.noise_multiplier * noise.clip_norm
        parts = [stream.add(part, stddev).astype(np.float32) for part in parts]
        with torch.no_grad():
            for parameter, part in zip(parameters.values(), parts, strict=True):
                parameter.sub_(LOCAL.lr / noise.divisor * torch.from_numpy(part).view_as(parameter))
    return {k: (p.detach() - weights[k]).numpy() for k, p in parameters.items() if k not in model.private}


def biases(update: Arrays) -> Float64:
    """The step's sum at each item's bias; with zero weights a positive is −½/(1 + k) there and a negative ½/(1 + k)."""
    return -update["bias.weight"][:, 0].astype(np.float64) * ONE_STEP.divisor / LOCAL.lr


@BOTH
class TestUpdate:
    @pytest.mark.parametrize("multiplier", [SILENT, 1.0])
    def test_equals_the_equations_with_the_same_draws(self, name: str, multiplier: float) -> None:
        noise = dataclasses.replace(NOISE, noise_multiplier=multiplier)
        found, expected = trained(name, HISTORY, noise), reference(name, HISTORY, noise)
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            np.testing.assert_allclose(found[key], values, atol=2e-6)
            assert np.abs(values).max() > 1e-3  # so that 2e-6 says something

    @pytest.mark.parametrize("field", ["clip_norm", "rate", "divisor"])
    def test_another_constant_is_seen_by_that_comparison(self, name: str, field: str) -> None:
        wrong = dataclasses.replace(NOISE, **{field: 1.1 * getattr(NOISE, field)})
        found, expected = trained(name, HISTORY, wrong, seed=3), reference(name, HISTORY, NOISE, seed=3)
        assert max(np.abs(found[key] - expected[key]).max() for key in expected) > 1e-3

    def test_repeats_for_a_stream_and_differs_for_another(self, name: str) -> None:
        noise = dataclasses.replace(NOISE, noise_multiplier=1.0)
        one, same, other = (trained(name, HISTORY, noise, seed=s) for s in (1, 1, 2))
        for key in one:
            np.testing.assert_array_equal(one[key], same[key])
            assert not np.array_equal(one[key], other[key])

    def test_the_persons_vector_and_the_received_weights_stay(self, name: str) -> None:
        model, weights = loud(name)
        before = {key: values.clone() for key, values in weights.items()}
        update = DeviceSgd(model, NOISE, LOCAL).train(weights, History.of(HISTORY), np.random.default_rng(0))
        assert update.keys() == weights.keys() - set(model.private)
        assert all(torch.equal(before[key], weights[key]) for key in weights)

    def test_warns_of_nothing_and_leaves_the_programs_filters_as_they_were(self, name: str) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = list(warnings.filters)
            trained(name, HISTORY, NOISE)
            assert warnings.filters == before
            assert caught == []
            model, _ = loud(name)  # Opacus alone, on the same layers, does warn
            alone: Any = GradSampleModule(copy.deepcopy(model).train(), loss_reduction="sum")
            groups = torch.tensor([[1, 2]])
            backward(group_loss(alone(groups[:, :0], groups)).sum())
        assert any("Full backward hook" in str(w.message) for w in caught)

    def test_nobody_leaves_anything_for_the_next(self, name: str) -> None:
        model, weights = loud(name)
        device = DeviceSgd(model, NOISE, LOCAL)
        first = device.train(weights, History.of(HISTORY), np.random.default_rng(0))
        device.train(weights, History.of([1]), np.random.default_rng(1))
        again = device.train(weights, History.of(HISTORY), np.random.default_rng(0))
        assert all(np.array_equal(first[key], again[key]) for key in first)


@BOTH
class TestClip:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(exponents=st.lists(st.floats(-3, 38), min_size=6, max_size=6), seed=st.integers(0, 999))
    @example(exponents=[20.0, 20.0, 20.0, 20.0, 20.0, 20.0], seed=0)  # a gradient that overflows
    @example(exponents=[4.0, 4.0, 4.0, 4.0, 4.0, 4.0], seed=3)
    def test_no_weights_make_one_interaction_count_for_more_or_fail_the_device(
        self, name: str, sums: list[Float64], exponents: list[float], seed: int
    ) -> None:
        # Whoever sends the weights may look for ones under which an interaction shows. Ghost norms cancel there.
        sums.clear()
        model, weights = loud(name)
        scale = dict(zip(weights, [10.0**e for e in exponents] * 2, strict=False))
        random = np.random.default_rng(seed)
        sent = {
            n: torch.from_numpy((np.clip(random.standard_normal(tuple(w.shape)), -3, 3) * scale[n]).astype(np.float32))
            for n, w in weights.items()
        }
        sent = {n: torch.nan_to_num(w, posinf=3e38, neginf=-3e38) for n, w in sent.items()}
        for items in ([5, 2, 7], [5, 2, 7, 1]):
            update = DeviceSgd(model, ONE_STEP, LOCAL).train(sent, History.of(items), Coupled(seed))
            assert update.keys() == sent.keys() - set(model.private)
        fewer, more = sums
        assert np.isfinite(more).all()
        assert np.linalg.norm(more - fewer) <= ONE_STEP.clip_norm

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(item=st.integers(0, N_ITEMS - 1), bound=st.floats(1e-3, 5), seed=st.integers(0, 99))
    @example(item=0, bound=1e-3, seed=0)
    def test_a_group_adds_its_gradient_or_a_part_of_length_c(
        self, name: str, sums: list[Float64], item: int, bound: float, seed: int
    ) -> None:
        sums.clear()
        trained(name, [item], dataclasses.replace(ONE_STEP, clip_norm=bound), seed=seed)
        model, group = drawn_group(name, item, seed)
        (gradient,) = group_gradients(model, group[None])
        (found,) = sums
        length = np.linalg.norm(found)
        assert length <= bound
        assert length == pytest.approx(min(bound, float(np.linalg.norm(gradient))), rel=1e-5)
        np.testing.assert_allclose(found, clipped(gradient, bound), atol=1e-5)

    def test_hits_and_repeats_among_the_draws_count_as_one_gradient(self, name: str, sums: list[Float64]) -> None:
        # Of two items and four draws some item is always drawn twice, and mostly the positive is drawn as well.
        noise, apart = dataclasses.replace(ONE_STEP, clip_norm=0.05), []
        for seed in range(20):
            sums.clear()
            trained(name, [1], noise, seed=seed, n_items=2)
            model, group = drawn_group(name, 1, seed, n_items=2)
            (gradient,) = group_gradients(model, group[None])
            np.testing.assert_allclose(sums[0], clipped(gradient, 0.05), atol=1e-6)
            places = np.array(examples(model, group))
            apart.append(np.linalg.norm(places) / np.linalg.norm(gradient))
        assert max(abs(1 - np.array(apart))) > 0.2  # summing squares place by place would find another norm

    def test_the_examples_of_a_group_are_not_clipped_one_by_one(self, name: str, sums: list[Float64]) -> None:
        bound = 0.05
        trained(name, [3], dataclasses.replace(ONE_STEP, clip_norm=bound))
        places = examples(*drawn_group(name, 3, 0))
        np.testing.assert_allclose(sums[0], clipped(np.sum(places, axis=0), bound), atol=1e-5)
        apart = np.sum([clipped(place, bound) for place in places], axis=0)
        assert np.abs(sums[0] - apart).max() > 0.01
        assert np.linalg.norm(apart) > 1.5 * bound  # which would break the sensitivity

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        items=ITEMS,
        extra=st.integers(0, N_ITEMS - 1),
        shortest=st.integers(1, 5),
        rate=st.sampled_from((0.5, 1.0)),
        seed=st.integers(0, 99),
    )
    @example(items=[5, 2, 7, 0], extra=1, shortest=5, rate=1.0, seed=0)  # a threshold lets five in at once
    def test_one_more_interaction_moves_the_sum_by_at_most_c(
        self, name: str, sums: list[Float64], items: list[int], extra: int, shortest: int, rate: float, seed: int
    ) -> None:
        sums.clear()
        noise = dataclasses.replace(ONE_STEP, min_history=shortest, rate=rate)
        model, weights = loud(name)
        for history in (items, [*items, extra]):
            DeviceSgd(model, noise, LOCAL).train(weights, History.of(history), Coupled(seed))
        moved = np.linalg.norm(sums[1] - sums[0])
        assert moved <= noise.clip_norm * (1 + 1e-5)
        if rate == 1:
            assert (moved > 0) == (len(items) + 1 >= shortest)

    def test_two_more_move_it_by_more(self, name: str, sums: list[Float64]) -> None:
        model, weights = loud(name)
        for items in ([5], [5, 1, 1]):
            DeviceSgd(model, ONE_STEP, LOCAL).train(weights, History.of(items), Coupled(0))
        assert np.linalg.norm(sums[1] - sums[0]) > 1.2 * ONE_STEP.clip_norm


class TestPersonalVector:
    """Zero biases and the item vectors 3 · 1, so that only the person's vector and the biases have a gradient."""

    def update(self, sums: list[Float64], steps: int = 1) -> tuple[Arrays, list[Float64]]:
        model, weights = loud("mf", scale=0.0)
        weights["item.weight"] += 3
        noise = dataclasses.replace(ONE_STEP, steps=steps, clip_norm=0.2)
        local = dataclasses.replace(LOCAL, negatives=2)
        return DeviceSgd(model, noise, local).train(weights, History.of([4]), np.random.default_rng(7)), sums

    def test_its_gradient_counts_in_the_norm(self, sums: list[Float64]) -> None:
        update, (total,) = self.update(sums)
        user, shared = total[:4], total[4:]
        assert np.linalg.norm(total) == pytest.approx(0.2, rel=1e-4)
        assert np.linalg.norm(user) > 0.15
        sent = flat([torch.from_numpy(update[key]) for key in ("item.weight", "bias.weight")])
        np.testing.assert_allclose(sent, -LOCAL.lr / ONE_STEP.divisor * shared, atol=1e-6)
        assert 0.01 < np.linalg.norm(shared) < 0.1  # clipped without it they would have length 0.2

    def test_it_is_trained_and_reset(self, sums: list[Float64]) -> None:
        update, (first, second) = self.update(sums, steps=2)
        assert not first[4 : 4 + 4 * N_ITEMS].any()  # the item vectors' gradient is a multiple of the person's vector
        assert np.abs(second[4 : 4 + 4 * N_ITEMS]).max() > 1e-4
        assert "user.weight" not in update


class TestNoise:
    n_items, repeats = 40, 150
    noise = DeviceNoise(clip_norm=0.4, noise_multiplier=1.5, rate=0.5, steps=4, divisor=3.0, min_history=3)
    expected = LOCAL.lr * 1.5 * 0.4 * math.sqrt(4) / 3.0

    def draws(self, items: list[int]) -> dict[str, Float64]:
        """The updates of 150 devices with this history, on top of each other."""
        model, weights = loud("mf", self.n_items)
        device = DeviceSgd(model, self.noise, LOCAL)
        all_of = [device.train(weights, History.of(items), np.random.default_rng(s)) for s in range(self.repeats)]
        return {key: np.stack([u[key] for u in all_of]).astype(np.float64) for key in all_of[0]}

    def test_has_the_promised_scale_in_every_coordinate_and_a_wrong_one_is_caught(self) -> None:
        # χ²: of n draws the mean square strays 10 % with probability < 1e-7 for n ≥ 6,000, and of 150 draws by more
        # than 80 % in one of 200 coordinates with probability < 1e-7.
        for values in self.draws([]).values():
            assert values.size >= 6000
            for factor, right in ((1.0, True), (0.9, False), (1.1, False)):
                assert (abs(np.mean((values / (factor * self.expected)) ** 2) - 1) < 0.1) == right
            each = np.mean((values / self.expected) ** 2, axis=0)
            assert 0.2 < each.min() < each.max() < 1.8
            assert abs(values.mean()) < 6 * self.expected / math.sqrt(values.size)

    def test_is_in_rows_that_no_gradient_reached(self) -> None:
        model, weights = loud("mf", self.n_items)
        noise = dataclasses.replace(self.noise, steps=1, rate=1.0, min_history=1)
        local = dataclasses.replace(LOCAL, negatives=1)
        untouched = []
        for seed in range(self.repeats):
            update = DeviceSgd(model, noise, local).train(weights, History.of([7]), np.random.default_rng(seed))
            random = np.random.default_rng(seed)
            random.random(1)
            touched = np.array([7, random.integers(0, self.n_items)])
            untouched.append(np.delete(update["item.weight"], touched, axis=0).ravel())
        square = np.mean((np.concatenate(untouched) / (self.expected / 2)) ** 2)  # one step, not four
        assert abs(square - 1) < 0.1
        assert abs(square * 4 - 1) > 0.1

    def test_does_not_come_from_a_seed_that_can_be_tried_out(self) -> None:
        # torch's CPU generator keeps 32 bits of its seed: streams whose next integers agree there would share noise.
        assert torch.equal(
            torch.randn(4, generator=torch.Generator().manual_seed(5)),
            torch.randn(4, generator=torch.Generator().manual_seed(5 + 2**32)),
        )
        noise = dataclasses.replace(NOISE, noise_multiplier=1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "normal", lambda *args, **kwargs: pytest.fail("noise from a torch generator"))
            assert np.abs(trained("mf", [], noise)["item.weight"]).max() > 0

    def test_of_one_device_is_independent_from_step_to_step_and_call_to_call(self) -> None:
        model, weights = loud("mf", self.n_items)
        random = np.random.default_rng(0)
        device = DeviceSgd(model, dataclasses.replace(self.noise, steps=1), LOCAL)
        one, two = (device.train(weights, History.of([]), random)["item.weight"].ravel() for _ in range(2))
        # 160 products of independent normals: their mean strays 0.5 (6 stddevs) for 1 seed in 1e9.
        assert abs(np.mean(one * two)) / np.mean(one**2) < 0.5


class TestHistoryLength:
    noise = dataclasses.replace(NOISE, noise_multiplier=1.0, min_history=3, rate=1.0)

    @BOTH
    def test_too_short_a_history_sends_exactly_what_an_empty_one_does(self, name: str) -> None:
        empty = trained(name, [], self.noise)
        for items, same in (([4], True), ([4, 1], True), ([4, 1, 6], False)):
            update = trained(name, items, self.noise)
            assert all(np.array_equal(update[key], empty[key]) for key in empty) == same

    @pytest.mark.parametrize("start", [0, 2])
    def test_the_first_interactions_below_the_minimum_never_take_part(self, start: int) -> None:
        found = trained("mf", HISTORY, self.noise)
        expected = reference("mf", HISTORY, self.noise, start=start)
        assert np.allclose(found["item.weight"], expected["item.weight"], atol=2e-6) == (start == 2)

    def test_steps_and_noise_draws_are_the_same_for_every_history(
        self, sums: list[Float64], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        n_normals = 0

        def count(self: Noise, total: Float64, stddev: float) -> Float64:
            nonlocal n_normals
            n_normals += total.size
            return total

        monkeypatch.setattr(Noise, "add", count)
        counts = []
        model, weights = loud("mf")
        for n in (0, 1, 3, 50):
            n_normals = 0
            sums.clear()
            history = History.of([i % N_ITEMS for i in range(n)])
            DeviceSgd(model, self.noise, LOCAL).train(weights, history, np.random.default_rng(0))
            counts.append((len(sums), n_normals))
        assert counts == [(NOISE.steps, NOISE.steps * sum(w.numel() for w in weights.values()))] * 4

    def test_an_update_is_not_divided_by_how_many_took_part(self, sums: list[Float64]) -> None:
        for n in (1, 4):
            trained("mf", [3] * n, ONE_STEP, scale=0.0)
        assert sums[1].min() < 3 * sums[0].min() < 0  # the bias of item 3, chosen once and four times


class TestSampling:
    """With zero weights and no clip to speak of, a step's sum tells who was in it."""

    wide = dataclasses.replace(ONE_STEP, clip_norm=1e2, noise_multiplier=1e-12)

    def test_negatives_come_from_the_whole_catalogue_hits_allowed(self) -> None:
        n = 3000
        places = biases(trained("mf", [2] * n, self.wide, scale=0.0)) * (1 + LOCAL.negatives) / 0.5
        drawn = places + n * (np.arange(N_ITEMS) == 2)
        assert drawn.sum() == pytest.approx(n * LOCAL.negatives, rel=1e-5)
        expected = n * LOCAL.negatives / N_ITEMS
        # χ² with 7 degrees of freedom exceeds 42 for 1 seed in 2,000,000.
        assert ((drawn - expected) ** 2 / expected).sum() < 42
        avoiding = np.where(np.arange(N_ITEMS) == 2, 0, drawn)
        assert ((avoiding - expected) ** 2 / expected).sum() > 42

    def test_a_person_who_knows_the_whole_catalogue_can_take_part(self) -> None:
        update = trained("mf", list(range(N_ITEMS)), ONE_STEP)
        assert np.abs(update["item.weight"]).max() > 1e-3

    def test_each_step_takes_each_interaction_by_a_coin_of_its_own(self, sums: list[Float64]) -> None:
        n, rate, steps = 100, 0.3, 400
        noise = dataclasses.replace(self.wide, rate=rate, steps=steps, divisor=1e9)  # weights stay as good as zero
        trained("mf", [1] * n, noise, scale=0.0)
        # A group of k negatives adds (k − 1)/2/(1 + k) over all biases.
        each = (LOCAL.negatives - 1) / 2 / (1 + LOCAL.negatives)
        counts = np.array([s[-N_ITEMS:].sum() for s in sums]) / each
        np.testing.assert_allclose(counts, np.round(counts), atol=0.01)
        assert len(counts) == steps
        variance = n * rate * (1 - rate)
        # The mean strays 6 stddevs for 1 seed in 1e9, the variance 40 % (5.6 stddevs) for 1 in 1e7.
        assert abs(counts.mean() - n * rate) < 6 * math.sqrt(variance / steps)
        assert abs(counts.mean() - n * rate * 1.1) > 6 * math.sqrt(variance / steps)
        assert 0.6 < counts.var() / variance < 1.4  # draws of a fixed size would have none
        assert len(np.unique(np.round(counts[:20]))) > 3

    def test_a_rate_of_one_takes_everything_every_time(self, sums: list[Float64]) -> None:
        noise = dataclasses.replace(self.wide, steps=5, divisor=1e9)
        trained("mf", [1] * 10, noise, scale=0.0)
        each = (LOCAL.negatives - 1) / 2 / (1 + LOCAL.negatives)
        np.testing.assert_allclose([s[-N_ITEMS:].sum() / each for s in sums], 10, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("mf", "mlp", "neumf")])
def test_a_sequence_model_is_refused_in_one_line_that_says_how_to_mend_it(name: str) -> None:
    catalogue = Catalogue(ids=("a", "b", "c"))
    config = FedAvgConfig(model=ModelConfig(name=name, dim=4), device=NOISE)
    with pytest.raises(InvalidConfig) as refused:
        FedAvg(catalogue, config)
    message = str(refused.value)
    assert "\n" not in message
    assert all(word in message for word in (name, "interaction", "mf, mlp or neumf", "user"))
    assert FedAvg(catalogue, dataclasses.replace(config, device=None))


class TestFrozen:
    """A frozen weight is sent by nobody, gets no noise and takes no part of a sample's clip."""

    def test_it_is_neither_sent_nor_noised_and_the_clip_is_spent_on_the_rest(self, sums: list[Float64]) -> None:
        model, weights = loud("mf")
        noise = dataclasses.replace(ONE_STEP, clip_norm=0.05, noise_multiplier=1.0)
        device = DeviceSgd(model, noise, LOCAL, frozenset({"bias.weight"}))
        drawn: list[int] = []
        add = Noise.add

        def count(self: Noise, total: Float64, stddev: float) -> Float64:
            drawn.append(total.size)
            return add(self, total, stddev)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Noise, "add", count)
            update = device.train(weights, History.of([5]), np.random.default_rng(0))
        assert update.keys() == {"item.weight"}
        assert sum(drawn) == 4 + 4 * N_ITEMS  # the person's vector and the item vectors
        (total,) = sums
        assert len(total) == sum(drawn)
        assert np.linalg.norm(total) == pytest.approx(0.05, rel=1e-4)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"start": "co-occurrence"}, "start co-occurrence"),
            ({"adapter": 2}, "adapter"),
            ({"local": LocalTraining(proximal=0.5)}, "proximal"),
        ],
    )
    def test_what_nobody_would_add_noise_to_is_refused(self, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(InvalidConfig, match=f"{words}.*--unit user"):
            FedAvgConfig(device=NOISE, **fields)

    def test_no_state_makes_a_device_send_its_items_without_noise(self) -> None:
        # A state without weights is what asks for co-occurrence's exact sums, where that is the start.
        learner = FedAvg(Catalogue(ids=tuple(map(str, range(N_ITEMS)))), FedAvgConfig(device=NOISE))
        for state in ({"popularity": np.zeros(N_ITEMS, np.float32)}, {}):
            with pytest.raises(KeyError):
                learner.contribution(state, History.of(HISTORY), Streams(0))
