"""How a profile follows its person: which memory to trust, when a taste has changed, and what a moment shifts.

    loss      ℓ_h = |{j in J : score_h(j) ≥ score_h(i)}| / |J|      of event i, before it is taken in
    share     v_h ∝ w_h exp(−η log(1 + |J| ℓ_h) / log(1 + |J|)),   w = (1 − α) v + α w₀
    drift     g ← max(0, g + ℓ_long − ℓ̄ − slack),   a drift where g > threshold
    context   shift = c v N Λ_long⁻¹ Σ_name n / (n + shrink) · (pull_value / n − pull_name / n_name)

J is a fixed sample of the catalogue less what must not be shown; ties count half; ℓ is in [0, 1] whatever the scale of
the scores. The logarithm is for the top of a list, where memories differ; a drift shows in ℓ itself. N is what the
long-term memory weighs, n what the events of a category weigh and pull their Σ o y f: with c = 1 and no shrinking the
shift turns the long-term memory into one whose events were chosen as this person chooses in that category. v is a share
too, of scores with the shift against scores without it: a moment that foretells nothing is soon believed little.

Source: Herbster and Warmuth 1998, "Tracking the best expert", in the form that shares with the starting weights
(Bousquet and Warmuth 2002, "Tracking a small set of experts by mixing past posteriors"); Page 1954, "Continuous
inspection schemes", as in Gama et al. 2013, "On evaluating stream learning algorithms".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from penchant.common.arrays import Float64, Int64
from penchant.common.errors import InvalidConfig


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """Public settings.

    Attributes:
        rate: η ≥ 0, how far one event moves the share of the memories and of the moment; 0 keeps both fixed.
        switch: α in [0, 1], how far each event moves them back to where they started.
        threshold: of g, for a drift; None detects none.
        slack: ≥ 0, what a loss may lie above the mean so far and still be nothing new.
        haste: for how many events from a drift on the long-term memory forgets faster; neither these nor as many at
            the very start are looked at for a drift.
        fade: in (0, 1], what it keeps at each of these, on top of γ.
        context: c ≥ 0, weight of the moment's categories; 0 leaves them out.
        shrink: > 0, events at which a category counts half.
        categories: how many are kept; the one longest unmet goes first.
        sample: how many items a loss looks at.
    """

    rate: float = 2.0
    switch: float = 0.05
    threshold: float | None = 1.5
    slack: float = 0.05
    haste: int = 10
    fade: float = 0.8
    context: float = 0.6
    shrink: float = 10.0
    categories: int = 64
    sample: int = 128

    def __post_init__(self) -> None:
        for name in ("rate", "slack", "context"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} must be finite and ≥ 0, not {getattr(self, name)}")
        if not 0 <= self.switch <= 1:
            raise InvalidConfig(f"switch must be in [0, 1], not {self.switch}")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise InvalidConfig(f"threshold must be positive and finite, or None for no drifts, not {self.threshold}")
        if not 0 < self.fade <= 1:
            raise InvalidConfig(f"fade must be in (0, 1], not {self.fade}")
        if not 0 < self.shrink < math.inf:
            raise InvalidConfig(f"shrink must be positive and finite, not {self.shrink}")
        for name, least in (("haste", 0), ("categories", 1), ("sample", 1)):
            if getattr(self, name) < least:
                raise InvalidConfig(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def watches(self) -> bool:
        """Whether events are compared with what was expected, which costs a loss each."""
        return self.rate > 0 or self.threshold is not None


STILL = Dynamics(rate=0.0, threshold=None, context=0.0)
"""Nothing follows: a fixed share, no drifts, no context."""


@dataclass(frozen=True)
class Drift:
    """A taste was found to have changed.

    Attributes:
        event: position in the profile's events of the one that showed it.
        time: of that event, UTC milliseconds, where it was given.
    """

    event: int
    time: int | None = None


def sample(order: Int64, size: int) -> Int64:
    """int64[≤ size], positions spread evenly over the catalogue in order of released popularity; public.

    >>> sample(np.array([1, 2, 3, 0]), 2).tolist()
    [1, 3]
    """
    return np.asarray(order[np.unique(np.arange(size) * len(order) // size)], np.int64)


def loss(scores: Float64, own: Float64) -> Float64:
    """float64[h], ℓ of each of h scorers.

    Args:
        scores: float64[h, n], of the sampled items.
        own: float64[h], of the event's item.

    >>> loss(np.array([[1.0, 2.0, 3.0, 4.0]] * 3), np.array([5.0, 2.5, 2.0])).tolist()
    [0.0, 0.5, 0.625]
    """
    above = ((scores > own[:, None]).sum(axis=1) + (scores >= own[:, None]).sum(axis=1)) / 2
    return np.asarray(above / scores.shape[1], np.float64)


class Share:
    """Of the second of two scorers against the first, by how well each foresaw the events so far."""

    def __init__(self, start: float) -> None:
        self.start = self.value = start

    def learn(self, losses: Float64 | Sequence[float], rate: float, switch: float) -> None:
        """One event.

        Args:
            losses: in [0, 1], of the first and the second.
            rate: η.
            switch: α.
        """
        least = float(min(losses))  # which cancels, and keeps the better one's factor at 1 however large η is
        second = self.value * math.exp(-rate * (float(losses[1]) - least))
        first = (1 - self.value) * math.exp(-rate * (float(losses[0]) - least))
        found = second / (first + second) if first + second else self.value  # all was on the worse one
        self.value = (1 - switch) * found + switch * self.start


class PageHinkley:
    """Finds where losses have begun to lie above their mean."""

    def __init__(self) -> None:
        self.n = self.mean = self.excess = 0.0

    def drifted(self, value: float, weight: float, slack: float, threshold: float) -> bool:
        """Takes in one loss; True where it shows a drift, from which all begins anew."""
        if weight <= 0:
            return False
        self.n += weight
        self.mean += weight / self.n * (value - self.mean)
        self.excess = max(0.0, self.excess + weight * (value - self.mean - slack))
        if self.excess <= threshold:
            return False
        self.n = self.mean = self.excess = 0.0
        return True


class Contexts:
    """What a person chooses in each category of a moment, such as ("weekday", "6"); the latest so many categories."""

    def __init__(self, d: int) -> None:
        self.d = d
        self.cells: dict[tuple[str, str], tuple[Float64, float]] = {}  # pull and weight, longest unmet first

    def add(self, context: Mapping[str, str], pull: Float64, weight: float, *, keep: float, most: int) -> None:
        """One event in these categories.

        Args:
            pull: float64[d], o y f.
            weight: o.
            keep: γ of a category, at each of its events.
            most: categories kept.
        """
        for cell in checked(context).items():
            before, n = self.cells.pop(cell, (np.zeros(self.d), 0.0))
            self.cells[cell] = (keep * before + pull, keep * n + weight)
            if len(self.cells) > most:
                del self.cells[next(iter(self.cells))]

    def shifts(self, context: Mapping[str, str], shrink: float) -> dict[str, Float64]:
        """By name, float64[d]: how events of the category differ from all of its name; none for what is unknown."""
        out = {}
        for name, value in checked(context).items():
            pull, n = self.cells.get((name, value), (np.zeros(self.d), 0.0))
            if n > 0:
                alike = [cell for (other, _), cell in self.cells.items() if other == name]
                overall = np.sum([p for p, _ in alike], axis=0) / sum(m for _, m in alike)
                out[name] = n / (n + shrink) * (pull / n - overall)
        return out

    def pack(self) -> dict[str, np.ndarray]:
        """Arrays that `unpack` turns back."""
        names = json.dumps([list(cell) for cell in self.cells]).encode()
        return {
            "context_names": np.frombuffer(names, np.uint8),
            "context_pulls": np.array([pull for pull, _ in self.cells.values()]).reshape(-1, self.d),
            "context_weights": np.array([n for _, n in self.cells.values()], np.float64),
        }

    def unpack(self, names: bytes, pulls: Float64, weights: Iterable[float]) -> None:
        """Replaces what is kept.

        Raises:
            ValueError: names that are not pairs of texts, or not as many as pulls and weights.
        """
        cells = [(name, value) for name, value in json.loads(names)]
        if not all(isinstance(part, str) for cell in cells for part in cell):
            raise ValueError("categories are texts")
        self.cells = {c: (p.copy(), float(n)) for c, p, n in zip(cells, pulls, weights, strict=True)}


def checked(context: Mapping[str, str]) -> Mapping[str, str]:
    """The same categories.

    Raises:
        InvalidConfig: a name or value that is no text.
    """
    if not all(isinstance(part, str) for pair in context.items() for part in pair):
        raise InvalidConfig('a context maps names to categories, both text, such as {"weekday": "6"}')
    return context
