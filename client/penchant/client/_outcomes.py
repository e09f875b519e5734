"""What is told of a try at a round: what left, or why nothing did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from penchant.client._conditions import Refusal
from penchant.common.errors import UnknownMechanism


@dataclass(frozen=True, kw_only=True)
class Report:
    """What left this device in one round, for the person to read. It is written down just before it leaves.

    Attributes:
        population, round, attempt, plan: of which round; the plan by its digest.
        bytes: that left.
        sealed: whether only the process that sums could open them.
        guarantee: ε of the plan with all that gives it a meaning, as computed here; "" where nothing is promised.
        verified, trusted: what of it this device enforces, and what it has to believe.
        at_ms: UTC milliseconds, for the person; nothing is counted by it.
    """

    population: str
    round: int
    attempt: int
    plan: str
    bytes: int
    sealed: bool
    guarantee: str
    verified: tuple[str, ...]
    trusted: tuple[str, ...]
    at_ms: int

    def to_record(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "verified": list(self.verified), "trusted": list(self.trusted)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Report:
        """
        Raises:
            UnknownMechanism: a field that is not known here, or one missing.
        """
        try:
            return cls(**{**record, "verified": tuple(record["verified"]), "trusted": tuple(record["trusted"])})
        except (KeyError, TypeError):
            raise UnknownMechanism("a report has missing or unknown fields; update penchant") from None


class Journal(Protocol):
    """Where reports are kept, for good; a list will do where nothing is to last."""

    def append(self, report: Report, /) -> None:
        """Keeps it; it is durable once this returns, and nothing leaves where this raises."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one try.

    Attributes:
        report: of what left; None where nothing did.
        refusal: why it took no part; None where it did, and where nobody asked.
        detail: in words, for a log; it names nothing of the person.
    """

    report: Report | None = None
    refusal: Refusal | None = None
    detail: str = ""

    @property
    def took_part(self) -> bool:
        return self.report is not None and self.refusal is None

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"refused: {self.refusal}" + (f" ({self.detail})" if self.detail else "")
        return "nothing to do" if self.report is None else f"took part in round {self.report.round}"
