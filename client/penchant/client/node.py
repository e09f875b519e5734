"""The device's part of a round: check the order, compute each hosted person's contribution, clip, sum.

A node is a phone that hosts one person, a hub that hosts four, or a simulation worker that hosts a million; this code
is the same. It answers only under the plan its people enrolled with, keeps for each person how often they took part and
refuses past that plan's cap: as every participation costs the same, that is the person's budget. A device keeps that
count in a ledger on disk, written before anything is computed; a simulation's worker keeps it in an array. The count is
also in the name of a person's random stream: an order sent again, whatever round, try or state it claims, never meets
the same noise twice.

The drawn people are taken block by block, so that a node's memory depends on the block and the catalogue, and not on
how many it hosts or were drawn. Clipped values are on a grid that float64 adds without rounding (`sums.py`): where the
blocks are cut changes no bit of the sum.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from penchant.common.arrays import Arrays, Float64, Int64
from penchant.common.errors import BudgetExhausted, InvalidConfig, PrivacyRefused
from penchant.common.interactions import Interactions, runs
from penchant.common.learners.contract import Learner, State
from penchant.common.privacy import accounting, noise
from penchant.common.privacy.accounting import Bound
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan, task_digest
from penchant.common.privacy.sums import WITHIN, Clip
from penchant.common.streams import People, Streams
from penchant.common.wire import Order

Learners = Callable[[str, Mapping[str, Any]], Learner]
"""Name and settings to learner; the caller closes over the catalogue."""
BLOCK = 1 << 20
"""Interactions that are at hand at once; one person with more is a block alone."""


class Node:
    """Answers orders for the people it hosts.

    Args:
        histories: of its own users, in memory or mapped from a folder (`columns.load`).
        learners: builds the learner that an order names.
        plan: the one its people enrolled under; an order with another is refused.
        streams: where local randomness comes from: `Streams.from_os()`, and seeded only in research.
        first_user: added to a user's row in the names of streams, so that in a simulation a person's randomness does
            not depend on which node hosts them.
        participations: int64[n_users], rounds each person took part in so far; kept up to date in place.
        ledger: of the device, where participations last; instead of the array.

    Raises:
        InvalidConfig: both, or a ledger of another population.
        PrivacyRefused: the plan adds noise here and this machine's is not fit for it.
    """

    def __init__(
        self,
        histories: Interactions,
        learners: Learners,
        streams: Streams,
        *,
        plan: PrivacyPlan,
        first_user: int = 0,
        participations: Int64 | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        if ledger is not None and (participations is not None or ledger.population != plan.population):
            raise InvalidConfig("a node counts in its own population's ledger or in an array, not in both")
        if ledger is not None and ledger.delta > plan.delta:
            raise InvalidConfig(f"the ledger's delta {ledger.delta:g} is above the plan's {plan.delta:g}")
        if plan.device is not None:
            noise.self_test()
        self._histories = replace(histories, users=())  # nothing here needs their names, however many they are
        self._learners, self._streams = learners, streams
        self._first_user, self._plan, self._digest = first_user, plan, plan.digest
        self._ledger = ledger
        if ledger is not None:
            participations = np.array(
                [ledger.participations(u, plan.digest) for u in range(histories.n_users)], np.int64
            )
        self.participations = np.zeros(histories.n_users, np.int64) if participations is None else participations
        self._built: tuple[str, Learner] | None = None

    def answer(self, order: Order, state: State) -> Arrays:
        """The sum of the drawn people's clipped contributions.

        A person past the plan's cap, or for whom the ledger has no room, adds nothing; the others' sum does not depend
        on that.

        Guarantees:
            Under a finite clip, where the blocks are cut changes no bit of the sum of the same contributions.

        Raises:
            BudgetExhausted: the device's ledger has no room for any of them.
            PrivacyRefused: another plan than the one enrolled under, or another task than the plan names; a user that
                is not hosted here or drawn twice; nobody with room under the cap; a state with a value that is not
                finite; or a learner that adds other noise than the plan promises.
        """
        if order.plan.digest != self._digest:
            raise PrivacyRefused("the order's plan is not the one that people here enrolled under")
        if self._plan.task and self._plan.task != task_digest(order.learner, order.settings):
            raise PrivacyRefused("the order's learner or settings are not those that people here enrolled for")
        if not all(np.isfinite(values).all() for values in state.values()):
            raise PrivacyRefused("the order's state has a value that is not finite")
        learner, spec = self._learner(order), self._plan.spec(order.round)
        if learner.device_noise != self._plan.device:
            raise PrivacyRefused("the learner does not add the noise on the device that the plan promises")
        clip = Clip(spec.bound(state), spec.row_norm)
        users = np.asarray(order.users, np.int64)
        if len(np.unique(users)) != len(users) or (len(users) and not 0 <= users.min() <= users.max() < self.n_users):
            raise PrivacyRefused("the order names a user twice or one that is not hosted here")
        users = self._charged(order, users)

        total: dict[str, Float64] = {}
        for run in runs(self._histories.lengths[users], BLOCK):
            for name, values in self._sum(learner, order, state, users[run], clip).items():
                total[name] = total[name] + values if name in total else values
        if spec.quantile is not None:
            total[WITHIN] = np.array(clip.within - clip.n / 2)
        return total

    def _sum(self, learner: Learner, order: Order, state: State, users: Int64, clip: Clip) -> Arrays:
        taken = self.participations[users]
        people = People(self._streams, "local", (order.round, order.attempt, self._first_user + users, taken))
        return learner.partial_sum(state, self._histories.select(users), clip, people)

    def _charged(self, order: Order, users: Int64) -> Int64:
        """Those of the drawn who have room, each written down as having taken part.

        Raises:
            PrivacyRefused, BudgetExhausted: nobody has.
        """
        over = PrivacyRefused("the order would take everybody drawn past the plan's participation cap")
        if self._ledger is None:
            room = users[self.participations[users] < self._plan.max_participations]
            if len(users) and not len(room):
                raise over
            self.participations[room] += 1
            return room
        event, cap, kept, spent = self._plan.device_event(), self._plan.max_participations, [], over
        for user in users.tolist():
            try:
                self._ledger.participate(user, order.round, order.attempt, event, plan=self._digest, cap=cap)
                kept.append(user)
                self.participations[user] = self._ledger.participations(user, self._digest)
            except BudgetExhausted as error:
                spent = error
            except PrivacyRefused:
                pass  # the cap, which is the plan's and no news
        if len(users) and not kept:
            raise spent
        return np.array(kept, np.int64)

    def spent(self, user: int) -> Bound:
        """ε of everything that left this device about one of its people, over all rounds (unit interaction).

        With other units the device adds no noise, and what it spends is the server's ledger to say.
        """
        if self._ledger is not None:
            return self._ledger.spent(user)
        event = self._plan.device_event()
        times = int(self.participations[user])
        if event is None or times == 0:
            return accounting.epsilon((), self._plan.delta)
        return accounting.epsilon((replace(event, count=event.count * times),), self._plan.delta)

    @property
    def n_users(self) -> int:
        return self._histories.n_users

    def _learner(self, order: Order) -> Learner:
        """The learner of an order; the last one is kept, as building a model costs time."""
        name = f"{order.learner} {json.dumps(order.settings, sort_keys=True)}"
        if self._built is None or self._built[0] != name:
            self._built = (name, self._learners(order.learner, order.settings))
        return self._built[1]
