"""Audits a finished run: for each private row what its mechanism promises, and what an attack on it shows at least.

    claim   ε ≤ …    from the plan, by the accountant
    shown   ε ≥ …    from canaries in a shadow of the row's rounds, at some confidence

Shown above claimed is a broken mechanism, or an unlucky run: with probability at most 1 − confidence for each bound.
Shown below claimed proves nothing by itself; how far it could have gone with so many canaries stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from penchant.common.arrays import Float64
from penchant.common.errors import InvalidConfig
from penchant.common.learners import registry
from penchant.common.learners.neural.fedavg import FedAvg
from penchant.common.privacy import gaussian
from penchant.common.privacy.events import Gaussian
from penchant.common.privacy.plan import Guarantee, PrivacyPlan
from penchant.common.streams import Streams
from penchant.simulations import report
from penchant.simulations.audit import bounds
from penchant.simulations.audit.canaries import Scored, interaction_scores, most_canaries, user_scores
from penchant.simulations.audit.membership import Membership, membership
from penchant.simulations.engine import Population
from penchant.simulations.plans import Federated
from penchant.simulations.runs import RunFolder
from penchant.simulations.simulate import load_data, torch_device
from penchant.simulations.splits import split

SCHEMA_VERSION = 1
GUESSED = 0.25
"""Of the canaries, those that the one-run bound guesses about: near the best share for ε from 2 to 18."""
FAR = 4.0
"""A threshold that one in 30,000 passes by noise alone, in its stddevs: shows what only a few canaries give away."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What canaries show about one mechanism.

    Attributes:
        canaries, joined: how many there were, and how many of them were in.
        claim_mu: μ of the plan where it is exactly a Gaussian; None where it samples.
        mu_lower: lower bound on it; None where there is none.
        epsilon_lower: lower bound on ε at the plan's δ; from μ where there is one, else from the two errors.
        epsilon_ceiling: what it would have been with every canary told apart.
        one_run: lower bound on ε from `correct` right ones of `guesses`; and its ceiling.
        confidence: of each bound by itself.
    """

    canaries: int
    joined: int
    claim_mu: float | None
    mu_lower: float | None
    epsilon_lower: float
    epsilon_ceiling: float
    one_run: float
    one_run_ceiling: float
    correct: int
    guesses: int
    confidence: float

    def within(self, epsilon: float) -> bool:
        """Whether every bound is at or below the claim."""
        return max(self.epsilon_lower, self.one_run) <= epsilon


def shown(plan: PrivacyPlan, scored: Scored, confidence: float) -> Shown:
    """The bounds that the canaries' scores give. Thresholds and guesses are decided by plan and number alone."""
    inside, outside = scored.scores[scored.joined], scored.scores[~scored.joined]
    mu = exact_mu(plan)

    def lower(inside: Float64, outside: Float64) -> tuple[float | None, float]:
        if mu is None:
            claim = plan_guarantee(plan).epsilon
            thresholds: tuple[float, ...] = (0.0, claim / 2, claim)
            return None, bounds.epsilon_lower(inside, outside, plan.delta, confidence, thresholds=thresholds)
        thresholds = (0.0, mu * FAR - mu**2 / 2)  # the second is at FAR of a score that is N(0, 1) without the canary
        found = bounds.mu_lower(inside, outside, confidence, thresholds=thresholds)
        return found, gaussian.epsilon_of(found, plan.delta)

    mu_lower, epsilon_lower = lower(inside, outside)
    _, ceiling = lower(np.full(len(inside), math.inf), np.full(len(outside), -math.inf))
    m = len(scored.scores)
    guesses = math.ceil(GUESSED * m)
    clearest = np.argsort(-np.abs(scored.scores), kind="stable")[:guesses]
    correct = int(((scored.scores[clearest] > 0) == scored.joined[clearest]).sum())
    return Shown(
        canaries=m,
        joined=len(inside),
        claim_mu=mu,
        mu_lower=mu_lower,
        epsilon_lower=epsilon_lower,
        epsilon_ceiling=ceiling,
        one_run=bounds.one_run(correct, guesses, m, plan.delta, confidence),
        one_run_ceiling=bounds.one_run_ceiling(guesses, m, plan.delta, confidence),
        correct=correct,
        guesses=guesses,
        confidence=confidence,
    )


def exact_mu(plan: PrivacyPlan) -> float | None:
    """μ of everything that one unit is charged, where nothing is sampled; then the plan is exactly μ-GDP."""
    events = plan.events()
    if not all(isinstance(event, Gaussian) or event.rate == 1.0 for event in events):
        return None
    return math.hypot(*(math.sqrt(event.count) / event.noise_multiplier for event in events))


def plan_guarantee(plan: PrivacyPlan) -> Guarantee:
    """What the plan promises.

    Raises:
        InvalidConfig: nothing, so that there is nothing to audit.
    """
    found = plan.guarantee()
    if found is None:
        raise InvalidConfig("a plan with unit none promises nothing: there is nothing to audit")
    return found


def canary_scores(row: Federated, population: Population, m: int, streams: Streams, where: str) -> Scored:
    """Canaries of the plan's unit, m of them or as many as there is room for."""
    learner = registry.build(row.learner, row.settings, population.catalogue, where=where)
    if row.plan.unit == "interaction":
        if not isinstance(learner, FedAvg):
            raise InvalidConfig(f"learner {row.learner} has no interaction canaries: audit another row")
        return interaction_scores(row, learner, m, streams)
    return user_scores(row, learner, most_canaries(row, learner, m), streams)


def audit(
    folder: RunFolder,
    *,
    row: str | None = None,
    canaries: int = 1000,
    confidence: float = 0.999,
    seed: int = 0,
    told: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Audits a run's private rows, writes audit.json and puts it into the report.

    Args:
        row: one of them; None audits all.
        told: called with each row's name before its audit.

    Returns what audit.json holds; a row with "holds" false is not to be released.

    Raises:
        InvalidConfig: an option out of range, no such row, no private row, or other data than the run had.
    """
    if canaries < 2 or seed < 0 or not 0 < confidence < 1:
        raise InvalidConfig("an audit takes 2 canaries or more, confidence in (0, 1) and a seed ≥ 0")
    results, settings = folder.read_results(), folder.read_config()
    names = [run["name"] for run in results["runs"] if run["privacy"] is not None and row in (None, run["name"])]
    if not names:
        raise InvalidConfig(f"{folder.path} has no private row{'' if row is None else f' {row!r}'}: nothing to audit")
    data = load_data(settings)
    parts = split(settings.split, data.interactions, settings.seed)
    people = parts.train.select(np.flatnonzero(parts.participants))
    population = Population(histories=people, catalogue=data.catalogue)
    where, found = torch_device(settings.device), []
    for name in names:
        told(name)
        _, manifest = folder.read_model(name)
        if manifest["catalogue"] != data.catalogue.version:
            raise InvalidConfig("the data's catalogue is not the one this run had: audit it beside its own data")
        plan = PrivacyPlan.from_json(manifest["plan"])
        one = Federated(learner=manifest["learner"], settings=manifest["settings"], plan=plan)
        streams = Streams(seed).child("audit").child(name)
        seen = shown(plan, canary_scores(one, population, canaries, streams, where), confidence)
        attack = membership(
            one, population, name=name, seed=streams.seed("membership"), where=where, confidence=confidence
        )
        found.append(_row(name, plan_guarantee(plan), seen, attack))
    record = {"schema_version": SCHEMA_VERSION, "seed": seed, "confidence": confidence, "rows": found}
    folder.write_audit(record)
    folder.write_report(report.render(results, record))
    return record


def _row(name: str, claim: Guarantee, seen: Shown, attack: Membership) -> dict[str, Any]:
    return {
        "name": name,
        "privacy": asdict(claim),
        "canaries": asdict(seen),
        "holds": seen.within(claim.epsilon),
        "membership": {**asdict(attack), "note": attack.note},
    }
