"""The round loop's decisions: who is asked, what is accepted, what is charged and released. It knows no transport.

    open     budget checked first, cohort drawn, one order per node that hosts a drawn user
    close    replies checked and summed, the ledger charged, the noised sum released and applied
    abandon  nothing of the round is released; the next try draws everything afresh

    planned ──► drawn ──► training ──► aggregating ──► charged ──► released
       └───────────┴──────────┴────────────┴──────────────┴─────► abandoned

A reply that is malformed, late, a duplicate or an error is counted by reason and left out; it changes neither the noise
nor the divisor. A round with no reply at all still releases noise and is still charged, unless a minimum was asked for:
then it is abandoned, and that this happened is exact and not charged.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from penchant.common.arrays import Int64, content_digest
from penchant.common.errors import InvalidConfig, MalformedContribution, PrivacyRefused
from penchant.common.learners.contract import Learner, State
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.noise import Noise
from penchant.common.privacy.plan import Guarantee, PrivacyPlan
from penchant.common.privacy.sampling import draw
from penchant.common.privacy.sums import WITHIN, PrivateSum
from penchant.common.streams import Streams
from penchant.common.wire import Order, Reply

Phase = Literal["planned", "drawn", "training", "aggregating", "charged", "released", "abandoned"]


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """What happened in one round. The counts are exact: they are for the operator and never part of a release.

    Attributes:
        round, attempt: which, and which try at it.
        sum: the name of what was asked for.
        drawn: users in the cohort.
        nodes: nodes asked; `answered` of them gave a sum that was accepted.
        refused: replies left out, by reason.
        seconds: from the draw to the release.
        bytes_down, bytes_up: of the state and of one contribution, as arrays, for each drawn user.
        abandoned: why nothing was released; "" where it was.
    """

    round: int
    attempt: int
    sum: str
    drawn: int = 0
    nodes: int = 0
    answered: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    abandoned: str = ""


REFUSALS = (
    *("wrong round", "not asked", "duplicate", "malformed", "error", "unsent", "unavailable", "lost", "refused"),
    *("unsealed", "sealed for another round", "unreadable"),
)
"""Why replies are left out: every reason that a record counts."""
Watch = Callable[[Phase, RoundRecord], None]
"""Told of every change of phase, with what is known of the round by then, before anything follows from it."""


@dataclass
class Progress:
    """What a run must keep to go on later: everything else follows from plan, learner and streams.

    Attributes:
        state: of the learner, the server's part included.
        done: rounds released so far.
        participations: int64[n_users], rounds each user was drawn for.
    """

    state: State
    participations: Int64
    done: int = 0
    records: list[RoundRecord] = field(default_factory=list)


class Rounds:
    """Runs a plan's rounds for one learner.

    Args:
        roster: users of each node, fixed at enrolment; their sum is the plan's n_users.
        settings: the learner's config as plain types, for the orders.
        streams: coins and noise; seeded only in research.
        watch: told of every change of phase. What it raises stops the round where it is.
        attempts: tries at a round so far, whatever became of them; the ledger's charges if None.
        minimum: answers below which a round is abandoned.

    Raises:
        InvalidConfig: plan, roster, ledger and learner do not belong together.
        PrivacyRefused: the ledger lacks a charge of rounds that were released.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        settings: Mapping[str, Any],
        plan: PrivacyPlan,
        roster: Sequence[int],
        ledger: Ledger,
        streams: Streams,
        progress: Progress | None = None,
        watch: Watch = lambda phase, record: None,
        attempts: Callable[[int], int] | None = None,
        minimum: int = 0,
    ) -> None:
        if sum(roster) != plan.n_users:
            raise InvalidConfig(f"the roster holds {sum(roster)} users and the plan {plan.n_users}")
        if ledger.population != plan.population:
            raise InvalidConfig(f"the ledger is of population {ledger.population} and the plan of {plan.population}")
        if plan.unit == "user" and ledger.delta > plan.delta:
            raise InvalidConfig(f"the ledger's delta {ledger.delta:g} is above the plan's {plan.delta:g}")
        if learner.device_noise != plan.device:
            raise InvalidConfig("the learner does not add the noise on the device that the plan promises")
        self.learner, self.plan, self.ledger = learner, plan, ledger
        self._settings, self._roster, self._streams = settings, tuple(roster), streams
        self._first = np.concatenate([[0], np.cumsum(roster)])
        self.progress = progress or Progress(learner.init(streams), np.zeros(plan.n_users, np.int64))
        if any(plan.event(r) and not ledger.attempts(r, plan.digest) for r in range(1, self.progress.done + 1)):
            raise PrivacyRefused("this ledger lacks charges of rounds that were released: go on with the one they had")
        self._watch, self._minimum = watch, minimum
        self._attempts = attempts or (lambda number: ledger.attempts(number, plan.digest))
        self._asked: dict[int, Order] | None = None
        self._participations, self._started = self.progress.participations, 0.0
        self._now = RoundRecord(round=0, attempt=0, sum="")

    @property
    def n_nodes(self) -> int:
        """Nodes of the roster, whether they are there or not."""
        return len(self._roster)

    @property
    def n_left(self) -> int:
        """Rounds not released yet."""
        return self.plan.rounds - self.progress.done

    def guarantee(self, rounds: int | None = None) -> Guarantee | None:
        """What holds after so many rounds (all if None), rounds that were charged again included."""
        return self.plan.guarantee(rounds, self.ledger.neighbours, self.ledger.repeated(self.plan.digest))

    @property
    def state(self) -> State:
        return self.progress.state

    @property
    def asked(self) -> tuple[int, int]:
        """Round and attempt that replies are awaited for."""
        return self._now.round, self._now.attempt

    def open(self) -> dict[int, Order]:
        """Draws the next round's cohort: an order for each node that hosts one of the drawn.

        Raises:
            BudgetExhausted: the ledger has no room for the round; nobody was asked.
            InvalidConfig: every round is done.
        """
        number = self.progress.done + 1
        spec, attempt = self.plan.spec(number), self._attempts(number)
        self._started = time.perf_counter()
        self._tell("planned", RoundRecord(round=number, attempt=attempt, sum=spec.name))
        if (event := self.plan.event(number)) is not None:
            self.ledger.check(event, plan=self.plan.digest, cap=self.plan.charged_cap, round=number)
        self._participations = self.progress.participations.copy()
        drawn = draw(self.plan, number, attempt, self._participations, self._streams)
        nodes, starts = np.unique(np.searchsorted(self._first, drawn, side="right") - 1, return_index=True)
        self._asked = {
            node: Order(
                round=number,
                attempt=attempt,
                plan=self.plan,
                learner=self.learner.name,
                settings=self._settings,
                users=tuple((own - self._first[node]).tolist()),
            )
            for node, own in zip(nodes.tolist(), np.split(drawn, starts[1:]), strict=False)  # nobody is one part too
        }
        self._tell("drawn", drawn=len(drawn), nodes=len(self._asked))
        return self._asked

    @property
    def is_open(self) -> bool:
        """Whether a round was begun that is neither released nor abandoned."""
        return self._now.round > self.progress.done and not self._now.abandoned

    def abandon(self, why: str) -> RoundRecord:
        """Gives a round up, at whichever point. What was charged stays charged.

        Args:
            why: of a few fixed words, since it is shown and counted.

        Raises:
            InvalidConfig: no round was begun.
        """
        if not self.is_open:
            raise InvalidConfig("no round is open")
        self._asked = None
        self._tell("abandoned", seconds=time.perf_counter() - self._started, abandoned=why)
        return self._now

    def _tell(self, phase: Phase, record: RoundRecord | None = None, **known: Any) -> None:
        self._now = replace(record or self._now, **known)
        self._watch(phase, self._now)

    def close(self, replies: Iterable[Reply]) -> RoundRecord:
        """Sums what came, charges, releases and applies; or abandons the round where too few came.

        Args:
            replies: read one at a time, so that a cohort need not fit in memory.

        Raises:
            BudgetExhausted: the ledger has no room any more; nothing was released.
            InvalidConfig: no round is open.
        """
        if self._asked is None:
            raise InvalidConfig("no round is open")
        number, state = self._now.round, self.progress.state
        spec, shapes = self.plan.spec(number), self.learner.shapes(state)
        clip_norm = spec.bound(state)
        event = self.plan.event(number)
        total = PrivateSum(shapes, spec, clip_norm, event)
        heard: set[int] = set()
        refused: Counter[str] = Counter()
        self._tell("training")
        for reply in replies:
            reason = _refusal(reply, self.asked, self._asked, heard)
            if not reason:
                try:
                    total.add(reply.contribution(), users=self._roster[reply.node])
                    heard.add(reply.node)
                except MalformedContribution:
                    reason = "malformed" if reply.arrays is not None else reply.failure or "error"
            if reason:
                refused[reason] += 1
        self._tell("aggregating", answered=len(heard), refused=dict(refused))
        if len(heard) < self._minimum:
            return self.abandon("too few answers")
        receipt = None
        if event is not None:
            receipt = self.ledger.charge(
                number, event, plan=self.plan.digest, cap=self.plan.charged_cap, model=content_digest(state)
            )
        charge = self._now.attempt if receipt is None else receipt.attempt  # no two charges ever share their noise
        self._tell("charged")
        noisy = total.release(Noise(self._streams.key("noise", number, charge)), receipt)
        if receipt is not None:
            self.ledger.released(receipt, content_digest(noisy))
        record = replace(
            self._now,
            attempt=max(charge, self._now.attempt),
            seconds=time.perf_counter() - self._started,
            bytes_down=self._now.drawn * sum(np.asarray(v).nbytes for v in self.learner.released(state).values()),
            bytes_up=self._now.drawn * sum(4 * int(np.prod(shape)) for shape in shapes.values()),
        )
        within = noisy.pop(WITHIN, None)
        after = self.learner.apply(state, noisy, self.plan.divisor)
        if spec.quantile is not None and within is not None:
            moved = spec.quantile.next(clip_norm, float(within), self.plan.divisor)
            after = {**after, spec.clip_key: np.array(moved)}
        self.progress = Progress(
            after,
            self._participations,
            number,
            [*self.progress.records, record],
        )
        self._asked = None
        self._tell("released", record)
        return record


def _refusal(reply: Reply, now: tuple[int, int], asked: Container[int], heard: Container[int]) -> str:
    if (reply.round, reply.attempt) != now:
        return "wrong round"
    if reply.node not in asked:
        return "not asked"
    return "duplicate" if reply.node in heard else ""
