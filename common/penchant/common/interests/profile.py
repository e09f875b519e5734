"""What one person likes, kept up to date on their own device from what was released and what they do.

    long-term and recent, h:   S_h ← γ_h S_h + o f fᵀ,   b_h ← γ_h b_h + o y f      at each event of item vector f
    Λ_h = a FᵀF + r I + S_h,   m_h = Λ_h⁻¹ ((a FᵀF + r I) m₀ + b_h),   m = (1 − w) m_long + w m_recent
    score = F (m + shift) + b · popularity + λ Σⱼ δ^age(j) leaveⱼ · arriveᵀ

o is how much an event says, y in [0, 1] how strong a sign of interest it is. This is the user side of `taste.py`, event
by event and with two memories; with one of them (w = 0) and y = 1 it is that closed form. How w follows the person,
when a drift makes the long-term memory forget faster, and what a moment's categories shift: `dynamics.py`. An event
costs d² and, where it is compared with what was expected, a reading: two systems of size d, which the next list then
need not solve. A list costs one product with F. Nothing is uploaded, and nothing here reads a clock or a network.

Where a release is a network (`inference/`), F is its item table and lists are in the order of the network's own scores
of the history; the linear model says all else. Policies that explore find it as uncertain beside the network's scores
as it is beside its own: its taste, times the ratio of the two standard deviations over the catalogue.

Source: `taste.py`, with forgetting as in recursive least squares (Haykin 2014, Adaptive Filter Theory, chapter 10).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from penchant.common.arrays import Arrays, Bool, Float32, Float64, Int64, content_digest
from penchant.common.catalogue import Catalogue
from penchant.common.compact import Strings
from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.interactions import History
from penchant.common.interests.dynamics import Contexts, Drift, Dynamics, PageHinkley, Share, checked, loss, sample
from penchant.common.interests.exploration import Greedy, Policy, Standing
from penchant.common.taste import Attribution, ItemSide, Posterior

if TYPE_CHECKING:
    from penchant.common.inference.scorer import Scorer

SCHEMA_VERSION = 1
"""Of `InterestProfile.to_arrays`."""

_UNTIMED = int(np.iinfo(np.int64).min)


@dataclass(frozen=True, kw_only=True)
class InterestConfig:
    """Public settings.

    Attributes:
        long, recent: γ in (0, 1], kept with each newer event.
        share: w₀ in [0, 1], of the recent memory in the taste, to begin with.
        again: whether what a person had may be recommended again.
        dynamics: how the profile follows its person.
    """

    long: float = 0.97
    recent: float = 0.5
    share: float = 0.6
    again: bool = False
    dynamics: Dynamics = field(default_factory=Dynamics)

    def __post_init__(self) -> None:
        for name in ("long", "recent"):
            if not 0 < getattr(self, name) <= 1:
                raise InvalidConfig(f"{name} must be in (0, 1], not {getattr(self, name)}")
        if not 0 <= self.share <= 1:
            raise InvalidConfig(f"share must be in [0, 1], not {self.share}")


@dataclass(frozen=True)
class Recommendation:
    """One item of a list.

    Attributes:
        item: its identifier.
        position: in the catalogue.
        score: the linear score.
        explored: it would not be in the list by its score alone: shown to learn from it, or to keep a rule.
    """

    item: str
    position: int
    score: float
    explored: bool = False


class Memory:
    """Evidence that fades: S and b of one γ, and how much each event still weighs."""

    def __init__(self, d: int, keep: float) -> None:
        self.keep = keep
        self.spread, self.pull = np.zeros((d, d)), np.zeros(d)
        self.mass = 0.0  # what all events together weigh
        self.faded = 0.0  # log of what an event of weight 1 at the very start would weigh now

    def add(self, f: Float64, strength: float, weight: float) -> None:
        """One event, newer than all others."""
        self.fade(self.keep)
        self.spread += weight * np.outer(f, f)
        self.pull += weight * strength * f
        self.mass += weight

    def fade(self, factor: float) -> None:
        """Every event so far weighs this much less."""
        self.spread *= factor
        self.pull *= factor
        self.mass *= factor
        self.faded += math.log(factor)


class InterestProfile:
    """One person's interests. Not for several threads at once.

    Args:
        side: what was released.
        catalogue: of the release.
        prior: m₀, float64[d], such as `taste.declared` gives for topics that a person named; zero if None.
        network: what lists are ordered by instead of the linear score; `side` is then its own.

    Attributes:
        items, strengths, weights: of each event so far, oldest first.
        drifts: where the taste was found to have changed.
    """

    def __init__(
        self,
        side: ItemSide,
        catalogue: Catalogue,
        config: InterestConfig | None = None,
        *,
        prior: Float64 | None = None,
        network: Scorer | None = None,
    ) -> None:
        if len(side.vectors) != len(catalogue):
            raise InvalidConfig(f"the release has {len(side.vectors)} items, the catalogue {len(catalogue)}")
        self.side, self.catalogue, self.config = side, catalogue, config or InterestConfig()
        self.network = network
        settings, d = side.config, side.vectors.shape[1]
        self.base: Float64 = settings.unseen * side.gram + settings.ridge * np.eye(d)
        self.prior: Float64 = np.zeros(d) if prior is None else np.asarray(prior, np.float64)
        self.long, self.recent = Memory(d, self.config.long), Memory(d, self.config.recent)
        self.items: list[int] = []
        self.strengths: list[float] = []
        self.weights: list[float] = []
        self.drifts: list[Drift] = []
        self._faded: list[tuple[float, float]] = []  # of both memories when the event came
        self._share, self._detector, self._contexts = Share(self.config.share), PageHinkley(), Contexts(d)
        self._trust = Share(0.5)  # in what a moment shifts
        self._haste = 0  # events for which the long-term memory still forgets faster
        self._sample = sample(side.order, self.config.dynamics.sample)
        self._follows = np.zeros(0 if side.transitions is None else side.transitions.leave.shape[1])
        self._hidden = np.zeros(len(catalogue), bool)
        self._refused = np.zeros(len(catalogue), bool)
        self._hidden[catalogue.is_retired] = True
        self._means: tuple[Float64, Float64] | None = None
        self._moment: tuple[dict[str, str], Float64 | None] | None = None
        self._standing: tuple[dict[str, str], Standing] | None = None
        self._readings: dict[int | None, Float32] = {}

    @classmethod
    def of(
        cls, side: ItemSide, catalogue: Catalogue, history: History, config: InterestConfig | None = None
    ) -> InterestProfile:
        """The profile after a history, oldest first; items outside the catalogue are left out."""
        made = cls(side, catalogue, config)
        known = history.known(len(catalogue))
        columns = known.items.tolist(), known.strengths.tolist(), known.times.tolist()
        for item, strength, time in zip(*columns, strict=True):
            made.update(item, strength=strength, time=time)
        return made

    def update(
        self,
        item: int,
        *,
        strength: float = 1.0,
        weight: float = 1.0,
        context: Mapping[str, str] | None = None,
        time: int | None = None,
    ) -> None:
        """Takes in one event, newer than all before; the next list knows of it.

        Args:
            item: position in the catalogue.
            strength: y in [0, 1], how strong a sign of interest.
            weight: o ≥ 0, how much the event says.
            context: categories of the moment, such as {"device": "phone"}.
            time: UTC milliseconds, only to mark a drift with.

        Raises:
            InvalidConfig: an item outside the catalogue, or numbers outside these ranges.
        """
        if not 0 <= item < len(self.catalogue):
            raise InvalidConfig(f"item {item} is outside the catalogue of {len(self.catalogue)}")
        if not 0 <= strength <= 1 or not 0 <= weight < math.inf:
            raise InvalidConfig(f"strength must be in [0, 1] and weight finite and ≥ 0, not {strength} and {weight}")
        settings, context = self.config.dynamics, checked(context or {})
        if settings.watches and weight * strength > 0:
            self._compare(item, min(1.0, weight * strength), time, context)
        f = self.side.vectors[item].astype(np.float64)
        if self._haste:
            self._haste -= 1
            self.long.fade(settings.fade)
        for memory in (self.long, self.recent):
            memory.add(f, strength, weight)
        if settings.context:
            self._contexts.add(context, weight * strength * f, weight, keep=self.config.long, most=settings.categories)
        self.items.append(item)
        self.strengths.append(strength)
        self.weights.append(weight)
        self._faded.append((self.long.faded, self.recent.faded))
        if self.side.transitions is not None:
            self._follows = self.side.config.transition_decay * self._follows + self.side.transitions.leave[item]
        if not self.config.again:
            self._hidden[item] = True
        self._means = self._moment = self._standing = None
        self._readings.clear()

    def _compare(self, item: int, said: float, time: int | None, context: Mapping[str, str]) -> None:
        """What the event that comes tells of the memories and of the moment, before they have it."""
        settings, side = self.config.dynamics, self.side
        others = self._sample[~self._hidden[self._sample]]
        looked = np.append(others[others != item], item)
        n = len(looked) - 1
        if not n:
            return
        vectors = side.vectors[looked].astype(np.float64)
        scores = np.stack(self.means()) @ vectors.T + self._rest(looked)
        losses = loss(scores[:, :-1], scores[:, -1])
        if settings.rate:
            if (moved := self._moved(context)) is not None:
                mixed = np.array([1 - self.share, self.share]) @ scores
                both = np.stack([mixed, mixed + vectors @ moved])
                found = np.log1p(n * loss(both[:, :-1], both[:, -1])) / math.log1p(n)
                self._trust.learn(found, settings.rate * said, settings.switch)
            self._share.learn(np.log1p(n * losses) / math.log1p(n), settings.rate * said, settings.switch)
        now = len(self.items)
        settled = now - (self.drifts[-1].event if self.drifts else 0) >= settings.haste
        if settings.threshold is None or not settled:
            return
        if self._detector.drifted(float(losses[0]), said, settings.slack, settings.threshold):
            self.drifts.append(Drift(now, time))
            self._haste = settings.haste

    @property
    def share(self) -> float:
        """w, of the recent memory in the taste."""
        return self._share.value

    def taste(self) -> Posterior:
        """The mixed mean, with the long-term memory's precision: what is uncertain is what was never met."""
        long, recent = self.means()
        return Posterior((1 - self.share) * long + self.share * recent, self.base + self.long.spread)

    def means(self) -> tuple[Float64, Float64]:
        """float64[d] each, of the long-term and the recent memory."""
        if self._means is None:
            self._means = self._solved(self.long), self._solved(self.recent)
        return self._means

    def _solved(self, memory: Memory) -> Float64:
        right = self.base @ self.prior + memory.pull
        return np.asarray(np.linalg.solve(self.base + memory.spread, right), np.float64)

    def _shifts(self, context: Mapping[str, str]) -> dict[str, Float64]:
        """By name of a category, float64[d], what the moment adds to b of the long-term memory."""
        settings = self.config.dynamics
        scale = settings.context * self._trust.value * self.long.mass
        return {name: scale * pull for name, pull in self._contexts.shifts(context, settings.shrink).items()}

    def _moved(self, context: Mapping[str, str]) -> Float64 | None:
        """float64[d], what the moment adds to the taste, kept until the next event; None where it adds nothing."""
        if self._moment is None or self._moment[0] != context:
            shifts = list(self._shifts(context).values())
            precision = self.base + self.long.spread
            self._moment = dict(context), np.linalg.solve(precision, np.sum(shifts, axis=0)) if shifts else None
        return self._moment[1]

    def _rest(self, items: Int64 | slice) -> Float32:
        """float32[n], what popularity and transitions give these items."""
        side = self.side
        rest: Float32 = np.float32(side.config.popularity) * side.popularity[items]
        if side.transitions is not None and side.config.transition:
            left = (side.config.transition * self._follows).astype(np.float32)
            rest = (rest + side.transitions.arrive[items] @ left).astype(np.float32)
        return rest

    def standing(self, context: Mapping[str, str] | None = None) -> Standing:
        """Scores of the whole catalogue now; kept until the next event.

        Args:
            context: categories of the moment; those never met change nothing.
        """
        now = {} if self.network else dict(context or {})  # a network reads no moment
        if self._standing is None or self._standing[0] != now:
            side, taste, rest = self.side, self.taste(), self._rest(slice(None))
            scores: Float32 = (side.vectors @ taste.mean.astype(np.float32) + rest).astype(np.float32)
            if (moved := self._moved(now)) is not None:
                shift: Float32 = side.vectors @ moved.astype(np.float32)
                rest, scores = rest + shift, scores + shift
            if self.network is not None:
                said = self.network.scores_of(self.reading())
                if np.isfinite(said).all():  # else the linear model's list is better than none
                    taste, scores, rest = self._by_network(said, taste, scores)
            scores[self._hidden | self._refused] = -np.inf
            self._standing = now, Standing(side.vectors, taste, scores, rest)
        return self._standing[1]

    @property
    def read(self) -> Int64:
        """int64[n], what a network reads: items of the events that said any interest, oldest first."""
        return np.array(self.items, np.int64)[np.array(self.strengths) > 0]

    def reading(self, but: int | None = None) -> Float32:
        """What a network makes of the person, or would without one item; kept until the next event."""
        assert self.network is not None
        if but not in self._readings:
            history = self.read if but is None else self.read[self.read != but]
            self._readings[but] = self.network.person(history) if len(history) else self.network.nobody
        return self._readings[but]

    def _by_network(self, scores: Float32, taste: Posterior, linear: Float32) -> tuple[Posterior, Float32, Float32]:
        spread = float(linear.std())
        ratio = float(scores.std()) / spread if spread > 0 else 1.0
        ratio = ratio or 1.0  # all scores alike: the list is the linear model's to explore
        taste = Posterior(ratio * taste.mean, taste.precision / ratio**2)
        rest: Float32 = (scores - self.side.vectors @ taste.mean.astype(np.float32)).astype(np.float32)
        return taste, scores, rest

    def hide(self, items: Bool) -> None:
        """Keeps these items out of every list from now on, such as `Preferences.hidden`: "not this topic".

        Args:
            items: bool[n_items]; what was hidden by an earlier call is shown again unless it is in here.

        Raises:
            InvalidConfig: another size than the catalogue's.
        """
        if items.shape != self._hidden.shape:
            raise InvalidConfig(f"hide needs one value for each of {len(self._hidden)} items, not {items.shape}")
        self._refused = items.astype(np.bool_)
        self._standing = None

    def recommend(
        self,
        n: int = 10,
        *,
        policy: Policy | None = None,
        random: np.random.Generator | None = None,
        context: Mapping[str, str] | None = None,
    ) -> list[Recommendation]:
        """The next n items, best first; fewer where the catalogue has no more.

        Args:
            policy: how a list is chosen; the best by score if None.
            random: what a policy draws from; the system's if None.
            context: categories of the moment, as `update` takes them.
        """
        standing, policy = self.standing(context), policy or Greedy()
        values = policy.values(standing, random or np.random.default_rng())
        shown = np.flatnonzero(standing.scores > -np.inf)  # what a rule holds back is better than nothing
        chosen = shown[_top(values[shown], n)]
        best = set(_top(standing.scores, n).tolist())
        return [
            Recommendation(self.catalogue.ids[i], i, float(standing.scores[i]), i not in best) for i in map(int, chosen)
        ]

    def score(self, item: int, *, context: Mapping[str, str] | None = None) -> float:
        """One item's score now, also where it is hidden."""
        if self.network is not None and math.isfinite(said := self.network.score_of(self.reading(), item)):
            return said
        return float(self.attribution(item, context=context).total)

    def attribution(self, item: int, *, context: Mapping[str, str] | None = None) -> Attribution:
        """Where one item's linear score comes from, event by event; the parts sum to it, to float32 rounding."""
        side, f = self.side, self.side.vectors[item].astype(np.float64)
        own = side.vectors[self.items].astype(np.float64)
        past, prior = np.zeros(len(self.items)), 0.0
        said = np.array(self.weights) * np.array(self.strengths)
        for which, (memory, part) in enumerate(((self.long, 1 - self.share), (self.recent, self.share))):
            pull = np.linalg.solve(self.base + memory.spread, f)
            kept = np.exp(memory.faded - np.array([faded[which] for faded in self._faded]))
            past += part * said * kept * (own @ pull)
            prior += part * float(pull @ self.base @ self.prior)
        shifts = self._shifts(context or {})
        towards = np.linalg.solve(self.base + self.long.spread, f) if shifts else f
        follows = np.zeros(len(self.items))
        if side.transitions is not None and side.config.transition:
            ages = np.arange(len(self.items) - 1, -1, -1.0)
            each = side.transitions.leave[self.items].astype(np.float64) @ side.transitions.arrive[item]
            follows = side.config.transition * side.config.transition_decay**ages * each
        return Attribution(
            past,
            follows,
            prior,
            side.config.popularity * float(side.popularity[item]),
            {name: float(towards @ pull) for name, pull in shifts.items()},
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All that the profile knows, as named arrays; the release and the catalogue are not among them.

        They hold a person's history: keep them on the device, and encrypted.
        """
        detector = self._detector
        times = [_UNTIMED if drift.time is None else drift.time for drift in self.drifts]
        return {
            "schema_version": np.array([SCHEMA_VERSION], np.int64),
            "release": np.frombuffer(self._release().encode(), np.uint8),
            "prior": self.prior.copy(),
            "spread": np.stack([self.long.spread, self.recent.spread]),
            "pull": np.stack([self.long.pull, self.recent.pull]),
            "memories": np.array([[memory.mass, memory.faded] for memory in (self.long, self.recent)]),
            "items": np.array(self.items, np.int64),
            "events": np.array([self.strengths, self.weights], np.float64),
            "faded": np.array(self._faded, np.float64).reshape(-1, 2),
            "follows": self._follows.copy(),
            "refused": self._refused.copy(),
            "follower": np.array(
                [self._share.value, self._trust.value, detector.n, detector.mean, detector.excess, self._haste]
            ),
            "drifts": np.array([[drift.event for drift in self.drifts], times], np.int64),
            **self._contexts.pack(),
        }

    @classmethod
    def from_arrays(
        cls,
        side: ItemSide,
        catalogue: Catalogue,
        config: InterestConfig | None,
        arrays: Arrays,
        *,
        network: Scorer | None = None,
    ) -> InterestProfile:
        """The profile that gave these arrays: all that follows is the same to the last bit.

        Raises:
            MalformedData: arrays that `to_arrays` of this version did not give.
            InvalidConfig: a profile over another release or catalogue; make it anew from the history.
        """
        made = cls(side, catalogue, config, network=network)
        empty = made.to_arrays()
        version = arrays.get("schema_version")
        if version is None or version.tolist() != [SCHEMA_VERSION]:
            raise MalformedData(f"a saved profile of another version than {SCHEMA_VERSION}; make it from the history")
        if set(arrays) != set(empty) or any(
            arrays[name].dtype != like.dtype or arrays[name].ndim != like.ndim for name, like in empty.items()
        ):
            raise MalformedData("a saved profile with missing, foreign or mistyped arrays; make it from the history")
        if arrays["release"].tobytes() != empty["release"].tobytes():
            raise InvalidConfig("a saved profile of another release or catalogue; make it from the history")
        n, k = len(arrays["items"]), len(arrays["context_weights"])
        grown = {"events": (2, n), "faded": (n, 2), "items": (n,), "drifts": (2, arrays["drifts"].shape[-1])}
        grown |= {"context_pulls": (k, len(made.prior)), "context_weights": (k,)}
        grown |= {"context_names": arrays["context_names"].shape}
        if any(arrays[name].shape != grown.get(name, like.shape) for name, like in empty.items()):
            raise MalformedData("a saved profile whose arrays do not fit each other; make it from the history")
        if not all(np.isfinite(values).all() for values in arrays.values()):
            raise MalformedData("a saved profile with numbers that are not finite; make it from the history")
        if n and not 0 <= arrays["items"].min() <= arrays["items"].max() < len(catalogue):
            raise MalformedData("a saved profile with items outside the catalogue; make it from the history")
        try:
            made._take(arrays)
        except (ValueError, TypeError) as e:
            raise MalformedData("a saved profile whose categories cannot be read; make it from the history") from e
        return made

    def _take(self, arrays: Arrays) -> None:
        self.prior, self._refused = arrays["prior"].copy(), arrays["refused"].copy()
        for which, memory in enumerate((self.long, self.recent)):
            memory.spread, memory.pull = arrays["spread"][which].copy(), arrays["pull"][which].copy()
            memory.mass, memory.faded = arrays["memories"][which].tolist()
        self.items = arrays["items"].tolist()
        self.strengths, self.weights = arrays["events"].tolist()
        self._faded = [(long, recent) for long, recent in arrays["faded"].tolist()]
        self._follows = arrays["follows"].copy()
        if not self.config.again:
            self._hidden[self.items] = True
        detector = self._detector
        follower = arrays["follower"].tolist()
        self._share.value, self._trust.value, detector.n, detector.mean, detector.excess, haste = follower
        self._haste = int(haste)
        self.drifts = [Drift(event, None if time == _UNTIMED else time) for event, time in arrays["drifts"].T.tolist()]
        self._contexts.unpack(arrays["context_names"].tobytes(), arrays["context_pulls"], arrays["context_weights"])

    def _release(self) -> str:
        """Digest of what the state is about: vectors, what follows what, and the catalogue's order."""
        follows = self.side.transitions
        ids = np.frombuffer(Strings.of(self.catalogue.ids).text, np.uint8)
        about: dict[str, np.ndarray] = {"vectors": self.side.vectors, "ids": ids}
        if follows is not None:
            about |= {"leave": follows.leave, "arrive": follows.arrive}
        return content_digest(about)


def _top(values: Float32 | Float64, n: int) -> Int64:
    """int64[≤ n], positions of the largest, largest first; ties by position."""
    n = min(max(n, 0), len(values))
    if 0 < n < len(values):
        edge = np.partition(values, len(values) - n)[len(values) - n]
        kept = np.flatnonzero(values >= edge)
    else:
        kept = np.arange(len(values))
    found: Int64 = kept[np.argsort(-values[kept], kind="stable")][:n]
    return found
