"""What was released about people, as data: the events that a ledger stores and an accountant reads.

An event says what happened, not what it costs. Its meaning never changes; new fields are only added, with a default;
a kind or version that this code does not know is refused, never guessed.

Source of the idea: dp_accounting's DpEvent (Google), https://github.com/google/differential-privacy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from penchant.common.errors import InvalidConfig, UnknownMechanism

SCHEMA_VERSION = 1
MAX_COUNT = 2**53  # every count is exact as a float


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """`count` releases of a sum with Gaussian noise; every unit may be in every one of them.

    Attributes:
        noise_multiplier: σ, noise stddev over the sum's L2 sensitivity; positive, finite.
        count: how many such releases; 1 to 2⁵³.
    """

    kind: ClassVar[str] = "gaussian"
    noise_multiplier: float
    count: int = 1

    def __post_init__(self) -> None:
        _check(self.noise_multiplier, self.count)


@dataclass(frozen=True, kw_only=True)
class PoissonGaussian:
    """`count` releases of a noisy sum over units that each joined by an independent coin.

    The amplification holds only against those who do not see who was drawn.

    Attributes:
        noise_multiplier: σ, noise stddev over the sum's L2 sensitivity; positive, finite.
        rate: q, the coin's probability; in (0, 1].
        count: how many such releases; 1 to 2⁵³.
    """

    kind: ClassVar[str] = "poisson-gaussian"
    noise_multiplier: float
    rate: float
    count: int = 1

    def __post_init__(self) -> None:
        _check(self.noise_multiplier, self.count)
        if not 0.0 < self.rate <= 1.0:
            raise InvalidConfig(f"rate must be in (0, 1], not {self.rate}")


Event = Gaussian | PoissonGaussian
_KINDS: dict[str, type[Gaussian] | type[PoissonGaussian]] = {e.kind: e for e in (Gaussian, PoissonGaussian)}


def encode(event: Event) -> dict[str, Any]:
    """The event as plain JSON types.

    >>> encode(Gaussian(noise_multiplier=2.0))
    {'kind': 'gaussian', 'schema_version': 1, 'noise_multiplier': 2.0, 'count': 1}
    """
    return {"kind": event.kind, "schema_version": SCHEMA_VERSION, **asdict(event)}


def decode(record: Mapping[str, Any]) -> Event:
    """The event of such a record.

    Raises:
        UnknownMechanism: a kind, version or field that this version does not know.
    """
    fields = dict(record)
    kind, version = fields.pop("kind", None), fields.pop("schema_version", None)
    if kind not in _KINDS or version != SCHEMA_VERSION:
        raise UnknownMechanism(f"event {kind!r} in version {version!r} is unknown here; update penchant")
    try:
        return _KINDS[kind](**fields)
    except TypeError:
        raise UnknownMechanism(f"event {kind!r} has missing or unknown fields; update penchant") from None


def _check(noise_multiplier: float, count: int) -> None:
    if not 0.0 < noise_multiplier < math.inf:
        raise InvalidConfig(f"noise_multiplier must be positive and finite, not {noise_multiplier}")
    if not isinstance(count, int) or not 1 <= count <= MAX_COUNT:
        raise InvalidConfig(f"count must be a whole number from 1 to 2⁵³, not {count}")
