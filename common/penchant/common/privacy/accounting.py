"""From events to (ε, δ): the smallest valid upper bound, and the name of what proved it.

Each accountant is a small class that bounds what it can. `epsilon` asks those that are valid, reports the smallest and
names it; every event is checked before any is composed.

    GDP   closed form; exact for unamplified Gaussians, with nothing but `math` (`gaussian.py`). For sampled ones it
          leaves the coin out: they cost at most what they would without, so there is always a finite bound.
    PLD   privacy loss distributions with pessimistic rounding, dp-accounting; tight where events are sampled.
    RDP   Rényi divergences, dp-accounting; looser.

No bound may lie below PLD by more than its rounding explains: then one of the two is wrong and nothing is reported. For
unit "interaction" Opacus, whose sampler draws those interactions, is asked as well. Its answers are opinions: they can
stop a report, and are never reported.

Sources: Koskela et al. 2020, https://arxiv.org/abs/1906.03049 (PLD); Doroshenko et al. 2022,
https://arxiv.org/abs/2207.04380 (its rounding, "connect the dots"); Mironov et al. 2019,
https://arxiv.org/abs/1908.10530 (RDP of the sampled Gaussian); Gopi et al. 2021, https://arxiv.org/abs/2106.02848
(PRV).
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, Protocol, get_args

from penchant.common.errors import InvalidConfig, MissingExtra, PrivacyRefused, UnknownMechanism
from penchant.common.privacy import gaussian
from penchant.common.privacy.events import Event, Gaussian, PoissonGaussian

Neighbours = Literal["add/remove", "replace"]
TOLERANCE = 0.01
"""A bound may lie this share below PLD (its grid rounds up) before the disagreement is an error."""
GRID = 1e-4
"""Step of PLD's grid of privacy losses: what dp-accounting takes by default."""
_COARSEST = 1e-2  # a grid that would have to be coarser than this to fit into memory proves nothing useful
PRV_ERROR = 0.01
"""What Opacus' PRV adds to its estimate of ε, on either side."""


@dataclass(frozen=True)
class Bound:
    """An upper bound on ε at some δ, and the accountant that proved it ("GDP", "PLD" or "RDP")."""

    epsilon: float
    accountant: str


class Accountant(Protocol):
    """One way to bound ε. It keeps nothing between calls."""

    @property
    def name(self) -> str: ...

    def valid(self, events: Sequence[Event], neighbours: Neighbours) -> bool:
        """Whether what it says of these events is a bound, found in bounded time and memory."""
        ...

    def epsilon(self, events: Sequence[Event], delta: float, neighbours: Neighbours) -> float:
        """An upper bound ≥ 0, infinite where it finds none; 0 without events.

        Raises:
            MissingExtra: what computes it is not installed.
        """
        ...


@dataclass(frozen=True)
class Gdp:
    """Gaussian differential privacy in closed form: exact without sampling, an upper bound with it.

    A release over drawn units is a mixture of the release over all and of one without the unit, and every hockey-stick
    divergence is convex in the pair: the coin only lowers it.
    """

    name: str = "GDP"

    def valid(self, events: Sequence[Event], neighbours: Neighbours) -> bool:
        return True

    def epsilon(self, events: Sequence[Event], delta: float, neighbours: Neighbours) -> float:
        mu = _scale(neighbours) * math.hypot(*(math.sqrt(e.count) / e.noise_multiplier for e in events))
        return gaussian.epsilon_of(mu, delta) if math.isfinite(mu) else math.inf


@dataclass(frozen=True)
class Pld:
    """Privacy loss distributions on a grid, rounded up.

    Attributes:
        grid: step of the grid of losses; a coarser one is faster and its bound larger. Where the finer would not fit
            into memory, a coarser one is taken.
    """

    grid: float = GRID
    name: str = "PLD"

    def valid(self, events: Sequence[Event], neighbours: Neighbours) -> bool:
        sampled = sum(event.count for event in events if isinstance(event, PoissonGaussian))
        return self.step(events, neighbours) <= _COARSEST and sampled <= 10**7

    def tight(self, events: Sequence[Event], neighbours: Neighbours) -> bool:
        """Whether rounding to the grid adds next to nothing: it is no coarser than one event's losses are wide."""
        widths = (_rate(e) * math.sqrt(math.expm1(min(_divergence(e, neighbours), 700.0))) for e in events)
        return self.step(events, neighbours) <= min((2 * GRID, *widths))

    def step(self, events: Sequence[Event], neighbours: Neighbours) -> float:
        """The step taken: `grid`, or as much more as keeps arrays below some millions of numbers.

        One event's losses reach to s²/2σ² + 10 s/σ, s the sensitivity, but for a mass below e⁻⁵⁰.
        """
        alone = 0.0
        for event in events:
            x = _divergence(event, neighbours) * (event.count if isinstance(event, Gaussian) else 1)
            alone += x / 2 + 10 * math.sqrt(x)
        return max(self.grid, alone / 4e5, _reach(events, neighbours) / 2e6)

    def epsilon(self, events: Sequence[Event], delta: float, neighbours: Neighbours) -> float:
        return _pld_epsilon(tuple(events), delta, neighbours, self.step(events, neighbours)) if events else 0.0


@dataclass(frozen=True)
class Rdp:
    """Rényi divergences. With neighbours "replace" dp-accounting 0.6.0 takes a Gaussian's sensitivity as 1, not 2."""

    name: str = "RDP"

    def valid(self, events: Sequence[Event], neighbours: Neighbours) -> bool:
        return neighbours == "add/remove"

    def epsilon(self, events: Sequence[Event], delta: float, neighbours: Neighbours) -> float:
        return _rdp_epsilon(tuple(events), delta) if events else 0.0


@dataclass(frozen=True)
class OpacusRdp:
    """Rényi divergences as Opacus computes them: an upper bound, with orders up to 63 only."""

    name: str = "RDP (Opacus)"

    def valid(self, events: Sequence[Event], neighbours: Neighbours) -> bool:
        return neighbours == "add/remove"

    def epsilon(self, events: Sequence[Event], delta: float, neighbours: Neighbours) -> float:
        return _opacus("rdp", tuple(events), delta) if events else 0.0


@dataclass(frozen=True)
class OpacusPrv:
    """Privacy random variables as Opacus computes them, and so rounded up by `PRV_ERROR` to twice that.

    `get_epsilon` of Opacus 1.6.0 returns the upper end of its interval, which is its estimate + eps_error. It is no
    bound by itself: only removal is composed, not addition, and the domain is, by a comment beside it, not certain to
    be the one that the proof needs.
    """

    name: str = "PRV (Opacus)"

    def valid(self, events: Sequence[Event], neighbours: Neighbours) -> bool:
        # its grid narrows as 1/√n: 2²¹ cells take some seconds and some 100 MB
        n = sum(event.count for event in events)
        cells = 2 * _reach(events, neighbours) * math.sqrt(12 * n) / PRV_ERROR
        return neighbours == "add/remove" and len(events) <= 8 and cells <= 2**21

    def epsilon(self, events: Sequence[Event], delta: float, neighbours: Neighbours) -> float:
        return _opacus("prv", tuple(events), delta) if events else 0.0


GDP, PLD, RDP = Gdp(), Pld(), Rdp()
OPACUS_PRV, OPACUS_RDP = OpacusPrv(), OpacusRdp()


def epsilon(
    events: Sequence[Event],
    delta: float,
    neighbours: Neighbours = "add/remove",
    unit: Literal["user", "interaction"] = "user",
) -> Bound:
    """The smallest valid ε for all these events together.

    Raises:
        InvalidConfig: δ outside (0, 1).
        MissingExtra: sampled events without dp-accounting installed.
        UnknownMechanism: an event, or a relation between neighbours, that is not known here.
        PrivacyRefused: the accountants disagree, or none gives a finite bound.
    """
    found = opinions(events, delta, neighbours, unit)
    bounds = {name: value for name, value in found.items() if name not in (OPACUS_PRV.name, OPACUS_RDP.name)}
    best = min(bounds, key=lambda name: bounds[name])
    if not math.isfinite(bounds[best]):
        raise PrivacyRefused("no finite epsilon covers these events")
    return Bound(bounds[best], best)


def opinions(
    events: Sequence[Event],
    delta: float,
    neighbours: Neighbours = "add/remove",
    unit: Literal["user", "interaction"] = "user",
) -> dict[str, float]:
    """ε by the name of each accountant that is valid for these events: GDP alone where it is exact.

    Opacus is asked for unit "interaction" and only where it is installed; it gives opinions, not bounds.

    Raises:
        As `epsilon`.
    """
    if not 0.0 < delta < 1.0:
        raise InvalidConfig(f"delta must be in (0, 1), not {delta}")
    if neighbours not in get_args(Neighbours):
        raise UnknownMechanism(f"neighbours {neighbours!r} are unknown")
    merged = _merged(events)
    if _unsampled(merged):
        return {GDP.name: GDP.epsilon(merged, delta, neighbours)}
    bounds: tuple[Accountant, ...] = (PLD, RDP, GDP)
    found = {a.name: a.epsilon(merged, delta, neighbours) for a in bounds if a.valid(merged, neighbours)}
    if unit == "interaction":
        for second in (OPACUS_PRV, OPACUS_RDP):
            if second.valid(merged, neighbours):
                with suppress(MissingExtra):
                    found[second.name] = second.epsilon(merged, delta, neighbours)
    pld = found.get(PLD.name, math.inf)
    if math.isfinite(pld) and PLD.tight(merged, neighbours):  # on too coarse a grid others may well be smaller
        _check_agreement(pld, found)
    return found


def _check_agreement(pld: float, found: Mapping[str, float]) -> None:
    """Others are upper bounds too, and PLD is tight; PRV overstates by at most twice its error."""
    for name, value in found.items():
        below = value < pld * (1 - TOLERANCE) - 1e-6
        above = name == OPACUS_PRV.name and math.isfinite(value) and value - 2 * PRV_ERROR > pld * (1 + TOLERANCE)
        if below or above:
            raise PrivacyRefused(f"accountants disagree: {name} {value:.6g} against PLD {pld:.6g}")


def calibrate(
    events: Callable[[float], Sequence[Event]],
    epsilon_target: float,
    delta: float,
    neighbours: Neighbours = "add/remove",
) -> float:
    """The smallest noise multiplier σ with ε(events(σ)) ≤ the target, rounded up by less than a thousandth.

    Never less privacy than asked: what comes back was checked by `epsilon`. Coarse grids, ten and a hundred times
    faster, find where to look.

    Args:
        events: what a plan with this σ releases.

    Raises:
        PrivacyRefused: no noise reaches the target.
    """
    gaussian.mu_of(epsilon_target, delta)  # refuses a senseless target

    def excess(log_sigma: float, grid: float) -> float:
        """ln(ε(σ)/target), falling in ln σ by at least 1 for 1; ≤ 0 is private enough."""
        found = _bound(events(math.exp(log_sigma)), delta, neighbours, grid)
        return math.log(max(found, 1e-12) / (epsilon_target * (1 - 1e-12)))  # less an ulp's worth: no rounding up

    at, slope, tolerance = 0.0, -1.0, 1e-7
    if not _unsampled(_merged(events(1.0))):
        for grid in (min(1e-2, epsilon_target / 100), 1e-3):
            if grid > 2 * GRID:
                at, slope = _root(partial(excess, grid=grid), at, slope, 5e-4)
        tolerance = 5e-4 * max(1.0, -slope)  # of ln ε, and so 5e-4 of ln σ
    at, _ = _root(partial(excess, grid=GRID), at, slope, tolerance)
    return math.exp(at)


def most_rounds(
    events: Callable[[int], Sequence[Event]],
    epsilon_target: float,
    delta: float,
    neighbours: Neighbours = "add/remove",
    limit: int = 10**6,
) -> int:
    """The largest T ≤ limit with ε(events(T)) ≤ the target; 0 where one round costs more.

    Args:
        events: what a plan of so many rounds releases; more rounds cost more.
    """
    gaussian.mu_of(epsilon_target, delta)  # refuses a senseless target
    found = 0
    for grid in (1e-3, GRID):  # the fine one starts from where the coarse, whose bound is larger, ends

        def fits(rounds: int, grid: float = grid) -> bool:
            return rounds == 0 or _bound(events(rounds), delta, neighbours, grid) <= epsilon_target

        low, high, step = 0, limit + 1, 1
        while high - low > 1:  # from the guess outwards in growing steps, and once both ends are known, in halves
            found = min(max(found, low + 1), high - 1)
            if fits(found):
                low, found = found, (found + step if high > limit else (found + high) // 2)
            else:
                high, found = found, (found - step if low == 0 else (low + found) // 2)
            step *= 2
        found = low
    return found


def _root(f: Callable[[float], float], start: float, slope: float, tolerance: float) -> tuple[float, float]:
    """A place where the decreasing f is in [−tolerance, 0], or as near to its zero as floats go, and its slope there.

    Illinois false position (Dahlquist and Björck 1974, §6.4) once the zero lies between two places; until then, steps
    along the slope.
    """
    x, low, high, at_low, at_high, side, reach = start, -math.inf, math.inf, 0.0, 0.0, 0, 1.4
    for _ in range(200):
        value = f(x) + tolerance / 2
        if abs(value) <= tolerance / 2:
            break
        if value > 0:
            low, at_low = x, value
            at_high, side = (at_high / 2 if side == 1 else at_high), 1
        else:
            high, at_high = x, value
            at_low, side = (at_low / 2 if side == -1 else at_low), -1
        if low > 20:
            raise PrivacyRefused("no noise reaches this epsilon")
        if high - low < 1e-9:
            return high, slope
        if math.isinf(high - low):
            x, reach = x + max(-reach, min(reach, 1.1 * value / -slope)), reach * 1.5
        else:
            slope = (at_high - at_low) / (high - low)
            x = (low * at_high - high * at_low) / (at_high - at_low)
    return x, slope


def _bound(events: Sequence[Event], delta: float, neighbours: Neighbours, grid: float) -> float:
    """An upper bound on ε: what `epsilon` reports on the fine grid, PLD's alone on a coarser one."""
    merged = _merged(events)
    pld = Pld(grid)
    if grid > GRID and not _unsampled(merged) and pld.valid(merged, neighbours):
        found = pld.epsilon(merged, delta, neighbours)
        if math.isfinite(found):
            return found
    return epsilon(merged, delta, neighbours).epsilon


def _merged(events: Sequence[Event]) -> tuple[Event, ...]:
    """The same events, equal ones counted together and in one order; a coin that everybody wins is none.

    Raises:
        UnknownMechanism: something that is no event of ours, before anything is composed.
    """
    counts: Counter[Event] = Counter()
    for event in events:
        if not isinstance(event, Gaussian | PoissonGaussian):
            raise UnknownMechanism(f"event {type(event).__name__!r} is unknown here; update penchant")
        if isinstance(event, PoissonGaussian) and event.rate == 1.0:
            event = Gaussian(noise_multiplier=event.noise_multiplier, count=event.count)
        counts[replace(event, count=1)] += event.count
    merged = [replace(event, count=n) for event, n in counts.items()]
    return tuple(sorted(merged, key=lambda e: (e.kind, e.noise_multiplier, _rate(e))))


def _unsampled(events: Sequence[Event]) -> bool:
    return all(_rate(event) == 1.0 for event in events)


def _rate(event: Event) -> float:
    return event.rate if isinstance(event, PoissonGaussian) else 1.0


def _scale(neighbours: Neighbours) -> float:
    return 2.0 if neighbours == "replace" else 1.0  # two vectors in one clip ball can be opposite


def _divergence(event: Event, neighbours: Neighbours) -> float:
    """s²/σ², infinite where it overflows."""
    mu = _scale(neighbours) / event.noise_multiplier
    return mu * mu


def _reach(events: Sequence[Event], neighbours: Neighbours) -> float:
    """How far the losses of all events together go, but for a mass of 1e-16.

    Markov: P(L > t) ≤ exp(D₂ − t), with D₂ = Σ ln(1 + q² (exp(s²/σ²) − 1)) the Rényi divergence of order 2.
    """
    total = 37.0
    for event in events:
        x, q = _divergence(event, neighbours), _rate(event)
        total += event.count * (math.log1p(q * q * math.expm1(x)) if x < 700 else x)
    return total


@lru_cache(maxsize=1024)
def _pld_epsilon(events: tuple[Event, ...], delta: float, neighbours: Neighbours, step: float) -> float:
    def compute() -> float:
        first, *others = (_pld(event, neighbours, step) for event in events)
        for other in others:
            first = first.compose(other)
        return float(first.get_epsilon_for_delta(delta))

    return _quietly(compute)


def _pld(event: Event, neighbours: Neighbours, step: float) -> Any:
    if isinstance(event, Gaussian):
        return _one_pld(event.noise_multiplier / math.sqrt(event.count), 1.0, neighbours, step)
    return _one_pld(event.noise_multiplier, event.rate, neighbours, step).self_compose(event.count)


@lru_cache(maxsize=4)  # a search over rounds asks for the same one again and again; each takes some MB
def _one_pld(noise_multiplier: float, rate: float, neighbours: Neighbours, step: float) -> Any:
    dp_accounting, distribution = _dp_accounting("dp_accounting", "dp_accounting.pld.privacy_loss_distribution")
    relation = dp_accounting.NeighboringRelation
    return distribution.from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=rate,
        value_discretization_interval=step,
        neighboring_relation=relation.REPLACE_ONE if neighbours == "replace" else relation.ADD_OR_REMOVE_ONE,
    )


@lru_cache(maxsize=1024)
def _rdp_epsilon(events: tuple[Event, ...], delta: float) -> float:
    dp, rdp = _dp_accounting("dp_accounting", "dp_accounting.rdp")

    def compute() -> float:
        accountant = rdp.RdpAccountant()
        for event in events:
            release = dp.GaussianDpEvent(event.noise_multiplier)
            if isinstance(event, PoissonGaussian):
                release = dp.PoissonSampledDpEvent(event.rate, release)
            accountant.compose(release, event.count)
        return float(accountant.get_epsilon(delta))

    return _quietly(compute)


@lru_cache(maxsize=1024)
def _opacus(which: Literal["prv", "rdp"], events: tuple[Event, ...], delta: float) -> float:
    def compute() -> float:
        try:
            from opacus.accountants import PRVAccountant, RDPAccountant
        except ImportError:
            raise MissingExtra("train", "opacus") from None
        accountant: Any = PRVAccountant() if which == "prv" else RDPAccountant()
        accountant.history = [(event.noise_multiplier, _rate(event), event.count) for event in events]
        return float(accountant.get_epsilon(delta, **({"eps_error": PRV_ERROR} if which == "prv" else {})))

    return _quietly(compute)


def _dp_accounting(*modules: str) -> list[Any]:
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError:
        raise MissingExtra("train", "dp-accounting") from None


def _quietly(compute: Callable[[], float]) -> float:
    """What an accountant finds, ≥ 0; infinite where it gives up, as on numbers that its floats do not hold.

    RDP tells of each order that it leaves out; leaving orders out only loosens the bound.
    """
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = compute()
    except (ArithmeticError, IndexError, RuntimeError, ValueError):
        return math.inf
    finally:
        log.setLevel(level)
    return math.inf if math.isnan(found) else max(0.0, found)
