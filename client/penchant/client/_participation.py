"""Taking part in rounds: whether this device may, now; what it computes; what it tells of it afterwards.

    conditions hold? ──► join, pull ──► an app and plan we agreed to? ──► compute, clip, charge ──► seal
        ──► conditions still hold? ──► write down what leaves ──► reply

One thread does all of it, in the app's process. Every "no" has a reason (`Refusal`), which stays here: the server hears
"refused", or nothing, because why may depend on what the person did. The first "no" ends it:

- *Whether.* What the person agreed to and what the app says of the moment (`Conditions`) is asked before any work is
  pulled, and again before an answer leaves. What the app cannot tell counts as a no.
- *What.* Only runs of the app's own publisher, only the plan enrolled under, only the learners that are installed. No
  code comes from the network.
- *How much.* The plan's clip, cap and the device's budget are enforced here (`node.py`, `ledger.py`), and ε is computed
  again from the plan. With unit "user" the noise, the sampler and the cohort are the server's: `Report.trusted` says
  so, and who set trust to "own device" is never in such a round.
- *To whom.* The answer is sealed to a key of this round that the app's root key vouches for (`sealing.py`).

Caps and windows count the server's rounds, never this device's clock.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from penchant.client._conditions import ME, Conditions, Policy, Refusal, no_moment, no_room, promise
from penchant.client._outcomes import Journal, Outcome, Report
from penchant.client._training import TookTooLong, TooLittleMemory, Trainer
from penchant.client._transport import Content, Place, Refused, Sum, Task, Transport
from penchant.client.node import Learners, Node
from penchant.common.arrays import Arrays
from penchant.common.artifacts.bundle import App
from penchant.common.artifacts.sealing import RoundKey, check_round_key, seal
from penchant.common.artifacts.signing import Certificate, Envelope
from penchant.common.errors import (
    BudgetExhausted,
    InvalidConfig,
    MalformedArtifact,
    MissingExtra,
    NotEnrolled,
    PenchantError,
    PrivacyRefused,
    RoundClosed,
    Unreachable,
    UntrustedArtifact,
)
from penchant.common.interactions import Interactions
from penchant.common.learners.contract import State
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan
from penchant.common.streams import Streams
from penchant.common.wire import Order

log = logging.getLogger("penchant.client")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often things are tried, in seconds; none of it changes what leaves.

    Attributes:
        poll_s: between two questions for work.
        retry_s, longest_s: before the second try of something that failed; it doubles up to the longest. Each wait is
            stretched by a factor in [½, 1½] drawn anew, so that devices do not come back all at once.
        reply_s: how long an answer that cannot be delivered is tried again.
        heartbeat_s: between two signs of life.
        refused_s: before the background asks again whether it may.
    """

    poll_s: float = 3.0
    retry_s: float = 1.0
    longest_s: float = 300.0
    reply_s: float = 120.0
    heartbeat_s: float = 24.0
    refused_s: float = 60.0


Connect = Callable[[int | None], Transport]
"""Makes the line to a server, for a device that had this number there before, if it had any."""


def fleet(app: App, key: bytes) -> Connect:
    """What makes the line to the app's Flower server, with TLS checked against the bundle's CA.

    Args:
        key: this device's, as `new_node_key` made it.

    Raises:
        InvalidConfig: the app names no such server.
        MissingExtra: flwr is not installed.
    """
    if not app.fleet:
        raise InvalidConfig("this app's bundle names no fleet: its devices take part in no rounds")
    try:
        from penchant.client._flower import Fleet
    except ModuleNotFoundError as error:
        raise MissingExtra("participate", str(error.name)) from None
    return lambda node_id: Fleet(app.fleet, key, ca=app.ca, node_id=node_id)


class _Stopped(Exception):
    """This try is over: cancelled, or out of time."""


class _Refused(Exception):
    def __init__(self, why: Refusal, detail: str = "") -> None:
        super().__init__(detail)
        self.outcome = Outcome(refusal=why, detail=detail)


class _Turn:
    """One try: until when, and whether it was cancelled. Nothing leaves once it was."""

    def __init__(self, until: float, wait: Callable[[threading.Event, float], bool], now: Callable[[], float]) -> None:
        self.until, self._wait, self._now = until, wait, now
        self._cancelled = threading.Event()
        self.at_work = False  # a task is at hand
        self.trouble = ""  # why the last call failed, if it did
        self.over = False

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def left_s(self) -> float:
        return self.until - self._now()

    def check(self) -> None:
        if self.cancelled or self.left_s <= 0:
            raise _Stopped

    def wait(self, seconds: float) -> None:
        self.check()
        self._wait(self._cancelled, min(seconds, self.left_s))
        self.check()


class Participation:
    """This device's part in the rounds of one population: once, or from a thread of its own.

    For whoever embeds it (`Client.sync` and the app's background):

        part = Participation(app=bundle.app, place=place, plan=plan, history=history, learners=learners,
                             ledger=ledger, transport=fleet(bundle.app, key), policy=policy, conditions=conditions,
                             journal=journal, serial=seen.serial, node_id=node_id)
        part.once(deadline_s=60)           # waits for a round; says what happened, or why not
        part.start(); ...; part.stop()     # or in the background, as long as the app runs
        part.policy = replace(part.policy, consent=False)     # withdrawn: within a second nothing leaves any more

    Every method may be called from any thread, and none raises for what a server, a network or a moment does: that is
    an `Outcome`. All computing and all network is on one daemon thread, with another beside it for signs of life while
    a model trains.

    Args:
        app: of the bundle: whose runs are served, and which root key vouches for the rounds' keys.
        place: this device's in the roster, as enrolment gave it.
        plan: the one enrolled under, from a signed manifest. Another plan is another `Participation`, with the same
            ledger and journal.
        earlier: plans that this device was enrolled under before. With unit "user", a budget needs them all.
        history: this person's interactions, as a population of one; asked for when a round is at hand.
        learners: builds the learner that an order names, over the catalogue at hand (`registry.build`).
        trainer: where learners that train with PyTorch are computed; None computes all in the app's process.
        ledger: of this device, in a file, made with the person's budget; it counts how often they took part.
        transport: makes the line to the server; see `fleet`. Called on the thread that uses it.
        node_id: as the attribute of this name said in an earlier process. It spares a minute after a crash.
        journal: where reports of what left are kept.
        serial: highest of a release key's certificate that this device has seen (`Seen.serial`).
        released: rounds of the plan that this device has a release of; a device that was in all of its rounds waits for
            further tries at the later ones. None where they cannot come.
        streams: for noise that a learner adds here; seeded only in tests.
        on_outcome: told, on the participation's thread, how each try of the background ended.

    Raises:
        InvalidConfig: app, plan and ledger are not of one population, or a place below 0.
    """

    def __init__(
        self,
        *,
        app: App,
        place: int,
        plan: PrivacyPlan,
        history: Callable[[], Interactions],
        learners: Learners,
        ledger: Ledger,
        transport: Connect,
        policy: Policy,
        conditions: Conditions,
        journal: Journal,
        earlier: Sequence[PrivacyPlan] = (),
        trainer: Trainer | None = None,
        serial: int = 0,
        released: Callable[[], int | None] = lambda: None,
        node_id: int | None = None,
        pace: Pace | None = None,
        streams: Streams | None = None,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        now: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
        stretch: Callable[[], float] = lambda: random.uniform(0.5, 1.5),
    ) -> None:
        if not app.population == plan.population == ledger.population:
            raise InvalidConfig("the app, the plan and the ledger of a participation are of one population")
        if place < 0:
            raise InvalidConfig(f"a place in the roster is a number ≥ 0, not {place}")
        self._app, self._place, self._plan, self._ledger = app, place, plan, ledger
        self._plans = {one.digest: one for one in (plan, *earlier)}
        self._history, self._learners, self._make = history, learners, transport
        self._trainer = trainer
        self._policy, self._conditions, self._journal = policy, conditions, journal
        self._pace, self._streams = pace or Pace(), streams or Streams.from_os()
        self._on_outcome, self._now_ms = on_outcome, now_ms
        self._now, self._wait, self._stretch = now, wait, stretch
        self.promise = promise(plan)
        self.serial, self.node_id, self._released = serial, node_id, released
        self._lock = threading.Lock()  # whoever cancels holds it, and so does what writes a report down
        self._turn: _Turn | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    # what the app calls; beside these, `promise` is what the plan promises, and `serial` and `node_id` are to be stored

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        """From now on; what is under way is cancelled, and the background goes on under the new one."""
        with self._lock:
            self._policy = policy
        self.cancel()

    def unwilling(self) -> Refusal | None:
        """Why this device would take no part now; None where it would. It asks the conditions, and no server."""
        return self._no_moment() or self._no_room()

    @property
    def trouble(self) -> str:
        """Why the server cannot be reached just now; "" where it can, or nobody tries."""
        turn = self._turn
        return "" if turn is None or not self._busy() else turn.trouble

    def once(self, deadline_s: float = 60.0) -> Outcome:
        """Takes part in the next round that asks within so many seconds, and says what happened.

        It returns within half a second of the deadline, or of `cancel` or `stop`. Whatever it returns, the journal has
        what left.
        """
        answer: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

        def work() -> None:
            with self._line() as line:
                outcome = self._try(line, turn)
                turn.over = True
                answer.put(outcome)

        before, thread = self._turn, self._thread
        if before is not None and before.over and thread is not None:
            thread.join(1.0)  # the last try may still be saying goodbye
        with self._lock:
            if self._busy():
                return Outcome(refusal=Refusal.BUSY)
            turn = self._turn = self._new_turn(deadline_s)
            self._run(work)
        until = time.monotonic() + deadline_s + 0.2
        while time.monotonic() < until and not turn.cancelled:
            with suppress(queue.Empty):
                return answer.get(timeout=0.05)
        given_up = Outcome(refusal=Refusal.CANCELLED) if turn.cancelled else _late(turn)
        turn.cancel()
        with suppress(queue.Empty):
            if (outcome := answer.get(timeout=0.3)).took_part:  # it was on its way
                return outcome
        return given_up

    def start(self) -> bool:
        """Takes part in the background, in every round it may, until `stop`; whether it began (not where it is busy).

        Nothing happens between rounds but a question every few seconds; while a condition does not hold, not even
        that.
        """
        with self._lock:
            if self._busy():
                return False
            self._stopping.clear()
            self._run(self._forever)
        return True

    def cancel(self) -> None:
        """Gives up what is under way; the background goes on with the next round.

        It returns at once, and nothing is written to the journal after it, so nothing begins to leave. What is in the
        journal already may still be on its way.
        """
        with self._lock:
            if self._turn is not None:
                self._turn.cancel()

    def stop(self, wait_s: float = 1.0) -> bool:
        """Gives up what is under way and ends the background; whether its thread has ended after so many seconds.

        A thread that still computes or waits for a server ends by itself after that, and sends nothing.
        """
        self._stopping.set()
        self.cancel()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(wait_s)
        return not thread.is_alive()

    # the thread

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, name="penchant-rounds", daemon=True)
        self._thread.start()

    def _new_turn(self, deadline_s: float) -> _Turn:
        return _Turn(self._now() + deadline_s, self._wait, self._now)

    def _forever(self) -> None:
        with self._line() as line:
            while True:
                with self._lock:  # `stop` sets its flag before it takes the lock to cancel
                    if self._stopping.is_set():
                        return
                    turn = self._turn = self._new_turn(math.inf)
                outcome = self._try(line, turn)
                try:
                    self._on_outcome(outcome)
                except Exception as error:
                    log.warning("the app's on_outcome failed: %s", type(error).__name__)
                if outcome.took_part or outcome.refusal is Refusal.CANCELLED:
                    continue
                if outcome.refusal not in _TASKS:
                    line.leave()  # nobody waits for a device that may not
                pause = self._pace.poll_s if outcome.refusal in _TASKS else self._pace.refused_s
                with suppress(_Stopped):
                    turn.wait(pause * self._stretch())

    @contextmanager
    def _line(self) -> Iterator[_Line]:
        line = _Line(lambda: self._make(self.node_id))
        try:
            yield line
        finally:
            line.close()

    def _try(self, line: _Line, turn: _Turn) -> Outcome:
        try:
            return Outcome(report=self._round(line, turn))
        except _Stopped:
            return Outcome(refusal=Refusal.CANCELLED) if turn.cancelled else _late(turn)
        except _Refused as refused:
            return refused.outcome
        except Unreachable as error:
            return Outcome(refusal=Refusal.UNREACHABLE, detail=str(error))
        except NotEnrolled as error:
            return Outcome(refusal=Refusal.NOT_ENROLLED, detail=str(error))
        except PenchantError as error:  # the words of ours name no person and no item
            return Outcome(refusal=Refusal.FAILED, detail=str(error))
        except Exception as error:
            return Outcome(refusal=Refusal.FAILED, detail=type(error).__name__)

    def _round(self, line: _Line, turn: _Turn) -> Report:
        self._ask(self.unwilling())
        self.node_id = self._patiently(turn, lambda: line.there.join(), self._no_moment)
        heard = self._now()
        while True:
            turn.at_work = False
            self._ask(self._no_moment())
            try:
                task = self._patiently(turn, lambda: line.there.pull(), self._no_moment)
                if task is not None:
                    turn.at_work = True
                    if (report := self._serve(line.there, turn, task)) is not None:
                        return report
                    continue
            except RoundClosed:
                turn.at_work = False
            if self._now() - heard >= self._pace.heartbeat_s:
                self._patiently(turn, lambda: line.there.heartbeat(), self._no_moment)
                heard = self._now()
            turn.wait(self._pace.poll_s)

    def _serve(self, line: Transport, turn: _Turn, task: Task) -> Report | None:
        """Answers one task; what left in a round, or None where it was no round."""
        try:
            if task.app != self._app.publisher:
                raise _Refused(Refusal.FOREIGN_APP)
            if task.kind == "unknown":
                raise _Refused(Refusal.UNKNOWN_TASK)
            content = self._patiently(turn, lambda: line.fetch(task))
            if task.kind == "train":
                return self._take_part(line, turn, task, content)
            place = Place(self._place)
            self._patiently(turn, lambda: line.reply(task, place))
            return None
        except (_Stopped, RoundClosed, Unreachable, NotEnrolled):
            raise
        except Exception:
            with suppress(PenchantError):  # so that the round need not wait for us
                line.reply(task, Refused())
            raise

    def _take_part(self, line: Transport, turn: _Turn, task: Task, content: Content) -> Report:
        order = self._order(content)
        to = self._round_key(order)
        self._ask(self._no_moment())
        self._ask(self._no_room(order))
        turn.check()
        try:
            with self._beating(line):
                if beside := self._trainer is not None and self._trainer.takes(order.learner):
                    total = self._trained(turn, order, content.state)
                else:
                    node = Node(self._history(), self._learners, self._streams, plan=self._plan, ledger=self._ledger)
                    total = node.answer(order, content.state)
        except TookTooLong:
            raise _Refused(Refusal.TRAINING_TOO_LONG) from None
        except TooLittleMemory:
            raise _Refused(Refusal.OUT_OF_MEMORY) from None
        except BudgetExhausted as error:
            raise _Refused(Refusal.BUDGET_EXHAUSTED, str(error)) from None
        except PrivacyRefused as error:
            raise _Refused(Refusal.UNKNOWN_PLAN, str(error)) from None
        answer = Sum(
            round=order.round, attempt=order.attempt, content=total if to is None else seal(total, to[0], to[1])
        )
        self._ask(self._no_moment())
        report = Report(
            population=self._plan.population,
            round=order.round,
            attempt=order.attempt,
            plan=self._plan.digest,
            bytes=answer.size_bytes,
            sealed=to is not None,
            guarantee="" if self.promise.guarantee is None else str(self.promise.guarantee),
            verified=self.promise.verified,
            trusted=self.promise.trusted,
            at_ms=self._now_ms(),
        )
        with self._lock:
            turn.check()
            if beside:
                self._ask(self._no_room(order))
                self._charge(order)
            self._journal.append(report)
        self._patiently(turn, lambda: line.reply(task, answer), at_most_s=self._pace.reply_s)
        return report

    def _trained(self, turn: _Turn, order: Order, state: State) -> Arrays:
        """What a worker computed. It is charged before it leaves, and not before.

        A training that the person or the app gave up is not charged: that tells nothing of the history. One that met a
        bound, failed or outlived the deadline may tell something, by the silence that the server hears. Where the
        server is whom the device's noise holds it from, that is charged as an answer is, or a server could go on asking
        with weights under which some histories fail.
        """
        assert self._trainer is not None
        taken = self._ledger.participations(ME, self._plan.digest)
        if self._ledger.is_further(ME, self._plan.digest, order.round, order.attempt):
            taken -= 1  # a further try at a round is no further participation
        try:
            return self._trainer.answer(order, state, self._history(), taken=taken, look=turn.check)
        except (PrivacyRefused, InvalidConfig, MissingExtra):  # before it looked at a history
            raise
        except Exception:
            if self._plan.device is not None and not (turn.cancelled and turn.left_s > 0):
                self._charge(order)
            raise

    def _no_room(self, order: Order | None = None) -> Refusal | None:
        asked = None if order is None else (order.round, order.attempt)
        released = self._released()
        return no_room(self._plan, self._policy, self._ledger, self._plans, asked=asked, released=released)

    def _charge(self, order: Order) -> None:
        plan = self._plan
        try:
            self._ledger.participate(
                ME, order.round, order.attempt, plan.device_event(), plan=plan.digest, cap=plan.max_participations
            )
        except BudgetExhausted as error:
            raise _Refused(Refusal.BUDGET_EXHAUSTED, str(error)) from None
        except PrivacyRefused as error:
            raise _Refused(Refusal.CAP_REACHED, str(error)) from None

    @contextmanager
    def _beating(self, line: Transport) -> Iterator[None]:
        """Signs of life from a thread beside, while this one computes."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self._pace.heartbeat_s):
                with suppress(PenchantError):
                    line.heartbeat()

        beside = threading.Thread(target=beat, name="penchant-heartbeat", daemon=True)
        beside.start()
        try:
            yield
        finally:
            over.set()

    def _patiently(
        self,
        turn: _Turn,
        call: Callable[[], _T],
        against: Callable[[], Refusal | None] = lambda: None,
        *,
        at_most_s: float = math.inf,
    ) -> _T:
        """Calls until there is an answer, each time later, no longer than the turn lasts or nothing is against it.

        Raises:
            _Stopped: the turn is over.
            _Refused: something is against it.
            Unreachable: `at_most_s` is over.
        """
        began, pause = self._now(), self._pace.retry_s
        while True:
            turn.check()
            self._ask(against())
            try:
                found = call()
                turn.trouble = ""
                return found
            except Unreachable as error:
                turn.trouble = str(error)
                if self._now() - began >= at_most_s:
                    raise
            turn.wait(pause * self._stretch())
            pause = min(2 * pause, self._pace.longest_s)

    # what is asked and checked

    def _no_moment(self) -> Refusal | None:
        return no_moment(self._policy, self._conditions, self._plan.unit)

    def _ask(self, why: Refusal | None) -> None:
        if why is not None:
            raise _Refused(why)

    def _order(self, content: Content) -> Order:
        try:
            order = Order.from_flat(content.order)
            self._plan.spec(order.round)
        except (PrivacyRefused, InvalidConfig) as error:
            raise _Refused(Refusal.UNKNOWN_PLAN, str(error)) from None
        if order.plan.digest != self._plan.digest:
            raise _Refused(Refusal.UNKNOWN_PLAN, "the order's plan is not the one enrolled under")
        if order.users != (0,):
            raise _Refused(Refusal.UNKNOWN_TASK, "the order is for others than the one person here")
        last = max(self._ledger.rounds(ME, self._plan.digest) - {order.round}, default=None)
        if self._policy.rounds_apart and last is not None and order.round - last <= self._policy.rounds_apart:
            raise _Refused(Refusal.OUTSIDE_WINDOW, f"{self._policy.rounds_apart} rounds are sat out between two")
        return order

    def _round_key(self, order: Order) -> tuple[Envelope, RoundKey] | None:
        """What to seal to, once the root key is known to vouch for it; None where the answer goes unsealed."""
        if not order.round_key:
            if self._policy.sealed:
                raise _Refused(Refusal.UNSEALED)
            return None
        app = self._app
        try:
            certificate = Certificate.read(Envelope.from_bytes(order.certificate.encode()), app.root)
            certificate.check(app.app_id, now_ms=self._now_ms(), serial=self.serial)
            statement = Envelope.from_bytes(order.round_key.encode())
            key = RoundKey.read(statement, certificate.public_key)
            check_round_key(
                key,
                app_id=app.app_id,
                population=app.population,
                plan=self._plan.digest,
                round=order.round,
                attempt=order.attempt,
            )
        except (UntrustedArtifact, MalformedArtifact) as error:
            raise _Refused(Refusal.UNTRUSTED_KEY, str(error)) from None
        self.serial = max(self.serial, certificate.serial)
        return statement, key


class _Line:
    """A transport that is made when it is first needed, and left and closed at the end."""

    def __init__(self, make: Callable[[], Transport]) -> None:
        self._make = make
        self._made: Transport | None = None

    @property
    def there(self) -> Transport:
        if self._made is None:
            self._made = self._make()
        return self._made

    def leave(self) -> None:
        if self._made is not None:
            self._made.leave()

    def close(self) -> None:
        if self._made is not None:
            self._made.leave()
            self._made.close()


_TASKS = frozenset(
    {
        Refusal.FOREIGN_APP,
        Refusal.UNKNOWN_PLAN,
        Refusal.UNKNOWN_TASK,
        Refusal.UNSEALED,
        Refusal.UNTRUSTED_KEY,
        Refusal.FAILED,
    }
)
"""Reasons that are of a task: the next one may be another."""


def _late(turn: _Turn) -> Outcome:
    """What it means that a turn's time is over."""
    if turn.at_work:
        return Outcome(refusal=Refusal.OUT_OF_TIME, detail=turn.trouble)
    return Outcome(refusal=Refusal.UNREACHABLE, detail=turn.trouble) if turn.trouble else Outcome()
