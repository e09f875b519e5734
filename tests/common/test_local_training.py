"""A block of people trained together gives each of them what plain PyTorch gives one person alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from penchant.common import draws
from penchant.common.arrays import Arrays, Float32, Int32, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.learners import training
from penchant.common.learners.neural import adapters
from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig, ServerStep
from penchant.common.learners.neural.local import Update, fitted_scores, updates
from penchant.common.learners.neural.models import InterestModel, ModelConfig, build, group_loss
from penchant.common.learners.training import LocalTraining
from penchant.common.negatives import negatives
from penchant.common.privacy.sums import Clip, norm
from penchant.common.streams import Streams
from penchant.common.taste import TasteConfig

N_ITEMS = 30
LOCAL = LocalTraining(epochs=2, batch=3, lr=0.3, negatives=3, fold_in_steps=4, fold_in_lr=1.0)
PROXIMAL = LocalTraining(**{**vars(LOCAL), "proximal": 1.5})
HISTORIES = [np.array(h, np.int32) for h in ([4, 9, 2, 17, 9], [8], [1, 2, 3, 4, 5, 6, 7, 8], [], [29, 0, 29], [3, 12])]
BOTH = pytest.mark.parametrize("name", ["mf", "mlp", "neumf"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loud(name: str, n_items: int = N_ITEMS) -> tuple[InterestModel, dict[str, Tensor]]:
    """A model and weights so large that whatever happens is seen in them."""
    model, random = build(ModelConfig(name=name, dim=4), n_items, 1), torch.Generator().manual_seed(2)
    return model, {n: 0.5 * torch.randn(p.shape, generator=random) for n, p in model.named_parameters()}


# Under these seeds no small network of neumf dies, so that every weight moves and a comparison says something.
def trained(
    name: str, config: LocalTraining = LOCAL, *, block: int = 32, seeds: int = 700, histories: list[Int32] = HISTORIES
) -> dict[int, Update]:
    model, weights = loud(name)
    return dict(updates(model, weights, histories, config, [seeds + u for u in range(len(histories))], block))


def dense(name: str, update: Update) -> dict[str, Float32]:
    """The update with whole tables."""
    model, weights = loud(name)
    out = {}
    for key, values in update.values.items():
        out[key] = values
        if key in model.item_tables:
            out[key] = np.zeros(weights[key].shape, np.float32)
            out[key][update.rows] = values
    return out


def reference(name: str, history: Int32, config: LocalTraining, seed: int) -> dict[str, Float32]:
    """One person in plain PyTorch: whole tables, modules, autograd, one group after another."""
    model, weights = loud(name)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
    pool, *orders = draws.children(seed, 1 + config.epochs)
    order = np.concatenate([draws.permutation(own, len(history)) for own in orders])
    drawn = negatives(history, N_ITEMS, (len(order), config.negatives), pool)
    groups = torch.from_numpy(np.column_stack([history[order], drawn])).long()  # [epochs · n, 1 + k]
    private = [parameters[key] for key in model.private]

    def loss(some: Tensor) -> Tensor:
        return torch.stack([group_loss(model(group[None, :0], group[None]))[0] for group in some])

    def far() -> Tensor:
        return sum(((p - weights[k]) ** 2).sum() for k, p in parameters.items() if k not in model.private)  # type: ignore[return-value]  # not empty

    def step(lr: float, chosen: list[torch.nn.Parameter], value: Tensor) -> None:
        slopes = grad(value, chosen)
        with torch.no_grad():
            for parameter, slope in zip(chosen, slopes, strict=True):
                parameter.sub_(lr * slope)

    if model.linear is not None:  # every item a little as "not chosen", the own ones in full, whatever their age
        f, own = weights[model.linear].double(), weights[model.linear][history.tolist()].double()
        settings = TasteConfig()
        system = settings.unseen * f.T @ f + own.T @ own + settings.ridge * torch.eye(f.shape[1])
        with torch.no_grad():
            private[0].copy_(torch.linalg.solve(system, own.sum(0))[None])
    else:
        for _ in range(config.fold_in_steps):
            step(config.fold_in_lr, private, loss(groups[: len(history)]).mean())
    for batch in torch.split(groups, config.batch):
        step(config.lr, list(parameters.values()), loss(batch).sum() + config.proximal / 2 * far())
    return {k: (p.detach() - weights[k]).numpy() for k, p in parameters.items() if k not in model.private}


@BOTH
class TestBlock:
    @pytest.mark.parametrize("config", [LOCAL, PROXIMAL], ids=["plain", "proximal"])
    def test_equals_plain_pytorch_on_whole_tables(self, name: str, config: LocalTraining) -> None:
        found = trained(name, config)
        for user, history in enumerate(HISTORIES):
            if not len(history):
                assert user not in found
                continue
            update = dense(name, found[user])
            expected = reference(name, history, config, 700 + user)
            assert update.keys() == expected.keys()
            for key, values in expected.items():
                np.testing.assert_allclose(update[key], values, atol=1e-5)
                assert np.abs(values).max() > 1e-2  # so that 1e-5 says something

    @pytest.mark.parametrize(
        "other",
        [
            LocalTraining(**{**vars(LOCAL), "lr": 0.31}),
            LocalTraining(**{**vars(LOCAL), "batch": 4}),
            LocalTraining(**{**vars(LOCAL), "epochs": 1}),
            PROXIMAL,
        ],
    )
    def test_another_setting_is_seen_by_that_comparison(self, name: str, other: LocalTraining) -> None:
        wrong = dense(name, trained(name, other)[0])
        expected = reference(name, HISTORIES[0], LOCAL, 700)
        assert max(np.abs(wrong[key] - expected[key]).max() for key in expected) > 1e-3

    @pytest.mark.parametrize("block", [1, 2, 4])
    def test_its_size_and_who_shares_it_do_not_matter(self, name: str, block: int) -> None:
        config = LocalTraining(**{**vars(LOCAL), "epochs": 3})
        together, apart = trained(name, config, block=32), trained(name, config, block=block)
        assert together.keys() == apart.keys()
        for user in together:
            np.testing.assert_array_equal(together[user].rows, apart[user].rows)
            for key in together[user].values:
                np.testing.assert_allclose(together[user].values[key], apart[user].values[key], atol=2e-6)
        other = trained(name, config, seeds=200)
        assert not np.array_equal(other[2].rows, together[2].rows)

    def test_only_rows_of_own_items_and_negatives_move(self, name: str) -> None:
        model, _ = loud(name)
        for user, update in trained(name).items():
            own = HISTORIES[user]
            pool = draws.children(700 + user, 1)[0]
            drawn = negatives(own, N_ITEMS, (LOCAL.epochs * len(own), LOCAL.negatives), pool)
            assert update.rows.tolist() == sorted({*own.tolist(), *drawn.ravel().tolist()})
            assert len(update.rows) < N_ITEMS
            for table in model.item_tables:
                assert (np.abs(update.values[table]).max(1) > 0).all()

    def test_the_persons_own_vector_is_not_sent(self, name: str) -> None:
        model, weights = loud(name)
        for update in trained(name).values():
            assert update.values.keys() == weights.keys() - set(model.private)
        assert model.private

    def test_the_received_weights_stay_as_they_were(self, name: str) -> None:
        model, weights = loud(name)
        before = {key: values.clone() for key, values in weights.items()}
        list(updates(model, weights, HISTORIES, LOCAL, [0] * len(HISTORIES)))
        assert all(torch.equal(before[key], weights[key]) for key in weights)

    def test_a_person_who_knows_everything_changes_nothing(self, name: str) -> None:
        model, weights = loud(name)
        everything = np.arange(N_ITEMS, dtype=np.int32)
        found = trained(name, histories=[everything, everything[1:], everything[:0]])
        assert found.keys() == {1}
        scores = fitted_scores(model, weights, [everything, everything[1:], everything[:0]], LOCAL)
        assert np.isfinite(scores).all()
        np.testing.assert_array_equal(scores[0], scores[2])
        assert not np.array_equal(scores[1], scores[2])


@pytest.mark.parametrize("name", ["mf", "neumf", "gru"])
class TestParts:
    """What trains beside what is frozen, on the two paths of local training."""

    def learner(self, name: str, **fields: Any) -> tuple[FedAvg, dict[str, Float32]]:
        config = FedAvgConfig(model=ModelConfig(name=name, dim=4), local=LOCAL, **fields)
        learner = FedAvg(Catalogue(ids=tuple(str(i) for i in range(N_ITEMS))), config)
        return learner, loud_state(learner)

    def update(self, name: str, **fields: Any) -> tuple[FedAvg, dict[str, Float32], Arrays]:
        learner, state = self.learner(name, **fields)
        return learner, state, learner.contribution(state, History.of(HISTORIES[0].tolist()), rng())

    def test_a_frozen_weight_is_in_no_contribution_and_no_round_moves_it(self, name: str) -> None:
        held = {"mf": "bias.weight", "neumf": "first", "gru": "cell"}[name]
        _, _, whole = self.update(name)
        learner, state, part = self.update(name, freeze=(held,))
        frozen = {key for key in whole if key.startswith(held)}
        assert frozen
        assert part.keys() == learner.shapes(state).keys() == whole.keys() - frozen
        total = learner.partial_sum(
            state, Interactions.of([HISTORIES[0].tolist()], N_ITEMS), Clip(0.01), lambda _: rng()
        )
        assert total.keys() == part.keys()
        after = learner.apply(state, {key: np.ones_like(v, np.float32) for key, v in total.items()}, 1.0)
        assert all(np.array_equal(after[key], state[key]) for key in frozen)
        assert not any(np.array_equal(after[key], state[key]) for key in part)
        assert not any(key.endswith(tuple(frozen)) for key in after.keys() - state.keys())  # nor remembers anything

    def test_a_clip_is_spent_on_what_trains(self, name: str) -> None:
        table = {"mf": "item", "neumf": "item_product", "gru": "item"}[name]
        learner, state, _ = self.update(name, freeze=(table,))
        one = Interactions.of([HISTORIES[0].tolist()], N_ITEMS)
        found = learner.partial_sum(state, one, Clip(0.01), lambda _: rng())
        assert norm(found) == pytest.approx(0.01, rel=1e-4)

    def test_an_adapter_is_trained_by_the_chain_rule_of_its_table(self, name: str) -> None:
        # One small step: dA = V₀ᵀ G Bᵀ and dB = (V₀ A)ᵀ G, with G what moves the table where it trains itself.
        # the differences are float32's last digits of the weights.
        small = LocalTraining(**{**vars(LOCAL), "epochs": 1, "batch": 99, "lr": 1e-2, "fold_in_steps": 0})
        learner, state = self.learner(name, adapter=2)
        plain, _ = self.learner(name)
        for one in (learner, plain):
            object.__setattr__(one.config, "local", small)
            for layer in one.model.modules():
                if isinstance(layer, torch.nn.Dropout):
                    layer.p = 0.0
        full = {n: v.numpy() for n, v in learner._whole(state).items()}
        history = History.of(HISTORIES[0].tolist())
        found = learner.contribution(state, history, rng())
        moved = plain.contribution(full, history, rng())
        for table in adapters.tables(learner.model):
            module = table.removesuffix(".weight")
            v0, a, b = state[table], state[f"{module}.down"], state[f"{module}.up"]
            g = moved[table]
            for part, expected in (("down", v0.T @ g @ b.T), ("up", (v0 @ a).T @ g)):
                size = np.abs(expected).max()
                assert size > 1e-5
                np.testing.assert_allclose(found[f"{module}.{part}"], expected, atol=1e-2 * size)
            assert table not in found
        for key in found.keys() & moved.keys():
            np.testing.assert_allclose(found[key], moved[key], atol=1e-5)

    def test_an_adapter_changes_nothing_at_first_and_sends_few_numbers(self, name: str) -> None:
        with_one, plain = self.learner(name, adapter=1)[0], self.learner(name)[0]
        state, other = with_one.init(Streams(5)), plain.init(Streams(5))
        people = Interactions.of([h.tolist() for h in HISTORIES], N_ITEMS)
        np.testing.assert_array_equal(with_one.scores(state, people), plain.scores(other, people))
        tables = adapters.tables(with_one.model)
        size = {key: math.prod(shape) for key, shape in with_one.shapes(state).items()}
        assert sum(size[key] for key in size if key.endswith((".up", ".down"))) == 2 * 4 * len(tables)
        assert not size.keys() & set(tables)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"adapter": 5}, "at most the size of an item vector, 4"),
            ({"adapter": -1}, "adapter must be a whole number"),
            ({"freeze": ("itme",)}, "no weights 'itme'.*item"),
            ({"freeze": ("item.up",)}, "no weights 'item.up'"),  # which only an adapter has
            ({"start": "contents"}, "did you mean 'content'"),
        ],
    )
    def test_what_the_model_does_not_have_is_refused(self, name: str, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(InvalidConfig, match=words):
            self.learner(name, **fields)

    def test_a_freeze_that_leaves_nothing_or_holds_a_person_is_refused(self, name: str) -> None:
        learner, state = self.learner(name)
        everything = tuple(learner.shapes(state))
        with pytest.raises(InvalidConfig, match="nothing to train"):
            self.learner(name, freeze=everything)
        for own in learner.model.private:
            with pytest.raises(InvalidConfig, match="a person's own"):
                self.learner(name, freeze=(own,))


def test_a_sequence_model_is_pulled_back_to_what_it_received() -> None:
    # From the second step on: w₂ − w₀ = (1 − lr μ)(w₁ − w₀) − lr ∇, against the same without μ.
    def steps(epochs: int, proximal: float) -> Arrays:
        local = LocalTraining(lr=0.5, epochs=epochs, proximal=proximal)
        config = FedAvgConfig(model=ModelConfig(name="gru", dim=4, dropout=0.0), local=local)
        learner = FedAvg(Catalogue(ids=tuple(str(i) for i in range(N_ITEMS))), config)
        return learner.contribution(loud_state(learner), History.of(HISTORIES[2].tolist()), rng())

    first, free, pulled = steps(1, 0.0), steps(2, 0.0), steps(2, 0.8)
    for key in first:
        np.testing.assert_allclose(steps(1, 0.8)[key], first[key], atol=1e-7)
        np.testing.assert_allclose(pulled[key], free[key] - 0.5 * 0.8 * first[key], atol=1e-6)
    assert max(np.abs(pulled[key] - free[key]).max() for key in first) > 1e-3


@pytest.mark.parametrize("name", ["gru", "transformer"])
def test_a_sequence_model_mixes_items_of_one_time_from_the_persons_own_stream(name: str) -> None:
    items = HISTORIES[2]
    config = FedAvgConfig(model=ModelConfig(name=name, dim=4, dropout=0.0), local=LocalTraining(lr=0.5))
    learner = FedAvg(Catalogue(ids=tuple(str(i) for i in range(N_ITEMS))), config)

    def sent(times: Int64, seed: int) -> Float32:
        history = History(items.astype(np.int32), times, np.ones(len(items), np.float32))
        made = learner.contribution(loud_state(learner), history, Streams(seed))
        return made["item.weight"]

    apart, tied, none = np.arange(len(items)) + 1, np.full(len(items), 7), np.zeros(len(items), np.int64)
    np.testing.assert_array_equal(sent(apart, 1), sent(apart, 2))
    np.testing.assert_array_equal(sent(none, 1), sent(apart, 2))  # no times: the order they came in
    np.testing.assert_array_equal(sent(tied, 1), sent(tied, 1))
    assert np.abs(sent(tied, 1) - sent(tied, 2)).max() > 1e-4


def loud_state(learner: FedAvg) -> dict[str, Float32]:
    random = np.random.default_rng(8)
    return {
        key: (0.5 * random.standard_normal(v.shape)).astype(np.float32)
        for key, v in sorted(learner.init(Streams(0)).items())
    }


def rng() -> Streams:
    return Streams(3)


def test_negatives_avoid_the_persons_own_items(monkeypatch: pytest.MonkeyPatch) -> None:
    # A bias only rises by being chosen and only falls by being drawn, so each sign tells which it was.
    config = LocalTraining(**{**vars(LOCAL), "negatives": 8})

    def own_and_other_biases() -> tuple[Float32, Float32]:
        biases = dense("mf", trained("mf", config)[2])["bias.weight"][:, 0]
        return biases[HISTORIES[2]], np.delete(biases, HISTORIES[2])

    own, other = own_and_other_biases()
    assert (own > 0).all()
    assert (other <= 0).all()
    assert (other < 0).mean() > 0.9  # 128 draws among 22 items miss one of them for 1 seed in 18
    monkeypatch.setattr(
        training,
        "negatives",
        lambda own, n, shape, seed: np.random.default_rng(seed).integers(0, n, shape).astype(np.int32),
    )
    own, _ = own_and_other_biases()
    assert (own < 0).any()


@BOTH
def test_loss_falls_over_rounds(name: str) -> None:
    random = np.random.default_rng(0)
    histories = [(random.choice(15, 8, replace=False) + 15 * (u % 2)).tolist() for u in range(24)]
    people = Interactions.of(histories, N_ITEMS)
    config = FedAvgConfig(
        model=ModelConfig(name=name, dim=8),
        local=LOCAL,
        server=ServerStep(lr=0.05),
        taste=TasteConfig(decay=1.0, popularity=0.0),
    )
    learner = FedAvg(Catalogue(ids=tuple(str(i) for i in range(N_ITEMS))), config)

    def loss(scores: Float32) -> float:
        """log(1 + e^(other − own)) over the items of the own taste that the person has not met, and the other's."""
        total = 0.0
        for user, history in enumerate(people):
            taste = np.arange(15) + 15 * (user % 2)
            unmet, other = scores[user, np.setdiff1d(taste, history.items)], scores[user, (taste + 15) % N_ITEMS]
            total += float(np.logaddexp(0, other[None] - unmet[:, None]).mean())
        return total / people.n_users

    state = {key: values.detach().numpy().copy() for key, values in learner.model.named_parameters()}
    losses = [loss(learner.scores(state, people))]
    for number in range(20):
        randoms = [Streams(number).scope("person", user) for user in range(people.n_users)]
        total = learner.partial_sum(state, people, Clip(np.inf), randoms.__getitem__)
        state = dict(learner.apply(state, total, people.n_users))
        losses.append(loss(learner.scores(state, people)))
    assert losses[0] > np.log(2) - 0.01  # knows nothing of items that a person has not met
    assert max(losses[-3:]) < 0.6 * np.log(2)


class TestFittedScores:
    def test_equal_histories_score_equally_and_others_do_not(self) -> None:
        model, weights = loud("neumf")
        found = fitted_scores(model, weights, [HISTORIES[0], HISTORIES[1], HISTORIES[0], HISTORIES[3]], LOCAL)
        np.testing.assert_array_equal(found[0], found[2])
        assert not np.allclose(found[0], found[1])

    def test_an_empty_history_is_scored_from_the_released_vector(self) -> None:
        model, weights = loud("neumf")
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(weights[key])
            expected = model.score_all(torch.zeros(1, 0).long()).numpy()
        np.testing.assert_allclose(fitted_scores(model, weights, [HISTORIES[3]], LOCAL), expected, atol=1e-6)

    def test_the_fit_lifts_own_items_above_others(self) -> None:
        model, weights = loud("neumf")
        config = LocalTraining(**{**vars(LOCAL), "fold_in_steps": 60})
        history = HISTORIES[2]
        before, after = (
            fitted_scores(model, weights, [history], LocalTraining(**{**vars(config), "fold_in_steps": steps}))[0]
            for steps in (0, 60)
        )
        gained = after - before
        assert gained[history].mean() > np.delete(gained, history).mean() + 0.1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("epochs", 0), ("batch", 0), ("negatives", 0), ("lr", 0), ("lr", np.nan), ("fold_in_lr", np.inf)),
        *(("proximal", -1.0), ("proximal", np.nan), ("proximal", 1 / LOCAL.lr)),
    ],
)
def test_a_setting_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidConfig, match=field):
        LocalTraining(**{**vars(LOCAL), field: value})
    with pytest.raises(InvalidConfig, match="fold_in_steps"):
        LocalTraining(fold_in_steps=-1)
