"""Canaries: units made up for an audit, each in or out by a fair coin, and how an observer of the releases scores them.

User canaries go through the rounds of the row themselves, `server/rounds.py` and `client/node.py` under the row's own
plan, in a shadow of the run in which nobody real takes part. A canary contributes a vector along coordinates that no
other canary has, so long that the clip must cut it. The observer sees each noised sum as it leaves and, knowing that
nobody else is there, reads  y = ⟨sum, v⟩/(σC) = (1/σ if in and drawn, else 0) + N(0, 1).

Interaction canaries are items put into the history of a made-up device, which trains with its own DP-SGD and answers
through `client/node.py`; the observer sees what leaves the device. The weights that it is sent are the observer's to
choose: with matrix factorisation they make each canary's clipped gradient lie in its own item's row alone.

A canary's score is the logarithm of how much likelier what was seen is with it in than out, for the mechanism as
planned. Who is drawn by a coin (Poisson) the observer does not know, so there it averages over the coin.

Nothing of a shadow is kept but the scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import special, stats
from torch.func import functional_call

from penchant.client.node import Node
from penchant.common.arrays import Arrays, Bool, Float32, Float64, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.learners.contract import Learner, Randoms, State
from penchant.common.learners.neural.fedavg import FedAvg
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan, expected_cohort
from penchant.common.privacy.sums import Clip, Shapes
from penchant.common.streams import Streams
from penchant.common.wire import Order, Reply
from penchant.server.rounds import Rounds
from penchant.simulations.plans import Federated

LENGTH = 1e6
"""Of a user canary's contribution, in clips."""


@dataclass(frozen=True)
class Scored:
    """What the observer made of the canaries.

    Attributes:
        scores: float64[m], log of the likelihood ratio; higher says "in".
        joined: bool[m], the coins.
    """

    scores: Float64
    joined: Bool


def shadow_plan(plan: PrivacyPlan, m: int) -> PrivacyPlan:
    """The plan with room for m canaries: itself, or for as many times the people, all else and its events the same.

    Raises:
        InvalidConfig: δ is too large for so many people.
    """
    times = math.ceil(m / plan.n_users)
    if times == 1:
        return plan
    n, cap = times * plan.n_users, plan.max_participations
    if not plan.delta < 1 / n:
        raise InvalidConfig(f"{m} canaries need a delta below 1/{n}: take --canaries {plan.n_users}")
    evenly = plan.cohort == expected_cohort(plan.n_users, cap, plan.rounds)
    cohort = expected_cohort(n, cap, plan.rounds) if evenly and plan.sampling == "none" else times * plan.cohort
    return replace(plan, n_users=n, cohort=cohort)


def most_canaries(row: Federated, learner: Learner, m: int) -> int:
    """How many of m canaries have coordinates of their own in every sum, and people of the plan to be."""
    plan, shadow = row.plan, Shadow(learner, row.plan, 1)
    state, room = shadow.init(Streams(0)), m
    for _ in range(plan.rounds):
        room = min(room, _size(shadow.shapes(state)))
        state = shadow.next(state)
    return min(room, plan.n_users * max(1, math.ceil(1 / (plan.delta * plan.n_users)) - 1))


def user_scores(row: Federated, learner: Learner, m: int, streams: Streams) -> Scored:
    """Runs the row's rounds with m canaries and nobody else.

    Args:
        learner: of the row; asked for its shapes only.
        m: at most `most_canaries`.
        streams: of this audit; the row's own run uses others.
    """
    plan = shadow_plan(row.plan, m)
    joined = streams.get("coins").random(m) < 0.5
    shadow = Shadow(learner, plan, m)
    people = [[j] if joined[j] else [] for j in range(m)]
    node = Node(
        Interactions.of([*people, *([] for _ in range(plan.n_users - m))], n_items=m),
        lambda name, settings: shadow,
        streams.child("node"),
        plan=plan,
    )
    rounds = Rounds(
        learner=shadow,
        settings=row.settings,
        plan=plan,
        roster=(plan.n_users,),
        ledger=Ledger(plan.population, delta=plan.delta),
        streams=streams.child("server"),
    )
    rate = plan.rate if plan.sampling == "poisson" else 1.0
    scores = np.zeros(m)
    while rounds.n_left:
        orders = rounds.open()
        number, attempt = rounds.asked
        spec, state = plan.spec(number), rounds.state
        clip = spec.bound(state)
        rounds.close(
            Reply(node=n, round=number, attempt=attempt, arrays=node.answer(order, learner.released(state)))
            for n, order in orders.items()
        )
        seen = shadow.seen.pop() / (spec.noise_multiplier * clip)
        told = _log_ratio(seen, 1 / spec.noise_multiplier, 1, rate)
        if plan.sampling == "none":  # each profile's own rounds are public
            drawn = np.zeros(plan.n_users, bool)
            for order in orders.values():
                drawn[list(order.users)] = True
            told = told * drawn[:m]
        scores += told
    return Scored(scores, joined)


class Shadow(Learner):
    """Asks for what a learner asks for, and gets canaries: whoever has item j contributes along canary j's coordinates.

    A canary's coordinates are spread over the whole contribution. Where a row bound keeps one row below C, a canary has
    as many rows as fill C, if there are so many.

    Attributes:
        seen: a released sum's projections on the canaries' directions, float64[m] for each round.
        width: coordinates of one canary.
    """

    def __init__(self, learner: Learner, plan: PrivacyPlan, m: int) -> None:
        super().__init__(Catalogue(ids=tuple(map(str, range(m))), name="canaries"))
        self.name, self.device_noise = learner.name, learner.device_noise
        self._learner, self._m = learner, m
        self._value = LENGTH * max(spec.clip_norm for spec in plan.sums)
        rows = [(spec.clip_norm / spec.row_norm) ** 2 for spec in plan.sums if spec.row_norm is not None]
        shapes = learner.shapes(learner.init(Streams(0)))
        room = _size(shapes) // max(m, *(math.prod(shape[1:]) for shape in shapes.values()))
        self.width = max(1, min(math.ceil(max(rows, default=1.0)), room))
        self.seen: list[Float64] = []

    def init(self, streams: Streams) -> State:
        return self._learner.init(streams)

    def shapes(self, state: State) -> Shapes:
        return self._learner.shapes(state)

    def _contribution(self, state: State, history: History, streams: Streams) -> Arrays:
        out = {name: np.zeros(shape, np.float32) for name, shape in self.shapes(state).items()}
        for name, at in self._own(state, history):
            out[name].reshape(-1)[at] = self._value
        return out

    def _partial_sum(self, state: State, histories: Interactions, clip: Clip, randoms: Randoms) -> Arrays:
        total = {name: np.zeros(shape, np.float64) for name, shape in self.shapes(state).items()}
        for history in histories:
            own = self._own(state, history)
            cut = clip({name: np.full((len(at), 1), self._value, np.float32) for name, at in own})  # a row each
            for name, at in own:
                total[name].reshape(-1)[at] += cut[name][:, 0]
        return total

    def apply(self, state: State, noisy_sum: Arrays, divisor: float) -> State:
        flat = np.concatenate([np.asarray(noisy_sum[n], np.float64).ravel() for n in sorted(noisy_sum)])
        self.seen.append(flat[self._coordinates(len(flat))].sum(axis=1) / math.sqrt(self.width))
        return self.next(state)

    def next(self, state: State) -> State:
        """The state after a sum of zeros: it asks for what comes next, and is made from nothing that was released."""
        zeros = {name: np.zeros(shape, np.float32) for name, shape in self.shapes(state).items()}
        return self._learner.apply(state, zeros, 1.0)

    def _scores(self, state: State, histories: Interactions) -> Float32:
        return self._learner.scores(state, histories)

    def _adopted(self, name: str, state: State, place: Int64) -> npt.NDArray[Any]:
        raise InvalidConfig("canaries are of one catalogue")

    def _coordinates(self, size: int) -> Int64:
        """int64[m, width], positions in the flattened contribution; no position twice."""
        apart = size // self.width
        return (np.arange(self._m) * apart // self._m)[:, None] + apart * np.arange(self.width)

    def _own(self, state: State, history: History) -> list[tuple[str, Int64]]:
        """Names of arrays and positions in them that this history contributes to."""
        if not len(history):
            return []
        sizes = {name: math.prod(shape) for name, shape in sorted(self.shapes(state).items())}
        at = self._coordinates(sum(sizes.values()))[history.items[0]]
        found, start = [], 0
        for name, size in sizes.items():
            within = at[(at >= start) & (at < start + size)]
            if len(within):
                found.append((name, within - start))
            start += size
        return found


def interaction_scores(row: Federated, learner: FedAvg, m: int, streams: Streams) -> Scored:
    """Trains made-up devices whose histories hold the canaries that are in, as often as the plan lets one take part.

    A device has a canary for each item of the catalogue, and there are as many devices as m canaries need.
    """
    plan, noise = row.plan, row.plan.device
    if noise is None:
        raise InvalidConfig("interaction canaries need a plan with unit interaction")
    first = min(1, noise.min_history - 1)  # item 0 fills the places that never take part
    room = len(learner.catalogue) - first
    joined = streams.get("coins").random(m) < 0.5
    items = first + np.arange(m) % room
    devices = [np.arange(start, min(m, start + room)) for start in range(0, m, room)]
    histories = [[0] * (noise.min_history - 1) + items[own][joined[own]].tolist() for own in devices]
    node = Node(
        Interactions.of(histories, n_items=len(learner.catalogue)),
        lambda name, settings: learner,
        streams.child("node"),
        plan=plan,
    )
    state = _telling_state(learner, noise.clip_norm, streams)
    towards = _gradients(learner, state)
    seen = np.zeros(m)
    for number in range(1, plan.max_participations + 1):
        for device, own in enumerate(devices):
            order = Order(
                round=number, attempt=0, plan=plan, learner=row.learner, settings=row.settings, users=(device,)
            )
            seen[own] -= _projected(node.answer(order, state), towards)[items[own]]
    steps = noise.steps * plan.max_participations
    stddev = learner.config.local.lr / noise.divisor * noise.noise_multiplier * noise.clip_norm * math.sqrt(steps)
    return Scored(_log_ratio(seen / stddev, 1 / noise.noise_multiplier, steps, noise.rate), joined)


def _telling_state(learner: FedAvg, clip_norm: float, streams: Streams) -> State:
    """Weights under which matrix factorisation tells most: −∂loss/∂logit is 1/(1 + k) for a positive and 0 for a drawn
    item, and a positive's gradient, in its own row alone, is twice as long as the clip."""
    state = dict(learner.init(streams))
    if learner.model.linear is None:
        return state
    (person,) = learner.model.private
    dim = state[person].shape[1]
    length = 2 * clip_norm * (1 + learner.config.local.negatives)
    state[person] = np.full((1, dim), length / math.sqrt(dim), np.float32)
    state[learner.model.linear] = np.zeros_like(state[learner.model.linear])
    state["bias.weight"] = np.full_like(state["bias.weight"], -20.0)
    return state


def _gradients(learner: FedAvg, state: State) -> Mapping[str, Float64]:
    """The direction of each item's rows in the gradient of choosing it: float64[n_items, …], of length 1 together."""
    model = learner.model
    weights = {n: torch.from_numpy(np.asarray(state[n])).to(learner.where) for n, _ in model.named_parameters()}
    everything = torch.arange(model.n_items, device=learner.where)[:, None]
    tables = {name: weights[name].requires_grad_() for name in model.item_tables}
    logits = functional_call(model, weights, (everything[:, :0], everything))
    slopes = torch.autograd.grad(torch.nn.functional.softplus(-logits).sum(), list(tables.values()))
    found = {name: slope.double().cpu().numpy() for name, slope in zip(tables, slopes, strict=True)}
    length = np.sqrt(sum((slope**2).sum(axis=1) for slope in found.values()))
    return {name: slope / np.maximum(length, 1e-300)[:, None] for name, slope in found.items()}


def _projected(update: Arrays, towards: Mapping[str, Float64]) -> Float64:
    """float64[n_items]: each item's rows of the update along its direction."""
    return np.asarray(sum((update[name] * direction).sum(axis=1) for name, direction in towards.items()))


def _log_ratio(seen: Float64, shift: float, times: int, rate: float) -> Float64:
    """log of the density of `seen` if in over that if out.

    Args:
        seen: sums over `times` looks, over √times: N(0, 1) if out; if in, each look joins with probability `rate`
            and then adds shift/√times.
    """
    joins = np.arange(times + 1) if rate < 1 else np.array([times])
    with np.errstate(over="ignore"):  # a sum that nothing clipped may be anything
        move = joins * shift / math.sqrt(times)
        each = stats.binom.logpmf(joins, times, rate) + seen[:, None] * move - move**2 / 2
        found: Float64 = special.logsumexp(each, axis=1)
    return found


def _size(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
