"""What passes between server and node in a round, as plain data.

    order  (server → node)   which round and try, the plan, the learner, which of the node's own users were drawn
    reply  (node → server)   the sum of their clipped contributions; its count is diagnostics only

Both become a flat map of strings, numbers and bytes, so that any transport can carry them. Fields are only added and
their meaning never changes; another schema version is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from penchant.common.errors import MalformedContribution, UnknownMechanism
from penchant.common.learners.contract import State
from penchant.common.privacy.plan import PrivacyPlan

SCHEMA_VERSION = 1
Flat = dict[str, str | int]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a node is asked for in one round.

    Attributes:
        round: from 1.
        attempt: which try at this round, from 0; a second try draws everything afresh.
        plan: the whole plan, so that a device can check it.
        learner, settings: name and settings of the learner.
        users: which of the node's own users were drawn, ascending.
        round_key, certificate: the round's key and its release key's certificate, each a signed envelope as text, to
            which a device seals its answer (`sealing.py`); "" where nothing is sealed.
    """

    round: int
    attempt: int
    plan: PrivacyPlan
    learner: str
    settings: Mapping[str, Any]
    users: tuple[int, ...]
    round_key: str = ""
    certificate: str = ""

    def to_flat(self) -> Flat:
        return {
            "schema_version": SCHEMA_VERSION,
            "round": self.round,
            "attempt": self.attempt,
            "plan": self.plan.to_json(),
            "learner": self.learner,
            "settings": json.dumps(self.settings, sort_keys=True),
            "users": json.dumps(self.users),
            **{name: text for name in _SEALING if (text := getattr(self, name))},  # an order without stays as it was
        }

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Order:
        """The order of such a map.

        Raises:
            UnknownMechanism: another schema version, or a field missing, unknown or malformed.
            InvalidConfig: a plan whose parts do not belong together.
        """
        fields = dict(flat)
        if (version := fields.pop("schema_version", None)) != SCHEMA_VERSION:
            raise UnknownMechanism(f"order version {version!r} is unknown here; update penchant")
        try:
            for name in ("settings", "users"):
                fields[name] = json.loads(fields[name])
            if not (isinstance(fields["users"], list) and isinstance(fields["settings"], dict)):
                raise TypeError
            order = cls(**{**fields, "plan": _plan(fields["plan"]), "users": tuple(fields["users"])})
            numbers = (order.round, order.attempt, *order.users)
            words = (order.learner, order.round_key, order.certificate)
            if not all(isinstance(word, str) for word in words) or {*map(type, numbers)} != {int}:
                raise TypeError
            if not 0 <= min(numbers) <= max(numbers) < 2**32:
                raise ValueError
        except (KeyError, ValueError, TypeError):
            raise UnknownMechanism("order has missing, unknown or malformed fields; update penchant") from None
        return order


_plan = lru_cache(maxsize=8)(PrivacyPlan.from_json)  # the same in every order of a run
_SEALING = ("round_key", "certificate")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What one node sent back.

    Attributes:
        node: which, by its place in the roster.
        round, attempt: that it answers.
        arrays: the sum of its clipped contributions; None where it failed.
        failure: why, in a word, where it failed.
    """

    node: int
    round: int
    attempt: int
    arrays: State | None
    failure: str = ""

    def contribution(self) -> State:
        """The sum.

        Raises:
            MalformedContribution: the node failed.
        """
        if self.arrays is None:
            raise MalformedContribution(f"a node failed: {self.failure or 'no answer'}")
        return self.arrays
