"""How well strengths are foretold: on held-out ratings, and on synthetic people whose true strengths are known.

A random tenth of each person's interactions is held out before anything is made of the data, so neither the item
vectors nor the item terms nor the calibration have met it; another tenth is for choosing settings. What is reported:

    RMSE, MAE   of the expected strength, in units of the rating scale, over all held-out ratings
    NDCG@10     of a person's held-out items by expected strength, gain 2^(4y) − 1, tied items sharing their gains
    AUC         share of a person's pairs (liked, not liked) in the right order, a tie half; liked is y ≥ ¾, 4 of 5
    ECE         Σ over ten bins of equal mass of |Σ (P(liked) − liked)| / n

NDCG and AUC are means over people for whom they are defined. Intervals are 95 % percentile bootstraps that resample
people, and a difference resamples the same people on both sides. An ECE cannot be negative and its resamples lie above
it, so its interval reaches up.

Sources: Järvelin and Kekäläinen 2002, "Cumulated gain-based evaluation of IR techniques"; McSherry and Najork 2008,
"Computing information retrieval performance measures efficiently in the presence of tied scores"; Naeini et al. 2015,
"Obtaining well calibrated probabilities using Bayesian binning" (ECE).
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from penchant.common import config
from penchant.common.arrays import Bool, Float64
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.interests.intensity import (
    RATING_MODEL,
    Intensities,
    IntensityConfig,
    ItemTerms,
    probability,
)
from penchant.common.learners import strengths
from penchant.common.learners.neural import strengths as neural
from penchant.common.learners.neural.strengths import NeuralStrengths
from penchant.common.learners.strengths import Strengths
from penchant.common.privacy import gaussian
from penchant.common.privacy.plan import Guarantee, PrivacyPlan
from penchant.common.streams import Streams
from penchant.simulations import engine, report
from penchant.simulations.data.dataset import Dataset
from penchant.simulations.data.loaders import load
from penchant.simulations.data.synthetic import Synthetic
from penchant.simulations.engine import Population
from penchant.simulations.evaluation import Interval
from penchant.simulations.frontier_page import PRINT
from penchant.simulations.interests.releases import Table, interval
from penchant.simulations.plans import UNCHARGED, Federated

LIKED, BOUNDARY = 0.75, 0.625
"""Strength from which a rating counts as liked, and the middle between it and the star below."""
FLOORS = ("global mean", "person's mean")
LONG = 50
"""Own events from which a device counts its own outcomes."""
SHARE = 0.1
N_BOOT, BINS = 1000, 10
SPANS = {"ml-100k": 4.0, "ml-1m": 4.0, "ml-latest-small": 4.5}
"""Stars between the lowest and the highest rating; other data are in units of strength."""
NEURAL = {"linear model": "neural model", "calibrated, private sum": "neural model, calibrated"}
"""What a model is called where the release has a network to correct it."""
PSEUDO = 4.0
"""Released share of what is liked counts as so many of a person's own events, in the floor of the person's mean."""


@dataclass(frozen=True)
class Predicted:
    """What one model says of every held-out interaction: expected strength and P(liked), float64[n] each.

    Attributes:
        stddev: of the expectation, where the model has one.
    """

    strength: Float64
    liked: Float64
    stddev: Float64 | None = None


@dataclass(frozen=True)
class Trial:
    """What was foretold, and what came.

    Attributes:
        history: what devices knew and sums were made of.
        held: bool[n], which interactions of the data were held out.
        rows: int[m], whose each held-out interaction is.
        came: float64[m], its strength.
        guarantee: of the whole release, None for exact sums.
        neural: of the release that the neural rows are from, which is another at the same ε.
        said: by model.
    """

    data: Dataset
    history: Interactions
    held: Bool
    rows: np.ndarray
    came: Float64
    guarantee: Guarantee | None
    neural: Guarantee | None
    said: Mapping[str, Predicted]


def table(*, data: str = "ml-100k", epsilon: float | None = None, seed: int = 0) -> Table:
    """Every model on held-out ratings, and paired differences.

    Args:
        data: as `penchant simulate --data` takes it.
        epsilon: of everything released, unit user, δ = 1e-5; None for exact sums.
        seed: of the held-out tenth and of the noise.
    """
    made = trial(load(data, seed=seed), epsilon=epsilon, seed=seed)
    span = SPANS.get(made.data.name, 1.0)
    sums = {name: figures(made, said, span) for name, said in made.said.items()}
    people = np.random.default_rng(seed).multinomial(n := len(sums["global mean"]["n"]), np.full(n, 1 / n), N_BOOT)
    drawn = {name: read(one, people) for name, one in sums.items()}
    whole = {name: read(one, np.ones((1, n))) for name, one in sums.items()}
    columns = list(whole["global mean"])
    rows = [[name, *(_cell(whole[name][c][0], drawn[name][c]) for c in columns)] for name in sums]
    pairs = (
        ("linear model", "rating model"),
        ("linear model", "person's mean"),
        ("calibrated, private sum", "linear model"),
        ("calibrated, own too", "calibrated, private sum"),
        ("neural model", "linear model"),
        ("neural model", "person's mean"),
        ("neural model, calibrated", "calibrated, private sum"),
    )
    rows += [
        [f"{a} less {b}", *(_cell(whole[a][c][0] - whole[b][c][0], drawn[a][c] - drawn[b][c]) for c in columns)]
        for a, b in pairs
    ]
    ranked = {c: int(np.isfinite(sums["global mean"][c]).sum()) for c in ("ndcg", "auc")}
    return Table(
        title=f"Intensity: held-out strengths of {made.data.name}, {_words(epsilon)}",
        columns=["", *(c if c not in ("RMSE", "MAE") else f"{c}, {_unit(span)}" for c in columns)],
        rows=rows,
        notes=[
            f"{len(made.came):,} interactions of {n:,} people held out, a random tenth (seed {seed}); NDCG over"
            f" {ranked['ndcg']:,} people, AUC over {ranked['auc']:,}.",
            *_conditions(made),
            "Settings were chosen on the validation tenth of ML-100K, those of models with exact sums and the shares "
            "of the budget at ε = 8; not charged.",
            *_floors(whole, drawn),
        ],
    )


def truths(
    *,
    synthetic: str = "synthetic:users=1000,items=1000,interactions=60",
    epsilon: float | None = None,
    seed: int = 0,
) -> Table:
    """Every model against the true expected strengths of synthetic people, and whether its bands hold them.

    Args:
        synthetic: a data set with its truth.

    Raises:
        InvalidConfig: any other.
    """
    people = load(synthetic, seed=seed)
    if not isinstance(people, Synthetic):
        raise InvalidConfig(f"only synthetic data has a truth: give data such as synthetic:users=1000, not {synthetic}")
    made = trial(people, epsilon=epsilon, seed=seed)
    truth = _truth(people, made.held)
    n = int(made.rows.max()) + 1
    count = np.bincount(made.rows, minlength=n)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), N_BOOT)
    squares = {k: np.bincount(made.rows, (said.strength - truth) ** 2, n) for k, said in made.said.items()}
    drawn = {k: np.sqrt((draws @ square) / (draws @ count)) for k, square in squares.items()}
    whole = {k: math.sqrt(square.sum() / count.sum()) for k, square in squares.items()}
    rows, short = [], []
    for name, said in made.said.items():
        within = "none"
        if said.stddev is not None:
            hit = np.bincount(made.rows, np.abs(said.strength - truth) <= 1.96 * said.stddev, n)
            within = _cell(hit.sum() / count.sum(), (draws @ hit) / (draws @ count))
        less = drawn[name] - drawn["person's mean"]
        if name not in FLOORS and np.quantile(less, 0.975) >= 0:
            short.append(name)
        rows.append(
            [
                name,
                _cell(whole[name], drawn[name]),
                _cell(whole[name] - whole["person's mean"], less),
                f"{np.corrcoef(said.strength, truth)[0, 1]:.3f}" if np.ptp(said.strength) else "none",
                within,
            ]
        )
    return Table(
        title=f"Intensity: true expected strengths of {people.name}, {_words(epsilon)}",
        columns=["", "RMSE to the truth", "less person's mean", "correlation", "truth within ±1.96 stddev"],
        rows=rows,
        notes=[
            f"{len(truth):,} held-out interactions of {n:,} people, truth at the moment of each; strengths from 0.2 to "
            f"0.9, spread {truth.std():.3f}.",
            *_conditions(made),
            f"Not better than the person's mean, by the paired interval: {', '.join(short) or 'none'}.",
            "The bands of a model that is right would hold the truth 95 % of the time.",
        ],
    )


def reliability(*, data: str = "ml-100k", epsilon: float | None = 8.0, seed: int = 0) -> str:
    """P(liked) as said against the share that was liked, in ten bins of equal mass, as SVG.

    Bars are 95 % binomial intervals, as if no two ratings were one person's.
    """
    made = trial(load(data, seed=seed), epsilon=epsilon, seed=seed)
    liked = made.came >= LIKED
    shown = {
        "probability model": (PRINT.series[4], "s"),
        "linear model": (PRINT.series[0], "o"),
        "calibrated, private sum": (PRINT.series[1], "D"),
    }
    swapped = {report.INK: PRINT.ink, report.MUTED: PRINT.muted, report.GRID: PRINT.grid}
    style = {key: swapped.get(value, value) if isinstance(value, str) else value for key, value in report.STYLE.items()}
    with matplotlib.style.context(["default", style]):
        drawn = Figure(figsize=(6.4, 4.8), layout="constrained")
        axes = drawn.subplots()
        axes.plot([0, 1], [0, 1], color=PRINT.muted, linewidth=0.8, linestyle="--", label="as said")
        for name, (colour, marker) in shown.items():
            said = made.said[name].liked
            at = _bins(said)
            n = np.bincount(at)
            x, y = (np.bincount(at, values) / n for values in (said, liked.astype(float)))
            error = 1.96 * np.sqrt(y * (1 - y) / n)
            ece = float((np.abs(x - y) * n).sum() / n.sum())
            axes.errorbar(
                x, y, error, color=colour, marker=marker, markersize=4, linewidth=1.2, label=f"{name}, ECE {ece:.3f}"
            )
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="P(at least 4 of 5 stars), as said", ylabel="share that was")
        axes.set_title(f"{made.data.name}, {_words(epsilon)}: {len(liked):,} held-out ratings")
        axes.legend(loc="upper left", framealpha=1, edgecolor="none")
        told = textwrap.fill(_charged(made.guarantee), 110)
        drawn.supxlabel(told, x=0.01, ha="left", fontsize=6.5, color=PRINT.muted)
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def trial(
    data: Dataset,
    *,
    epsilon: float | None,
    seed: int,
    validation: bool = False,
    model: IntensityConfig | None = None,
) -> Trial:
    """Runs the rounds on what is not held out, and foretells what is.

    Args:
        validation: hold out the tenth for choosing settings, and leave the tested one out of everything.
        model: of the linear model.
    """
    tested, chosen = held_out(data.interactions, seed)
    history = data.interactions.keep(~tested & ~chosen if validation else ~tested)
    held = chosen if validation else tested
    learner, state, guarantee = released(data, history, epsilon, seed)
    asked = data.interactions.keep(held)
    said = _foretold(learner, state, history, asked, model or IntensityConfig())
    network, trained, also = released(data, history, epsilon, seed, NeuralStrengths)
    found = _foretold(network, trained, history, asked, model or IntensityConfig())
    said |= {new: found[name] for name, new in NEURAL.items()}
    rows, came = data.interactions.rows[held], data.interactions.strengths[held].astype(np.float64)
    return Trial(data, history, held, rows, came, guarantee, also, said)


def held_out(data: Interactions, seed: int) -> tuple[Bool, Bool]:
    """Two masks bool[n], to test on and to choose by: a random tenth each, never a person's first interaction."""
    drawn = Streams(seed).get("intensity/held-out").random(len(data))
    drawn[data.offsets[:-1][data.lengths > 0]] = 1.0
    return drawn < SHARE, (drawn >= SHARE) & (drawn < 2 * SHARE)


def released(
    data: Dataset, history: Interactions, epsilon: float | None, seed: int, learner: type[Strengths] = Strengths
) -> tuple[Strengths, Mapping[str, np.ndarray], Guarantee | None]:
    """What the rounds of `Strengths` give, or of `NeuralStrengths`."""
    n, delta = history.n_users, 1e-5
    mu = math.inf if epsilon is None else gaussian.mu_of(epsilon, delta) * (1 - 1e-9)  # dividing it must not round ε up
    made, sums = (neural if learner.name == NeuralStrengths.name else strengths).automatic(n, mu)
    settings = config.encode(made)
    plan = PrivacyPlan(
        unit="none" if epsilon is None else "user",
        n_users=n,
        delta=delta,
        sampling="none",
        cohort=n,
        sums=sums,
        max_participations=sum(spec.rounds for spec in sums),
        uncharged=UNCHARGED,
    )
    rounds = engine.run(
        Federated(learner=learner.name, settings=settings, plan=plan),
        Population(histories=history, catalogue=data.catalogue),
        name=learner.name,
        seed=seed,
        nodes=engine.cores(),
        engine="local",
        where="cpu",
        after_round=lambda *_: None,
    )
    built = learner(data.catalogue, made)
    return built, built.released(rounds.progress.state), plan.guarantee()


def _foretold(
    learner: Strengths,
    state: Mapping[str, np.ndarray],
    history: Interactions,
    held: Interactions,
    model: IntensityConfig,
) -> dict[str, Predicted]:
    """What each model says of the held-out interactions, one person after another; none reads their strengths."""
    side, terms, curve = learner.item_side(state), learner.item_terms(state), learner.calibration(state)
    correction = learner.correction(state)
    flat = ItemTerms.flat(terms.mean, history.n_items)
    outcomes = curve.table.sum(axis=0)
    often = float(np.clip(outcomes[curve.levels >= LIKED].sum() / max(outcomes.sum(), 1e-9), 0, 1))
    found: dict[str, list[Predicted]] = {}

    def add(name: str, strength: Float64, liked: Float64, stddev: Float64 | None = None) -> None:
        found.setdefault(name, []).append(Predicted(strength, liked, stddev))

    for person, own in enumerate(history):
        asked = held.history(person).items
        if not len(asked):
            continue
        one = np.ones(len(asked))
        add("global mean", terms.mean * one, often * one)
        mean = Intensities(side, flat, own.items, own.strengths, RATING_MODEL).at(asked)
        likes = (np.count_nonzero(own.strengths >= LIKED) + PSEUDO * often) / (len(own) + PSEUDO)
        add("person's mean", mean.mean, likes * one, mean.stddev)
        rating = Intensities(side, terms, own.items, own.strengths, RATING_MODEL).at(asked)
        add("rating model", rating.mean, rating.at_least(BOUNDARY), rating.stddev)
        interest = probability(rating.mean, boundary=BOUNDARY)
        add("probability model", interest, interest)
        person_model = Intensities(side, terms, own.items, own.strengths, model, correction)
        linear = person_model.at(asked)
        add("linear model", linear.mean, linear.at_least(BOUNDARY), linear.stddev)
        add("calibrated, private sum", curve.strength(linear.mean), curve.at_least(LIKED, linear.mean), linear.stddev)
        both = curve
        if len(own) >= LONG:
            both = curve.with_own(person_model.own().mean, own.strengths)
        add("calibrated, own too", both.strength(linear.mean), both.at_least(LIKED, linear.mean), linear.stddev)
    return {name: _joined(parts) for name, parts in found.items()}


def _joined(parts: list[Predicted]) -> Predicted:
    stddevs = [part.stddev for part in parts if part.stddev is not None]
    return Predicted(
        np.concatenate([part.strength for part in parts]),
        np.concatenate([part.liked for part in parts]),
        np.concatenate(stddevs) if stddevs else None,
    )


def figures(made: Trial, said: Predicted, span: float) -> dict[str, Float64]:
    """By person, what the figures are sums and means of: float64[n_people], or [n_people, BINS] of P(liked) − liked.

    `ndcg` and `auc` are NaN for whom they are not defined: fewer than two different strengths, or no pair.
    """
    who, rows = np.unique(made.rows, return_inverse=True)
    n, apart, liked = len(who), span * (said.strength - made.came), made.came >= LIKED
    cells = rows * BINS + _bins(said.liked)
    starts = np.searchsorted(rows, np.arange(n + 1))
    own = [slice(a, b) for a, b in pairwise(starts)]
    found = {
        "n": np.bincount(rows),
        "squares": np.bincount(rows, apart**2),
        "absolutes": np.bincount(rows, np.abs(apart)),
        "ndcg": [graded_ndcg(said.strength[k], made.came[k]) for k in own],
        "auc": [pairs_right(said.strength[k], liked[k]) for k in own],
        "bins": np.bincount(cells, said.liked - liked, n * BINS).reshape(n, BINS),
    }
    return {name: np.asarray(values, np.float64) for name, values in found.items()}


def read(sums: Mapping[str, Float64], people: np.ndarray) -> dict[str, Float64]:
    """The figures, float64[b] each, with every person taken as often as `people` (int[b, n_people]) says."""
    n = people @ sums["n"]
    found = {"RMSE": np.sqrt((people @ sums["squares"]) / n), "MAE": (people @ sums["absolutes"]) / n}
    for name, label in (("ndcg", "NDCG@10"), ("auc", "AUC")):
        defined = np.isfinite(sums[name])
        with np.errstate(invalid="ignore"):  # nobody for whom it is defined
            found[label] = (people[:, defined] @ sums[name][defined]) / people[:, defined].sum(axis=1)
    return {**found, "ECE": np.abs(people @ sums["bins"]).sum(axis=1) / n}


def graded_ndcg(scores: Float64, strengths: Float64, k: int = 10) -> float:
    """DCG@k over its best, items of one score sharing their gains; NaN where every order is as good.

    >>> bool(graded_ndcg(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == 0.5 * (1 + 1 / np.log2(3)))
    True
    """
    if len(strengths) < 2 or np.ptp(strengths) == 0:
        return math.nan
    gains = 2 ** (4 * strengths) - 1
    _, level = np.unique(-scores, return_inverse=True)
    shared = (np.bincount(level, gains) / np.bincount(level))[level][np.argsort(level, kind="stable")]
    discount = 1 / np.log2(np.arange(2, min(k, len(gains)) + 2))
    return float(shared[:k] @ discount) / float(np.sort(gains)[::-1][:k] @ discount)


def pairs_right(scores: Float64, liked: Bool) -> float:
    """Share of pairs (liked, not liked) in the right order, a tie half; NaN without a pair.

    >>> pairs_right(np.array([3.0, 2.0, 2.0]), np.array([True, True, False]))
    0.75
    """
    apart = scores[liked][:, None] - scores[~liked]
    return float(((apart > 0) + 0.5 * (apart == 0)).mean()) if apart.size else math.nan


def _bins(said: Float64) -> np.ndarray:
    """int64[n] in [0, BINS): bins of equal mass; equal values share one, so a constant has a single bin."""
    edges = np.quantile(said, np.arange(1, BINS) / BINS, method="higher")
    return np.searchsorted(edges, said, side="right").astype(np.int64)


def _truth(people: Synthetic, held: Bool) -> Float64:
    """float64[m], the true expected strength of each held-out interaction, at its own moment."""
    data, truth = people.interactions, people.truth
    at = np.flatnonzero(held)
    rows = data.rows[at]
    moments = (at - data.offsets[rows]) / truth.lengths[rows]
    cells = zip(rows.tolist(), moments.tolist(), data.items[at].tolist(), strict=True)
    return np.array([truth.strengths(row, time)[item] for row, time, item in cells], np.float64)


def _cell(mean: float, drawn: Float64) -> str:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return interval(Interval(mean=float(mean), low=float(low), high=float(high)))


def _words(epsilon: float | None) -> str:
    return "exact sums" if epsilon is None else f"ε = {epsilon:g}"


def _unit(span: float) -> str:
    return "strength" if span == 1.0 else "stars"


def _charged(guarantee: Guarantee | None) -> str:
    if guarantee is None:
        return "Exact sums: nothing is promised, nothing is charged."
    return f"Charged, everything together (co-occurrence, strengths, outcomes): {guarantee}."


def _conditions(made: Trial) -> list[str]:
    if made.neural is None:
        return [_charged(None)]
    return [
        _charged(made.guarantee),
        f"The neural rows are from a release of their own, instead of the other: {made.neural}.",
    ]


def _floors(whole: Mapping[str, Mapping[str, Float64]], drawn: Mapping[str, Mapping[str, Float64]]) -> list[str]:
    """Says which model does not beat the better of the two floors, figure by figure."""
    lines = []
    for figure in ("RMSE", "MAE", "NDCG@10", "AUC", "ECE"):
        sign = -1.0 if figure in ("RMSE", "MAE", "ECE") else 1.0
        floor = max(FLOORS, key=lambda name: sign * whole[name][figure][0])
        short = [
            name
            for name in whole
            if name not in FLOORS and np.quantile(sign * (drawn[name][figure] - drawn[floor][figure]), 0.025) <= 0
        ]
        if short:
            lines.append(f"Not better than the {floor} in {figure}, by the paired interval: {', '.join(short)}.")
    return lines
