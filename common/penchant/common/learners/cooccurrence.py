"""Item vectors from one noised sum of who-goes-with-what, and no training rounds.

Round 1 asks for item counts, to publish a list of head items; round 2 for pairs of head items that stand close together
in a history; round 3, where the budget allows, for what follows what. Each device sends a vector of length 1, so the
clip at C = 1 never bites an honest one:

    counts       1/√n at each of its n different items
    matrix       over its ordered head items: the q distinct unordered pairs at most w apart, and each item with itself,
                 1/√q at each; the K(K+1)/2 unique entries of a symmetric K×K matrix are all that is sent or noised
    transitions  its distinct ordered pairs of different items at most w' apart, φ^(gap − 1) at each, scaled to length 1

Something done again and again in a row is one step of a history here. From the noised sums, with x the released counts
of the head over their mean, kept above a floor:

    S = D (Σ + noise) D,  D = diag x^−s      eigenvalues above the noise's edge (`spectral.py`)  →  Q√l
    F = Q√l shrunk, each row divided by its length^ρ, all scaled to a mean square length of 1, or less where even the
        first column barely stands above the noise;  beside g × public features
    T = Dₗ (Σ + noise) Dₐ                    singular values likewise, shrunk  →  leave = U s,  arrive = V

Dividing by a power of popularity, which is released anyway, keeps the first vectors from being popularity over again.
An item outside the head is placed by its public features (`newcomers.py`). The rest is `taste.py`, on the device.

Privacy: adding or removing a person moves each sum by at most 1, so with σ = 1/(μ√share) for each the sums together are
exactly μ-GDP (`split`); every setting is public beforehand, and `automatic` chooses them from n·μ alone.

Sources: Dong et al. 2019, https://arxiv.org/abs/1905.02383 (composition); Ng, Jordan and Weiss 2001, On Spectral
Clustering, section 2 (dividing by popularity, there with s = ½; under noise less is better).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.common.arrays import Arrays, Float32, Float64, Int32, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.content import ContentConfig
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions, runs
from penchant.common.learners import newcomers, spectral
from penchant.common.learners.contract import Learner, Randoms, State
from penchant.common.privacy.plan import SumSpec
from penchant.common.privacy.sums import Clip, Shapes
from penchant.common.streams import Streams
from penchant.common.taste import ItemSide, TasteConfig, Transitions

Keys = npt.NDArray[np.signedinteger[Any]]
BLOCK = 1 << 20
"""Interactions whose steps are found at once."""
CELLS = 1 << 18
"""Keys that are sorted at once: what a core's cache holds."""
USER_SIDE = TasteConfig(decay=0.7, unseen=0.015, ridge=0.3, popularity=0.3, transition=0.4, transition_decay=0.6)


@dataclass(frozen=True, kw_only=True)
class TransitionConfig:
    """Settings of the sum of what follows what.

    Attributes:
        window: w', how far apart two items may stand.
        fade: φ in (0, 1], weight of a pair for each step more between them.
        dims: most singular vectors kept.
        leave, arrive: powers of popularity divided out of the item before and the item after; ≥ 0.
        noise_stddev: of the sum, known from the plan.
    """

    window: int = 3
    fade: float = 0.85
    dims: int = 64
    leave: float = 0.25
    arrive: float = 0.5
    noise_stddev: float = 0.0

    def __post_init__(self) -> None:
        if self.window < 1 or self.dims < 1 or not 0 < self.fade <= 1:
            raise InvalidConfig("transitions: window and dims must be ≥ 1 and fade in (0, 1]")
        for name in ("leave", "arrive", "noise_stddev"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidConfig(f"transitions: {name} must be finite and ≥ 0, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class CooccurrenceConfig:
    """Public settings, fixed before anybody takes part.

    Attributes:
        head: K, items that get a vector from the sum; ≥ 2.
        window: w, how far apart two items may stand.
        dims: k, most eigenvectors kept.
        whiten: s ≥ 0, power of popularity divided out of both sides.
        even: ρ in [0, 1], how far vectors are brought to one length.
        tail: weight of the vectors that public features give items outside the head; ≥ 0.
        content: g ≥ 0, weight of the public features.
        features: how the public catalogue becomes numbers.
        counts_stddev, noise_stddev: of the sums of counts and pairs, known from the plan. 0 without noise.
        transitions: of the third sum; None leaves it out.
        taste: settings of the user side.
    """

    head: int = 800
    window: int = 10
    dims: int = 48
    whiten: float = 0.25
    even: float = 0.6
    tail: float = 0.5
    content: float = 0.5
    features: ContentConfig = field(default_factory=ContentConfig)
    counts_stddev: float = 0.0
    noise_stddev: float = 0.0
    transitions: TransitionConfig | None = None
    taste: TasteConfig = field(default_factory=lambda: USER_SIDE)

    def __post_init__(self) -> None:
        if self.head < 2 or self.window < 1 or self.dims < 1:
            raise InvalidConfig("head must be ≥ 2, window and dims ≥ 1")
        for name in ("whiten", "tail", "content", "counts_stddev", "noise_stddev"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} must be finite and ≥ 0, not {getattr(self, name)}")
        if not 0 <= self.even <= 1:
            raise InvalidConfig(f"even must be in [0, 1], not {self.even}")


def split(mu: float, counts_share: float = 0.2, transitions_share: float = 0.0) -> tuple[SumSpec, ...]:
    """The sums of a plan with Gaussian budget μ, each with its share of μ²; infinite μ is no noise.

    Args:
        transitions_share: 0 leaves the third sum out.
    """
    matrix_share = 1.0 - counts_share - transitions_share
    if not (mu > 0.0 and 0.0 < counts_share < 1.0 and 0.0 <= transitions_share < 1.0 and matrix_share > 0.0):
        raise InvalidConfig("mu must be positive, and the shares positive with a sum below 1")
    shares = {"counts": counts_share, "matrix": matrix_share, "transitions": transitions_share}
    return tuple(
        SumSpec(name=name, rounds=1, clip_norm=1.0, noise_multiplier=1 / (mu * math.sqrt(share)))
        for name, share in shares.items()
        if share > 0
    )


def automatic(
    n_users: int, mu: float, *, counts_share: float = 0.2, most_transitions: float = 0.2
) -> tuple[CooccurrenceConfig, tuple[SumSpec, ...]]:
    """Settings and sums for so many people and a Gaussian budget μ, from n·μ alone; infinite μ is no noise.

    The signal of an item grows with n and its popularity, the noise's edge is 2σ√K ∝ √K/μ: what stands above it depends
    on n·μ, and each further item raises the edge for all. Were popularity to fall as 1/rank, the last item of the head
    would have a signal ∝ n/K, which stays at a given share of the edge for K ∝ (n·μ)^⅔; catalogues fall more slowly at
    first and faster later, and K = 8 √(n·μ) fitted best. Transitions have twice the entries and only short-range pairs,
    so they pay later: their share of μ² is `most_transitions` · n·μ/(n·μ + 8 000), and none below 0.05.

    The constants were fitted once, on the validation items of MovieLens-100K, ml-latest-small and 6 000 synthetic
    people with n·μ from 250 to ∞, all together; on anything else they look at nobody.
    """
    if n_users < 1 or not mu > 0:
        raise InvalidConfig("n_users must be ≥ 1 and mu positive")
    signal = n_users * mu
    share = most_transitions if signal == math.inf else round(most_transitions * signal / (signal + 8000), 3)
    sums = split(mu, counts_share, share if share >= 0.05 else 0.0)
    stddev = {spec.name: spec.noise_multiplier for spec in sums}
    transitions = TransitionConfig(noise_stddev=stddev["transitions"]) if "transitions" in stddev else None
    config = CooccurrenceConfig(
        head=1600 if signal == math.inf else max(50, min(1600, round(8 * math.sqrt(signal)))),
        counts_stddev=stddev["counts"],
        noise_stddev=stddev["matrix"],
        transitions=transitions,
    )
    return config, sums


class Cooccurrence(Learner):
    """Two or three rounds: counts, then the matrix, then transitions."""

    name = "cooccurrence"

    def __init__(self, catalogue: Catalogue, config: CooccurrenceConfig) -> None:
        super().__init__(catalogue, config.features)
        self.config = config

    def init(self, streams: Streams) -> State:
        return {"popularity": np.zeros(len(self.catalogue), np.float32)}

    def shapes(self, state: State) -> Shapes:
        asked = self._asked(state)
        if asked == "counts":
            return {asked: (len(self.catalogue),)}
        k = len(state["head"])  # as it was cut, whatever the catalogue has become
        return {asked: (k * (k + 1) // 2 if asked == "matrix" else k * k,)}

    def apply(self, state: State, noisy_sum: Arrays, divisor: float) -> State:
        ((asked, total),) = noisy_sum.items()
        if asked == "counts":
            return self._counted(total)
        if asked == "matrix":
            return {**state, "vectors": self._vectors(state, total)}
        return {**state, **self._transitions(state, total)}

    def _asked(self, state: State) -> str:
        if "head" not in state:
            return "counts"
        if "vectors" in state and "leave" not in state and self.config.transitions is not None:
            return "transitions"
        return "matrix"

    def _contribution(self, state: State, history: History, streams: Streams) -> Arrays:
        ((name, (size,)),) = self.shapes(state).items()
        out = np.zeros(size, np.float32)
        for found in self._question(state).entries(Interactions.one(history, len(self.catalogue))):
            out[found.at] = found.values[found.who, found.level]
        return {name: out}

    def _partial_sum(self, state: State, histories: Interactions, clip: Clip, randoms: Randoms) -> Arrays:
        ((name, (size,)),) = self.shapes(state).items()
        total = np.zeros(size, np.float64)
        question = self._question(state)
        for run in runs(histories.lengths, BLOCK):
            for found in question.entries(histories.select(range(run.start, run.stop))):
                clipped = clip.repeated(found.values, found.times).astype(np.float64)
                np.add.at(total, found.at, clipped[found.who, found.level])
        return {name: total}

    def _question(self, state: State) -> Question:
        """What a device with this state is asked for."""
        asked = self._asked(state)
        if asked == "counts":
            n = len(self.catalogue)
            return Question(np.arange(n, dtype=np.int32), 0, lambda own: own, np.ones(1))
        k, window, rule = len(state["head"]), self.config.window, self.config.transitions
        place = np.full(len(self.catalogue), -1, np.int32)
        place[state["head"]] = np.arange(k)
        if asked == "matrix" or rule is None:
            return Question(place, window, lambda own: pair_keys(own, window, k), np.ones(1))
        fades = np.float64(rule.fade) ** np.arange(rule.window, dtype=np.float64)
        return Question(place, rule.window, lambda own: transition_keys(own, rule.window, k), fades)

    def item_side(self, state: State) -> ItemSide:
        content = np.float32(self.config.content) * self.content
        vectors = np.hstack([state["vectors"], content]) if "vectors" in state else content
        follows = Transitions(state["leave"], state["arrive"]) if "leave" in state else None
        return ItemSide(vectors, state["popularity"], self.config.taste, follows, content=content.shape[1])

    def _scores(self, state: State, histories: Interactions) -> Float32:
        return self.item_side(state).scores(histories)

    def _adopted(self, name: str, state: State, place: Int64) -> npt.NDArray[Any]:
        values = state[name]
        if name == "head":
            return np.asarray(place[values], np.int32)
        if not values.ndim:
            return values
        moved, known = newcomers.grown(values, place, len(self.catalogue))
        if name != "vectors":
            return moved
        placed = self._placed(moved, place[state["head"]])
        return np.where(known[:, None], moved, placed)

    def _counted(self, counts: Float32) -> State:
        """Head and popularity; a count below `floor` says nothing: half the head's mean, and twice the noise."""
        head = np.sort(np.argsort(-counts, kind="stable")[: self.config.head]).astype(np.int32)
        top = float(counts.max())
        popularity = np.clip(counts / top, 0, 1) if top > 0 else np.zeros_like(counts)
        floor = max(0.5 * float(popularity[head].mean()), 2 * self.config.counts_stddev / top if top > 0 else 1.0, 1e-6)
        return {"popularity": popularity.astype(np.float32), "head": head, "floor": np.array(floor, np.float32)}

    def _scale(self, state: State, power: float) -> Float64:
        """float64[K], x^−power."""
        counts = np.maximum(state["popularity"][state["head"]].astype(np.float64), float(state["floor"]))
        return np.asarray((counts / counts.mean()) ** -power)

    def _vectors(self, state: State, upper: Float32) -> Float32:
        """float32[n_items, k]."""
        config, scale = self.config, self._scale(state, self.config.whiten)
        k = len(state["head"])
        matrix = np.zeros((k, k))
        matrix[np.triu_indices(k)] = upper
        matrix += np.triu(matrix, 1).T
        edge = spectral.symmetric_edge(config.noise_stddev, scale)
        own, left = spectral.top_symmetric(matrix * scale[:, None] * scale, edge, config.dims)
        own = own * left
        own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12) ** config.even
        own /= max(math.sqrt(float((own**2).sum(axis=1).mean())), 1e-12)
        return self._placed(self._everywhere(state, own * left.max(initial=0.0)), state["head"])

    def _transitions(self, state: State, total: Float32) -> dict[str, Float32]:
        """leave and arrive, float32[n_items, k]; rows of `leave` have a mean square length of 1 over the head."""
        rule = self.config.transitions or TransitionConfig()
        left, right = self._scale(state, rule.leave), self._scale(state, rule.arrive)
        matrix = total.reshape(len(left), len(left)).astype(np.float64) * left[:, None] * right
        leave, arrive = spectral.top(matrix, spectral.edge(rule.noise_stddev, left, right), rule.dims)
        leave = leave / max(math.sqrt(float((leave**2).sum(axis=1).mean())), 1e-12)
        return {"leave": self._everywhere(state, leave), "arrive": self._everywhere(state, arrive)}

    def _everywhere(self, state: State, own: Float64) -> Float32:
        """float32[n_items, k]: the head's rows in their places, zeros elsewhere."""
        out = np.zeros((len(self.catalogue), own.shape[1]), np.float32)
        out[state["head"]] = own
        return out

    def _placed(self, vectors: Float32, head: npt.NDArray[Any]) -> Float32:
        """The vectors, with those of items outside the head as their public features predict, at weight `tail`."""
        known = np.zeros(len(self.catalogue), np.bool_)
        known[head] = True
        placed = newcomers.from_content(vectors, known, self.content)
        return np.where(known[:, None], placed, np.float32(self.config.tail) * placed)


class Continued(Learner):
    """A learner whose first rounds are co-occurrence's, and whose user side reads a state as that one does."""

    def __init__(self, catalogue: Catalogue, start: CooccurrenceConfig) -> None:
        super().__init__(catalogue, start.features)
        self.start = Cooccurrence(catalogue, start)

    def init(self, streams: Streams) -> State:
        return self.start.init(streams)

    def item_side(self, state: State) -> ItemSide:
        return self.start.item_side(state)

    def _scores(self, state: State, histories: Interactions) -> Float32:
        return self.start.scores(state, histories)

    def _adopted(self, name: str, state: State, place: Int64) -> npt.NDArray[Any]:
        return self.start._adopted(name, state, place)


@dataclass(frozen=True)
class Entries:
    """Where the contributions of n people are not zero, each place of a person once.

    Attributes:
        at: int64[m], positions in a contribution.
        who: int64[m], whose, in [0, n).
        level: int64[m], which of that person's values stands there.
        times: int64[n, L], at how many places each value stands.
        values: float32[n, L], with which a contribution that is not all zero has an L2 norm of 1.
    """

    at: Int64
    who: Int64
    level: Int64
    times: Int64
    values: Float32


@dataclass(frozen=True)
class Question:
    """What one of the sums asks of a person.

    Attributes:
        place: int32[n_items], the number of each item that it asks about; −1 for the others.
        window: how far apart two of a person's steps may be.
        keys: from the steps of people who have m each, int32[n, m], the positions of their entries, int[n, p] with
            p ≤ m (window + 1), in any order and with repetitions: each times L, plus its level, or NOTHING of its type.
        fades: float64[L], the values by level, before they are scaled. Of one position the lowest level stays.
    """

    place: Int32
    window: int
    keys: Callable[[Int32], Keys]
    fades: Float64

    def entries(self, histories: Interactions) -> Iterator[Entries]:
        """Everybody's entries, some people at a time and everybody once, in an order of its own.

        People with equally many steps form a table, so that nothing in it has to say whose it is, and each is sorted
        alone: at a tenth of the cost of one long sort.
        """
        own, who = steps(self.place[histories.items], histories.rows)
        lengths = np.bincount(who, minlength=histories.n_users)
        starts, order = np.cumsum(lengths) - lengths, np.argsort(lengths, kind="stable")
        for alike in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
            length = int(lengths[alike[0]]) if len(alike) else 0
            size = max(1, CELLS // max(1, length * (self.window + 1)))
            for first in range(0, len(alike), size):
                people = alike[first : first + size]
                yield self._distinct(self.keys(own[starts[people, None] + np.arange(length)]))

    def _distinct(self, keys: Keys) -> Entries:
        """Of keys [n, p], which are sorted in place."""
        n_people, n_levels = len(keys), len(self.fades)
        keys.sort(axis=1)
        at, level = (keys, np.zeros_like(keys)) if n_levels == 1 else np.divmod(keys, keys.dtype.type(n_levels))
        own = keys < np.iinfo(keys.dtype).max
        own[:, 1:] &= at[:, 1:] != at[:, :-1]
        cells = np.flatnonzero(own)
        who = np.repeat(np.arange(n_people), np.count_nonzero(own, axis=1))
        level = level.ravel()[cells].astype(np.int64)
        times = np.bincount(who * n_levels + level, minlength=n_people * n_levels).reshape(n_people, n_levels)
        squares = np.zeros(n_people)
        for number, fade in enumerate(self.fades):  # in one order, so that one person alone gets the same bits
            squares += times[:, number] * fade**2
        values = self.fades / np.maximum(np.sqrt(squares), 1e-12)[:, None]
        return Entries(at.ravel()[cells].astype(np.int64), who, level, times, values.astype(np.float32))


def steps(places: Int32, who: Int32) -> tuple[Int32, Int32]:
    """Places in the head, in order, once for each run of the same, and whose they are.

    Args:
        places: int32[n], of each item in the head, oldest first; negative where it is not in the head, and then it
            takes no room in a window either.
        who: int32[n], whose; one person's stand together.

    >>> [found.tolist() for found in steps(np.array([4, 4, -1, 4, 2, 4, 4]), np.array([0, 0, 0, 0, 0, 0, 1]))]
    [[4, 2, 4, 4], [0, 0, 0, 1]]
    """
    inside = np.flatnonzero(places >= 0)
    own, who = places[inside], who[inside]
    first = np.ones(len(own), np.bool_)
    first[1:] = (own[1:] != own[:-1]) | (who[1:] != who[:-1])
    return own[first], who[first]


def pair_keys(own: Int32, window: int, head: int) -> Keys:
    """Positions in the upper triangle (row by row) of each step with itself and with those at most `window` before it.

    >>> pair_keys(np.array([[0, 2, 0]]), window=1, head=3).tolist()  # (0,0) (2,2) (0,0); (0,2) (0,2)
    [[0, 5, 0, 2, 2]]
    """
    row = np.arange(head)
    start: Keys = (row * head - row * (row - 1) // 2 - row).astype(_type(head * (head + 1) // 2))
    pairs = [start[own] + own]
    for gap in range(1, min(window, own.shape[1] - 1) + 1):
        a, b = own[:, :-gap], own[:, gap:]
        pairs.append(start[np.minimum(a, b)] + np.maximum(a, b))
    return np.concatenate(pairs, axis=1)


def transition_keys(own: Int32, window: int, head: int) -> Keys:
    """Positions (row by row) of ordered pairs of different steps at most `window` apart, times it, plus the gap − 1.

    >>> transition_keys(np.array([[0, 1, 2]]), window=2, head=3).tolist()  # (0,1) (1,2) at gap 1; (0,2) at gap 2
    [[2, 10, 5]]
    """
    kind = _type(head * head * window)
    wide, pairs = own.astype(kind), [np.zeros((len(own), 0), kind)]
    for gap in range(1, min(window, own.shape[1] - 1) + 1):
        a, b = wide[:, :-gap], wide[:, gap:]
        pairs.append(np.where(a != b, (a * head + b) * window + (gap - 1), np.iinfo(kind).max))
    return np.concatenate(pairs, axis=1)


def _type(size: int) -> np.dtype[np.signedinteger[Any]]:
    """The narrowest for keys below `size`: half the width is sorted in less than half the time."""
    return np.dtype(np.int32 if size < np.iinfo(np.int32).max else np.int64)
