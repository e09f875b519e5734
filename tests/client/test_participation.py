"""A device takes part only when it may, says why not, sends nothing but what it wrote down, and stops when told to."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.client._conditions import Conditions, Policy, Refusal, promise
from penchant.client._outcomes import Outcome, Report
from penchant.client._participation import Pace, Participation, fleet
from penchant.client._transport import Answer, Content, Place, Refused, Sum, Task, new_node_key
from penchant.client.node import Node
from penchant.common.artifacts.bundle import App
from penchant.common.artifacts.sealing import RoundOpener
from penchant.common.artifacts.signing import Certificate, SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig, MissingExtra, NotEnrolled, RoundClosed, UnknownMechanism, Unreachable
from penchant.common.interactions import Interactions
from penchant.common.learners import registry
from penchant.common.learners.contract import Learner, State
from penchant.common.privacy import gaussian
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import DeviceNoise, PrivacyPlan, SumSpec
from penchant.common.streams import Streams
from penchant.common.wire import Order

N_ITEMS = 12
CATALOGUE = Catalogue(ids=tuple(f"i{i}" for i in range(N_ITEMS)))
SETTINGS = {"head": 6, "window": 3, "dims": 2}
MINE = Interactions.of([[0, 3, 5, 3, 8]], N_ITEMS)
PLAN = PrivacyPlan(
    unit="user",
    n_users=100,
    delta=1e-5,
    sampling="none",
    cohort=50,
    sums=(
        SumSpec(name="counts", rounds=2, clip_norm=1.0, noise_multiplier=2.0),
        SumSpec(name="matrix", rounds=4, clip_norm=1.0, noise_multiplier=1.0),
    ),
    max_participations=3,
    population="everybody",
)
NONE = replace(PLAN, unit="none", sums=(SumSpec(name="counts", rounds=6, clip_norm=1.0),))
OWN = replace(
    NONE,
    unit="interaction",
    device=DeviceNoise(clip_norm=0.5, noise_multiplier=2.0, rate=0.1, steps=8, divisor=16.0),
)
ROOT, RELEASE = SigningKey.generate(), SigningKey.generate()
NOW_MS = 1_700_000_000_000
OURS = "films/rounds"
APP = App(app_id="films", population="everybody", root=ROOT.public, fleet="localhost:1", publisher=OURS)
WILLING = Policy(consent=True, trust="server")
ALL = Conditions(idle=lambda: True, charging=lambda: True, unmetered=lambda: True)
PACE = Pace(poll_s=0.01, retry_s=0.01, longest_s=0.05, reply_s=5.0, heartbeat_s=0.05, refused_s=0.02)
STATE: State = {"popularity": np.zeros(N_ITEMS, np.float32)}


def learners(name: str, settings: Mapping[str, Any]) -> Learner:
    return registry.build(name, settings, CATALOGUE)


def certificate(serial: int = 1, root: SigningKey = ROOT, **changed: Any) -> str:
    made = Certificate(
        app_id="films", public_key=RELEASE.public, serial=serial, not_before_ms=NOW_MS - 10, not_after_ms=NOW_MS + 10
    )
    return replace(made, **changed).signed(root).to_bytes().decode()


def opener(round: int = 1, plan: PrivacyPlan = PLAN, key: SigningKey = RELEASE, attempt: int = 0) -> RoundOpener:
    return RoundOpener(key, app_id="films", population="everybody", plan=plan.digest, round=round, attempt=attempt)


def order(round: int = 1, plan: PrivacyPlan = PLAN, *, to: RoundOpener | None = None, **changed: Any) -> Order:
    key = "" if to is None else to.statement.to_bytes().decode()
    made = Order(
        round=round,
        attempt=0,
        plan=plan,
        learner="cooccurrence",
        settings=SETTINGS,
        users=(0,),
        round_key=key,
        certificate="" if to is None else certificate(),
    )
    return replace(made, **changed)


@dataclass
class Server:
    """A transport in memory, and what was called on it; `before` may raise, or wait, in any call.

    Attributes:
        tasks: what is asked, in turn; an order, or a task's kind.
        app: whose runs they are of.
    """

    tasks: list[Order | str] = field(default_factory=list)
    app: str = OURS
    before: Callable[[str], None] = lambda call: None
    calls: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def __call__(self, node_id: int | None) -> Server:
        return self

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.before(name)

    def join(self) -> int:
        self._called("join")
        return 7

    def pull(self) -> Task | None:
        self._called("pull")
        if not self.tasks:
            return None
        task = self.tasks.pop(0)
        if isinstance(task, Order):
            return Task(app=self.app, kind="train", handle=task)
        return Task(app=self.app, kind="enrol" if task == "enrol" else "unknown", handle=None)

    def fetch(self, task: Task) -> Content:
        self._called("fetch")
        return Content(order={} if task.handle is None else task.handle.to_flat(), state=STATE)

    def reply(self, task: Task, answer: Answer) -> None:
        self._called("reply")
        self.answers.append(answer)

    def heartbeat(self) -> None:
        self._called("heartbeat")

    def leave(self) -> None:
        self._called("leave")

    def close(self) -> None:
        self._called("close")

    @property
    def sums(self) -> list[Sum]:
        return [answer for answer in self.answers if isinstance(answer, Sum)]


def ledger(path: Path | None = None, budget: float | None = None) -> Ledger:
    return Ledger("everybody", delta=1e-5, budget=budget, path=path)


def device(server: Server, journal: list[Report] | None = None, **changed: Any) -> Participation:
    given: dict[str, Any] = {
        "app": APP,
        "place": 3,
        "plan": PLAN,
        "history": lambda: MINE,
        "learners": learners,
        "ledger": ledger(),
        "transport": server,
        "policy": WILLING,
        "conditions": ALL,
        "journal": [] if journal is None else journal,
        "pace": PACE,
        "now_ms": lambda: NOW_MS,
    }
    return Participation(**{**given, **changed})


def refused(server: Server, **changed: Any) -> Refusal | None:
    """Why a device takes no part; nothing of it was written down and nothing left."""
    journal: list[Report] = []
    outcome = device(server, journal, **changed).once(2.0)
    assert journal == []
    assert server.sums == []
    return outcome.refusal


# --------------------------------------------------------------------------------------------------------- takes part


def test_what_leaves_is_the_nodes_sum_sealed_and_is_written_down() -> None:
    to, journal = opener(), list[Report]()
    server = Server(["enrol", order(to=to)])
    part = device(server, journal)
    outcome = part.once(5.0)
    assert outcome.took_part
    assert str(outcome) == "took part in round 1"
    assert part.node_id == 7

    assert server.answers[0] == Place(3)
    (sent,) = server.sums
    assert isinstance(sent.content, bytes)
    assert (sent.round, sent.attempt) == (1, 0)
    expected = Node(MINE, learners, Streams(1), plan=PLAN).answer(order(), STATE)
    opened = to.open(sent.content)
    assert opened.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(opened[name], expected[name])

    (report,) = journal
    assert outcome.report == report
    assert (report.round, report.plan, report.bytes, report.sealed) == (1, PLAN.digest, len(sent.content), True)
    assert report.at_ms == NOW_MS
    assert report.trusted == ("noise", "sampling", "cohort", "that a repeated try is charged")
    assert "unit user" in report.guarantee
    assert "accountant GDP" in report.guarantee
    assert Report.from_record(report.to_record()) == report
    with pytest.raises(UnknownMechanism, match="update"):
        Report.from_record({**report.to_record(), "shape": 1})
    for values in expected.values():
        assert np.ascontiguousarray(values).tobytes() not in sent.content


def test_nobody_asking_is_no_refusal() -> None:
    server = Server()
    outcome = device(server).once(0.1)
    assert outcome == Outcome()
    assert str(outcome) == "nothing to do"
    assert server.calls[-2:] == ["leave", "close"]


# --------------------------------------------------------------------------------------------- may it, here and now


def no() -> bool:
    return False


def broken() -> bool:
    raise OSError


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"policy": Policy(trust="server")}, Refusal.NO_CONSENT),
        ({"policy": Policy(consent=True)}, Refusal.UNTRUSTED_SERVER),
        ({"plan": NONE}, Refusal.UNTRUSTED_SERVER),
        ({"conditions": replace(ALL, idle=no)}, Refusal.NOT_IDLE),
        ({"conditions": replace(ALL, charging=no)}, Refusal.NOT_CHARGING),
        ({"conditions": replace(ALL, unmetered=no)}, Refusal.METERED),
        ({"conditions": replace(ALL, in_window=no)}, Refusal.OUTSIDE_WINDOW),
        ({"conditions": replace(ALL, idle=broken)}, Refusal.NOT_IDLE),
        ({"conditions": Conditions()}, Refusal.NOT_IDLE),
        ({"policy": replace(WILLING, max_participations=0)}, Refusal.CAP_REACHED),
        ({"ledger": ledger(budget=0.1)}, Refusal.BUDGET_EXHAUSTED),
    ],
)
def test_a_device_that_may_not_asks_no_server(changed: dict[str, Any], why: Refusal) -> None:
    server = Server([order(to=opener())])
    assert device(server, **changed).unwilling() is why
    assert refused(server, **changed) is why
    assert server.calls == []


def test_what_the_policy_does_not_ask_for_need_not_hold() -> None:
    careless = replace(WILLING, idle=False, charging=False, unmetered=False)
    assert device(Server([order(to=opener())]), policy=careless, conditions=Conditions()).once(5.0).took_part


@pytest.mark.parametrize("name", ["idle", "charging", "unmetered", "in_window"])
def test_a_condition_that_ends_while_the_device_computes_keeps_the_answer_here(name: str) -> None:
    holds = [True]

    def history() -> Interactions:
        holds[0] = False
        return MINE

    server = Server([order(to=opener())])
    assert refused(server, history=history, conditions=replace(ALL, **{name: lambda: holds[0]})) is not None
    assert server.answers == [Refused()]


def test_own_device_is_enough_trust_only_where_the_device_adds_the_noise() -> None:
    unsure = Policy(consent=True, trust="own device")
    assert device(Server(), plan=OWN, policy=unsure).unwilling() is None
    assert device(Server(), plan=PLAN, policy=unsure).unwilling() is Refusal.UNTRUSTED_SERVER
    assert device(Server(), plan=NONE, policy=replace(unsure, trust="anybody")).unwilling() is None


def test_a_plans_epsilon_is_computed_here_and_what_is_trusted_is_told_apart() -> None:
    made = promise(PLAN)
    # three rounds at the least noise, σ = 1: μ = √3
    assert made.guarantee is not None
    assert made.guarantee.epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(3), 1e-5), rel=1e-6)
    assert "noise" in made.trusted
    assert "clip" in made.verified
    assert promise(OWN).trusted == ()
    assert "noise" in promise(OWN).verified
    assert promise(NONE).guarantee is None


def test_without_dp_accounting_a_sampled_plan_is_bounded_without_its_coins(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = replace(PLAN, sampling="poisson", max_participations=6)
    tight = promise(sampled).guarantee
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    made = promise(replace(sampled, cohort=49)).guarantee  # another one, as bounds are remembered
    assert tight is not None
    assert made is not None
    assert made.accountant == "GDP"
    assert made.epsilon > tight.epsilon
    two, four = 2 / 2.0**2, 4 / 1.0**2
    assert made.epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(two + four), 1e-5), rel=1e-6)


# ------------------------------------------------------------------------------------------------------ what is asked


def test_a_foreign_app_is_refused_before_its_content_is_fetched() -> None:
    server = Server([order(to=opener())], app="somebody/else")
    assert refused(server) is Refusal.FOREIGN_APP
    assert "fetch" not in server.calls
    assert server.answers == [Refused()]


OTHER = SigningKey.generate()


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("evaluate", Refusal.UNKNOWN_TASK),
        (order(plan=replace(PLAN, schedule=1), to=opener(plan=replace(PLAN, schedule=1))), Refusal.UNKNOWN_PLAN),
        (order(7, to=opener(7)), Refusal.UNKNOWN_PLAN),
        (order(to=opener(), users=(0, 1)), Refusal.UNKNOWN_TASK),
        (order(to=opener(), learner="unheard of"), Refusal.FAILED),
        (order(), Refusal.UNSEALED),
        (order(to=opener(), certificate=""), Refusal.UNTRUSTED_KEY),
        (order(to=opener(), round_key="{}"), Refusal.UNTRUSTED_KEY),
        (order(to=opener(), certificate=certificate(root=OTHER)), Refusal.UNTRUSTED_KEY),
        (order(to=opener(), certificate=certificate(app_id="books")), Refusal.UNTRUSTED_KEY),
        (order(to=opener(), certificate=certificate(not_before_ms=1, not_after_ms=2)), Refusal.UNTRUSTED_KEY),
        (order(to=opener(2)), Refusal.UNTRUSTED_KEY),
        (order(to=opener(key=OTHER)), Refusal.UNTRUSTED_KEY),
    ],
)
def test_what_was_not_agreed_to_is_refused_without_a_reason_to_the_server(task: Order | str, why: Refusal) -> None:
    server = Server([task])
    assert refused(server) is why
    assert server.answers == [Refused()]


def test_a_release_key_that_was_retired_signs_no_more_rounds() -> None:
    to, spent = opener(), ledger()
    newer = order(to=to, certificate=certificate(serial=5))
    part = device(Server([newer, order(2, to=opener(2))]), ledger=spent)
    assert part.once(5.0).took_part
    assert part.serial == 5
    assert part.once(5.0).refusal is Refusal.UNTRUSTED_KEY
    assert refused(Server([order(to=opener())]), serial=2) is Refusal.UNTRUSTED_KEY


def test_unsealed_answers_leave_only_where_the_policy_allows_it() -> None:
    server, journal = Server([order()]), list[Report]()
    assert device(server, journal, policy=replace(WILLING, sealed=False)).once(5.0).took_part
    assert not isinstance(server.sums[0].content, bytes)
    assert not journal[0].sealed
    assert journal[0].bytes == sum(v.nbytes for v in server.sums[0].content.values())


# ------------------------------------------------------------------------------------------------------ how much of it


def test_the_cap_holds_over_restarts_whatever_rounds_are_asked_for(tmp_path: Path) -> None:
    for round in (1, 1, 2):  # a round asked for again counts again
        with ledger(tmp_path / "l") as counted:
            assert device(Server([order(round, to=opener(round))]), ledger=counted).once(5.0).took_part
    with ledger(tmp_path / "l") as counted:
        assert refused(Server([order(2, to=opener(2))]), ledger=counted) is Refusal.CAP_REACHED


def test_who_was_in_all_their_rounds_answers_a_further_try_until_its_release_is_here(tmp_path: Path) -> None:
    def asked(round: int, attempt: int, *, released: int | None, plan: PrivacyPlan = PLAN) -> Refusal | None:
        with ledger(tmp_path / "l") as counted:
            task = order(round, plan, to=opener(round, attempt=attempt, plan=plan), attempt=attempt)
            part = device(Server([task]), ledger=counted, plan=plan, released=lambda: released)
            return part.once(2.0).refusal

    assert [asked(round, 0, released=round - 1) for round in (1, 2, 3)] == [None] * 3  # the cap is 3
    assert asked(3, 1, released=2) is None  # the server was killed before it released round 3
    assert asked(2, 4, released=2) is None
    assert asked(4, 0, released=2) is Refusal.CAP_REACHED  # another round
    assert asked(3, 1, released=2) is Refusal.CAP_REACHED  # the same try
    assert asked(3, 2, released=3) is Refusal.CAP_REACHED  # released: nobody has a reason to ask
    assert asked(3, 2, released=None) is Refusal.CAP_REACHED
    with ledger(tmp_path / "l") as counted:
        assert counted.participations(0, PLAN.digest) == 3


def test_the_budget_counts_rounds_of_every_plan_and_refuses_what_it_cannot_know() -> None:
    # one round at σ = 2, and the next may be at σ = 1: μ² = 1/4 + 1. A second at σ = 2 leaves no room for it.
    spent = ledger(budget=gaussian.epsilon_of(math.sqrt(1.25), 1e-5))
    before = replace(PLAN, schedule=9)
    assert device(Server([order(plan=before, to=opener(plan=before))]), plan=before, ledger=spent).once(5.0).took_part
    after = device(Server([order(to=opener())]), ledger=spent, earlier=[before])
    assert after.once(5.0).took_part
    assert after.unwilling() is Refusal.BUDGET_EXHAUSTED

    roomy = ledger(budget=100.0)
    assert device(Server([order(plan=before, to=opener(plan=before))]), plan=before, ledger=roomy).once(5.0).took_part
    assert device(Server(), ledger=roomy, earlier=[before]).unwilling() is None
    assert device(Server(), ledger=roomy).unwilling() is Refusal.BUDGET_EXHAUSTED  # what did that one cost?


def test_nothing_leaves_that_the_journal_cannot_keep() -> None:
    class Full(list[Report]):
        def append(self, report: Report, /) -> None:
            raise OSError("disk full")

    server = Server([order(to=opener())])
    assert device(server, Full()).once(5.0).refusal is Refusal.FAILED
    assert server.answers == [Refused()]


def test_rounds_are_sat_out_between_two() -> None:
    rarely, spent = replace(WILLING, rounds_apart=2), ledger()
    assert device(Server([order(1, to=opener(1))]), policy=rarely, ledger=spent).once(5.0).took_part
    assert refused(Server([order(3, to=opener(3))]), policy=rarely, ledger=spent) is Refusal.OUTSIDE_WINDOW
    assert device(Server([order(4, to=opener(4))]), policy=rarely, ledger=spent).once(5.0).took_part


# -------------------------------------------------------------------------------------------- stopping, within a second


@dataclass
class Stuck:
    """Waits in one call of a server until the test is over, as on a dead line."""

    where: str
    reached: threading.Event = field(default_factory=threading.Event)
    free: threading.Event = field(default_factory=threading.Event)

    def __call__(self, call: str) -> None:
        if call == self.where:
            self.reached.set()
            self.free.wait(10)


@pytest.mark.parametrize("where", ["join", "pull", "fetch", "history"])
@pytest.mark.parametrize("how", ["cancel", "stop", "withdraw"])
def test_whatever_it_waits_for_it_stops_within_a_second_and_nothing_leaves(where: str, how: str) -> None:
    stuck, journal, outcomes = Stuck(where), list[Report](), list[Outcome]()
    server = Server([order(to=opener())], before=stuck)

    def history() -> Interactions:
        stuck("history")
        return MINE

    part = device(server, journal, history=history)
    caller = threading.Thread(target=lambda: outcomes.append(part.once(30.0)))
    caller.start()
    assert stuck.reached.wait(5)
    began = time.monotonic()
    if how == "withdraw":
        part.policy = replace(part.policy, consent=False)
    elif how == "cancel":
        part.cancel()
    else:
        part.stop(wait_s=0.2)
    caller.join(1.0)
    assert time.monotonic() - began < 1.0
    assert [outcome.refusal for outcome in outcomes] == [Refusal.CANCELLED]
    assert part.once(1.0).refusal is (Refusal.BUSY)  # until the line gives up
    stuck.free.set()
    assert part.stop(5.0)
    assert server.sums == []
    assert journal == []


def test_an_answer_that_was_on_its_way_when_it_was_cancelled_is_told() -> None:
    stuck, journal, outcomes = Stuck("reply"), list[Report](), list[Outcome]()
    server = Server([order(to=opener())], before=stuck)
    part = device(server, journal)
    caller = threading.Thread(target=lambda: outcomes.append(part.once(30.0)))
    caller.start()
    assert stuck.reached.wait(5)
    assert len(journal) == 1
    part.cancel()
    stuck.free.set()
    caller.join(2)
    assert [str(outcome) for outcome in outcomes] == ["took part in round 1"]


def test_a_deadline_that_passes_at_work_is_told_apart_from_one_that_passes_idle() -> None:
    stuck = Stuck("fetch")
    part = device(Server([order(to=opener())], before=stuck))
    began = time.monotonic()
    assert part.once(0.2).refusal is Refusal.OUT_OF_TIME
    assert time.monotonic() - began < 1.0
    stuck.free.set()
    assert part.stop(5.0)


# ----------------------------------------------------------------------------------------------------------- networks


@dataclass
class Clock:
    """A time that passes only where it is waited for."""

    now: float = 0.0
    waits: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return event.is_set()


def test_each_wait_is_twice_the_last_up_to_the_longest_and_stretched_at_random() -> None:
    clock, left = Clock(), [6]
    stretches = iter([0.5, 1.5, 1.0, 1.0, 1.0, 1.5])

    def fails(call: str) -> None:
        if call == "pull" and left[0]:
            left[0] -= 1
            raise Unreachable("the server answered 500")

    server = Server([order(to=opener())], before=fails)
    pace = Pace(retry_s=1.0, longest_s=8.0)
    part = device(server, pace=pace, now=clock, wait=clock.wait, stretch=lambda: next(stretches))
    assert part.once(60.0).took_part
    assert clock.waits == [0.5, 3.0, 4.0, 8.0, 8.0, 12.0]


def test_a_server_that_stays_away_is_unreachable_once_the_deadline_is_over() -> None:
    clock = Clock()

    def fails(call: str) -> None:
        if call == "join":
            raise Unreachable("no answer")

    outcome = device(Server(before=fails), now=clock, wait=clock.wait).once(30.0)
    assert outcome.refusal is Refusal.UNREACHABLE
    assert outcome.detail == "no answer"
    assert clock.now == 30.0


def test_an_answer_is_delivered_once_the_server_is_back() -> None:
    left = [3]

    def fails(call: str) -> None:
        if call == "reply" and left[0]:
            left[0] -= 1
            raise Unreachable("no answer")

    server, journal = Server([order(to=opener())], before=fails), list[Report]()
    assert device(server, journal).once(5.0).took_part
    assert len(server.sums) == 1
    assert len(journal) == 1


def test_an_answer_that_cannot_be_delivered_is_given_up_and_stays_in_the_journal() -> None:
    def fails(call: str) -> None:
        if call == "reply":
            raise Unreachable("no answer")

    server, journal = Server([order(to=opener())], before=fails), list[Report]()
    outcome = device(server, journal, pace=replace(PACE, reply_s=0.1)).once(5.0)
    assert outcome.refusal is Refusal.UNREACHABLE
    assert len(journal) == 1  # the server may have it all the same


def test_a_device_that_waits_for_a_server_in_vain_stops_asking_once_it_may_not() -> None:
    charging = [True]

    def fails(call: str) -> None:
        if call == "join":
            charging[0] = len(server.calls) < 3
            raise Unreachable("no answer")

    server = Server(before=fails)
    part = device(server, conditions=replace(ALL, charging=lambda: charging[0]))
    assert part.once(5.0).refusal is Refusal.NOT_CHARGING
    assert server.calls.count("join") == 3


def test_the_background_tells_why_it_reaches_no_server() -> None:
    away = [True]

    def fails(call: str) -> None:
        if call == "join" and away[0]:
            raise Unreachable("the server answered 500")

    part = device(Server(before=fails))
    assert part.start()
    until(lambda: part.trouble == "the server answered 500")
    away[0] = False
    until(lambda: part.trouble == "")
    assert part.stop()


def test_a_server_that_does_not_know_the_device_is_told_apart() -> None:
    def unknown(call: str) -> None:
        if call == "join":
            raise NotEnrolled("enrol it")

    assert refused(Server(before=unknown)) is Refusal.NOT_ENROLLED


def test_a_round_that_closed_is_left_for_the_next_one() -> None:
    closed = [True]

    def once(call: str) -> None:
        if call == "fetch" and closed.pop(0) if closed else False:
            raise RoundClosed("over")

    server = Server([order(1, to=opener(1)), order(2, to=opener(2))], before=once)
    outcome = device(server).once(5.0)
    assert outcome.report is not None
    assert outcome.report.round == 2


def test_signs_of_life_go_out_while_it_waits_and_while_it_computes() -> None:
    server = Server()
    device(server).once(0.3)
    assert "heartbeat" in server.calls

    def slow() -> Interactions:
        time.sleep(0.3)
        return MINE

    server = Server([order(to=opener())])
    assert device(server, history=slow).once(5.0).took_part
    assert "heartbeat" in server.calls


# --------------------------------------------------------------------------------------------------- in the background


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_background_serves_round_after_round_until_it_is_stopped() -> None:
    outcomes: list[Outcome] = []
    server = Server([order(1, to=opener(1)), order(2, to=opener(2))])
    part = device(server, on_outcome=outcomes.append)
    assert part.start()
    assert not part.start()
    assert part.once(1.0).refusal is Refusal.BUSY
    until(lambda: len(server.sums) == 2)
    part.cancel()  # only what is under way
    server.tasks.append(order(3, to=opener(3)))
    until(lambda: len(server.sums) == 3)
    assert part.stop()
    assert part.stop()
    assert [str(o) for o in outcomes if o.took_part] == [f"took part in round {n}" for n in (1, 2, 3)]
    assert server.calls[-2:] == ["leave", "close"]
    assert part.start()
    assert part.stop()


def test_the_background_leaves_while_it_may_not_and_comes_back_when_it_may() -> None:
    charging = [False]
    server = Server([order(to=opener())])
    part = device(server, conditions=replace(ALL, charging=lambda: charging[0]))
    assert part.start()
    time.sleep(0.1)
    assert "join" not in server.calls
    charging[0] = True
    until(lambda: len(server.sums) == 1)
    charging[0] = False
    until(lambda: server.calls[-1] == "leave")
    assert part.stop()


def test_a_foreign_task_does_not_keep_the_background_from_ours() -> None:
    server = Server(["evaluate", order(to=opener())])
    part = device(server, pace=replace(PACE, refused_s=60.0))
    assert part.start()
    until(lambda: len(server.sums) == 1)
    assert part.stop()


# -------------------------------------------------------------------------------------------------------------- edges


def test_parts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="one population"):
        device(Server(), ledger=Ledger("others", delta=1e-5))
    with pytest.raises(InvalidConfig, match="roster"):
        device(Server(), place=-1)
    with pytest.raises(InvalidConfig, match="trust"):
        Policy(trust="nobody")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InvalidConfig, match="rounds_apart"):
        Policy(rounds_apart=-1)


def test_without_flower_the_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "penchant.client._flower", raising=False)
    monkeypatch.setitem(sys.modules, "flwr", None)
    for name in [name for name in sys.modules if name.startswith("flwr.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"penchant\[participate\]"):
        fleet(APP, new_node_key())
    with pytest.raises(InvalidConfig, match="no fleet"):
        fleet(replace(APP, fleet=""), new_node_key())
