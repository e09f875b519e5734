"""What was spent about one population, charged before anything is released.

Every release about the same people composes here. Charge, then release: a release needs the receipt, and a budget
refuses the round before any device is called. A round run again is charged again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penchant.common.errors import BudgetExhausted, InvalidConfig, UnknownMechanism
from penchant.common.privacy import accounting
from penchant.common.privacy.accounting import Neighbours
from penchant.common.privacy.events import Event, decode, encode


@dataclass(frozen=True)
class Receipt:
    """Proof that a ledger holds the charge for one release. Only `Ledger.charge` makes one."""

    entry: int
    event: Event


@dataclass(frozen=True)
class Entry:
    """One charge: the event, the round it was for, and which try at that round it was (from 0)."""

    round: int
    attempt: int
    event: Event


class Ledger:
    """The charges of one population, in order.

    Args:
        population: whose releases these are.
        delta: δ of the guarantee, < 1/n.
        budget: ε that must not be passed; None where the plan alone limits the rounds.
        keep: called with all charges, as `to_records` gives them, before a receipt is: what makes a charge last.

    Raises:
        InvalidConfig: δ outside (0, 1), or a budget that is not positive and finite.
    """

    def __init__(
        self,
        population: str,
        *,
        delta: float,
        budget: float | None = None,
        neighbours: Neighbours = "add/remove",
        keep: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> None:
        if not 0.0 < delta < 1.0 or (budget is not None and not 0.0 < budget < math.inf):  # also refuses NaN
            raise InvalidConfig(f"delta must be in (0, 1) and a budget positive and finite, not {delta} and {budget}")
        self.population, self.delta, self.budget = population, delta, budget
        self.neighbours: Neighbours = neighbours
        self._entries: list[Entry] = []
        self._keep = keep
        self._lock = threading.Lock()

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries)

    @property
    def events(self) -> tuple[Event, ...]:
        return tuple(entry.event for entry in self._entries)

    @property
    def repeated(self) -> tuple[Event, ...]:
        """The charges of rounds run again, beyond the first of each round."""
        return tuple(entry.event for entry in self._entries if entry.attempt > 0)

    def attempts(self, round: int) -> int:
        """How often this round was charged before."""
        return sum(entry.round == round for entry in self._entries)

    def check(self, event: Event) -> None:
        """Refuses an event that the budget has no room for. Call it before any device is.

        Raises:
            BudgetExhausted: the charge would pass the budget.
        """
        if self.budget is None:
            return
        after = accounting.epsilon(_merged([*self.events, event]), self.delta, self.neighbours).epsilon
        if after > self.budget * (1 + 1e-9):
            raise BudgetExhausted(f"population {self.population}: epsilon would pass the budget of {self.budget:g}")

    def charge(self, round: int, event: Event) -> Receipt:
        """Writes the charge down. Only then may the release be drawn."""
        with self._lock:
            self.check(event)
            self._entries.append(Entry(round, self.attempts(round), event))
            if self._keep is not None:
                self._keep(self.to_records())
            return Receipt(len(self._entries) - 1, event)

    def spent(self) -> accounting.Bound:
        """ε of everything charged so far."""
        return accounting.epsilon(_merged(self.events), self.delta, self.neighbours)

    def to_records(self) -> list[dict[str, Any]]:
        """The charges as plain JSON types."""
        return [{"round": e.round, "attempt": e.attempt, "event": encode(e.event)} for e in self._entries]

    def load(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes back what `to_records` gave.

        Raises:
            UnknownMechanism: an event or a field that this version does not know; the ledger stays as it was.
        """
        try:
            self._entries = [Entry(**{**r, "event": decode(r["event"])}) for r in records]
        except (KeyError, TypeError):
            raise UnknownMechanism("a charge has missing or unknown fields; update penchant") from None


def _merged(events: Sequence[Event]) -> list[Event]:
    """Equal events counted together: accountants compose a count far faster than a list."""
    counts: dict[Event, int] = {}
    for event in events:
        one = type(event)(**{**vars(event), "count": 1})
        counts[one] = counts.get(one, 0) + event.count
    return [type(event)(**{**vars(event), "count": n}) for event, n in counts.items()]
