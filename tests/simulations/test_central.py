"""Central training: it learns, it keeps the best epoch and not the last, and it repeats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from penchant.common.arrays import Int32
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.learners.contract import State
from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig
from penchant.common.learners.neural.models import MODELS, ModelConfig, SequenceModel, build, pad, reads_history
from penchant.common.streams import Streams
from penchant.simulations import central
from penchant.simulations.baselines import Popularity
from penchant.simulations.central import CentralTraining, train, usual
from penchant.simulations.data.synthetic import synthetic
from penchant.simulations.evaluation import evaluate
from penchant.simulations.simulate import _Released
from penchant.simulations.splits import leave_last_out

DATA = synthetic(users=30, items=40, interactions=12, topics=8, seed=0)
SHORT = CentralTraining(epochs=2, batch=64)


def learner(name: str = "mf", where: str = "cpu") -> FedAvg:
    return FedAvg(DATA.catalogue, FedAvgConfig(model=ModelConfig(name=name)), where=where)


def trained(
    settings: CentralTraining, values: Iterable[float], name: str = "mf", seed: int = 0, where: str = "cpu"
) -> tuple[State, list[State], list[int]]:
    """The state kept where validation goes by `values`, the state after each epoch, and the epochs told of."""
    seen: list[State] = []
    told: list[int] = []
    ahead = iter(values)

    def validate(state: State) -> float:
        seen.append({k: v.copy() for k, v in state.items()})
        return next(ahead)

    best = train(
        learner(name, where),
        DATA.interactions,
        settings,
        Streams(seed),
        validate,
        lambda epoch, value: told.append(epoch),
    )
    return best, seen, told


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("values", "best", "epochs"),
    [
        ([1, 2, 3, 4, 5, 6], 6, 6),  # better all the time
        ([3, 2, 1, 0, 0, 0], 1, 3),  # worse from the start: two epochs of patience
        ([1, 5, 2, 3, 9, 9], 2, 4),  # stops before it would have got better
        ([1, 5, 2, 6, 2, 2], 4, 6),  # a better one in time starts the patience again
        ([2, 2, 2, 2, 2, 2], 1, 3),  # a tie is not better
    ],
)
def test_the_best_epoch_is_kept_and_training_stops_when_patience_is_over(
    values: list[float], best: int, epochs: int
) -> None:
    state, seen, told = trained(CentralTraining(epochs=6, batch=64, patience=2), values)
    assert told == list(range(1, epochs + 1))
    assert same(state, seen[best - 1])
    assert [same(state, s) for s in seen].count(True) == 1  # so that another epoch would have been noticed


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_learns_and_is_scored(name: str) -> None:
    state, seen, told = trained(SHORT, [1, 2], name)
    assert told == [1, 2]
    assert all(np.isfinite(v).all() for v in state.values())
    shared = [k for k in state if k not in learner(name).model.private]
    assert any(not np.array_equal(seen[0][k], seen[1][k]) for k in shared)
    scores = learner(name).scores(state, DATA.interactions)
    assert scores.shape == (30, 40)
    assert np.isfinite(scores).all()


def losses(name: str, lr: float) -> list[float]:
    """The mean training loss of each of eight epochs."""
    inner = "_sequence_epoch" if reads_history(name) else "_point_epoch"
    original, means = getattr(central, inner), []

    def listening(*args: object) -> Iterator[list[torch.Tensor]]:
        found = []
        for parts in original(*args):
            losses = list(parts)
            found.append(sum(float(loss.detach()) for loss in losses))
            yield losses
        means.append(float(np.mean(found)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(central, inner, listening)
        trained(CentralTraining(epochs=8, batch=64, lr=lr), range(8), name)
    return means


@pytest.mark.parametrize("name", ["mf", "neumf", "gru"])
def test_the_loss_goes_down_and_without_steps_it_does_not(name: str) -> None:
    found, still = losses(name, 0.02), losses(name, 1e-9)
    assert len(found) == len(still) == 8
    assert found[-1] < 0.95 * found[0]
    assert still[-1] > 0.95 * still[0]


@pytest.mark.parametrize("name", [name for name in MODELS if reads_history(name)])
def test_a_batch_in_parts_has_the_gradient_of_the_batch_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = leave_last_out(synthetic(users=21, items=40, interactions=15, seed=3).interactions).train
    assert len(set(parts.lengths)) > 4  # so that parts are padded to lengths of their own
    model = build(ModelConfig(name=name, dropout=0.0), 40, 1)
    assert isinstance(model, SequenceModel)

    def gradients(size: int) -> list[list[torch.Tensor]]:
        monkeypatch.setattr(central, "PART", size)
        out: list[list[torch.Tensor]] = []
        random = np.random.default_rng(4)
        for losses in central._sequence_epoch(model, parts, CentralTraining(batch=8), random):
            slopes = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
            assert len(slopes) == -(-(8 if len(out) < 2 else 5) // size)
            out.append([torch.stack(one).sum(0) for one in zip(*slopes, strict=True)])
        return out

    found, whole = gradients(3), gradients(64)
    assert len(found) == len(whole) == 3
    for one, other in zip(found, whole, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(one, other, strict=True))
    assert not torch.allclose(found[0][0], whole[1][0], atol=1e-4)


def test_each_epoch_reads_items_of_one_time_in_a_new_order(monkeypatch: pytest.MonkeyPatch) -> None:
    items = np.arange(12, dtype=np.int32)
    times = np.repeat(np.array([5, 9, 9, 9, 12, 12]), 2)
    people = Interactions(np.array([0, 12]), items, times, np.ones(12, np.float32), 40)
    read: list[list[int]] = []

    def reading(rows: list[Int32], length: int, n_items: int) -> torch.Tensor:
        read.append(rows[0].tolist())
        return pad(rows, length, n_items)

    monkeypatch.setattr(central, "pad", reading)
    train(learner("gru"), people, SHORT, Streams(0), lambda state: 0.0, lambda epoch, value: None)
    first, second = read
    for row in read:
        assert [times[i] for i in row] == times.tolist()
    assert first != second
    again = len(read)
    train(learner("gru"), people, SHORT, Streams(0), lambda state: 0.0, lambda epoch, value: None)
    assert read[again:] == [first, second]


def test_a_linear_step_size_falls_evenly_to_half_a_step_above_zero() -> None:
    settings = CentralTraining(epochs=4, lr=0.8, schedule="linear", decay=9.0)
    assert [settings.step_size(e) for e in (1, 2, 3, 4)] == pytest.approx([0.7, 0.5, 0.3, 0.1])
    settings = CentralTraining(epochs=4, lr=0.8, decay=1.0)
    assert [settings.step_size(e) for e in (1, 2, 3, 4)] == pytest.approx([0.8, 0.4, 0.8 / 3, 0.2])
    with pytest.raises(InvalidConfig, match="did you mean 'linear'"):
        CentralTraining(schedule="liner")  # type: ignore[arg-type]  # a wrong one is the point


def test_the_step_size_of_an_epoch_is_the_one_that_adam_takes() -> None:
    still = replace(SHORT, lr=0.02, schedule="linear")
    assert not same(trained(still, [1, 2])[0], trained(replace(SHORT, lr=0.02), [1, 2])[0])
    assert same(trained(replace(SHORT, lr=0.75 * 0.02, decay=2.0), [1, 2])[0], trained(still, [1, 2])[0])


def test_validation_may_skip_epochs_but_not_the_first_or_the_last() -> None:
    settings = CentralTraining(epochs=6, batch=64, patience=4, validate_every=2)
    state, seen, told = trained(settings, [1, 3, 2, 5])
    assert told == [1, 2, 3, 4, 5, 6]
    assert len(seen) == 4  # after epochs 1, 3, 5 and 6
    assert same(state, seen[3])
    state, seen, told = trained(replace(settings, epochs=20), [4, 3, 2, 9])
    assert told == [1, 2, 3, 4, 5]  # patience counts epochs, and ends at a validation
    assert same(state, seen[0])


def test_models_without_a_recipe_train_as_ever_and_more_epochs_than_a_recipe_has_are_not_taken() -> None:
    assert usual("mf") == usual("gru") == CentralTraining()
    assert usual("mf", 40) == CentralTraining(epochs=40)
    recipe = usual("transformer")
    assert (recipe.epochs, recipe.batch, recipe.lr, recipe.schedule, recipe.weight_decay) == (40, 64, 8e-3, "linear", 0)
    assert usual("transformer", 900) == recipe
    assert usual("transformer", 5) == replace(recipe, epochs=5)


def test_a_seed_repeats_and_another_seed_does_not() -> None:
    first, *_ = trained(SHORT, [1, 2], "gru")
    assert same(trained(SHORT, [1, 2], "gru")[0], first)
    assert not same(trained(SHORT, [1, 2], "gru", seed=1)[0], first)
    assert not same(trained(replace(SHORT, lr=0.02), [1, 2], "gru")[0], first)


def test_what_it_learns_beats_popularity_where_people_differ() -> None:
    population = synthetic(users=300, items=100, interactions=25, topics=8, follow=0.0, drift=0.0, zipf=0.3, seed=1)
    parts = leave_last_out(population.interactions)
    model = FedAvg(population.catalogue, FedAvgConfig(model=ModelConfig(name="mf")))
    popularity = parts.train.counts()

    def ndcg(state: State) -> float:
        scorer = _Released(model, state)
        return evaluate(scorer, parts.train, parts.validation, popularity=popularity, ks=(10,)).overall["ndcg@10"]

    settings = CentralTraining(epochs=15, batch=256, lr=0.02)
    state = train(model, parts.train, settings, Streams(0), ndcg, lambda epoch, value: None)
    floor = evaluate(Popularity(parts.train), parts.train, parts.validation, popularity=popularity, ks=(10,))
    untrained = ndcg(model.init(Streams(0)))
    assert ndcg(state) > 1.2 * floor.overall["ndcg@10"]
    assert ndcg(state) > 1.2 * untrained


@pytest.mark.parametrize("field", ["epochs", "batch", "negatives", "patience", "validate_every", "lr"])
def test_settings_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(InvalidConfig, match=field):
        replace(SHORT, **{field: 0})  # type: ignore[arg-type]  # one field of several types


@pytest.mark.parametrize("name", ["mf", "gru"])
def test_on_cuda_it_learns_too(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: central training was run on the processor only")
    state, seen, _ = trained(SHORT, [1, 2], name, where="cuda")
    assert same(state, seen[1])
    assert all(np.isfinite(v).all() for v in state.values())
