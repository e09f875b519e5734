"""Whether exploring pays: lists shown to simulated people whose taste is known, and who gain an interest unannounced.

A person likes item i with probability 0.05 + 0.9 m_i · w, m the item's topics and w the person's interests: at most 0.5
for those that their history shows, and 0.9 for one more from step `PLANTED` on, of which no profile knows. At each step
they see ten items, none of the last three lists among them, and take each with that probability; the profile hears of
all ten. Items are known by vectors as a release has them: the topics turned into other coordinates, with noise.

    regret = Σ over steps and places of P(liked | the oracle's list) − P(liked | the list shown)

The oracle knows w and keeps to the same rule of repeats. Every policy meets the same people, interests and luck, and is
chosen from as many settings, by regret, on a seed that is not reported: greedy from four memories, which the others
take over, and each of these from four strengths.

Source: Chapelle and Li 2011, section 3, for the comparison; the synthetic truth of `data/synthetic.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from penchant.common import metrics
from penchant.common.arrays import Bool, Float64, Int32, Int64
from penchant.common.interests import STILL, Greedy, InterestConfig, InterestProfile, Policy, Standing
from penchant.common.interests.exploration import Diverse, EpsilonGreedy, LongTail, Thompson, UpperBound, head
from penchant.common.streams import Streams
from penchant.common.taste import ItemSide, Posterior, TasteConfig
from penchant.simulations.data.synthetic import Synthetic, synthetic
from penchant.simulations.evaluation import Resamples
from penchant.simulations.interests import offpolicy
from penchant.simulations.interests.releases import Table, interval

LIST, HELD = 10, 3
ITEMS, TOPICS, DIM, NOISE = 2000, 32, 48, 0.5
FLOOR, SLOPE, KNOWN, NEW = 0.05, 0.9, 0.5, 0.9
PLANTED = 0.25
"""Of the steps, how many pass before the new interest."""
RULED = "Thompson, MMR, tail"
"""The chosen Thompson, whose lists keep to the other rules too, at their usual settings."""
COMPARED: Mapping[float, Sequence[str]] = {
    0.3: ("ε-greedy", "UCB", "Thompson", RULED),
    1.0: ("ε-greedy", "Thompson"),
}
"""By what an item weighs that was shown and not taken, where one that was taken weighs 1: what greedy meets."""
TUNING = 1000
"""Added to a seed for the people that settings are chosen on."""

MEMORIES = tuple(
    InterestConfig(long=0.995, recent=recent, share=share, again=True, dynamics=STILL)  # so that only policies differ
    for recent, share in ((0.95, 0.0), (0.95, 0.3), (0.95, 0.6), (0.98, 0.6))
)
STRENGTHS: Mapping[str, Sequence[Policy]] = {
    "ε-greedy": [EpsilonGreedy(chance=chance, places=LIST) for chance in (0.03, 0.1, 0.2, 0.3)],
    "UCB": [UpperBound(strength=strength) for strength in (0.1, 0.3, 0.6, 1.0)],
    "Thompson": [Thompson(strength=strength) for strength in (0.003, 0.01, 0.03, 0.1)],
}


@dataclass(frozen=True)
class World:
    """People, what they like, and what a device knows of the items.

    Attributes:
        data: histories of before, with their truth.
        side: noisy item vectors.
        likes: float64[2, n_people, n_items], probability before and after the new interest.
        topic: int64[n_people], of the new interest.
        of_it: bool[n_topics, n_items], items at least half of which is this topic.
    """

    data: Synthetic
    side: ItemSide
    likes: Float64
    topic: Int64
    of_it: Bool

    @classmethod
    def of(cls, people: int, seed: int, items: int = ITEMS) -> World:
        data = synthetic(users=people, items=items, interactions=20, topics=TOPICS, drift=0.0, follow=0.0, seed=seed)
        streams, truth = Streams(seed).child("explore"), data.truth
        interests = KNOWN * truth.start.astype(np.float64) / truth.start.max(axis=1, keepdims=True)
        unknown = interests < 0.02 * KNOWN  # fewer than one event in fifty tells of it
        topic = np.argmax(unknown * streams.get("topic").random(unknown.shape), axis=1)
        after = interests.copy()
        after[np.arange(people), topic] = NEW
        likes = FLOOR + SLOPE * np.stack([interests, after]) @ truth.memberships.T
        random = streams.get("vectors")
        turned = np.linalg.qr(random.standard_normal((DIM, DIM)))[0][:TOPICS]
        unit = truth.memberships / np.linalg.norm(truth.memberships, axis=1, keepdims=True)
        vectors = unit @ turned + NOISE * random.standard_normal((items, DIM)) / np.sqrt(DIM)
        counts = data.interactions.counts().astype(np.float32)
        side = ItemSide(vectors.astype(np.float32), counts / counts.max(), TasteConfig())
        return cls(data, side, likes, topic, truth.memberships.T >= 0.5)


class Crowd:
    """`InterestProfile` for many people at once, who each have as many events at a time.

    Only what this evaluation needs: no transitions, and what a person had may be shown again. A test holds that it is
    the profile's own arithmetic.
    """

    def __init__(self, side: ItemSide, profiles: Sequence[InterestProfile]) -> None:
        self.vectors, self.base = side.vectors.astype(np.float64), profiles[0].base
        self.side, self.share = side, profiles[0].config.share
        memories = [(one.long, one.recent) for one in profiles]
        self.keep = [memory.keep for memory in memories[0]]
        self.spread = [np.stack([both[k].spread for both in memories]) for k in range(2)]
        self.pull = [np.stack([both[k].pull for both in memories]) for k in range(2)]
        self.rest = (np.float32(side.config.popularity) * side.popularity).astype(np.float32)

    def update(self, items: Int32, strengths: Float64, weights: Float64) -> None:
        """Events int[n_people, k], the oldest first, all newer than those before."""
        f, k = self.vectors[items], items.shape[1]
        for which, keep in enumerate(self.keep):
            weighted = f * (weights * keep ** np.arange(k - 1, -1, -1.0))[:, :, None]
            self.spread[which] = keep**k * self.spread[which] + weighted.transpose(0, 2, 1) @ f
            self.pull[which] = keep**k * self.pull[which] + np.einsum("pkd,pk->pd", weighted, strengths)

    def standings(self, held: Int32) -> Iterator[Standing]:
        """One person after another.

        Args:
            held: int[n_people, any], items that must not be shown now.
        """
        long, recent = (
            np.linalg.solve(self.base + spread, pull[:, :, None])[:, :, 0]
            for spread, pull in zip(self.spread, self.pull, strict=True)
        )
        mean, precision = (1 - self.share) * long + self.share * recent, self.base + self.spread[0]
        scores = (mean.astype(np.float32) @ self.side.vectors.T + self.rest).astype(np.float32)
        np.put_along_axis(scores, held, np.float32(-np.inf), axis=1)
        for u in range(len(mean)):
            yield Standing(self.side.vectors, Posterior(mean[u], precision[u]), scores[u], self.rest)


@dataclass(frozen=True)
class Walk:
    """What came of one policy.

    Attributes:
        lists: int32[n_people, n_steps, LIST], what was shown.
        expected: float64[n_people, n_steps], expected number of items liked.
        found: int64[n_people], steps from the new interest to the first item of it that was taken; n_steps if none.
    """

    lists: Int32
    expected: Float64
    found: Int64


def walk(world: World, policy: Policy | None, config: InterestConfig, *, steps: int, ignored: float, seed: int) -> Walk:
    """Shows lists for so many steps.

    Args:
        policy: None for the oracle.
        config: of the profiles.
        ignored: weight of an item that was shown and not taken.
        seed: of the policy's draws and of people's; two policies with the same seed meet the same luck.
    """
    people, n_items = world.likes.shape[1:]
    data, streams = world.data, Streams(seed).child("walk")
    catalogue = data.catalogue
    crowd = Crowd(world.side, [InterestProfile.of(world.side, catalogue, one, config) for one in data.interactions])
    randoms = [streams.get("policy", u) for u in range(people)]
    luck = streams.get("luck")
    rows, planted = np.arange(people)[:, None], round(PLANTED * steps)
    lists = np.zeros((people, steps, LIST), np.int32)
    expected, found = np.zeros((people, steps)), np.full(people, steps)
    values = np.empty((people, n_items))
    for step in range(steps):
        likes = world.likes[int(step >= planted)]
        held = lists[:, max(0, step - HELD) : step].reshape(people, -1)
        if policy is None:
            values[:] = likes
            np.put_along_axis(values, held, -np.inf, axis=1)
        else:
            for u, standing in enumerate(crowd.standings(held)):
                values[u] = policy.values(standing, randoms[u])
        shown = lists[:, step] = metrics.best(values, LIST)
        chance = likes[rows, shown]
        expected[:, step] = chance.sum(axis=1)
        taken = luck.random((people, LIST)) < chance
        if step >= planted:
            met = (taken & world.of_it[world.topic[:, None], shown]).any(axis=1)
            found = np.where(met & (found == steps), step - planted, found)
        if policy is not None:
            crowd.update(shown, taken.astype(np.float64), np.where(taken, 1.0, ignored))
    return Walk(lists, expected, found)


@dataclass(frozen=True)
class Chosen:
    """A policy with the setting that did best on the tuning people.

    Attributes:
        words: the setting.
    """

    policy: Policy
    config: InterestConfig
    words: str


def tuned(world: World, names: Sequence[str], *, steps: int, ignored: float, seed: int) -> dict[str, Chosen]:
    """Greedy and these policies of `STRENGTHS`, each at the least regret of its four settings."""

    def liked(policy: Policy, config: InterestConfig) -> float:
        return float(walk(world, policy, config, steps=steps, ignored=ignored, seed=seed).expected.sum())

    config = max(MEMORIES, key=lambda one: liked(Greedy(), one))
    out = {"greedy": Chosen(Greedy(), config, f"recent {config.recent:g}, share {config.share:g}")}
    for name in names:
        best = max(STRENGTHS[name], key=lambda one: liked(one, config))
        strength = best.chance if isinstance(best, EpsilonGreedy) else getattr(best, "strength", 0.0)
        out[name] = Chosen(best, config, f"{'ε' if name == 'ε-greedy' else 'α'} = {strength:g}")
    return out


def table(*, people: int = 200, seeds: int = 5, steps: int = 200, seed: int = 0) -> Table:
    """Regret and the time to find the new interest, for each policy against greedy, over the same people."""
    tuning = World.of(max(people // 2, 1), seed + TUNING)
    worlds = [World.of(people, seed + k) for k in range(seeds)]
    oracles = [
        walk(world, None, MEMORIES[0], steps=steps, ignored=0.0, seed=seed + k) for k, world in enumerate(worlds)
    ]
    rows: list[list[str]] = []
    notes = [
        f"Synthetic truth: {people} people × {seeds} seeds, {ITEMS:,} items, {TOPICS} topics, {steps} lists of {LIST}, "
        f"the new interest at list {round(PLANTED * steps)}; nobody's data, so no ε. 95 % intervals over people and "
        "seeds, differences paired. Regret is in items liked; who never finds the interest counts as "
        f"{steps} lists. Each policy has the best of four settings on other people."
    ]
    for ignored, names in COMPARED.items():
        own = [name for name in names if name != RULED]
        chosen = tuned(tuning, own, steps=steps, ignored=ignored, seed=seed + TUNING)
        if RULED in names:
            chosen[RULED] = chosen["Thompson"]

        def shown(name: str, k: int, chosen: Mapping[str, Chosen] = chosen, ignored: float = ignored) -> Walk:
            world, policy, config = worlds[k], chosen[name].policy, chosen[name].config
            if name == RULED:
                policy = LongTail(Diverse(policy), head=head(world.side.popularity))
            return walk(world, policy, config, steps=steps, ignored=ignored, seed=seed + k)

        walks = {name: [shown(name, k) for k in range(seeds)] for name in chosen}
        found, better = _rows(chosen, walks, oracles, worlds, round(PLANTED * steps))
        rows += [[f"{cells[0]}, ignored {ignored:g}", *cells[1:]] for cells in found]
        notes.append(f"Where an ignored item weighs {ignored:g}, {better}")
    notes.append(_logged(worlds[0], seed))
    return Table(
        "Does exploring pay, and does it find a new interest?",
        (
            "policy",
            "setting",
            "regret",
            "before the interest",
            "− greedy",
            "lists to find it",
            "− greedy",
            "found %",
            "catalogue seen %",
            "novelty, bits",
        ),
        rows,
        notes,
    )


def _rows(
    chosen: Mapping[str, Chosen],
    walks: Mapping[str, Sequence[Walk]],
    oracles: Sequence[Walk],
    worlds: Sequence[World],
    planted: int,
) -> tuple[list[list[str]], str]:
    """A line for each policy, and in words which do better than greedy."""

    def against_oracle(name: str, until: int | None = None) -> Float64:
        pairs = zip(oracles, walks[name], strict=True)
        return np.stack([(best.expected - one.expected)[:, :until].sum(axis=1) for best, one in pairs])

    regret = Resamples.of({name: against_oracle(name) for name in walks}, seed=0)
    before = Resamples.of({name: against_oracle(name, planted) for name in walks}, seed=0)
    delay = Resamples.of(
        {name: np.stack([one.found for one in each]).astype(np.float64) for name, each in walks.items()}, seed=0
    )
    rows = []
    said: dict[str, list[str]] = {"less regret": [], "sooner": []}
    for name, each in walks.items():
        floor = name == "greedy"
        less, sooner = regret.difference(name, "greedy"), delay.difference(name, "greedy")
        said["less regret"] += [name] if less.high < 0 else []
        said["sooner"] += [name] if sooner.high < 0 else []
        lists = [one.lists.reshape(len(one.lists), -1) for one in each]
        seen = np.mean([[len(np.unique(row)) for row in one] for one in lists]) / ITEMS
        counts = [world.data.interactions.counts() for world in worlds]
        novel = np.mean([metrics.novelty(one, count) for one, count in zip(lists, counts, strict=True)])
        rows.append(
            [
                name,
                chosen[name].words,
                interval(regret.mean(name), 0),
                interval(before.mean(name), 0),
                "" if floor else interval(less, 0),
                interval(delay.mean(name), 1),
                "" if floor else interval(sooner, 1),
                f"{100 * np.mean([one.found < one.lists.shape[1] for one in each]):.0f}",
                f"{100 * seen:.0f}",
                f"{novel:.1f}",
            ]
        )
    others = [name for name in walks if name != "greedy"]
    words = []
    for what, names in said.items():
        rest = ", ".join(name for name in others if name not in names)
        words.append(f"{what}: {'; '.join(names) or 'none'}" + (f" (not: {rest})" if rest else ""))
    return rows, f"better than greedy beyond the interval, {'; '.join(words)}."


def _logged(world: World, seed: int, draws: int = 40) -> str:
    """What a log of ε-greedy says of Thompson, as a sentence: lists of one, right after the histories.

    Of the best 20 items only: with a whole catalogue to stray into, a chance is tiny and its inverse says nothing.
    """
    random = Streams(seed).child("explore").get("log")
    logging, target = EpsilonGreedy(chance=0.5, places=1), Thompson(strength=0.03)
    catalogue, likes = world.data.catalogue, world.likes[0]
    profiles = [InterestProfile.of(world.side, catalogue, one, MEMORIES[0]) for one in world.data.interactions]
    columns: list[list[float]] = []
    truth = []
    for u, standing in enumerate(Crowd(world.side, profiles).standings(np.zeros((len(profiles), 0), np.int32))):
        best = metrics.best(standing.scores[None], 20)[0]
        left = np.full_like(standing.scores, -np.inf)
        left[best] = standing.scores[best]
        standing = replace(standing, scores=left)
        wanted = offpolicy.chances(target, standing, 200, random)
        guess = np.clip(left.astype(np.float64), 0.0, 1.0)
        truth.append(float(wanted @ likes[u]))
        for _ in range(draws):
            item = int(np.argmax(logging.values(standing, random)))
            came = float(random.random() < likes[u, item])
            chance = float(logging.propensities(standing, [item])[0])
            columns.append([came, chance, wanted[item], guess[item], float(wanted @ guess)])
    reward, logged, other, predicted, expected = np.array(columns).T
    return (
        f"Off-policy, from {len(columns):,} shows logged by ε-greedy (ε = 0.5, of the best 20): Thompson (α = 0.03) "
        f"would be liked in {np.mean(truth):.3f} by the truth, {offpolicy.ips(reward, logged, other):.3f} by IPS, "
        f"{offpolicy.snips(reward, logged, other):.3f} by SNIPS, "
        f"{offpolicy.doubly_robust(reward, logged, other, predicted, expected):.3f} by the doubly robust estimate; the "
        f"log itself {reward.mean():.3f}."
    )
