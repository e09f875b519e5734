"""Sequence models trained together give each person what plain PyTorch gives that person alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import grad

from penchant.common.arrays import Arrays, Float32
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.learners.contract import Learner
from penchant.common.learners.neural import together
from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig
from penchant.common.learners.neural.models import (
    MODELS,
    Dropout,
    ModelConfig,
    SequenceModel,
    build,
    pad,
    reads_history,
)
from penchant.common.learners.neural.models.recurrence import carried
from penchant.common.learners.neural.models.softmax import SoftmaxLoss
from penchant.common.learners.training import LocalTraining
from penchant.common.privacy.sums import Clip, norm
from penchant.common.streams import Streams

N_ITEMS = 40
CATALOGUE = Catalogue(ids=tuple(str(i) for i in range(N_ITEMS)))
SEQUENCE = tuple(name for name in MODELS if reads_history(name))
EVERY = pytest.mark.parametrize("name", SEQUENCE)
SIZES: dict[str, dict[str, int]] = {"transformer": {"hidden": 12}}  # beside those of all
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def learner(name: str, *, dropout: float = 0.4, where: str = "cpu", layers: int = 2, **fields: Any) -> FedAvg:
    sizes = {"dim": 8, "hidden": 10, "max_length": 9, **SIZES.get(name, {})}
    model = ModelConfig(name=name, layers=layers, dropout=dropout, **sizes)
    return FedAvg(CATALOGUE, FedAvgConfig(model=model, **fields), where=where)


def loud(made: FedAvg, seed: int = 3) -> dict[str, Float32]:
    """A state with weights so large that whatever happens is seen in them, the row for padding too."""
    random = np.random.default_rng(seed)
    return {
        key: (values + 0.3 * random.standard_normal(values.shape)).astype(np.float32)
        for key, values in sorted(made.init(Streams(1)).items())
    }


def timed(histories: list[list[int]], ties: int) -> Interactions:
    """Histories in which so many neighbours have one time."""
    made = Interactions.of(histories, N_ITEMS)
    places = [5 + i // ties for items in histories for i in range(len(items))]
    return replace(made, times=np.array(places, np.int64))


def people() -> Interactions:
    """Nobody, one item, two, repeats, exactly what is read, far more, the whole catalogue; of three times each."""
    random = np.random.default_rng(0)
    some = [random.integers(0, N_ITEMS, n).tolist() for n in (0, 1, 2, 3, 10, 11, 25, 5, 8)]
    every = [*some, [3, 3, 3], random.permutation(N_ITEMS).tolist()]
    return timed(every, 3)


def own(row: int) -> Streams:
    return Streams(2).scope("person", row)


def precise(made: FedAvg, state: Arrays) -> tuple[SequenceModel, dict[str, Tensor]]:
    """Model and weights in float64, so that two ways to one result meet to many digits: to a root in float32."""
    assert isinstance(made.model, SequenceModel)
    return made.model.double(), {name: values.double() for name, values in made._weights(state).items()}


def both(
    made: FedAvg, data: Interactions, block: int = together.BLOCK, seed: int = 2, few: int = 1
) -> tuple[Mapping[int, Arrays], Mapping[int, Arrays]]:
    """What each person changes, together and alone."""
    model, weights = precise(made, loud(made))
    rule, streams = made.config.local, [Streams(seed).scope("person", u) for u in range(data.n_users)]
    found = dict(together.updates(model, weights, list(data), rule, streams, made.frozen, block, few))
    one_by_one = {
        u: together.alone(model, weights, person, rule, streams[u], made.frozen) for u, person in enumerate(data)
    }
    return found, one_by_one


def furthest(found: Arrays, expected: Arrays) -> float:
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in expected)


def size(update: Arrays) -> float:
    return max(float(np.abs(values).max()) for values in update.values())


@EVERY
@pytest.mark.parametrize("block", [1, 30_000, together.BLOCK])
@pytest.mark.parametrize(
    "fields",
    [
        {"local": LocalTraining(lr=0.3)},
        {"local": LocalTraining(lr=0.3, epochs=3, proximal=1.5, negatives=2)},
        {"local": LocalTraining(lr=0.3, epochs=2), "adapter": 3},
        {"local": LocalTraining(lr=0.3, epochs=2, proximal=0.5), "freeze": ("item",)},
    ],
    ids=["one epoch", "proximal", "adapter", "frozen table"],
)
def test_together_each_person_changes_what_they_change_alone(name: str, block: int, fields: dict[str, Any]) -> None:
    found, expected = both(learner(name, **fields), people(), block)
    for person, update in expected.items():
        if person not in found:
            assert size(update) == 0.0  # nobody, one item; against negatives the whole catalogue too
            continue
        assert furthest(found[person], update) < 1e-7
        assert size(update) > 1e-2  # so that 1e-7 says something
    assert len(found) == len(expected) - 2 - (name == "cnn-lstm")


@settings(max_examples=25, deadline=None)
@given(
    histories=st.lists(st.lists(st.integers(0, N_ITEMS - 1), max_size=14), max_size=5),
    ties=st.integers(1, 4),
    local=st.builds(
        LocalTraining,
        epochs=st.integers(1, 3),
        negatives=st.integers(1, 4),
        lr=st.just(0.05),
        proximal=st.sampled_from([0.0, 2.0]),
    ),
    name=st.sampled_from(SEQUENCE),
    layers=st.integers(1, 2),
    dropout=st.sampled_from([0.0, 0.5]),
    block=st.integers(1, 100_000),
    few=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@example([], 1, LocalTraining(), "gru", 1, 0.0, 1, 1, 0)
def test_any_histories_settings_and_grouping_give_what_each_gives_alone(
    histories: list[list[int]],
    ties: int,
    local: LocalTraining,
    name: str,
    layers: int,
    dropout: float,
    block: int,
    few: int,
    seed: int,
) -> None:
    made = learner(name, layers=layers, dropout=dropout, local=local)
    found, expected = both(made, timed(histories, ties), block, seed, few)
    for person, update in expected.items():
        assert furthest(found[person], update) < 1e-7 if person in found else size(update) == 0.0


@EVERY
@pytest.mark.parametrize(
    "other",
    [
        {"local": LocalTraining(lr=0.31, epochs=2)},
        {"local": LocalTraining(lr=0.3)},
        {"local": LocalTraining(lr=0.3, epochs=2, proximal=0.5)},
        {"local": LocalTraining(lr=0.3, epochs=2), "dropout": 0.3},
    ],
    ids=["lr", "epochs", "proximal", "dropout"],
)
def test_another_setting_is_seen_by_that_comparison(name: str, other: dict[str, Any]) -> None:
    _, expected = both(learner(name, local=LocalTraining(lr=0.3, epochs=2)), people())
    wrong, _ = both(learner(name, **other), people())
    assert all(furthest(update, expected[person]) > 1e-4 for person, update in wrong.items())


@EVERY
def test_what_one_draws_depends_on_their_own_stream_alone(name: str) -> None:
    made = learner(name, local=LocalTraining(lr=0.3, epochs=2))
    found, _ = both(made, people())
    model, weights = precise(made, loud(made))
    histories, streams = list(people()), [own(u) for u in range(people().n_users)]
    for person in (3, 6):
        for stream, same in ((streams[person], True), (own(77), False)):
            (again,) = together.updates(model, weights, [histories[person]], made.config.local, [stream], few=1)
            assert (furthest(again[1], found[person]) < 1e-7) == same


@EVERY
@DEVICES
@pytest.mark.parametrize("bound", [0.05, np.inf])
def test_a_node_s_sum_is_that_of_one_after_another(name: str, device: str, bound: float) -> None:
    made = learner(name, where=device, local=LocalTraining(lr=0.3, epochs=2))
    state, one, other = loud(made), Clip(bound), Clip(bound)
    expected = Learner._partial_sum(made, state, people(), one, own)
    found = made.partial_sum(state, people(), other, own)
    assert furthest(found, expected) < (5e-5 if device == "cpu" else 5e-3)
    assert norm(expected) > 0.1
    assert vars(other) == vars(one)


@EVERY
@DEVICES
def test_a_device_of_any_kind_draws_the_same(name: str, device: str) -> None:
    on, here = learner(name, where=device), learner(name)
    state = loud(here)
    for person, stream in zip((people().history(6), people().history(3)), (own(6), own(3)), strict=True):
        found = on.contribution(state, person, stream)
        assert furthest(found, here.contribution(state, person, stream)) < (1e-6 if device == "cpu" else 1e-3)


def test_one_person_who_cannot_be_bounded_takes_nobody_along() -> None:
    made = learner("cnn-lstm", dropout=0.0, layers=1, local=LocalTraining(lr=0.3, negatives=1))
    state = loud(made)
    state["item.weight"][0] = 3e38  # what it meets overflows
    data = Interactions.of([[0, 1, 2], *([i, i + 1, i + 2] for i in (4, 5, 7, 9, 12))], N_ITEMS)

    def streams(row: int) -> Streams:  # under these the others do not draw item 0
        return own(row + 50)

    clip, reference = Clip(0.1), Clip(0.1)
    found = made.partial_sum(state, data, clip, streams)
    expected = Learner._partial_sum(made, state, data, reference, streams)
    assert (clip.n, clip.refused) == (6, 1)
    assert vars(reference) == vars(clip)
    assert furthest(found, expected) < 1e-6
    assert norm(found) > 0.01


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize(("layers", "length"), [(1, 1), (1, 6), (3, 4)])
def test_a_recurrence_and_its_slopes_are_torch_s(kind: type[nn.GRU] | type[nn.LSTM], layers: int, length: int) -> None:
    torch.manual_seed(0)
    cell = kind(3, 5, num_layers=layers, batch_first=True).double()
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    weigh = torch.randn(2, length, 5, dtype=torch.float64)
    inputs = [x, *cell.parameters()]
    expected, found = cell(x)[0], carried(cell, x)
    torch.testing.assert_close(found, expected)
    for slope, its in zip(grad((found * weigh).sum(), inputs), grad((expected * weigh).sum(), inputs), strict=True):
        torch.testing.assert_close(slope, its)


@pytest.mark.parametrize("items", [[7, 3, 15, 4], [7, 3, 7], [7, 7, 7], [5, 9], [5], []])
def test_the_softmax_loss_and_its_slopes_are_those_of_plain_pytorch(items: list[int]) -> None:
    made = learner("transformer", dropout=0.0)
    model, _ = precise(made, loud(made))
    history = pad([items], 9, N_ITEMS)
    states = torch.randn(1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = model._softmax_loss(states, history)[0]
    found, *_ = SoftmaxLoss.apply(states[0], model.item.weight, history[0], model.smoothing)  # type: ignore[no-untyped-call]  # torch's
    torch.testing.assert_close(found, expected)
    assert (found > 0.0) == (len(items) > 1)
    inputs = [states, model.item.weight]
    for slope, its in zip(grad(3.0 * found, inputs), grad(3.0 * expected, inputs), strict=True):
        torch.testing.assert_close(slope, its)


@EVERY
def test_stacked_or_not_a_loss_asks_for_the_same_negatives(name: str) -> None:
    made = learner(name)
    model, history = made.model, torch.tensor([1, 2, 3])
    assert isinstance(model, SequenceModel)
    drawn = torch.tensor([[4], [5], [6]])
    model.eval()
    torch.testing.assert_close(model.stacked_loss(history, drawn), model.sequence_loss(history[None], drawn[None])[0])
    if model.needs_negatives:
        with pytest.raises(InvalidConfig, match="negatives"):
            model.stacked_loss(history)


@EVERY
def test_all_that_a_model_hides_is_drawn_from_the_person(name: str) -> None:
    model = build(ModelConfig(name=name), N_ITEMS, 0)
    hiding = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert hiding
    assert all(isinstance(module, Dropout) for module in hiding)


def test_dropout_hides_its_share_and_keeps_the_mean() -> None:
    # 200,000 values: a share strays 0.006 (six stddevs) for fewer than 1 seed in 1e8.
    site = Dropout(0.3, 2, None, 1000)
    kept = site.draw(100, np.random.default_rng(0))
    assert kept.shape == site.shape(100) == (2, 100, 1000)
    assert abs((kept == 0).mean() - 0.3) < 0.006
    assert abs(kept.mean() - 1) < 0.01
    assert len(np.unique(kept)) == 2
    site.kept = torch.from_numpy(kept)
    torch.testing.assert_close(site(torch.full(kept.shape, 2.0)), 2 * site.kept)
    site.kept = None
    assert abs((site(torch.ones(kept.shape)) == 0).float().mean() - 0.3) < 0.006
