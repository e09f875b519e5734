"""What may be asked of a device: whom its person trusts, what the moment allows, and what cap and budget leave.

Every "no" is a `Refusal`, and stays on the device. What the app cannot tell counts as a no. Caps and budgets are
counted from the device's ledger and the plans it was enrolled under: one participation costs its own noise, or with
unit "user" that which the server adds if it keeps its word.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, get_args

from penchant.common.errors import InvalidConfig, MissingExtra
from penchant.common.privacy import accounting
from penchant.common.privacy.events import Event, Gaussian
from penchant.common.privacy.ledger import MOST_TRIES, Ledger
from penchant.common.privacy.plan import Guarantee, PrivacyPlan, Unit

log = logging.getLogger("penchant.client")
Trust = Literal["own device", "server", "anybody"]
ME = 0
"""The one profile that a device hosts, in its ledger."""
_NEEDED = {"interaction": 0, "user": 1, "none": 2}
"""The least trust, by its place in `Trust`, that a plan of each unit needs."""


class Refusal(StrEnum):
    """Why a device took no part."""

    NO_CONSENT = "no_consent"
    UNTRUSTED_SERVER = "untrusted_server"
    """The plan's guarantee is the server's to keep, or there is none, and the person did not agree to that."""
    NOT_IDLE = "not_idle"
    NOT_CHARGING = "not_charging"
    METERED = "metered"
    OUTSIDE_WINDOW = "outside_window"
    """The app says not now, or this device was in a round too short a while ago."""
    BUDGET_EXHAUSTED = "budget_exhausted"
    CAP_REACHED = "cap_reached"
    UNKNOWN_PLAN = "unknown_plan"
    FOREIGN_APP = "foreign_app"
    UNKNOWN_TASK = "unknown_task"
    UNSEALED = "unsealed"
    """The order has no key to seal to, and answers must be sealed."""
    UNTRUSTED_KEY = "untrusted_key"
    """It has one that the app's root key does not vouch for, or that is for another round."""
    FAILED = "failed"
    """Something here went wrong: the learner, the history or a disk; the log names the error's type."""
    UNREACHABLE = "unreachable"
    NOT_ENROLLED = "not_enrolled"
    CANCELLED = "cancelled"
    OUT_OF_TIME = "out_of_time"
    """A task was at hand, and the deadline came before the answer left."""
    TRAINING_TOO_LONG = "training_too_long"
    OUT_OF_MEMORY = "out_of_memory"
    """The training met a bound that the app set for it (`Training`), or the system's."""
    BUSY = "busy"
    """Another call is at it, or one that was given up still has to end."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When a person's device may take part. The default never does: consent is given, not assumed.

    Attributes:
        consent: the person agreed, to this plan's kind; who stores when and to which words is the caller.
        trust: whom they trust to keep the guarantee: "own device" takes part only where the device itself adds the
            noise (unit interaction), "server" also where the server does (unit user), "anybody" also where nothing is
            promised (unit none).
        sealed: answers leave only sealed to the round's key.
        idle, charging, unmetered: that the conditions of these names must hold.
        max_participations: in rounds of one plan; None leaves it to the plan's own cap, which holds anyway.
        budget: ε that this device may spend in all rounds together; None leaves it to the plans, and to the ledger's.
        rounds_apart: server rounds to sit out after one that this device was in.
    """

    consent: bool = False
    trust: Trust = "own device"
    sealed: bool = True
    idle: bool = True
    charging: bool = True
    unmetered: bool = True
    max_participations: int | None = None
    budget: float | None = None
    rounds_apart: int = 0

    def __post_init__(self) -> None:
        if self.trust not in get_args(Trust):
            raise InvalidConfig(f"trust is one of {', '.join(get_args(Trust))}, not {self.trust!r}")
        if self.rounds_apart < 0 or (self.max_participations is not None and self.max_participations < 0):
            raise InvalidConfig("rounds_apart and max_participations must be ≥ 0")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise InvalidConfig(f"a budget must be positive and finite, not {self.budget}")


def _unknown() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the app says of the moment. Each is asked often, from the participation's thread, and answers at once.

    One that raises, or that the app leaves out, counts as a no where the policy asks for it. `in_window` is always
    asked: an app that knows a good time of day says so there.
    """

    idle: Callable[[], bool] = _unknown
    charging: Callable[[], bool] = _unknown
    unmetered: Callable[[], bool] = _unknown
    in_window: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Promise:
    """What a plan promises, as this device sees it."""

    guarantee: Guarantee | None
    verified: tuple[str, ...]
    trusted: tuple[str, ...]


def promise(plan: PrivacyPlan) -> Promise:
    """Computes a plan's ε again, and tells what of it this device holds by itself.

    A sampled plan's ε needs dp-accounting; without it the bound is the closed one, which leaves the coins out.
    """
    if plan.unit == "none":
        return Promise(None, (), ())
    try:
        guarantee = plan.guarantee()
    except MissingExtra:
        device = None if plan.device is None else replace(plan.device, rate=1.0)
        guarantee = replace(plan, sampling="none", device=device).guarantee()
    here = ("clip", "participation cap", "budget")
    if plan.unit == "interaction":
        return Promise(guarantee, (*here, "noise", "sampling"), ())
    return Promise(guarantee, here, ("noise", "sampling", "cohort", "that a repeated try is charged"))


def no_moment(policy: Policy, now: Conditions, unit: Unit) -> Refusal | None:
    """What the person or the moment is against, under a plan of this unit."""
    if not policy.consent:
        return Refusal.NO_CONSENT
    if _NEEDED[unit] > get_args(Trust).index(policy.trust):
        return Refusal.UNTRUSTED_SERVER
    asked: tuple[tuple[bool, Callable[[], bool], Refusal], ...] = (
        (policy.idle, now.idle, Refusal.NOT_IDLE),
        (policy.charging, now.charging, Refusal.NOT_CHARGING),
        (policy.unmetered, now.unmetered, Refusal.METERED),
        (True, now.in_window, Refusal.OUTSIDE_WINDOW),
    )
    return next((why for matters, holds, why in asked if matters and not _holds(holds)), None)


def no_room(
    plan: PrivacyPlan,
    policy: Policy,
    ledger: Ledger,
    plans: Mapping[str, PrivacyPlan],
    *,
    asked: tuple[int, int] | None = None,
    released: int | None = None,
) -> Refusal | None:
    """What of cap and budget is used up.

    A device that was in all of its rounds still answers a further try at one of them, where the noise is the server's:
    a server that was killed must be able to end its plan.

    Args:
        plans: all that this device was enrolled under, by digest.
        asked: round and try that are; None before any is.
        released: rounds of the plan that this device has a release of, so that no more tries at them can come; None if
            all of them.
    """
    own = policy.max_participations
    cap = plan.max_participations if own is None else min(own, plan.max_participations)
    if asked is not None and ledger.is_further(ME, plan.digest, *asked):
        if ledger.further(ME, plan.digest) >= MOST_TRIES:
            return Refusal.CAP_REACHED
    elif ledger.participations(ME, plan.digest) >= cap:
        last = max(ledger.rounds(ME, plan.digest), default=0)
        if asked is not None or plan.device is not None or released is None or last <= released:
            return Refusal.CAP_REACHED
    budgets = [b for b in (policy.budget, ledger.budget) if b is not None]
    if not budgets or plan.unit == "none":
        return None
    if (spent := _spent(plan, ledger, plans)) is None:
        return Refusal.BUDGET_EXHAUSTED
    cost = plan.device_event() or Gaussian(noise_multiplier=min(s.charged_multiplier for s in plan.sums))
    bound = accounting.epsilon((*spent, cost), ledger.delta, ledger.neighbours, plan.unit)
    return Refusal.BUDGET_EXHAUSTED if bound.epsilon > min(budgets) else None


def _spent(plan: PrivacyPlan, ledger: Ledger, plans: Mapping[str, PrivacyPlan]) -> list[Event] | None:
    """What this device's participations cost: its own noise, or with unit user the server's if it adds that.

    One that was charged and then cancelled counts. The coins of a sampled plan are left out: this device knows when
    it was drawn. None where no budget covers them all: one of a plan that is not at hand or promised nothing, or of
    the other unit, as the two are never mixed.
    """
    spent: list[Event] = []
    own = plan.device is not None
    for entry in ledger.entries:
        if entry.kind != "participation":
            continue
        if (entry.event is not None) != own:
            return None
        if entry.event is not None:
            spent.append(entry.event)
            continue
        its = plans.get(entry.plan)
        if its is None or (event := its.event(entry.round)) is None:
            return None
        spent.append(Gaussian(noise_multiplier=event.noise_multiplier))
    return spent


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition() is True
    except Exception as error:
        log.warning("a condition of the app failed: %s", type(error).__name__)
        return False
