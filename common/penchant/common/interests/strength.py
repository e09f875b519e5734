"""How strong a sign of interest one event is: from a rating, from time spent, from a count, or from what was done.

    rating   (r − lowest) / (highest − lowest)
    dwell    min(1, time spent / the item's duration)
    count    min(1, log(1 + n) / log(1 + full))
    event    a table, below, of which an app overrides what differs in it

Every strength is in [0, 1]. Scales, durations, `full` and the table are public: an expected dwell or a count that was
learned from people would be data (a private sum, or not used). An item's duration is of the catalogue file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig

EVENTS: Mapping[str, float] = MappingProxyType(
    {
        "hide": 0.0,  # said no
        "skip": 0.1,
        "view": 0.3,  # shown and looked at
        "click": 0.4,
        "watch": 0.5,  # or listen, read: begun, length unknown
        "save": 0.65,  # for later, or to a list
        "like": 0.75,
        "share": 0.8,
        "buy": 0.9,
        "repeat": 1.0,  # came back to it
    }
)
"""Strength of an event by its name: what costs a person more says more. An order with round numbers, not a measurement;
`of_event(name, EVENTS | {"buy": 0.7})` is how an app disagrees."""


def of_event(event: str, table: Mapping[str, float] = EVENTS) -> float:
    """Strength of an event that has no number of its own.

    >>> of_event("click") < of_event("buy"), of_event("tip", {**EVENTS, "tip": 0.95})
    (True, 0.95)

    Raises:
        InvalidConfig: an event that the table does not name, or a table with a strength outside [0, 1].
    """
    if event not in table:
        raise InvalidConfig(f"no strength for event {event!r}{did_you_mean(event, table)}; add it to the table")
    return _within(float(table[event]), "the table's strength")


def of_rating(rating: float, lowest: float, highest: float) -> float:
    """Strength of a rating on a documented scale.

    >>> of_rating(4, 1, 5)
    0.75

    Raises:
        InvalidConfig: an empty scale, or a rating outside it.
    """
    if not -math.inf < lowest < highest < math.inf:
        raise InvalidConfig(f"a scale needs lowest below highest, both finite, not {lowest} and {highest}")
    if not lowest <= rating <= highest:
        raise InvalidConfig(f"rating must be from {lowest} to {highest}, not {rating}")
    return (rating - lowest) / (highest - lowest)


def of_dwell(spent_s: float, duration_s: float) -> float:
    """Strength of time spent with an item, as a share of its public duration; more than all of it counts as all.

    >>> of_dwell(30, 120), of_dwell(500, 120)
    (0.25, 1.0)

    Raises:
        InvalidConfig: a time below zero, or a duration that is not positive and finite.
    """
    if not 0 <= spent_s < math.inf or not 0 < duration_s < math.inf:
        raise InvalidConfig(f"spent_s must be ≥ 0 and duration_s positive, finite, not {spent_s} and {duration_s}")
    return min(1.0, spent_s / duration_s)


def of_count(n: float, full: float = 20.0) -> float:
    """Strength of having done something n times: each time more says less than the one before.

    Args:
        full: public; how many times count as full strength.

    >>> [round(of_count(n), 2) for n in (0, 1, 4, 20, 90)]
    [0.0, 0.23, 0.53, 1.0, 1.0]

    Raises:
        InvalidConfig: a count below zero, or `full` that is not positive and finite.
    """
    if not 0 <= n < math.inf or not 0 < full < math.inf:
        raise InvalidConfig(f"n must be ≥ 0 and full positive, finite, not {n} and {full}")
    return min(1.0, math.log1p(n) / math.log1p(full))


def _within(strength: float, name: str) -> float:
    if not 0.0 <= strength <= 1.0:  # also refuses NaN
        raise InvalidConfig(f"{name} must be in [0, 1], not {strength}")
    return strength
