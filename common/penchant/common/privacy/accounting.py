"""From events to (ε, δ): the smallest valid upper bound, and the name of what proved it.

Unamplified Gaussians compose in closed form (`gaussian.py`). Poisson-sampled ones go to dp-accounting: privacy loss
distributions with pessimistic rounding (PLD) and Rényi divergences (RDP), both upper bounds, so the smaller is
reported. PLD is the tighter in theory; if RDP comes out below it by more than the rounding can explain, one of the two
is wrong and nothing is reported.

Sources: Koskela et al. 2020, https://arxiv.org/abs/1906.03049 (PLD); Mironov et al. 2019,
https://arxiv.org/abs/1908.10530 (RDP of the sampled Gaussian).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from penchant.common.errors import InvalidConfig, MissingExtra, PrivacyRefused, UnknownMechanism
from penchant.common.privacy import gaussian
from penchant.common.privacy.events import Event, Gaussian, PoissonGaussian

if TYPE_CHECKING:
    import dp_accounting

Neighbours = Literal["add/remove", "replace"]
PLD_TOLERANCE = 0.01
"""RDP may lie this share below PLD (its grid rounds up) before the disagreement is an error."""


@dataclass(frozen=True)
class Bound:
    """An upper bound on ε at some δ, and the accountant that proved it ("GDP", "PLD" or "RDP")."""

    epsilon: float
    accountant: str


def epsilon(events: Sequence[Event], delta: float, neighbours: Neighbours = "add/remove") -> Bound:
    """The smallest valid ε for all these events together.

    Raises:
        InvalidConfig: δ outside (0, 1).
        MissingExtra: sampled events without dp-accounting installed.
        UnknownMechanism: another relation between neighbours.
        PrivacyRefused: the accountants disagree, or none gives a finite bound.
    """
    if not 0.0 < delta < 1.0:
        raise InvalidConfig(f"delta must be in (0, 1), not {delta}")
    if neighbours not in get_args(Neighbours):
        raise UnknownMechanism(f"neighbours {neighbours!r} are unknown")
    if not _unsampled(events):
        return _sampled(tuple(events), delta, neighbours)
    scale = 2.0 if neighbours == "replace" else 1.0  # two vectors in one clip ball can be opposite
    mu = scale * math.hypot(*(math.sqrt(e.count) / e.noise_multiplier for e in events))
    bound = gaussian.epsilon_of(mu, delta) if math.isfinite(mu) else math.inf
    if not math.isfinite(bound):
        raise PrivacyRefused("no finite epsilon covers these events")
    return Bound(bound, "GDP")


def calibrate(
    events: Callable[[float], Sequence[Event]],
    epsilon_target: float,
    delta: float,
    neighbours: Neighbours = "add/remove",
) -> float:
    """The smallest noise multiplier σ with ε(events(σ)) ≤ the target, rounded up: never less privacy than asked.

    Args:
        events: what a plan with this σ releases.
    """
    gaussian.mu_of(epsilon_target, delta)  # refuses a senseless target

    def excess(log_sigma: float) -> float:
        """ln(ε(σ)/target) by the one accountant that is tight; ≤ 0 is private enough. Nearly linear in ln σ."""
        found = _search_epsilon(events(math.exp(log_sigma)), delta, neighbours)
        return math.log(max(found, 1e-12) / epsilon_target)

    low, high = math.log(0.4), math.log(1.6)
    while excess(high) > 0:
        low, high = high, high + 1.4
        if high > 20:
            raise PrivacyRefused(f"no noise reaches epsilon {epsilon_target} at delta {delta}")
    while excess(low) < 0:
        low, high = low - 1.4, low
    sigma = math.exp(_root(excess, low, high))
    for _ in range(100):
        if epsilon(events(sigma), delta, neighbours).epsilon <= epsilon_target:
            return sigma
        sigma *= 1 + 1e-5
    raise PrivacyRefused("the noise found does not reach its epsilon")


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where the decreasing f crosses zero, to 1e-5: Illinois false position (Dahlquist and Björck 1974, §6.4)."""
    at_low, at_high, side, middle = f(low), f(high), 0, high
    for _ in range(100):
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        value = f(middle)
        if abs(value) < 1e-5 or high - low < 1e-5:
            break
        if value > 0:
            low, at_low = middle, value
            at_high, side = (at_high / 2 if side == 1 else at_high), 1
        else:
            high, at_high = middle, value
            at_low, side = (at_low / 2 if side == -1 else at_low), -1
    return middle


def _search_epsilon(events: Sequence[Event], delta: float, neighbours: Neighbours) -> float:
    if _unsampled(events):
        return epsilon(events, delta, neighbours).epsilon
    return _dp_accounting_epsilon("pld", tuple(events), delta, neighbours)


def _unsampled(events: Sequence[Event]) -> bool:
    return all(isinstance(e, Gaussian) or e.rate == 1.0 for e in events)


def _sampled(events: tuple[Event, ...], delta: float, neighbours: Neighbours) -> Bound:
    pld = _dp_accounting_epsilon("pld", events, delta, neighbours)
    rdp = _dp_accounting_epsilon("rdp", events, delta, neighbours)
    if math.isfinite(pld) and rdp < pld * (1 - PLD_TOLERANCE) - 1e-6:
        raise PrivacyRefused(f"accountants disagree: RDP {rdp:.6g} lies below PLD {pld:.6g}")
    best = min(pld, rdp)
    if not 0.0 <= best < math.inf:
        raise PrivacyRefused("no accountant gives a finite epsilon for these events")
    return Bound(best, "PLD" if pld <= rdp else "RDP")


@lru_cache(maxsize=1024)
def _dp_accounting_epsilon(which: str, events: tuple[Event, ...], delta: float, neighbours: Neighbours) -> float:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError:
        raise MissingExtra("train", "dp-accounting") from None
    relation = {
        "add/remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace": dp_accounting.NeighboringRelation.REPLACE_ONE,
    }[neighbours]
    if which == "rdp" and neighbours == "replace":  # dp-accounting's RDP takes a Gaussian's sensitivity as 1 there too
        return math.inf
    accountant: Any = pld.PLDAccountant(relation) if which == "pld" else rdp.RdpAccountant()
    with _quiet():
        for event in events:
            accountant.compose(_to_dp_event(event))
        value = float(accountant.get_epsilon(delta))
    return math.inf if math.isnan(value) else max(0.0, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """RDP tells of each order that it leaves out; leaving orders out only loosens the bound."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _to_dp_event(event: Event) -> dp_accounting.DpEvent:
    import dp_accounting

    match event:
        case Gaussian():
            inner: Any = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        case PoissonGaussian(rate=1.0):
            inner = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        case PoissonGaussian():
            release = dp_accounting.GaussianDpEvent(event.noise_multiplier)
            inner = dp_accounting.PoissonSampledDpEvent(event.rate, release)
    return dp_accounting.SelfComposedDpEvent(inner, event.count)
