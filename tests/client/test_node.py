"""A node answers for its own people, under their plan and within their caps; how they are dealt changes nothing."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.client import node as client_node
from penchant.client.node import Node
from penchant.common import columns, config
from penchant.common.arrays import Arrays, Float32, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.columns import ColumnWriter
from penchant.common.errors import BudgetExhausted, InvalidConfig, PrivacyRefused
from penchant.common.interactions import History, Interactions
from penchant.common.learners import newcomers, registry
from penchant.common.learners.contract import Learner, State
from penchant.common.privacy import accounting, gaussian, sums
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.noise import Noise
from penchant.common.privacy.plan import DeviceNoise, PrivacyPlan, QuantileClip, SumSpec, task_digest
from penchant.common.privacy.sums import Shapes
from penchant.common.streams import Streams
from penchant.common.wire import Order

N_ITEMS = 12
CATALOGUE = Catalogue(ids=tuple(f"i{i}" for i in range(N_ITEMS)))
DEVICE = DeviceNoise(clip_norm=0.5, noise_multiplier=2.0, rate=0.1, steps=8, divisor=16.0)

PLAN = PrivacyPlan(
    unit="none",
    n_users=6,
    delta=1e-5,
    sampling="none",
    cohort=6,
    sums=(SumSpec(name="noisy", rounds=5, clip_norm=1.5),),
    max_participations=2,
)
PROMISED = replace(PLAN, unit="interaction", device=DEVICE)
PEOPLE = Interactions.of([[0, 3, 5], [1], [], [3, 3, 8, 9], [11, 0], [2, 4, 6, 8, 10]], N_ITEMS)


class Noisy(Learner):
    """A contribution that shows whose stream it was drawn from, some of it longer than the clip."""

    name = "noisy"

    def init(self, streams: Streams) -> State:
        return {"w": np.zeros(N_ITEMS, np.float32)}

    def shapes(self, state: State) -> Shapes:
        return {"w": (N_ITEMS,), "count": ()}

    def _contribution(self, state: State, history: History, streams: Streams) -> Arrays:
        w = streams.get("w").standard_normal(N_ITEMS).astype(np.float32) + state["w"]
        w[history.items] += 1
        return {"w": w, "count": np.array(len(history), np.float32)}

    def apply(self, state: State, noisy_sum: Arrays, divisor: float) -> State:
        return {"w": noisy_sum["w"] / np.float32(divisor)}

    def _scores(self, state: State, histories: Interactions) -> Float32:
        return np.tile(state["w"], (histories.n_users, 1))

    def _adopted(self, name: str, state: State, place: Int64) -> np.ndarray[Any, Any]:
        values = state[name]
        return newcomers.grown(values, place, len(self.catalogue))[0] if values.ndim else values


class NoisyDevice(Noisy):
    """The same, under the name of a learner whose devices add the noise of PROMISED."""

    name = "noisy device"

    def __init__(self, catalogue: Catalogue, device: DeviceNoise = DEVICE) -> None:
        super().__init__(catalogue)
        self.device_noise = device


def order(*users: int, round: int = 1, plan: PrivacyPlan = PLAN, learner: str = "noisy", **settings: Any) -> Order:
    return Order(round=round, attempt=0, plan=plan, learner=learner, settings=settings, users=users)


def learners(name: str, settings: Mapping[str, Any]) -> Learner:
    own = {"noisy": Noisy, "noisy device": NoisyDevice}
    return own[name](CATALOGUE) if name in own else registry.build(name, settings, CATALOGUE)


def node(people: Interactions = PEOPLE, *, plan: PrivacyPlan = PLAN, first_user: int = 0) -> Node:
    return Node(people, learners, Streams(1), plan=plan, first_user=first_user)


STATE: State = {"w": np.zeros(N_ITEMS, np.float32)}

# ---------------------------------------------------------------------------------------------------------- sums


def total(cuts: list[int], asked: Order, state: State) -> dict[str, np.ndarray]:
    """What nodes that split the people at these places send together."""
    edges = [0, *sorted(cuts), PEOPLE.n_users]
    out: dict[str, np.ndarray] = {}
    for first, end in itertools.pairwise(edges):
        here = node(PEOPLE.select(range(first, end)), plan=asked.plan, first_user=first)
        users = tuple(u - first for u in asked.users if first <= u < end)
        for name, values in here.answer(replace(asked, users=users), state).items():
            out[name] = out.get(name, 0) + values
    return out


HEAD: State = {"popularity": np.ones(N_ITEMS, np.float32), "head": np.array([0, 3, 5, 8, 9, 10], np.int32)}
MODEL: dict[str, Any] = {"model": {"name": "mf", "dim": 3}}
COUNTS: State = {"popularity": np.zeros(N_ITEMS, np.float32)}


@pytest.mark.parametrize(
    ("learner", "options", "state"),
    [
        ("noisy", {}, STATE),
        ("cooccurrence", {"head": 6, "window": 2}, COUNTS),
        ("cooccurrence", {"head": 6, "window": 2}, HEAD),
    ],
    ids=["noisy", "counts", "matrix"],
)
@settings(max_examples=40)
@given(cuts=st.lists(st.integers(0, PEOPLE.n_users), max_size=5), users=st.sets(st.integers(0, 5)))
def test_any_way_to_deal_people_to_nodes_gives_the_sum_of_single_users(
    learner: str, options: dict[str, Any], state: State, cuts: list[int], users: set[int]
) -> None:
    asked = order(*sorted(users), learner=learner, **options)
    single = total(list(range(1, PEOPLE.n_users)), asked, state)
    dealt = total(cuts, asked, state)
    assert dealt.keys() == single.keys()
    for name, values in single.items():
        assert dealt[name].dtype == np.float64  # what a node adds up and sends
        np.testing.assert_allclose(dealt[name], values, atol=1e-9)


@pytest.mark.parametrize(
    ("learner", "options", "state"),
    [
        ("noisy", {}, STATE),
        ("cooccurrence", {"head": 6, "window": 2}, COUNTS),
        ("cooccurrence", {"head": 6, "window": 2}, HEAD),
    ],
    ids=["noisy", "counts", "matrix"],
)
@given(users=st.sets(st.integers(0, 5)), block=st.integers(1, 20))
def test_the_blocks_a_node_cuts_its_people_into_change_no_bit(
    learner: str, options: dict[str, Any], state: State, users: set[int], block: int
) -> None:
    quantile = QuantileClip(quantile=0.5, noise_multiplier=1.0)
    spec = SumSpec(name="noisy", rounds=5, clip_norm=1.5, noise_multiplier=1.0, quantile=quantile)
    plan = replace(PLAN, unit="user", sums=(spec,), cohort=2)
    asked, state = order(*sorted(users), plan=plan, learner=learner, **options), {**state, spec.clip_key: np.array(1.5)}
    whole = node(plan=plan).answer(asked, state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_node, "BLOCK", block)
        cut = node(plan=plan).answer(asked, state)
    assert cut.keys() == whole.keys()
    for name, values in whole.items():
        assert cut[name].dtype == np.float64
        assert cut[name].tobytes() == values.tobytes()


def test_float32_sums_or_values_off_the_grid_would_show_where_blocks_are_cut() -> None:
    values = np.random.default_rng(0).standard_normal((3, 200)) / 3
    for a, b, c, exact in ((*values, False), (*values.astype(np.float32), False), (*sums.on_grid(values, 1.0), True)):
        assert np.array_equal((a + b) + c, a + (b + c)) == exact


def test_a_nodes_memory_is_that_of_a_block_and_not_of_the_people_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, block = 200_000, Interactions.of([[u % N_ITEMS] * 10 for u in range(1000)], N_ITEMS)
    with ColumnWriter(tmp_path, n_items=N_ITEMS) as writer:  # 32 MB of columns
        for _ in range(n // block.n_users):
            writer.add(block)
    plan = replace(PLAN, n_users=n, cohort=n)
    asked = order(*range(0, n, 2), plan=plan, learner="cooccurrence")  # every other one, so nothing is a view

    def peak_bytes(block: int) -> int:
        monkeypatch.setattr(client_node, "BLOCK", block)
        here = node(columns.load(tmp_path), plan=plan)
        tracemalloc.start()
        assert here.answer(asked, COUNTS)["counts"].sum() == pytest.approx(n / 2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    a_number_each = 8 * n // 2
    small, large = peak_bytes(1 << 16), peak_bytes(100 * n)
    assert small < 12 * a_number_each
    assert large > 2 * small


def test_a_node_that_counts_somebody_twice_or_draws_from_another_stream_fails_that_comparison() -> None:
    once, twice = total([3], order(0, 1), STATE), total([3], order(0, 1), STATE)
    twice["w"] += node().answer(order(0), STATE)["w"]
    assert np.abs(once["w"] - twice["w"]).max() > 1e-3
    shifted = node(first_user=7).answer(order(0, 1), STATE)
    assert np.abs(once["w"] - shifted["w"]).max() > 1e-3


def test_everybody_is_clipped_alone_before_they_are_added() -> None:
    capped = replace(PLAN, sums=(SumSpec(name="noisy", rounds=5, clip_norm=0.01),))
    for users in ((0,), (0, 1, 3, 4, 5)):
        sent = node(plan=capped).answer(order(*users, plan=capped), STATE)
        length = math.sqrt(sum(float((v.astype(np.float64) ** 2).sum()) for v in sent.values()))
        assert length <= 0.01 * len(users) * (1 + 1e-5)
        assert length > 0.001
    free = replace(PLAN, sums=(SumSpec(name="noisy", rounds=5, clip_norm=math.inf),))
    assert np.linalg.norm(node(plan=free).answer(order(0, plan=free), STATE)["w"]) > 1


def test_a_round_is_clipped_to_the_bound_of_its_own_sum() -> None:
    sums = (SumSpec(name="noisy", rounds=1, clip_norm=0.01), SumSpec(name="noisy", rounds=4, clip_norm=0.5))
    plan = replace(PLAN, sums=sums)
    here = node(plan=plan)
    assert np.linalg.norm(here.answer(order(0, round=1, plan=plan), STATE)["w"]) <= 0.0101
    assert np.linalg.norm(here.answer(order(0, round=2, plan=plan), STATE)["w"]) > 0.1
    with pytest.raises(InvalidConfig, match="rounds 1 to 5"):
        here.answer(order(0, round=6, plan=plan), STATE)


def test_nobody_drawn_is_an_ordinary_answer_of_zeros() -> None:
    sent = node().answer(order(), STATE)
    assert {name: values.shape for name, values in sent.items()} == {"w": (N_ITEMS,), "count": ()}
    assert all((values == 0).all() and values.dtype == np.float64 for values in sent.values())


def test_a_state_that_is_not_finite_is_refused_before_anybody_takes_part() -> None:
    here = node()
    with pytest.raises(PrivacyRefused, match="not finite"):
        here.answer(order(0), {"w": np.full(N_ITEMS, np.nan, np.float32)})
    assert here.participations.tolist() == [0] * 6


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("users", [(6,), (-1,), (0, 6), (0, 0), (1, 2, 1)])
def test_a_user_hosted_elsewhere_or_named_twice_is_refused_and_nobody_is_counted(users: tuple[int, ...]) -> None:
    here = node()
    with pytest.raises(PrivacyRefused, match="twice or one that is not hosted"):
        here.answer(order(*users), STATE)
    assert here.participations.tolist() == [0] * 6
    here.answer(order(5), STATE)
    assert here.participations.tolist() == [0, 0, 0, 0, 0, 1]


def test_nobody_takes_part_past_their_cap_whichever_round_and_try_is_claimed() -> None:
    here = node()
    here.answer(order(0, 1), STATE)
    here.answer(order(0, round=2), STATE)
    for asked in (order(0, round=3), order(0), replace(order(0), attempt=1)):
        with pytest.raises(PrivacyRefused, match="cap"):
            here.answer(asked, STATE)
    assert here.participations.tolist() == [2, 1, 0, 0, 0, 0]
    here.answer(order(1, round=3), STATE)


def test_participations_kept_from_before_count() -> None:
    kept = np.array([2, 1, 0, 0, 0, 0], np.int64)
    here = Node(PEOPLE, learners, Streams(1), plan=PLAN, participations=kept)
    with pytest.raises(PrivacyRefused, match="cap"):
        here.answer(order(0), STATE)
    here.answer(order(1), STATE)
    assert kept.tolist() == [2, 2, 0, 0, 0, 0]  # in place: whoever keeps them sees it


OTHER_PLANS: list[dict[str, Any]] = [
    {"unit": "none", "device": None},
    {"unit": "user", "device": None, "cohort": 2, "sums": (replace(PLAN.sums[0], noise_multiplier=9.0),)},
    {
        "unit": "user",
        "device": None,
        "cohort": 2,
        "sums": (
            replace(PLAN.sums[0], noise_multiplier=9.0, quantile=QuantileClip(quantile=0.5, noise_multiplier=9.0)),
        ),
    },
    {"n_users": 7},
    {"delta": 2e-5},
    {"sampling": "poisson", "max_participations": 5},
    {"cohort": 5},
    *(
        {"sums": (replace(PLAN.sums[0], **change),)}
        for change in (
            {"name": "other"},
            {"rounds": 6},
            {"clip_norm": 1.5000001},
            {"clip_norm": math.inf},
            {"row_norm": 1.0},
        )
    ),
    {"enforced_by": "nothing", "max_participations": 5},
    {"schedule": 1},
    {"task": "f" * 64},
    {"sums": (PLAN.sums[0], PLAN.sums[0])},
    {"max_participations": 3},
    {"max_participations": 1},
    *(
        {"device": replace(DEVICE, **change)}
        for change in (
            {"clip_norm": 0.6},
            {"noise_multiplier": 2.1},
            {"rate": 0.05},
            {"steps": 7},
            {"divisor": 17.0},
            {"min_history": 2},
        )
    ),
    {"population": "other"},
    {"uncharged": ("the learning rate",)},
]


def test_an_order_under_another_plan_than_the_one_enrolled_under_is_refused_and_nobody_is_counted() -> None:
    here = node(plan=PROMISED)
    for change in OTHER_PLANS:
        for learner in ("noisy", "noisy device"):
            with pytest.raises(PrivacyRefused, match="not the one that people here enrolled under"):
                here.answer(order(0, plan=replace(PROMISED, **change), learner=learner), STATE)
        assert here.participations.tolist() == [0] * 6
    for plan in (PROMISED, replace(PROMISED), PrivacyPlan.from_json(PROMISED.to_json())):
        other = node(plan=PROMISED)
        other.answer(order(0, plan=plan, learner="noisy device"), STATE)
        assert other.participations.tolist() == [1, 0, 0, 0, 0, 0]


def test_those_other_plans_change_every_field_that_can_be() -> None:
    def names(kind: type[PrivacyPlan | DeviceNoise | SumSpec]) -> set[str]:
        return {field.name for field in fields(kind)}

    assert {name for change in OTHER_PLANS for name in change} == names(PrivacyPlan) - {"schema_version"}
    for kind, base, changed in (
        (DeviceNoise, DEVICE, [c["device"] for c in OTHER_PLANS if c.get("device")]),
        (SumSpec, PLAN.sums[0], [c["sums"][0] for c in OTHER_PLANS if "sums" in c]),
    ):
        assert {n for c in changed for n in names(kind) if getattr(c, n) != getattr(base, n)} == names(kind)


def test_a_plan_with_an_infinite_clip_is_the_same_after_it_was_sent() -> None:
    free = replace(PLAN, sums=(replace(PLAN.sums[0], clip_norm=math.inf),))
    sent = Order.from_flat(order(0, plan=free).to_flat())
    assert sent.plan == free
    assert np.linalg.norm(node(plan=free).answer(sent, STATE)["w"]) > 1
    with pytest.raises(PrivacyRefused, match="enrolled"):
        node().answer(sent, STATE)


def test_a_plan_that_promises_noise_the_learner_does_not_add_is_refused() -> None:
    here = node(plan=PROMISED)
    with pytest.raises(PrivacyRefused, match="noise on the device"):
        here.answer(order(0, plan=PROMISED), STATE)
    assert here.participations.tolist() == [0] * 6


def test_noise_on_the_device_must_be_that_of_the_plan_to_the_digit() -> None:
    same: dict[str, Any] = {**MODEL, "device": config.encode(DEVICE)}
    less: dict[str, Any] = {**MODEL, "device": config.encode(replace(DEVICE, noise_multiplier=1.9))}
    state = learners("fedavg", same).init(Streams(0))
    here = node(plan=PROMISED)
    assert set(here.answer(order(0, plan=PROMISED, learner="fedavg", **same), state)) <= set(state)
    for wrong in (less, MODEL):
        with pytest.raises(PrivacyRefused, match="noise on the device"):
            here.answer(order(0, plan=PROMISED, learner="fedavg", **wrong), state)
    assert here.participations.tolist() == [1, 0, 0, 0, 0, 0]
    with pytest.raises(PrivacyRefused, match="noise on the device"):  # noise that no plan accounts for
        node().answer(order(0, learner="fedavg", **same), state)


# ---------------------------------------------------------------------------------------------------------- spent


def test_what_a_person_spent_is_one_device_event_for_each_time_they_took_part() -> None:
    here, event = node(plan=PROMISED), PROMISED.device_event()
    assert event is not None
    assert [here.spent(user).epsilon for user in range(6)] == [0] * 6
    before = 0.0
    for times in (1, 2):
        here.answer(order(0, plan=PROMISED, learner="noisy device", round=times), STATE)
        spent = here.spent(0).epsilon
        assert spent == pytest.approx(accounting.epsilon((event,) * times, PROMISED.delta).epsilon, rel=1e-6)
        assert spent > before * 1.1
        assert here.spent(1).epsilon == 0
        before = spent
    promised = PROMISED.guarantee()
    assert promised is not None
    assert before == promised.epsilon  # at the cap: nobody can spend more
    with pytest.raises(PrivacyRefused, match="cap"):
        here.answer(order(0, plan=PROMISED, learner="noisy device", round=3), STATE)
    assert here.spent(0).epsilon == before


@pytest.mark.parametrize("times", [0, 1, 2])
def test_what_a_person_spent_is_the_gaussian_closed_form_where_every_step_reads_everything(times: int) -> None:
    device = replace(DEVICE, rate=1.0)
    plan = replace(PROMISED, device=device)
    kept = np.array([0, times, 0, 0, 0, 0], np.int64)  # as after a restart
    here = Node(PEOPLE, lambda *_: NoisyDevice(CATALOGUE, device), Streams(1), plan=plan, participations=kept)
    expected = gaussian.epsilon_of(math.sqrt(8 * times) / 2.0, 1e-5) if times else 0.0
    assert here.spent(1).epsilon == pytest.approx(expected, rel=1e-9)
    assert here.spent(0).epsilon == 0
    here.answer(order(0, plan=plan, learner="noisy device"), STATE)
    assert here.spent(0).epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(8) / 2.0, 1e-5), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------- noise


def test_an_order_sent_again_meets_other_randomness_whatever_it_claims() -> None:
    plan = replace(PLAN, max_participations=5)
    here = node(plan=plan)
    first = here.answer(order(0, plan=plan), STATE)["w"]
    again = here.answer(order(0, plan=plan), STATE)["w"]
    assert np.abs(first - again).max() > 1e-3  # equal noise on another state would be subtracted
    same = node(plan=plan).answer(order(0, plan=plan), STATE)["w"]
    np.testing.assert_array_equal(first, same)


@pytest.mark.parametrize("change", [{"round": 2}, {"attempt": 1}, {"users": (1,)}])
def test_another_round_try_or_person_draws_from_another_stream(change: dict[str, Any]) -> None:
    empty = Interactions.of([[], []], N_ITEMS)
    first, other = (node(empty).answer(asked, STATE)["w"] for asked in (order(0), replace(order(0), **change)))
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.999
    np.testing.assert_array_equal(first, node(empty).answer(order(0), STATE)["w"])


def test_a_learner_is_built_once_for_its_settings_and_anew_for_others() -> None:
    built: list[str] = []

    def count(name: str, settings: Mapping[str, Any]) -> Learner:
        built.append(f"{name} {dict(settings)}")
        return Noisy(CATALOGUE)

    here = Node(PEOPLE, count, Streams(0), plan=PLAN)
    for n, option in enumerate((1, 1, 2, 1)):
        here.answer(order(n, option=option), STATE)
    assert built == ["noisy {'option': 1}", "noisy {'option': 2}", "noisy {'option': 1}"]


# --------------------------------------------------------------------------------------------------------- ledger


def on_disk(path: Path, budget: float | None = None) -> Node:
    """A device whose participations last."""
    ledger = Ledger("default", delta=1e-5, path=path, budget=budget)
    return Node(PEOPLE, learners, Streams.from_os(), plan=PROMISED, ledger=ledger)


def participated(times: int) -> Node:
    """One that counts in an array, after so many rounds of everybody."""
    return Node(PEOPLE, learners, Streams(0), plan=PROMISED, participations=np.full(6, times, np.int64))


def test_a_device_that_starts_again_goes_on_from_what_it_spent(tmp_path: Path) -> None:
    path = tmp_path / "device.sqlite"
    here = on_disk(path)
    here.answer(order(0, 2, plan=PROMISED, learner="noisy device"), STATE)
    once = here.spent(0).epsilon
    assert once == pytest.approx(participated(1).spent(0).epsilon, rel=1e-9)
    again = on_disk(path)
    assert again.participations.tolist() == [1, 0, 1, 0, 0, 0]
    assert again.spent(0).epsilon == once
    assert again.spent(1).epsilon == 0
    again.answer(order(0, plan=PROMISED, learner="noisy device", round=2), STATE)
    for device in (again, on_disk(path)):
        with pytest.raises(PrivacyRefused, match="cap"):
            device.answer(order(0, plan=PROMISED, learner="noisy device", round=3), STATE)
    assert on_disk(path).spent(0).epsilon > once


def test_what_a_person_spent_is_written_before_anything_is_computed(tmp_path: Path) -> None:
    path = tmp_path / "device.sqlite"
    here = on_disk(path)
    with pytest.raises(KeyError):
        here.answer(order(0, plan=PROMISED, learner="noisy device"), {"other": np.zeros(1)})  # fails while it computes
    assert on_disk(path).participations.tolist() == [1, 0, 0, 0, 0, 0]


def test_a_device_s_own_budget_refuses_before_anything_is_computed(tmp_path: Path) -> None:
    once = participated(1).spent(0).epsilon
    here = on_disk(tmp_path / "device.sqlite", budget=1.01 * once)
    here.answer(order(0, plan=PROMISED, learner="noisy device"), STATE)
    with pytest.raises(BudgetExhausted):
        here.answer(order(0, plan=PROMISED, learner="noisy device", round=2), STATE)
    here.answer(order(1, plan=PROMISED, learner="noisy device", round=2), STATE)  # another person's budget is their own
    assert here.participations.tolist() == [1, 1, 0, 0, 0, 0]


def test_a_ledger_of_other_people_or_beside_an_array_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="ledger"):
        Node(PEOPLE, learners, Streams(0), plan=PROMISED, ledger=Ledger("others", delta=1e-5))
    counts = np.zeros(6, np.int64)
    with pytest.raises(InvalidConfig, match="ledger"):
        Node(PEOPLE, learners, Streams(0), plan=PROMISED, ledger=Ledger("default", delta=1e-5), participations=counts)


def test_a_device_whose_noise_is_not_fit_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "normal", lambda self, shape=(): np.zeros(shape))
    with pytest.raises(PrivacyRefused, match="Gaussian"):
        Node(PEOPLE, learners, Streams(0), plan=PROMISED)
    Node(PEOPLE, learners, Streams(0), plan=PLAN)  # which adds none


def test_a_node_sends_the_sum_of_clipped_contributions_and_not_their_clipped_sum() -> None:
    capped = replace(PLAN, sums=(SumSpec(name="noisy", rounds=5, clip_norm=0.01),))
    alike = {"w": np.full(N_ITEMS, 1000.0, np.float32)}  # beside which what tells people apart is small
    sent = node(plan=capped).answer(order(0, 1, 3, 4, 5, plan=capped), alike)
    length = math.sqrt(sum(float((v.astype(np.float64) ** 2).sum()) for v in sent.values()))
    assert length == pytest.approx(5 * 0.01, rel=0.001)  # the sum clipped as a whole would be 0.01 long


# ------------------------------------------------------------------------------- one person and the others on a node


def test_one_person_at_their_cap_does_not_take_the_others_with_them() -> None:
    kept = np.array([2, 0, 0, 0, 0, 0], np.int64)
    here = Node(PEOPLE, learners, Streams(1), plan=PLAN, participations=kept)
    found = here.answer(order(0, 1, 3), STATE)
    alone = node().answer(order(1, 3), STATE)
    np.testing.assert_array_equal(found["w"], alone["w"])
    assert kept.tolist() == [2, 1, 0, 1, 0, 0]


class Divergent(Noisy):
    """The last person's training blows up."""

    def _contribution(self, state: State, history: History, streams: Streams) -> Arrays:
        out = dict(super()._contribution(state, history, streams))
        if len(history) == 5:
            out["w"] = np.full(N_ITEMS, np.nan, np.float32)
        return out


def test_one_person_who_cannot_be_bounded_does_not_take_the_others_with_them() -> None:
    here = Node(PEOPLE, lambda *_: Divergent(CATALOGUE), Streams(1), plan=PLAN)
    found = here.answer(order(1, 3, 5), STATE)
    np.testing.assert_array_equal(found["w"], node().answer(order(1, 3), STATE)["w"])


def test_a_device_that_enrolled_for_one_task_refuses_another() -> None:
    settings = {"lr": 0.5}
    bound = replace(PLAN, task=task_digest("noisy", settings))
    here = node(plan=bound)
    for asked in (
        order(0, plan=bound),
        order(0, plan=bound, lr=0.6),
        order(0, plan=bound, learner="noisy device", lr=0.5),
    ):
        with pytest.raises(PrivacyRefused, match="settings"):
            here.answer(asked, STATE)
    assert here.participations.tolist() == [0] * 6
    here.answer(order(0, plan=bound, lr=0.5), STATE)


def test_a_ledger_at_a_weaker_delta_than_the_plan_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="delta"):
        Node(PEOPLE, learners, Streams(0), plan=PROMISED, ledger=Ledger("default", delta=0.01))
