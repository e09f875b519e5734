"""How long events are kept, and which time is believed.

At each write and when a store is opened, the oldest events beyond `max_events` go, and those older than `days`. A clock
can be wrong, so time is believed late: an event is too old only if two readings at least a day apart, with none below
the first in between, both say so. A clock that jumps ahead for an hour, or goes back, deletes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from penchant.client._schema import State
from penchant.common.errors import InvalidConfig

DAY_MS = 86_400_000


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How long events are kept. Whichever comes first; None is for ever.

    Attributes:
        days: an event goes when it is older, as the header says.
        max_events: with more, the oldest go.
    """

    days: float | None = 365.0
    max_events: int | None = 50_000

    def __post_init__(self) -> None:
        if not (self.days is None or 0 < self.days < math.inf):
            raise InvalidConfig(f"days must be positive and finite, or None for ever, not {self.days}")
        if not (self.max_events is None or self.max_events >= 1):
            raise InvalidConfig(f"max_events must be ≥ 1, or None for all, not {self.max_events}")

    def over(self, state: State) -> int:
        """How many of the oldest events there are beyond `max_events`."""
        return 0 if self.max_events is None else max(0, state.n - self.max_events)

    def too_old_ms(self, state: State) -> int | None:
        """Events before this time are too old; None where none can be."""
        if self.days is None or state.oldest_ms is None:
            return None
        limit = state.believed_ms - round(self.days * DAY_MS)
        return limit if state.oldest_ms < limit else None


def note(state: State, now_ms: int) -> bool:
    """Takes a reading of the clock; whether anything changed."""
    if now_ms < state.noted_ms:
        state.noted_ms = now_ms  # what was said before is taken back
    elif now_ms - state.noted_ms >= DAY_MS:
        state.believed_ms, state.noted_ms = state.noted_ms, now_ms
    else:
        return False
    return True
