"""What the SDK's calls take and give. None of it holds a key, a file or a connection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from penchant.common.errors import InvalidConfig

if TYPE_CHECKING:
    from penchant.common.privacy.plan import Guarantee

Trust = Literal["server", "own device", "nobody"]
"""What a person agreed to. "server": that the operator's server, which adds the noise, sees each contribution. "own
device": only guarantees that this device enforces by itself. "nobody": that nothing ever leaves it."""

Feedback = Literal["like", "dislike", "not_this_item", "not_this_topic"]


@dataclass(frozen=True)
class Recommendation:
    """One item of a list.

    Attributes:
        item, title: of the catalogue.
        score: best first; only the order means anything.
        explored: shown to learn from it, not for its score alone.
    """

    item: str
    title: str
    score: float
    explored: bool = False


@dataclass(frozen=True)
class TopicShare:
    """A topic's share of a person's interest.

    Attributes:
        share: in [0, 1]; all topics' sum to 1.
        low, high: between these it lies with a probability of 95 %.
    """

    topic: str
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Interests:
    """What a person likes, as far as this device can tell.

    Attributes:
        topics: largest share first; empty where the catalogue has none.
        n_events: interactions that it rests on; with none the shares are everybody's.
        refused: topics that the person does not want.
        drifts: UTC milliseconds at which the taste was found to have changed.
    """

    topics: tuple[TopicShare, ...]
    n_events: int
    refused: tuple[str, ...]
    drifts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """How strong a sign of interest an event is; public settings of the app (`common.interests.strength`).

    Attributes:
        events: strength of each kind of event, over the defaults.
        rating: the lowest and highest rating of the app's scale.
        duration: the catalogue's column of numbers with an item's length in seconds, against which a dwell is held; an
            item without one counts by the kind of event.
    """

    events: Mapping[str, float] = field(default_factory=dict)
    rating: tuple[float, float] = (1.0, 5.0)
    duration: str = "duration_s"

    def __post_init__(self) -> None:
        low, high = self.rating
        if not -math.inf < low < high < math.inf:
            raise InvalidConfig(f"a rating's scale needs its lowest below its highest, not {self.rating}")
        if not all(0 <= strength <= 1 for strength in self.events.values()):
            raise InvalidConfig("the strength of an event must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class SyncResult:
    """What a sync did, or why not.

    Attributes:
        release: what came of looking for a newer one.
        why: where that failed, in a sentence; "" else.
        version: of the release in use.
        round: the round that this device took part in; None where in none.
        reason: why in none, as a code: one of `Refusal`, or "no_fleet", "nothing_to_do", "missing_extra"; "" where it
            took part.
    """

    release: Literal["updated", "up_to_date", "no_server", "failed"]
    why: str = ""
    version: int
    round: int | None = None
    reason: str = ""

    def sentence(self, language: str = "en") -> str:
        """Whether this device took part and why not, in words for its person.

        Raises:
            InvalidConfig: no such language.
        """
        from penchant.common.interests.explanations import messages

        return messages(language, "penchant.client")[self.reason].format(round=self.round)


@dataclass(frozen=True, kw_only=True)
class Left:
    """One contribution that left this device.

    Attributes:
        at_ms: UTC milliseconds.
        round: the server's count.
        n_bytes: as sent.
        plan: digest of the plan.
        sealed: whether only the process that sums it could read it.
        guarantee: of the plan, as this device computed it; "" where nothing was promised.
    """

    at_ms: int
    round: int
    n_bytes: int
    plan: str
    sealed: bool
    guarantee: str


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What left this device, who could see it, and under which guarantee.

    Attributes:
        trust: what the person agreed to.
        consented_ms: when, in UTC milliseconds; None where nothing was.
        consent: version of the text that was agreed to.
        can_leave: whether the app has a server that rounds run on at all.
        left: every contribution, oldest first.
        seen_by: who could see a contribution of this device, in a sentence.
        release: what the release in use promises everybody, with all that gives its ε a meaning; None where nothing.
        spent: what this device's own noise has spent, likewise; "" where the server's ledger says it.
        participations, cap: rounds taken part in under the plan that is open, and how many it allows; 0, 0 with none.
        trusted: what of the guarantee this device cannot check.
    """

    trust: Trust
    consented_ms: int | None
    consent: str
    can_leave: bool
    left: tuple[Left, ...]
    seen_by: str
    release: Guarantee | None
    spent: str
    participations: int
    cap: int
    trusted: tuple[str, ...]

    @property
    def budget_left(self) -> int:
        """Rounds that this device may still take part in."""
        return self.cap - self.participations


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """The receipt of a forget.

    Attributes:
        key_destroyed: the key of everything that was stored is gone: what is left of the file is noise.
        undone: what must be destroyed by hand; nothing of it opens what was stored.
        kept: what stays, and nothing of it says what the person did.
        lost: what this costs, in a sentence.
        revoked: whether the server took the device out; None where it was not asked.
    """

    key_destroyed: bool
    kept: Mapping[str, Any]
    lost: str
    undone: tuple[str, ...] = ()
    revoked: bool | None = None
