"""Every interest model keeps one contract; those that read no history can also be clipped sample by sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor
from torch.autograd import backward
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History
from penchant.common.learners.neural.models import (
    MODELS,
    InterestModel,
    ModelConfig,
    SequenceModel,
    all_scores,
    base,
    build,
    group_loss,
    pad,
    reads_history,
    sequence,
    untied,
)
from penchant.common.learners.neural.models.transformer import FAR, Block

N_ITEMS = 20  # 0 … 9 are one taste, 10 … 19 the other
LENGTH = 8
POINT = tuple(name for name in MODELS if not reads_history(name))
SEQUENCE = tuple(name for name in MODELS if reads_history(name))

# Opacus hooks the backward pass of embeddings, whose inputs are positions and have no gradient; that is intended.
no_input_gradients = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing when gradients are computed with respect to module outputs:UserWarning"
)


@pytest.fixture(autouse=True)
def one_thread_and_a_random_state_of_its_own() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def small(name: str, seed: int = 1) -> InterestModel:
    return build(ModelConfig(name=name, dim=8, max_length=LENGTH), N_ITEMS, seed)


def loud(name: str, seed: int = 1) -> InterestModel:
    """A model with weights so large that whatever reaches a score is seen in it; dropout off."""
    model, random = small(name), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.7, generator=random)  # the padding row too, as a noised sum would
    return model.eval()


def sequence_model(name: str) -> SequenceModel:
    model = loud(name)
    assert isinstance(model, SequenceModel)
    return model


def same(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding; an accelerator multiplies convolutions and recurrences with 10-bit fractions."""
    return torch.allclose(a, b, rtol=0, atol=1e-5 if a.device.type == "cpu" else 2e-3)


def draw(taste: int, n: int, length: int = LENGTH) -> Tensor:
    """int64[n, length], items of one taste."""
    return torch.randint(10 * taste, 10 * taste + 10, (n, length))


def training_loss(model: InterestModel, histories: Tensor) -> Tensor:
    negatives = torch.randint(0, N_ITEMS, (*histories.shape, 4), device=histories.device)
    if isinstance(model, SequenceModel):
        return model.sequence_loss(histories, negatives if model.needs_negatives else None).mean()
    groups = torch.cat([histories[..., None], negatives], 2).flatten(0, 1)  # [B · L, 1 + k]
    return group_loss(model(histories.new_zeros(len(groups), 0), groups)).mean()


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    def test_gives_one_logit_for_each_candidate_and_all_scores_agrees(self, name: str, device: torch.device) -> None:
        model = loud(name).to(device).train()
        history, candidates = draw(0, 3).to(device), torch.tensor([[4, 19], [0, 4], [7, 7]], device=device)
        scores = all_scores(model, history)
        assert scores.shape == (3, N_ITEMS)
        assert scores.dtype == torch.float32
        assert model.training
        logits = model.eval()(history, candidates)
        assert logits.shape == (3, 2)
        assert logits.dtype == torch.float32
        assert same(logits, scores.gather(1, candidates))
        assert not same(logits, scores.gather(1, candidates.flip(1)))

    def test_padding_never_leaks(self, name: str, device: torch.device) -> None:
        model = loud(name).to(device)
        histories = [[3], [3, 14, 5], [], [1, 2, 3, 4, 5]]
        narrow, wide = (pad(histories, length, N_ITEMS).to(device) for length in (5, LENGTH))
        scores = all_scores(model, narrow)
        assert same(all_scores(model, wide), scores)
        if isinstance(model, SequenceModel):
            with torch.no_grad():
                model.item.weight[N_ITEMS] += 1
        assert same(all_scores(model, wide), scores)
        other = pad([[4], [3, 6, 5], [8], [9, 2, 3, 4, 5]], LENGTH, N_ITEMS).to(device)
        moved = (all_scores(model, other) - scores).abs().amax(1) > 0.01
        assert moved.tolist() == [model.reads_history] * 4  # the same comparison does see a real item change

    def test_learns_two_tastes_in_thirty_steps(self, name: str, device: torch.device) -> None:
        for taste in (0, 1):
            model = small(name).to(device)
            # A model that reads histories learns both tastes at once; otherwise the person is a parameter.
            tastes = (0, 1) if model.reads_history else (taste,)
            held_out = draw(taste, 16).to(device)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
            before = training_loss(model.eval(), held_out).item()
            model.train()
            for _ in range(30):
                optimizer.zero_grad()
                people = torch.cat([draw(t, 64) for t in tastes]).to(device)
                backward(training_loss(model, people))
                optimizer.step()
            after = training_loss(model.eval(), held_out).item()
            assert after < 0.85 * before
            scores = all_scores(model, held_out).view(-1, 2, 10)  # by taste
            right, wrong = scores[:, taste, :, None], scores[:, 1 - taste, None, :]
            assert (right > wrong).float().mean() > 0.9  # of all pairs

    def test_survives_a_state_dict_round_trip(self, name: str, device: torch.device) -> None:
        model, copy = small(name, seed=1).to(device), small(name, seed=2).to(device)
        history = draw(1, 4).to(device)
        assert not same(all_scores(copy, history), all_scores(model, history))
        copy.load_state_dict(model.state_dict())
        assert torch.equal(all_scores(copy, history), all_scores(model, history))

    def test_gives_an_empty_history_finite_scores_the_same_for_everybody(self, name: str, device: torch.device) -> None:
        model = loud(name).to(device)
        alone = all_scores(model, pad([[]], LENGTH, N_ITEMS).to(device))
        among = all_scores(model, pad([[1, 2], [], [99, -1], [11]], LENGTH, N_ITEMS).to(device))
        assert torch.isfinite(alone).all()
        assert same(among[1], alone[0])
        assert same(among[2], alone[0])  # only unknown items
        assert same(among[3], alone[0]) != model.reads_history

    def test_has_every_parameter_that_it_names(self, name: str) -> None:
        model = small(name)
        shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
        rows = N_ITEMS + model.reads_history  # one more, for padding
        tables = {key for key, shape in shapes.items() if shape[0] == rows}
        assert set(model.item_tables) == tables
        assert set(model.private) == {key for key in shapes if key.startswith("user")}
        assert bool(model.private) != model.reads_history

    def test_reads_the_history_where_its_name_says_so(self, name: str) -> None:
        assert small(name).reads_history is reads_history(name)
        assert reads_history(name) != (name in ("mf", "mlp", "neumf"))

    def test_starts_from_its_seed_alone(self, name: str) -> None:
        torch.manual_seed(5)
        untouched = torch.rand(3)
        torch.manual_seed(5)
        first = small(name, seed=2**63 - 1)
        assert torch.equal(torch.rand(3), untouched)  # the program's own state went on as if nothing happened
        with torch.device("meta"):
            second = small(name, seed=2**63 - 1)
        other = small(name, seed=7)
        for key, weights in first.state_dict().items():
            assert torch.equal(second.state_dict()[key], weights)
        assert any(not torch.equal(other.state_dict()[key], weights) for key, weights in first.state_dict().items())

    def test_refuses_an_item_outside_the_catalogue(self, name: str) -> None:
        model = small(name)
        for item in (-1, N_ITEMS + 1):
            with pytest.raises(IndexError):
                model(draw(0, 1), torch.tensor([[0, item]]))


@pytest.mark.parametrize("name", SEQUENCE)
class TestSequenceModels:
    def test_a_state_reads_nothing_later_and_is_what_its_prefix_gives(self, name: str, device: torch.device) -> None:
        model = sequence_model(name).to(device)
        history = pad([[5, 14, 3, 3, 12], [1, 2, 3, 4, 5, 6, 7, 8]], LENGTH, N_ITEMS).to(device)
        changed = history.clone()
        changed[:, 6:] = 19
        states = model.encode(history)
        assert states.shape == (2, LENGTH, 8)
        assert same(model.encode(changed)[:, :6], states[:, :6])
        assert not same(model.encode(changed)[:, 6:], states[:, 6:])
        assert not states[0, : LENGTH - 5].any()  # padded places
        for end in range(4, LENGTH + 1):
            assert same(model.encode(history[:, :end])[:, -1], states[:, end - 1])

    @pytest.mark.parametrize("length", [2, 4])
    def test_the_loss_against_negatives_is_the_mean_over_prefixes(self, name: str, length: int) -> None:
        model = sequence_model(name)
        history = [7, 3, 15, 4][:length]
        negatives = torch.randint(0, N_ITEMS, (1, LENGTH, 3))
        offset = LENGTH - len(history)
        binary = []
        for t in range(1, len(history)):
            group = torch.cat([torch.tensor([history[t]]), negatives[0, offset + t]])
            binary.append(group_loss(model(pad([history[:t]], LENGTH, N_ITEMS), group[None]))[0])
        padded = pad([history], LENGTH, N_ITEMS)
        assert same(model.sequence_loss(padded, negatives)[0], torch.stack(binary).mean())
        assert not same(model.sequence_loss(padded, negatives.flip(1))[0], torch.stack(binary).mean())
        if model.needs_negatives:
            with pytest.raises(InvalidConfig, match="negatives"):
                model.sequence_loss(padded)

    def test_columns_of_padding_alone_change_neither_scores_nor_loss_nor_gradient(self, name: str) -> None:
        model = sequence_model(name)
        histories = [[3, 3, 14], [5, 1, 2, 19], [], [6]]
        negatives = torch.randint(0, N_ITEMS, (4, LENGTH, 3))

        def found(length: int) -> tuple[Tensor, Tensor, list[Tensor]]:
            history = pad(histories, length, N_ITEMS)
            losses = model.sequence_loss(history, negatives[:, -length:] if model.needs_negatives else None)
            gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
            return model.score_all(history), losses, list(gradients)

        scores, losses, gradients = found(LENGTH)
        assert same(scores, model.encode(pad(histories, LENGTH, N_ITEMS))[:, -1] @ model.item.weight[:N_ITEMS].T)
        for length in (4, 5):
            other, cost, slopes = found(length)
            assert same(other, scores)
            assert same(cost, losses)
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(slopes, gradients, strict=True))
        assert not same(found(3)[0], scores)  # which does cut an item off
        assert not same(found(3)[1], losses)

    def test_many_people_are_scored_as_each_alone(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sequence, "TOGETHER", 3)
        model = sequence_model(name)
        histories = [[*range(start, start + n)] for start, n in enumerate((4, 0, 7, 1, 7, 2, 8, 3))]
        scores = all_scores(model, pad(histories, LENGTH, N_ITEMS))
        for row, history in zip(scores, histories, strict=True):
            assert torch.allclose(row, all_scores(model, pad([history], LENGTH, N_ITEMS))[0], atol=1e-3)
        assert not torch.allclose(scores[0], scores[1], atol=0.1)
        assert all_scores(model, pad([], LENGTH, N_ITEMS)).shape == (0, N_ITEMS)

    def test_a_history_too_short_to_predict_in_costs_and_teaches_nothing(self, name: str) -> None:
        model = sequence_model(name)
        history = pad([[], [4], [4, 5]], LENGTH, N_ITEMS)
        losses = model.sequence_loss(history, torch.randint(0, N_ITEMS, (3, LENGTH, 2)))
        assert losses[:2].tolist() == [0.0, 0.0]
        assert losses[2] > 0
        backward(losses[:2].sum())
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        for nothing in (history[:2], history[:0]):
            drawn = torch.zeros(len(nothing), LENGTH, 2, dtype=torch.int64)
            assert model.sequence_loss(nothing, drawn).tolist() == [0.0] * len(nothing)
            if not model.needs_negatives:
                assert model.sequence_loss(nothing).tolist() == [0.0] * len(nothing)

    def test_the_padding_row_gets_no_gradient(self, name: str) -> None:
        model = sequence_model(name)
        history = pad([[1, 2, 3], [4]], LENGTH, N_ITEMS)
        backward(training_loss(model, history))
        gradient = model.item.weight.grad
        assert gradient is not None
        assert not gradient[N_ITEMS].any()
        assert gradient[:N_ITEMS].any()

    def test_reads_max_length_items_and_no_more(self, name: str) -> None:
        model = sequence_model(name)
        longest = draw(0, 2, LENGTH + 1)
        assert torch.isfinite(model.sequence_loss(longest, torch.randint(0, N_ITEMS, (2, LENGTH + 1, 2)))).all()
        with pytest.raises(InvalidConfig, match="max_length is 8"):
            model(longest, longest)


def plain_loss(model: SequenceModel, history: list[int]) -> Tensor:
    """The softmax loss of one history, a place and an item at a time."""
    total, n = torch.zeros(()), model.n_items
    for t in range(1, len(history)):
        z = model.score_all(torch.tensor([history[:t]]))[0]
        new = [i for i in range(n) if i not in history[:t] or i == history[t]]
        target = [0.1 / n + (0.9 if i == history[t] else 0.0) for i in range(n)]
        total = total + z[new].exp().sum().log() - sum(q * z[i] for i, q in enumerate(target))
    return total / math.sqrt(max(1, len(history) - 1))


@pytest.mark.parametrize("name", [name for name in SEQUENCE if not sequence_model(name).needs_negatives])
class TestSoftmaxLoss:
    # Repeats, at once and later; padding before and none; nothing to predict.
    HISTORIES: ClassVar[list[list[int]]] = [[7, 3, 7, 7, 15, 3], [1], [2, 9], [], [*range(7), 19], [19, 19]]

    def test_is_that_of_a_loop_over_places_and_items_and_so_is_its_gradient(self, name: str) -> None:
        model = sequence_model(name)
        losses = model.sequence_loss(pad(self.HISTORIES, LENGTH, N_ITEMS))
        expected = torch.stack([plain_loss(model, history) for history in self.HISTORIES])
        assert torch.allclose(losses, expected, atol=1e-4)
        weights = torch.arange(1.0, 7.0)  # so that no two histories are exchanged
        found = torch.autograd.grad(losses @ weights, list(model.parameters()))
        slow = torch.autograd.grad(expected @ weights, list(model.parameters()))
        assert all(torch.allclose(a, b, atol=2e-3, rtol=1e-3) for a, b in zip(found, slow, strict=True))

    def test_an_item_met_before_is_no_rival_and_a_repeat_is_still_wanted(self, name: str) -> None:
        model = sequence_model(name)
        history = pad([[7, 3, 15]], LENGTH, N_ITEMS)
        slope = torch.autograd.grad(model.sequence_loss(history).sum(), model.item.weight)[0]
        assert slope[5].abs().sum() > 0
        for repeated in ([7, 3, 7], [7, 7, 7]):
            loss = model.sequence_loss(pad([repeated], LENGTH, N_ITEMS))
            assert torch.isfinite(loss).all()
            assert torch.allclose(loss, plain_loss(model, repeated), atol=1e-4)

    def test_m_places_that_cost_alike_cost_the_root_of_m(self, name: str) -> None:
        model = sequence_model(name)
        with torch.no_grad():
            for weights in model.parameters():
                weights.zero_()  # every item alike everywhere
        for m in (1, 4, 7):
            history = [*range(m), 19]
            cost = sum(math.log(N_ITEMS - t) for t in range(1, m + 1)) / m**0.5
            assert model.sequence_loss(pad([history], LENGTH, N_ITEMS)).item() == pytest.approx(cost, rel=1e-5)


def test_attention_adds_a_number_for_each_distance_and_sees_nothing_later() -> None:
    d, heads, length = 6, 2, FAR + 5
    block, random = Block(d, heads, 8, 0.5).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in block.parameters():
            weights.normal_(0, 0.5, generator=random)
    x = torch.randn(1, length, d, generator=random)
    query, key, value = block.query_key_value(x)[0].split(d, 1)
    expected = torch.zeros(length, d)
    for head in range(heads):
        part = slice(head * d // heads, (head + 1) * d // heads)
        for t in range(length):
            logits = [
                query[t, part] @ key[s, part] / (d / heads) ** 0.5 + block.distance[head, min(t - s, FAR - 1)]
                for s in range(t + 1)
            ]
            expected[t, part] = torch.stack(logits).softmax(0) @ value[: t + 1, part]
    assert same(block.attend(x)[0], block.mix(expected))
    with torch.no_grad():
        block.distance[:, FAR - 1] += 1.0  # of the farthest places alone
    moved = (block.attend(x)[0] - block.mix(expected)).abs().amax(1) > 1e-3
    assert moved.tolist() == [t >= FAR - 1 for t in range(length)]


def test_at_first_one_block_tells_no_distances_apart() -> None:
    model = build(ModelConfig(name="transformer", dim=8, layers=1, max_length=LENGTH), N_ITEMS, 1).eval()
    one, other = pad([[1, 2, 3, 4, 9], [3, 1, 4, 2, 9]], LENGTH, N_ITEMS)
    assert same(all_scores(model, one[None]), all_scores(model, other[None]))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith("distance"):
                weights[:, 1] += 5.0
    assert not same(all_scores(model, one[None]), all_scores(model, other[None]))


TIMES = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(times=TIMES, seed=st.integers(0, 2**32))
@example(times=[0, 0, 0, 0, 0, 0], seed=1)
@example(times=[1, 1, 0, 0, 1, 1], seed=1)  # not in order: what is equal but apart stays apart
def test_items_are_mixed_within_runs_of_one_time_and_only_there(times: list[int], seed: int) -> None:
    n = len(times)
    history = History(np.arange(n, dtype=np.int32), np.array(times, np.int64), np.ones(n, np.float32))
    found = untied(history, np.random.default_rng(seed))
    assert [times[i] for i in found] == times
    start = 0
    for end in range(1, n + 1):
        if end == n or times[end] != times[start] or times[end] == 0:
            assert sorted(found[start:end].tolist()) == list(range(start, end))
            start = end
    assert found.tolist() == untied(history, np.random.default_rng(seed)).tolist()


def test_every_order_of_a_tie_is_as_likely_as_another() -> None:
    history = History(np.arange(4, dtype=np.int32), np.array([5, 7, 7, 7]), np.ones(4, np.float32))
    random, n = np.random.default_rng(0), 6000
    counts = Counter(tuple(untied(history, random).tolist()) for _ in range(n))
    assert len(counts) == 6
    assert {order[0] for order in counts} == {0}
    assert max(abs(c - n / 6) for c in counts.values()) < 6 * (n / 6) ** 0.5  # six stddevs


@pytest.mark.parametrize("name", POINT)
class TestModelsThatReadNoHistory:
    # Row 1 draws one negative twice and row 2 its own positive: both add up on one item's vector.
    groups = torch.tensor([[3, 5, 6, 7], [3, 5, 5, 7], [4, 4, 19, 4], [0, 1, 2, 3]])
    histories = torch.zeros(4, 0, dtype=torch.int64)

    def gradients_one_by_one(self, model: InterestModel) -> list[dict[str, Tensor]]:
        result = []
        for group in self.groups:
            gradients = torch.autograd.grad(
                group_loss(model(self.histories[:1], group[None])).sum(), list(model.parameters())
            )
            result.append(dict(zip(dict(model.named_parameters()), gradients, strict=True)))
        return result

    def test_a_group_touches_only_the_items_it_names(self, name: str) -> None:
        model = loud(name)
        for group, gradients in zip(self.groups, self.gradients_one_by_one(model), strict=True):
            for table in model.item_tables:
                touched = gradients[table].abs().sum(1).nonzero().flatten()
                assert touched.tolist() == sorted(set(group.tolist()))

    @no_input_gradients
    def test_opacus_gradients_equal_autograd_sample_by_sample(self, name: str) -> None:
        model = loud(name).train()
        expected = self.gradients_one_by_one(model)
        wrapped = GradSampleModule(model, loss_reduction="sum")
        backward(group_loss(wrapped(self.histories, self.groups)).sum())
        for key, parameter in model.named_parameters():
            samples = getattr(parameter, "grad_sample")  # noqa: B009  # Opacus adds it, unknown to the types
            for sample, gradients in zip(samples, expected, strict=True):
                assert torch.allclose(sample, gradients[key], atol=1e-5)

    @no_input_gradients
    def test_opacus_ghost_norms_equal_the_norms_of_those_gradients(self, name: str) -> None:
        model = loud(name).train()
        expected = torch.stack(
            [torch.cat([g.flatten() for g in sample.values()]).norm() for sample in self.gradients_one_by_one(model)]
        )
        wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum")
        backward(group_loss(wrapped(self.histories, self.groups)).sum())
        norms = wrapped.get_norm_sample()
        assert torch.allclose(norms, expected, atol=1e-5)
        assert not torch.allclose(norms, expected.flip(0), atol=1e-2)

    def test_a_block_of_users_trained_together_gets_each_ones_gradients(self, name: str, device: torch.device) -> None:
        users = [loud(name, seed=u).to(device) for u in range(3)]
        groups = torch.randint(0, N_ITEMS, (3, 5, 4), device=device)  # [users, B, 1 + k]
        history = torch.zeros(5, 0, dtype=torch.int64, device=device)
        parameters, buffers = stack_module_state(users)
        assert not buffers  # Opacus refuses them

        def loss(parameters: dict[str, Tensor], groups: Tensor) -> Tensor:
            return group_loss(functional_call(users[0], parameters, (history, groups))).mean()

        together = vmap(grad(loss))(parameters, groups)
        for u, model in enumerate(users):
            backward(group_loss(model(history, groups[u])).mean())
            for key, parameter in model.named_parameters():
                assert parameter.grad is not None
                assert same(together[key][u], parameter.grad)
                assert not same(together[key][u], together[key][u - 1])


def test_a_group_costs_the_mean_of_its_binary_cross_entropies() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [-60.0, 60.0, 0.0]])  # the second overflows if written with logs
    chosen = torch.tensor([[1.0, 0.0, 0.0]]).expand(2, -1)
    expected = F.binary_cross_entropy_with_logits(logits, chosen, reduction="none").mean(1)
    assert torch.allclose(group_loss(logits), expected)
    assert not torch.allclose(group_loss(logits.flip(1)), expected)


@pytest.mark.parametrize("name", ["mlp", "neumf"])
def test_a_network_scores_a_catalogue_in_chunks_as_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, history = small(name), draw(0, 2)
    at_once = all_scores(model, history)
    monkeypatch.setattr(base, "CHUNK", 7)  # 20 items: two whole chunks and a rest
    assert same(all_scores(model, history), at_once)
    assert not same(at_once[:, :1], at_once[:, 7:8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "tranformer"}, "did you mean 'transformer'"),
        ({"name": "GRU"}, "did you mean 'gru'"),
        ({"name": "xyz"}, "choose from cnn-lstm, gru"),
        ({"name": "mf", "heads": 2}, "mf has no option 'heads'"),
        ({"name": "gru", "dropout": 1.0}, "dropout must be in"),
        ({"name": "gru", "dropout": float("nan")}, "dropout must be in"),
        ({"name": "gru", "layers": 0}, "layers must be a whole number"),
        ({"name": "gru", "max_length": 2.5}, "max_length must be a whole number"),
        ({"name": "mf", "dim": -1}, "dim must be a whole number"),
        ({"name": "transformer", "dim": 9}, "heads must divide dim"),
        ({"name": "neumf", "hidden": 7}, "hidden must be even"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        ModelConfig(**options)  # type: ignore[arg-type]  # wrong types are the point
    assert ModelConfig(name="transformer", heads=4, dim=12).options["layers"] == 2


def test_every_option_reaches_its_model() -> None:
    def n_parameters(**options: int) -> int:
        model = build(ModelConfig(name="transformer", **options), N_ITEMS, 0)
        return sum(p.numel() for p in model.parameters())

    plain = n_parameters()
    assert n_parameters(dim=32) < plain
    assert n_parameters(max_length=60) == plain  # nothing is learned for a place in the window
    assert n_parameters(layers=3) > plain
    assert n_parameters(hidden=64) < plain
    assert n_parameters(heads=4) == plain + 2 * 2 * FAR  # two blocks
    sizes = {"dim": 64, "hidden": 128, "layers": 2, "heads": 2, "dropout": 0.3, "max_length": 200}
    assert ModelConfig(name="transformer").options == sizes
    assert ModelConfig(name="gru").options["dim"] == ModelConfig(name="mf").options["dim"] == 32
    dropped = build(ModelConfig(name="gru", dropout=0.75), N_ITEMS, 0)
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.75 for m in dropped.modules())


def test_an_empty_catalogue_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="n_items"):
        build(ModelConfig(name="mf"), 0, 0)
    assert build(ModelConfig(name="mf"), 1, 0).n_items == 1


def test_pad_of_nobody_is_an_empty_block() -> None:
    assert pad([], 4, N_ITEMS).shape == (0, 4)
    assert pad([[1]], 4, N_ITEMS).shape == (1, 4)
