"""The round loop: charged before released, whatever arrives, and nothing that arrives changes noise or divisor.

Each user owns one coordinate of the sum, so a 2 is a double count and a 0 somebody who was left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.client.node import Node
from penchant.common.arrays import Arrays, Float32, Int64, content_digest
from penchant.common.catalogue import Catalogue
from penchant.common.errors import BudgetExhausted, InvalidConfig, PrivacyRefused
from penchant.common.interactions import History, Interactions
from penchant.common.learners import newcomers
from penchant.common.learners.contract import Learner, State
from penchant.common.privacy import gaussian
from penchant.common.privacy.events import Gaussian, PoissonGaussian
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import DeviceNoise, PrivacyPlan, QuantileClip, SumSpec
from penchant.common.privacy.sums import Shapes
from penchant.common.streams import Streams
from penchant.common.wire import Order, Reply
from penchant.server.rounds import Progress, RoundRecord, Rounds

N = 6
ROSTER = (3, 1, 2)
SPEC = SumSpec(name="seen", rounds=4, clip_norm=1.0, noise_multiplier=2.0)
PLAN = PrivacyPlan(unit="user", n_users=N, delta=1e-5, sampling="none", cohort=N, sums=(SPEC,), max_participations=4)
EXACT = replace(PLAN, unit="none", sums=(replace(SPEC, noise_multiplier=0.0),))
OWN_ROUNDS = replace(PLAN, cohort=3, max_participations=2)  # each of the six in two rounds of four
COINS = replace(PLAN, sampling="poisson", cohort=3)


class Presence(Learner):
    """Says that somebody was there: 1 at the one item that each person has."""

    name = "presence"

    def init(self, streams: Streams) -> State:
        return {"seen": np.zeros(N, np.float32), "server/rounds": np.zeros((), np.int64)}

    def shapes(self, state: State) -> Shapes:
        return {"seen": (N,)}

    def _contribution(self, state: State, history: History, streams: Streams) -> Arrays:
        return {"seen": np.bincount(history.items, minlength=N).astype(np.float32)}

    def apply(self, state: State, noisy_sum: Arrays, divisor: float) -> State:
        self.divisor = divisor
        return {"seen": noisy_sum["seen"], "server/rounds": state["server/rounds"] + 1}

    def _scores(self, state: State, histories: Interactions) -> Float32:
        return np.tile(state["seen"], (histories.n_users, 1))

    def _adopted(self, name: str, state: State, place: Int64) -> np.ndarray[Any, Any]:
        values = state[name]
        return newcomers.grown(values, place, len(self.catalogue))[0] if values.ndim else values


LEARNER = Presence(Catalogue(ids=tuple("abcdef")))
PEOPLE = Interactions.of([[u] for u in range(N)], N)


def rounds(
    plan: PrivacyPlan = PLAN,
    *,
    ledger: Ledger | None = None,
    seed: int = 0,
    streams: Streams | None = None,
    progress: Progress | None = None,
    roster: Sequence[int] = ROSTER,
) -> Rounds:
    return Rounds(
        learner=LEARNER,
        settings={},
        plan=plan,
        roster=roster,
        ledger=ledger or Ledger("default", delta=1e-5),
        streams=streams or Streams(seed),
        progress=progress,
    )


def node(shard: int, plan: PrivacyPlan) -> Node:
    """An honest node whose people enrolled under this plan."""
    first = sum(ROSTER[:shard])
    return Node(PEOPLE.select(range(first, first + ROSTER[shard])), lambda *_: LEARNER, Streams(0), plan=plan)


def answer(shard: int, order: Order, here: Node | None = None) -> Reply:
    """What an honest node sends; a fresh one if none is given."""
    return Reply(
        node=shard,
        round=order.round,
        attempt=order.attempt,
        arrays=(here or node(shard, order.plan)).answer(order, {}),
    )


def play(run: Rounds, change: Callable[[list[Reply]], list[Reply]] = list) -> RoundRecord:
    """One round in which every node answers, its replies changed on the way."""
    return run.close(change([answer(shard, order) for shard, order in run.open().items()]))


def charges(ledger: Ledger) -> list[tuple[Any, ...]]:
    return [(e.round, e.attempt, e.event, e.plan, e.model) for e in ledger.entries if e.kind == "charge"]


def seen(run: Rounds) -> np.ndarray:
    return np.asarray(run.state["seen"])


# --------------------------------------------------------------------------------------------------------- honest


def test_each_drawn_user_is_counted_once_and_nobody_else() -> None:
    run = rounds(replace(EXACT, cohort=4))
    orders = run.open()
    drawn = [sum(ROSTER[:shard]) + u for shard, order in orders.items() for u in order.users]
    assert len(drawn) == 4
    run.close([answer(shard, order) for shard, order in orders.items()])
    np.testing.assert_array_equal(seen(run), np.bincount(drawn, minlength=N))
    np.testing.assert_array_equal(run.progress.participations, np.bincount(drawn, minlength=N))


def test_only_nodes_that_host_a_drawn_user_are_asked_and_for_their_own_only() -> None:
    run = rounds(replace(EXACT, cohort=1))
    hosts = set()
    for _ in range(4):
        ((shard, order),) = run.open().items()
        assert len(order.users) == 1
        assert 0 <= order.users[0] < ROSTER[shard]
        run.close([answer(shard, order)])
        hosts.add(shard)
    assert len(hosts) > 1


def test_a_run_ends_with_the_plan() -> None:
    for plan in (PLAN, EXACT):
        run = rounds(plan)
        for left in (4, 3, 2, 1):
            assert run.n_left == left
            play(run)
        assert run.n_left == 0
        assert [record.round for record in run.progress.records] == [1, 2, 3, 4]
        with pytest.raises(InvalidConfig, match="no round 5"):
            run.open()


def test_a_round_must_be_open_to_be_closed_and_is_closed_once() -> None:
    run = rounds()
    with pytest.raises(InvalidConfig, match="open"):
        run.close([])
    play(run)
    with pytest.raises(InvalidConfig, match="open"):
        run.close([])
    assert len(charges(run.ledger)) == 1


def test_a_record_tells_the_operator_what_happened() -> None:
    run = rounds()
    record = play(run, lambda replies: replies[1:])
    assert (record.round, record.attempt, record.sum, record.drawn, record.nodes) == (1, 0, "seen", 6, 3)
    assert (record.answered, record.refused) == (2, {})
    assert (record.bytes_down, record.bytes_up) == (6 * 4 * N, 6 * 4 * N)  # the server's own part is not sent
    assert record.seconds > 0


# -------------------------------------------------------------------------------------------------------- hostile


def first_as(**changes: Any) -> Callable[[list[Reply]], list[Reply]]:
    return lambda replies: [replace(replies[0], **changes), *replies[1:]]


def vector(*values: float, kind: Any = np.float32) -> dict[str, np.ndarray]:
    return {"seen": np.array(values, kind)}


LEFT_OUT = [
    ("malformed", first_as(arrays={})),
    ("malformed", first_as(arrays={"other": np.zeros(N, np.float32)})),
    ("malformed", first_as(arrays={**vector(*[0] * N), "extra": np.zeros(1, np.float32)})),
    ("malformed", first_as(arrays=vector(1, 1, 1))),
    ("malformed", first_as(arrays=vector(*[1] * N, kind=np.int64))),
    ("malformed", first_as(arrays=vector(1, 1, 1, math.nan, 0, 0))),
    ("malformed", first_as(arrays=vector(1, 1, 1, math.inf, 0, 0))),
    ("malformed", first_as(arrays=vector(1e200, 0, 0, 0, 0, 0, kind=np.float64))),
    ("error", first_as(arrays=None, failure="error")),
    ("wrong round", first_as(round=2)),
    ("wrong round", first_as(round=0)),
    ("wrong round", first_as(attempt=1)),
    ("not asked", first_as(node=-1)),
    ("not asked", first_as(node=99)),
]


@pytest.mark.parametrize(("reason", "change"), LEFT_OUT)
def test_a_bad_reply_is_counted_by_reason_and_changes_neither_noise_nor_divisor(
    reason: str, change: Callable[[list[Reply]], list[Reply]]
) -> None:
    without, with_bad = rounds(), rounds()
    play(without, lambda replies: replies[1:])
    record = play(with_bad, change)
    np.testing.assert_array_equal(seen(with_bad), seen(without))  # the same stream of noise, the same others
    assert dict(record.refused) == {reason: 1}
    assert record.answered == 2
    assert LEARNER.divisor == N
    assert charges(with_bad.ledger) == charges(without.ledger)
    full = rounds()
    play(full)
    assert np.abs(seen(full) - seen(without)).max() > 0.9  # the comparison sees one node more or less


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_second_reply_of_one_node_is_a_duplicate_and_counts_for_nothing(first: int) -> None:
    once, twice = rounds(), rounds()
    play(once)
    record = play(twice, lambda replies: [*replies, replies[first], replies[first]])
    np.testing.assert_array_equal(seen(twice), seen(once))
    assert dict(record.refused) == {"duplicate": 2}


def test_a_good_reply_after_a_malformed_one_of_the_same_node_still_counts() -> None:
    good, mended = rounds(), rounds()
    play(good)
    record = play(mended, lambda replies: [replace(replies[0], arrays={}), *replies])
    np.testing.assert_array_equal(seen(mended), seen(good))
    assert dict(record.refused) == {"malformed": 1}


def test_a_node_that_was_not_asked_this_round_is_left_out() -> None:
    run = rounds(replace(EXACT, cohort=1))
    ((shard, order),) = run.open().items()
    other = (shard + 1) % 3
    record = run.close([Reply(node=other, round=1, attempt=0, arrays=vector(*[1] * N)), answer(shard, order)])
    assert dict(record.refused) == {"not asked": 1}
    assert seen(run).sum() == 1


def test_a_node_says_no_more_than_its_enrolled_users_could() -> None:
    loud, honest = rounds(), rounds()
    play(honest)
    play(loud, lambda replies: [replies[0], replace(replies[1], arrays=vector(*[50] * N)), replies[2]])
    moved = np.linalg.norm(seen(loud).astype(np.float64) - seen(honest))
    step = math.sqrt(N) * 2.0 / 256  # of the noise's grid
    assert 0.1 < moved <= 2 + step  # one user, replaced; without the second clip it would move by over 100


replies = st.lists(
    st.tuples(st.integers(-1, 3), st.integers(0, 2), st.sampled_from(["good", "shape", "nan", "error", "large"])),
    max_size=12,
)


@settings(max_examples=60)
@given(sent=replies)
def test_no_list_of_replies_moves_the_release_further_than_the_users_of_its_nodes(sent: list[Any]) -> None:
    contents: dict[str, Any] = {
        "good": vector(*[0.1] * N),
        "shape": vector(1.0),
        "nan": vector(*[math.nan] * N),
        "error": None,
        "large": vector(*[1e30] * N),
    }
    silent, run = rounds(), rounds()
    for each in (silent, run):
        each.open()
    silent.close([])
    record = run.close(Reply(node=n, round=r, attempt=0, arrays=contents[what]) for n, r, what in sent)
    accepted = {n for n, r, what in sent if r == 1 and 0 <= n < 3 and what in ("good", "large")}
    assert record.answered == len(accepted)
    assert record.answered + sum(record.refused.values()) == len(sent)
    moved = np.linalg.norm(seen(run).astype(np.float64) - seen(silent))
    step = math.sqrt(N) * 2.0 / 256  # of the noise's grid
    assert moved <= sum(ROSTER[n] for n in accepted) + step
    assert (moved > 0.1) == bool(accepted)
    assert charges(run.ledger) == charges(silent.ledger)


# -------------------------------------------------------------------------------------------------------- charges


def test_a_round_that_nobody_answers_releases_noise_and_is_charged() -> None:
    run = rounds()
    record = play(run, lambda replies: [])
    assert record.answered == 0
    assert np.abs(seen(run)).min() > 0
    assert run.ledger.events == (Gaussian(noise_multiplier=2.0),)
    assert run.n_left == 3


def test_an_empty_cohort_is_an_ordinary_round() -> None:
    plan = replace(PLAN, sampling="poisson", cohort=1)
    run = next(run for seed in range(50) if not (run := rounds(plan, seed=seed)).open())
    record = run.close([])
    assert (record.drawn, record.nodes) == (0, 0)
    assert np.abs(seen(run)).min() > 0
    assert run.ledger.events == (PoissonGaussian(noise_multiplier=2.0, rate=1 / 6),)


def test_noise_differs_from_round_to_round() -> None:
    run = rounds()
    released = []
    for _ in range(4):
        play(run, lambda replies: [])
        released.append(seen(run))
    assert len({values.tobytes() for values in released}) == 4


@pytest.mark.parametrize("plan", [COINS, OWN_ROUNDS], ids=["coins", "own rounds"])
def test_a_round_run_again_is_charged_again_with_fresh_coins_and_fresh_noise(plan: PrivacyPlan) -> None:
    ledger = Ledger("default", delta=1e-5)
    first, again = rounds(plan, ledger=ledger), rounds(plan, ledger=ledger)  # as after a crash before the checkpoint
    drawn = [order.users for order in first.open().values()]
    first.close([])
    orders = again.open()
    if plan is COINS:  # of six: 1 seed in 64 would draw the same
        assert [order.users for order in orders.values()] != drawn
    else:  # whose rounds are their own is asked again in the same ones
        assert [order.users for order in orders.values()] == drawn
    assert {order.attempt for order in orders.values()} == {1}
    record = again.close([])
    assert record.attempt == 1
    assert [(e[0], e[1]) for e in charges(ledger)] == [(1, 0), (1, 1)]
    assert ledger.events == (plan.event(1), plan.event(1))
    if plan is OWN_ROUNDS:
        assert ledger.spent().epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(2) / 2, 1e-5), rel=1e-9)
    assert np.abs(seen(first) - seen(again)).min() > 1e-3  # equal noise would subtract to the difference of the sums
    same = rounds(plan)
    assert [order.users for order in same.open().values()] == drawn  # both follow from seed, round and try alone
    same.close([])
    np.testing.assert_array_equal(seen(same), seen(first))


@pytest.mark.parametrize("plan", [PLAN, OWN_ROUNDS, COINS], ids=["everybody", "own rounds", "coins"])
def test_a_round_run_again_makes_the_guarantee_worse_than_the_plans(plan: PrivacyPlan) -> None:
    ledger, planned = Ledger("default", delta=1e-5), plan.guarantee()
    lost, run = rounds(plan, ledger=ledger), rounds(plan, ledger=ledger)
    assert planned is not None
    play(lost, lambda replies: [])
    assert lost.guarantee() == planned  # a first try is what the plan knows of
    for _ in range(4):
        play(run, lambda replies: [])
    now, early = run.guarantee(), run.guarantee(1)
    assert now is not None
    assert early is not None
    assert planned.epsilon * 1.01 < now.epsilon
    assert replace(now, epsilon=planned.epsilon) == planned  # all else is as promised
    if plan.sampling == "none":
        times = plan.max_participations
        assert now.epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(times + 1) / 2, 1e-5), rel=1e-9)
        assert early.epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(2) / 2, 1e-5), rel=1e-9)
    if plan is PLAN:  # where everybody is in every sum, what was promised is what was charged
        assert now.epsilon == pytest.approx(ledger.spent().epsilon, rel=1e-9)


class Watched(Streams):
    """Writes down each key of noise that is asked for."""

    def __init__(self, root: int, log: list[str]) -> None:
        super().__init__(root)
        self.log = log

    def key(self, name: str, *numbers: int) -> bytes:
        self.log.append(name)
        return super().key(name, *numbers)


def test_a_charge_is_on_disk_before_its_noise_is_drawn_and_the_release_is_written_after(tmp_path: Path) -> None:
    log: list[str] = []
    ledger = Ledger("default", delta=1e-5, path=tmp_path / "ledger.sqlite", at=log.append)
    run = rounds(ledger=ledger, streams=Watched(0, log))
    log.clear()
    for _ in range(2):
        play(run)
    words = [word for word in log if word in ("charge:committed", "noise", "release:committed")]
    assert words == ["charge:committed", "noise", "release:committed"] * 2
    with Ledger.open(tmp_path / "ledger.sqlite") as again:
        assert again.entries == ledger.entries


def test_the_ledger_says_what_each_release_was_made_from_and_what_it_was() -> None:
    run = rounds()
    before = content_digest(run.state)
    play(run)
    charge, release = run.ledger.entries
    assert (charge.plan, charge.cap, charge.model) == (PLAN.digest, 4, before)
    assert (release.kind, release.content) == ("release", content_digest({"seen": seen(run)}))
    assert content_digest({"seen": seen(run) + 1}) != release.content


def test_a_charge_that_cannot_be_kept_stops_the_release() -> None:
    log: list[str] = []
    disk = {"full": True}

    def at(point: str) -> None:
        if disk["full"] and point == "charge:inserted":
            raise OSError("no space left")

    run = rounds(ledger=Ledger("default", delta=1e-5, at=at), streams=Watched(0, log))
    before = run.progress
    with pytest.raises(OSError, match="no space"):
        play(run)
    assert "noise" not in log
    assert run.progress is before
    assert (before.done, before.records, before.participations.sum()) == (0, [], 0)
    assert not seen(run).any()
    assert charges(run.ledger) == []
    disk["full"] = False
    assert {order.attempt for order in run.open().values()} == {0}  # nothing was written, so nothing was charged
    assert run.close([]).attempt == 0
    assert "noise" in log
    assert seen(run).all()


def test_a_spent_budget_stops_the_round_before_anybody_is_asked() -> None:
    budget = gaussian.epsilon_of(math.sqrt(2) / 2, 1e-5)  # two rounds at σ = 2
    run = rounds(ledger=Ledger("default", delta=1e-5, budget=budget))
    play(run)
    play(run)
    before = run.progress
    with pytest.raises(BudgetExhausted):
        run.open()
    assert run.progress is before
    assert len(charges(run.ledger)) == 2
    with pytest.raises(InvalidConfig, match="open"):  # nor can replies that come anyway be released
        run.close([])


def test_a_budget_spent_by_another_release_meanwhile_stops_this_one() -> None:
    budget = gaussian.epsilon_of(1 / 2, 1e-5)  # one round
    run = rounds(ledger=Ledger("default", delta=1e-5, budget=budget))
    run.open()
    run.ledger.charge(1, Gaussian(noise_multiplier=2.0))
    with pytest.raises(BudgetExhausted):
        run.close([])
    assert run.progress.done == 0
    assert not seen(run).any()


def test_where_nothing_is_promised_nothing_is_charged_and_the_sum_is_exact() -> None:
    run = rounds(EXACT)
    play(run)
    assert run.ledger.entries == ()
    np.testing.assert_array_equal(seen(run), np.ones(N))


# ----------------------------------------------------------------------------------------------------------- caps


@pytest.mark.parametrize("cap", [1, 2, 4])
def test_nobody_is_drawn_more_often_than_the_cap_and_the_cohort_shrinks_instead(cap: int) -> None:
    run = rounds(replace(EXACT, cohort=4, max_participations=cap))
    for _ in range(4):
        play(run)
    assert run.progress.participations.max() == cap
    assert sum(record.drawn for record in run.progress.records) == run.progress.participations.sum()
    if cap == 1:
        assert [record.drawn for record in run.progress.records] == [4, 2, 0, 0]


# Each of 400 in three rounds of twelve, and the same as cohorts of fixed size.
CROWD = replace(PLAN, n_users=400, cohort=100, sums=(replace(SPEC, rounds=12),), max_participations=3)
FIXED = replace(CROWD, unit="none", sums=(replace(SPEC, rounds=12, noise_multiplier=0.0),))


def cohorts(plan: PrivacyPlan, roster: Sequence[int]) -> list[set[int]]:
    """The users of each round, as rows of the whole roster."""
    run, first = rounds(plan, roster=roster), np.cumsum([0, *roster])
    out = []
    while run.n_left:
        out.append({int(first[shard]) + u for shard, order in run.open().items() for u in order.users})
        record = run.close([])
        assert record.drawn == len(out[-1])
        assert LEARNER.divisor == plan.cohort  # whoever was drawn
        assert run.progress.participations.max() <= plan.max_participations
    taken = np.bincount([u for users in out for u in users], minlength=plan.n_users)
    np.testing.assert_array_equal(run.progress.participations, taken)
    return out


def test_with_rounds_of_ones_own_the_cohort_varies_and_everybody_takes_part_exactly_k_times() -> None:
    drawn = cohorts(CROWD, (250, 1, 149))
    assert np.bincount([u for users in drawn for u in users], minlength=400).tolist() == [3] * 400
    sizes = [len(users) for users in drawn]
    assert sum(sizes) == 400 * 3
    spread = math.sqrt(400 * 0.25 * 0.75)  # Binomial(400, 3/12); 12 rounds stray 6 stddevs for 1 seed in 4e7
    assert all(abs(size - 100) < 6 * spread for size in sizes)
    assert len(set(sizes)) > 1
    uncapped = replace(FIXED, max_participations=12)
    assert {len(users) for users in cohorts(uncapped, (250, 1, 149))} == {100}  # what a fixed cohort looks like


def test_one_more_profile_leaves_the_rounds_of_everybody_else_as_they_were() -> None:
    drawn, more = cohorts(CROWD, (250, 150)), cohorts(replace(CROWD, n_users=401), (250, 151))
    assert [users - {400} for users in more] == drawn
    assert sum(400 in users for users in more) == 3
    drawn, more = cohorts(FIXED, (250, 150)), cohorts(replace(FIXED, n_users=401), (250, 151))
    assert [users - {400} for users in more] != drawn  # a fixed cohort has to push somebody out


def test_nodes_that_keep_count_never_refuse_a_round_of_ones_own() -> None:
    run, nodes = rounds(OWN_ROUNDS), [node(shard, OWN_ROUNDS) for shard in range(3)]
    while run.n_left:
        record = run.close([answer(shard, order, nodes[shard]) for shard, order in run.open().items()])
        assert (record.answered, record.refused) == (record.nodes, {})
    assert [count for here in nodes for count in here.participations] == [2] * N
    with pytest.raises(PrivacyRefused, match="cap"):  # the nodes would have noticed one more
        answer(0, next(iter(rounds(OWN_ROUNDS).open().values())), nodes[0])


def test_an_opened_round_that_is_never_closed_leaves_no_trace() -> None:
    run = rounds(replace(EXACT, cohort=2, max_participations=1))
    run.open()
    assert run.progress.participations.sum() == 0
    play(run)
    assert run.progress.participations.sum() == 2


# ------------------------------------------------------------------------------------------------ quantile clip


def test_a_bound_that_follows_a_quantile_travels_in_the_state_and_is_what_nodes_clip_to() -> None:
    rule = QuantileClip(quantile=0.5, noise_multiplier=1e-3, step=0.5, lowest=0.01)
    spec = replace(SPEC, rounds=12, clip_norm=0.02, noise_multiplier=1e-4, quantile=rule)
    plan = replace(PLAN, sums=(spec,), max_participations=12)
    run, bounds = rounds(plan), []
    hosts = {shard: node(shard, plan) for shard in range(3)}
    while run.n_left:
        state = dict(run.state)
        bound = spec.bound(state)
        replies = []
        for shard, order in run.open().items():
            sent = hosts[shard].answer(order, state)
            assert np.linalg.norm(sent["seen"]) <= ROSTER[shard] * bound
            replies.append(Reply(node=shard, round=order.round, attempt=0, arrays=sent))
        assert run.close(replies).refused == {}
        np.testing.assert_allclose(seen(run), bound, atol=0.01 * bound)  # one person each, clipped to it
        bounds.append(bound)
    growth = np.diff(np.log(bounds))
    np.testing.assert_allclose(growth, 0.25, atol=1e-3)  # all are above: exp(η γ) a round, towards their norm of 1
    assert "clip/seen" in LEARNER.released(run.state)  # devices read it there


# --------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_stopped_after_a_round_goes_on_as_if_it_never_stopped(stop: int) -> None:
    plan = replace(PLAN, cohort=3, max_participations=2)
    whole = rounds(plan)
    for _ in range(4):
        play(whole)
    part = rounds(plan)
    for _ in range(stop):
        play(part)
    rest = rounds(plan, ledger=part.ledger, progress=part.progress)
    while rest.n_left:
        play(rest)
    np.testing.assert_array_equal(seen(rest), seen(whole))
    assert charges(rest.ledger) == charges(whole.ledger)
    assert [r.round for r in rest.progress.records] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------- mismatch


@pytest.mark.parametrize("roster", [(3, 1), (3, 1, 3), ()])
def test_a_roster_of_other_people_than_the_plans_is_refused(roster: tuple[int, ...]) -> None:
    with pytest.raises(InvalidConfig, match="roster"):
        Rounds(
            learner=LEARNER,
            settings={},
            plan=PLAN,
            roster=roster,
            ledger=Ledger("default", delta=1e-5),
            streams=Streams(0),
        )


def test_a_ledger_of_another_population_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="population"):
        rounds(ledger=Ledger("others", delta=1e-5))


def test_a_plan_that_promises_noise_on_the_device_needs_a_learner_that_adds_it() -> None:
    device = DeviceNoise(clip_norm=0.5, noise_multiplier=2.0, rate=0.1, steps=8, divisor=16.0)
    with pytest.raises(InvalidConfig, match="noise on the device"):
        rounds(replace(EXACT, unit="interaction", device=device))


def test_two_servers_that_opened_the_same_try_do_not_share_its_noise() -> None:
    ledger = Ledger("default", delta=1e-5)
    both = [rounds(ledger=ledger), rounds(ledger=ledger)]
    for run in both:
        run.open()
    records = [run.close([]) for run in both]
    assert [record.attempt for record in records] == [0, 1]  # as the ledger charged them, not as they were opened
    assert np.abs(seen(both[0]) - seen(both[1])).min() > 1e-3


def test_a_budget_is_held_at_the_ledgers_own_delta() -> None:
    budget = 1.01 * gaussian.epsilon_of(1 / 2, 1e-5)
    assert rounds(ledger=Ledger("default", delta=1e-5, budget=budget)).open()
    with pytest.raises(BudgetExhausted):
        rounds(ledger=Ledger("default", delta=1e-9, budget=budget)).open()


def test_the_divisor_is_the_plans_whoever_is_drawn_and_answers() -> None:
    drawn, answered = set(), set()
    for seed in range(8):
        for left_out in range(4):
            run = rounds(COINS, seed=seed)
            record = run.close([answer(shard, order) for shard, order in run.open().items()][left_out:])
            drawn.add(record.drawn)
            answered.add(record.answered)
            assert LEARNER.divisor == 3
    assert len(drawn) > 2  # cohorts and answers that a divisor could have followed
    assert len(answered) > 2


def test_a_run_does_not_go_on_with_a_ledger_that_lacks_its_charges() -> None:
    part = rounds()
    play(part)
    play(part)
    assert rounds(ledger=part.ledger, progress=part.progress).n_left == 2
    with pytest.raises(PrivacyRefused, match="lacks charges"):
        rounds(progress=part.progress)
    once = Ledger("default", delta=1e-5)
    once.charge(2, Gaussian(noise_multiplier=2.0), plan=PLAN.digest, cap=4)
    with pytest.raises(PrivacyRefused, match="lacks charges"):
        rounds(ledger=once, progress=part.progress)


def test_a_ledger_that_counts_at_a_weaker_delta_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="delta"):
        rounds(ledger=Ledger("default", delta=0.01))
    rounds(ledger=Ledger("default", delta=1e-6))
