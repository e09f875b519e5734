"""A device's forward passes in NumPy are PyTorch's: same weights, same histories, same scores."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from penchant.common import config
from penchant.common.arrays import Float32
from penchant.common.catalogue import Catalogue
from penchant.common.errors import MalformedArtifact
from penchant.common.inference.scorer import MAX_SIZE, Scorer, scorer
from penchant.common.inference.sequence import Gru
from penchant.common.interactions import Interactions
from penchant.common.learners.contract import State
from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig
from penchant.common.learners.neural.models import MODELS, ModelConfig
from penchant.common.streams import Streams

N_ITEMS, LENGTH = 40, 9
CATALOGUE = Catalogue(
    ids=tuple(f"i{i}" for i in range(N_ITEMS)),
    topics=tuple((f"topic {i % 3}",) for i in range(N_ITEMS)),
    retired=frozenset({"i5", "i38"}),
)
SHOWN = ~CATALOGUE.is_retired
NETWORKS = tuple(name for name in MODELS if name != "mf")
SEQUENCE = ("gru", "lstm", "cnn-lstm", "transformer")
HISTORIES = [
    [],
    [7],
    [3, 3],
    [5, 0, 39, 12],  # a retired item is read like any other
    [N_ITEMS, 4, 10_000, 8],  # unknown ones are not
    [N_ITEMS + 1],
    list(range(LENGTH)),
    [(11 * i) % N_ITEMS for i in range(3 * LENGTH)],
]


def made(name: str, seed: int = 0, *, loud: float = 0.4, **changes: Any) -> tuple[FedAvg, State, Mapping[str, Any]]:
    """A learner and a state of random weights so large that whatever reaches a score is seen in it."""
    deep = {} if name in ("mlp", "neumf") else {"layers": 2}
    model = ModelConfig(name=name, dim=8, hidden=12, max_length=LENGTH, **deep)
    learner = FedAvg(CATALOGUE, FedAvgConfig(model=model, **changes))
    random = np.random.default_rng(seed)
    state = {
        name: (loud * random.standard_normal(values.shape)).astype(np.float32)
        for name, values in learner.init(Streams(seed)).items()
    }
    return learner, state, config.encode(learner.config)


def of(name: str, seed: int = 0, **changes: Any) -> tuple[Float32, Scorer]:
    """PyTorch's scores of `HISTORIES`, and the scorer that must give the same."""
    learner, state, settings = made(name, seed, **changes)
    return learner.scores(state, Interactions.of(HISTORIES, 100_000)), scorer("fedavg", settings, state, N_ITEMS)


def scored(by: Scorer) -> Float32:
    return np.stack([by.scores(np.array(history, np.int64)) for history in HISTORIES])


def same(found: Float32, wanted: Float32) -> bool:
    """To 1e-5 of the largest score of each history: what float32 sums in another order may differ by."""
    reach = np.abs(wanted).max(1, keepdims=True)
    return bool((np.abs(found - wanted) <= 1e-5 * reach).all())


def hostile(model: Mapping[str, Any], n_items: int, value: float = 0.01) -> tuple[dict[str, Any], State]:
    """Settings of one layer, and arrays of the shapes that they say, all of one value."""
    name, d, h = model["name"], model["dim"], model["hidden"]
    state: dict[str, tuple[int, ...]] = {"item.weight": (n_items + 1, d)}
    if name == "mlp":
        state = {"item.weight": (n_items, d), "user.weight": (1, d), "bias.weight": (n_items, 1)}
        state |= {"first.weight": (h, 2 * d), "first.bias": (h,), "last.weight": (1, h), "last.bias": (1,)}
    elif name == "neumf":
        state = {f"item_{kind}.weight": (n_items, d) for kind in ("product", "network")}
        state |= {f"user_{kind}.weight": (1, d) for kind in ("product", "network")}
        state |= {"first.weight": (h, 2 * d), "first.bias": (h,), "second.weight": (h // 2, h)}
        state |= {"second.bias": (h // 2,), "last.weight": (1, d + h // 2), "last.bias": (1,)}
    elif name == "transformer":
        own: dict[str, tuple[int, ...]] = {"distance": (model["heads"], 64)}
        own |= {f"norm_{kind}.{what}": (d,) for kind in ("attention", "feed") for what in ("weight", "bias")}
        layers = {"query_key_value": (3 * d, d), "mix": (d, d), "widen": (h, d), "narrow": (d, h)}
        own |= {f"{layer}.weight": shape for layer, shape in layers.items()}
        own |= {f"{layer}.bias": shape[:1] for layer, shape in layers.items()}
        state |= {f"blocks.0.{key}": shape for key, shape in own.items()} | {"norm.weight": (d,), "norm.bias": (d,)}
    else:
        gates = {"gru": 3, "lstm": 4}[name] * h
        state |= {"cell.weight_ih_l0": (gates, d), "cell.bias_ih_l0": (gates,), "cell.weight_hh_l0": (gates, h)}
        state |= {"cell.bias_hh_l0": (gates,), "out.weight": (d, h), "out.bias": (d,)}
    return {"model": {"layers": 1, **model}}, {key: np.full(shape, value, np.float32) for key, shape in state.items()}


@pytest.mark.parametrize(
    "model",
    [
        {"name": "mlp", "dim": 1, "hidden": 8192},
        {"name": "mlp", "dim": 1024, "hidden": 8},
        {"name": "neumf", "dim": 16, "hidden": 1024},
        {"name": "gru", "dim": 8, "hidden": 4096, "max_length": 20},
        {"name": "transformer", "dim": 8, "hidden": 8192, "heads": 8, "max_length": 1024},
    ],
    ids=lambda model: f"{model['name']}-{model['dim']}",
)
def test_no_release_that_is_read_makes_a_device_take_256_mb_beside_it(model: dict[str, Any]) -> None:
    settings, state = hostile(model, 10_000)
    settings["local"] = {"fold_in_steps": 2, "negatives": 64}
    tracemalloc.start()
    try:
        by = scorer("fedavg", settings, state, 10_000)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        by.scores(np.arange(8_000))
        assert tracemalloc.get_traced_memory()[1] - before < 256e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"name": "mlp", "dim": 1, "hidden": 8193}, "hidden"),
        ({"name": "gru", "dim": 1, "hidden": 2800, "max_length": 1024}, "makes 1024 · 3 · 2800 numbers"),
        ({"name": "transformer", "dim": 9, "hidden": 1, "heads": 9, "max_length": 1024}, "makes 9 · 1024 · 1024"),
        ({"name": "transformer", "dim": 8, "hidden": 1, "heads": 3, "max_length": 9}, "3 heads do not share 8"),
    ],
)
def test_a_release_whose_layers_are_too_much_for_a_device_is_refused(model: dict[str, Any], why: str) -> None:
    settings, state = hostile({**model, "hidden": 1}, 5)
    settings["model"]["hidden"] = model["hidden"]
    with pytest.raises(MalformedArtifact, match=why):
        scorer("fedavg", settings, state, 5)


def test_an_adapter_of_a_higher_rank_than_its_table_is_refused_before_it_is_worked_in() -> None:
    settings, state = hostile({"name": "mlp", "dim": 2, "hidden": 2}, 5)
    for rank, refused in ((2, False), (3, True)):
        adapter = {"item.down": np.zeros((2, rank), np.float32), "item.up": np.zeros((rank, 2), np.float32)}
        if refused:
            with pytest.raises(MalformedArtifact, match=r"item\.down"):
                scorer("fedavg", settings, {**state, **adapter}, 5)
        else:
            scorer("fedavg", settings, {**state, **adapter}, 5)


def test_a_device_without_memory_for_a_release_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Gru, items: Float32) -> Float32:
        raise MemoryError

    monkeypatch.setattr(Gru, "read", full)
    settings, state = hostile({"name": "gru", "dim": 2, "hidden": 2}, 5)
    with pytest.raises(MalformedArtifact, match="more memory than this device has"):
        scorer("fedavg", settings, state, 5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # a norm's square, whose inverse is then 0
def test_scores_are_finite_after_any_history_whatever_weights_are_read(name: str) -> None:
    _, state, settings = made(name, loud=3e5)
    for seed in range(5):
        random = np.random.default_rng(seed)
        loud = {key: np.clip(values, -1e6, 1e6) for key, values in state.items()}
        loud = {key: random.permutation(values.ravel()).reshape(values.shape) for key, values in loud.items()}
        given = {**settings, "local": {"fold_in_lr": 1e6, "fold_in_steps": 20}}
        by = scorer("fedavg", given, loud, N_ITEMS)
        assert np.isfinite(scored(by)).all()
        with pytest.raises(MalformedArtifact, match="too large"):
            scorer("fedavg", given, {**loud, **over(loud)}, N_ITEMS)


def over(state: State) -> State:
    """One number of one table over what is read, in a row that no history here has."""
    table = next(key for key in state if key.startswith("item"))
    values = state[table].copy()
    values[1, 0] = 1.1e6
    return {table: values}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(4))
class TestScores:
    def test_are_pytorchs_for_any_weights_and_history(self, name: str, seed: int) -> None:
        wanted, by = of(name, seed)
        assert (wanted[:, ~SHOWN] == -np.inf).all()
        found = scored(by)
        assert found.dtype == np.float32
        assert same(found[:, SHOWN], wanted[:, SHOWN])
        assert len(np.unique(wanted[1:4], axis=0)) == 3  # else a reader that reads nothing would pass
        for row, history in zip(found, HISTORIES, strict=True):
            assert by.score_of(by.person(np.array(history, np.int64)), 17) == pytest.approx(row[17], rel=1e-5, abs=1e-6)

    def test_have_the_adapters_worked_in(self, name: str, seed: int) -> None:
        wanted, by = of(name, seed, adapter=3)
        assert same(scored(by)[:, SHOWN], wanted[:, SHOWN])
        _, state, settings = made(name, seed, adapter=3)
        without = {key: values for key, values in state.items() if not key.endswith(("down", "up"))}
        assert not same(scored(scorer("fedavg", settings, without, N_ITEMS))[:, SHOWN], wanted[:, SHOWN])


@pytest.mark.parametrize("name", NETWORKS)
class TestRelease:
    def test_of_default_sizes_is_read_from_settings_that_name_none(self, name: str) -> None:
        learner = FedAvg(CATALOGUE, FedAvgConfig(model=ModelConfig(name=name)))
        state = learner.init(Streams(3))
        by = scorer("fedavg", {"model": {"name": name}}, state, N_ITEMS)
        wanted = learner.scores(state, Interactions.of(HISTORIES, 100_000))
        assert same(scored(by)[:, SHOWN], wanted[:, SHOWN])

    def test_with_any_array_missing_or_misshapen_is_refused(self, name: str) -> None:
        _, state, settings = made(name, adapter=2)
        for array, values in state.items():
            if array.endswith("down"):  # a table may have no adapter
                continue
            for harmed in (
                {key: v for key, v in state.items() if key != array},
                {**state, array: values[..., :-1]},
                {**state, array: values[None]},
                {**state, array: values.astype(np.float64)},
            ):
                with pytest.raises(MalformedArtifact, match=array.replace(".", r"\.")):
                    scorer("fedavg", settings, harmed, N_ITEMS)

    def test_of_another_catalogue_is_refused(self, name: str) -> None:
        _, state, settings = made(name)
        for n_items in (0, N_ITEMS - 1, N_ITEMS + 1):
            with pytest.raises(MalformedArtifact):
                scorer("fedavg", settings, state, n_items)

    def test_with_numbers_too_large_to_score_with_is_refused(self, name: str) -> None:
        _, state, settings = made(name)
        table = next(key for key in state if key.startswith("item"))
        state = {**state, table: np.full_like(state[table], 3e38)}
        with pytest.raises(MalformedArtifact, match="too large"):
            scorer("fedavg", settings, state, N_ITEMS)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gru", {"dim": 0}),
        ("gru", {"dim": "8"}),
        ("gru", {"dim": MAX_SIZE + 1}),
        ("gru", {"max_length": 10**9}),
        ("gru", {"hidden": True}),
        ("gru", {"layers": -1}),
        ("lstm", {"layers": 3}),
        ("transformer", {"heads": 9}),
        ("transformer", {"heads": 3}),
        ("transformer", {"layers": 10**6}),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused(name: str, model: dict[str, Any]) -> None:
    _, state, settings = made(name)
    with pytest.raises(MalformedArtifact):
        scorer("fedavg", {**settings, "model": {**settings["model"], **model}}, state, N_ITEMS)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"name": "novel"}},
        {"model": {"name": ["gru"]}},
        {"model": {"name": "mf"}},
        {"model": "gru"},
        {"model": None},
        {},
        {"model": {"name": "mlp", "dim": 8, "hidden": 12}, "local": {"negatives": 0}},
        {"model": {"name": "mlp", "dim": 8, "hidden": 12}, "local": {"negatives": 2.5}},
        {"model": {"name": "mlp", "dim": 8, "hidden": 12}, "local": {"negatives": "4"}},
        {"model": {"name": "mlp", "dim": 8, "hidden": 12}, "local": {"fold_in_steps": 10**9}},
        {"model": {"name": "mlp", "dim": 8, "hidden": 12}, "local": {"later": 1}},
        {"model": {"name": "mlp", "dim": 8, "hidden": 12}, "local": 3},
    ],
)
def test_settings_that_cannot_be_read_are_refused(settings: Mapping[str, Any]) -> None:
    with pytest.raises(MalformedArtifact):
        scorer("fedavg", settings, made("mlp")[1], N_ITEMS)


def test_a_learner_that_no_scorer_knows_is_named_with_what_to_do() -> None:
    _, state, settings = made("gru")
    with pytest.raises(MalformedArtifact, match=r"this release of als has no item vectors .* update penchant"):
        scorer("als", settings, state, N_ITEMS)


@pytest.mark.parametrize("name", SEQUENCE)
def test_before_a_history_a_reader_ranks_by_what_comes_after_anything(name: str) -> None:
    _, by = of(name)
    each = [by.scores(np.array([item])) for item in range(N_ITEMS)]
    assert np.allclose(by.scores_of(by.nobody), np.mean(each, axis=0), atol=1e-5)
    assert not by.scores(np.zeros(0, np.int64)).any()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_side_is_the_item_table_by_direction_and_what_it_starts_from(name: str) -> None:
    _, by = of(name)
    assert np.allclose(np.linalg.norm(by.side.vectors, axis=1), 1)
    assert by.side.vectors.dtype == by.side.popularity.dtype == np.float32
    assert (by.side.popularity.min(), by.side.popularity.max()) == (0, 1)
    assert by.side.popularity.argmax() == by.scores_of(by.nobody).argmax()
