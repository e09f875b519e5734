"""One simulation from data to report: every row on the same data, split and evaluation.

    load → split → for each row: fit or run its rounds → evaluate → results.json, report.html

A finished row is kept at once and a federated row after every round, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import math
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from penchant.common import content, taste
from penchant.common.arrays import Float32
from penchant.common.catalogue import Catalogue
from penchant.common.cli import version
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.learners import registry
from penchant.common.learners.contract import Learner, State
from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig
from penchant.common.learners.neural.models import ModelConfig
from penchant.common.streams import Streams
from penchant.common.taste import TasteConfig
from penchant.server.rounds import RoundRecord, Rounds
from penchant.simulations import central, engine, report
from penchant.simulations.baselines import Ease, ItemKnn, Popularity
from penchant.simulations.data.dataset import Dataset
from penchant.simulations.data.loaders import load
from penchant.simulations.data.synthetic import Synthetic
from penchant.simulations.engine import Population
from penchant.simulations.evaluation import (
    Resamples,
    Scorer,
    evaluate,
    sampled_metrics,
)
from penchant.simulations.plans import Federated, as_if, federated
from penchant.simulations.runs import SCHEMA_VERSION, RunFolder
from penchant.simulations.settings import Row, SimulationConfig, rows
from penchant.simulations.splits import Split, split

METRIC = "ndcg@10"
CURVE_POINTS = 6
FLOOR_TASTE = TasteConfig(decay=0.65)


@dataclass(frozen=True)
class Watch:
    """Who is told how far a run is; the defaults tell nobody.

    Attributes:
        begin: called with a row's name and how many steps it has.
        step: called after each.
        end: called when the row is done, with its result.
    """

    begin: Callable[[str, int], None] = lambda name, steps: None
    step: Callable[[str], None] = lambda words: None
    end: Callable[[Mapping[str, Any]], None] = lambda row: None


@dataclass(frozen=True)
class _Released:
    """A learner with what it released, as a scorer."""

    learner: Learner
    state: State

    def scores(self, histories: Interactions) -> Float32:
        return self.learner.scores(self.state, histories)


@dataclass(frozen=True)
class NoSharing:
    """The second floor: public features and a person's own history; nothing of anybody is shared."""

    catalogue: Catalogue

    @cached_property
    def vectors(self) -> Float32:
        return content.condensed(content.features(self.catalogue))

    def scores(self, histories: Interactions) -> Float32:
        nothing = np.zeros(len(self.catalogue), np.float32)
        return taste.scores(self.vectors, nothing, histories, FLOOR_TASTE)


class Oracle:
    """Scores by the law that made the data; nothing ranks its next item better in expectation."""

    def __init__(self, data: Synthetic) -> None:
        self.truth, self.place = data.truth, {name: u for u, name in enumerate(data.interactions.users)}

    def scores(self, histories: Interactions) -> Float32:
        return np.stack(
            [self.truth.probabilities(self.place[name], h) for name, h in zip(histories.users, histories, strict=True)]
        )


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Its operations here are small: nodes run in threads instead. Afterwards the process has its own number again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_torch_thread()
def simulate(settings: SimulationConfig, folder: RunFolder, watch: Watch | None = None) -> dict[str, Any]:
    """Runs every row that is not finished yet and writes the report.

    Nothing is written before data, split, rows and plans are known to be sound.

    Raises:
        InvalidConfig, MalformedData, MissingExtra: what is wrong and how to mend it.
    """
    if folder.holds_other(settings):
        raise InvalidConfig(f"{folder.path} holds a run with other settings: take another folder")
    wanted = rows(settings)
    run = _Run(settings, folder, prepare(settings), torch_device(settings.device), watch or Watch(), folder)
    plans = {row.name: run.plan(row) for row in wanted if row.kind == "federated"}
    folder.write_config(settings)
    done = [run.row(row, plans.get(row.name)) for row in wanted]
    folder.write_rounds(run.rounds)  # again, as a row done again may not be the last
    results = run.results(done, plans)
    folder.write_results(results, report.render(results, folder.read_audit()))
    return results


@dataclass(frozen=True)
class Prepared:
    """What the rows of a run have in common: data, split, who takes part, and the data's digest."""

    data: Dataset
    split: Split
    population: Population
    digest: str


def prepare(settings: SimulationConfig) -> Prepared:
    """Loads and splits the data.

    Raises:
        InvalidConfig: nobody would be scored; or as `load` and `split` do.
    """
    data = load_data(settings)
    parts = split(settings.split, data.interactions, settings.seed)
    if not parts.targets.lengths.any():
        raise InvalidConfig(f"split {settings.split} leaves nobody to score: take another --split, or more data")
    takes_part = np.flatnonzero(parts.participants)
    population = Population(histories=parts.train.select(takes_part), catalogue=data.catalogue)
    return Prepared(data, parts, population, digest(data))


def plan_of(row: Row, settings: SimulationConfig, prepared: Prepared) -> Federated:
    """The learner and plan of a federated row, with what this data and split leave uncharged.

    Raises:
        InvalidConfig: as `federated` does.
    """
    uncharged = (*prepared.data.cleaning.uncharged, *prepared.split.uncharged)
    return federated(row, settings, prepared.population.histories.n_users, uncharged)


@_one_torch_thread()
def one_row(
    row: Row, settings: SimulationConfig, prepared: Prepared, folder: RunFolder, floors: RunFolder
) -> dict[str, Any]:
    """One row of `simulate`, kept in the folder and without a curve; a finished one is read from there.

    Args:
        floors: the folder with the floors' rows, which depend on no budget.
    """
    run = _Run(settings, folder, prepared, torch_device(settings.device), Watch(), floors, curve_points=0)
    return run.row(row, run.plan(row) if row.kind == "federated" else None)


@_one_torch_thread()
def on_validation(row: Row, settings: SimulationConfig, prepared: Prepared, metric: str) -> float:
    """A federated row's metric on what is held out for tuning. Targets are not looked at, and nothing is kept."""
    plan, parts = plan_of(row, settings, prepared), prepared.split
    rounds = engine.run(
        plan,
        prepared.population,
        name=f"validation of {row.name}",  # other noise than the row itself will meet
        seed=settings.seed,
        nodes=settings.nodes,
        engine=settings.engine,
        where=torch_device(settings.device),
        after_round=lambda record, run: None,
    )
    scorer = _Released(rounds.learner, Learner.released(rounds.state))
    found = evaluate(scorer, parts.train, parts.validation, popularity=parts.train.counts())
    if metric not in found.overall:
        raise InvalidConfig(f"unknown metric {metric!r}{did_you_mean(metric, found.overall)}")
    return found.overall[metric]


def load_data(settings: SimulationConfig) -> Dataset:
    """The data set that the settings name."""
    return load(
        settings.data,
        items=settings.items,
        rating_scale=settings.rating_scale,
        skip_bad_rows=settings.skip_bad_rows,
        k_core=settings.k_core,
        seed=settings.seed,
    )


def peak_rss_mb() -> float:
    """The most memory this process ever had, in MiB."""
    unit = 1024**2 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def digest(data: Dataset) -> str:
    """Of catalogue and interactions, every column but users' names, in hex: what tells data apart that share a name."""
    found, log = hashlib.sha256(data.catalogue.version.encode()), data.interactions
    columns = [log.offsets, log.items, log.times, log.strengths]
    for column in columns if log.events is None else [*columns, log.events]:
        found.update(np.ascontiguousarray(column).tobytes())
    for words in (log.event_names, *((name, *map(str, log.context[name])) for name in sorted(log.context))):
        found.update(("\x1f".join(words) + "\x1e").encode())
    return found.hexdigest()[:16]


def torch_device(name: str) -> str:
    """ "cpu" or "cuda"; "auto" takes CUDA where there is one.

    Raises:
        InvalidConfig: CUDA asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig("no CUDA device here: take --device cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


@dataclass
class _Run:
    settings: SimulationConfig
    folder: RunFolder
    prepared: Prepared
    where: str
    watch: Watch
    floors: RunFolder
    curve_points: int = CURVE_POINTS

    def __post_init__(self) -> None:
        self.data, self.split = self.prepared.data, self.prepared.split
        self.population, self.digest = self.prepared.population, self.prepared.digest
        self.popularity = self.split.train.counts()
        self.streams = Streams(self.settings.seed)
        self.rounds: list[Mapping[str, Any]] = []

    def plan(self, row: Row) -> Federated:
        return plan_of(row, self.settings, self.prepared)

    def row(self, row: Row, plan: Federated | None) -> dict[str, Any]:
        """One row, from the folder where it is finished."""
        finished = self.folder.read_row(row.name)
        if finished is not None:
            if finished["data_digest"] != self.digest:
                raise InvalidConfig("the data changed since this run began: start a new one")
            self.rounds += finished.get("rounds", [])
            self.watch.end(finished)
            return finished
        started = time.perf_counter()
        if plan is None:
            scorer, extra = self._central(row) if row.name == "central" else self._baseline(row)
        else:
            scorer, extra = self._federated(row, plan)
        seconds = extra.pop("seconds", time.perf_counter() - started)
        found = evaluate(scorer, self.split.history, self.split.targets, popularity=self.popularity)
        floors = self._floors_before(row)
        others = {f"floor {name}": self.floors.per_user(name)[METRIC] for name in floors}
        resamples = Resamples.of({**found.per_user, **others}, seed=self.settings.seed)
        out = {
            "name": row.name,
            "kind": row.kind,
            "learner": row.learner,
            "model": row.model,
            "data_digest": self.digest,
            "metrics": dict(found.overall),
            "ci95": {name: [(one := resamples.mean(name)).low, one.high] for name in found.per_user},
            "against_floors": {name: asdict(resamples.difference(METRIC, f"floor {name}")) for name in floors},
            "privacy": None,
            "privacy_note": "exact: not private",
            "buckets": {kind: {k: dict(v) for k, v in b.items()} for kind, b in found.buckets.items()},
            "curve": [],
            "seconds": seconds,
            "clients_per_second": None,
            "bytes_up": 0,
            "bytes_down": 0,
            "peak_rss_mb": peak_rss_mb(),
            **extra,
        }
        if self.settings.sampled_negatives:
            seed = self.settings.seed
            out["metrics"] |= sampled_metrics(scorer, self.split.history, self.split.targets, seed=seed)
        self.folder.write_row(out, found.users, found.per_user)
        self.folder.drop_partial(row.name)
        self.watch.end(out)
        return out

    def _baseline(self, row: Row) -> tuple[Scorer, dict[str, Any]]:
        self.watch.begin(row.name, 1)
        train = self.population.histories
        match row.name:
            case "popularity":
                return Popularity(train), {}
            case "no-sharing":
                return NoSharing(self.data.catalogue), {"privacy_note": "nothing leaves the device"}
            case "item-knn":
                return ItemKnn(train), {}
            case "truth" if isinstance(self.data, Synthetic):
                return Oracle(self.data), {"privacy_note": "what made the data: no learner has it"}
            case _:
                return Ease(train), {}

    def _central(self, row: Row) -> tuple[Scorer, dict[str, Any]]:
        settings = central.usual(row.model, self.settings.rounds)
        self.watch.begin(row.name, settings.epochs)
        learner = FedAvg(self.data.catalogue, FedAvgConfig(model=ModelConfig(name=row.model)), where=self.where)
        state = central.train(
            learner,
            self.population.histories,
            settings,
            self.streams.child("central"),
            lambda state: self._metric(learner, state, validation=True),
            lambda epoch, value: self.watch.step(f"validation {value:.2%}"),
        )
        return _Released(learner, state), {}

    def _federated(self, row: Row, plan: Federated) -> tuple[Scorer, dict[str, Any]]:
        self.watch.begin(row.name, plan.plan.rounds)
        kept = self.folder.read_partial(row.name)
        progress, curve = kept or (None, [])
        for _ in progress.records if progress else ():
            self.watch.step("")
        every = max(1, math.ceil(plan.plan.rounds / max(self.curve_points, 1)))

        def after_round(record: RoundRecord, run: Rounds) -> None:
            words = f"{record.drawn} users"
            if self.curve_points and (record.round % every == 0 or record.round == plan.plan.rounds):
                value = self._metric(run.learner, run.state)
                curve.append({"round": record.round, METRIC: value, "epsilon": epsilon(run, record.round)})
                words += f", NDCG@10 {value:.2%}"
            self.folder.write_partial(row.name, run.progress, curve)
            self.watch.step(words)

        with self.folder.ledger(row.name, plan.plan) as ledger:
            rounds = engine.run(
                plan,
                self.population,
                name=row.name,
                seed=self.settings.seed,
                nodes=self.settings.nodes,
                engine=self.settings.engine,
                where=self.where,
                after_round=after_round,
                progress=progress,
                ledger=ledger,
            )
            promise = rounds.guarantee()
        records = rounds.progress.records
        lines = [{"row": row.name, **asdict(record)} for record in records]
        self.rounds += lines
        self.folder.write_rounds(self.rounds)
        seconds = sum(record.seconds for record in records)
        released = Learner.released(rounds.state)
        privacy = None if promise is None else asdict(promise)
        note = "exact: not private" if promise is None else str(promise)
        scaled = None if promise is None else as_if(self.settings, plan.plan.n_users)
        imitates: dict[str, Any] = {}
        if scaled is not None:
            note = scaled.note(plan.plan.n_users, promise)
            imitates = {"as_if": {**asdict(scaled), "note": str(scaled)}}
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "name": row.name,
            "learner": plan.learner,
            "settings": plan.settings,
            "catalogue": self.data.catalogue.version,
            "plan": plan.plan.to_json(),
            "plan_digest": plan.plan.digest,
            "privacy": privacy,
            "privacy_note": note,
            **imitates,
        }
        self.folder.write_model(row.name, released, manifest)
        return _Released(rounds.learner, released), {
            "privacy": privacy,
            "privacy_note": note,
            **imitates,
            "curve": curve,
            "rounds": lines,
            "seconds": seconds,
            "clients_per_second": sum(r.drawn for r in records) / max(seconds, 1e-9),
            "bytes_up": sum(r.bytes_up for r in records),
            "bytes_down": sum(r.bytes_down for r in records),
        }

    def _metric(self, learner: Learner, state: State, validation: bool = False) -> float:
        history, targets = (
            (self.split.train, self.split.validation) if validation else (self.split.history, self.split.targets)
        )
        scorer = _Released(learner, Learner.released(state))
        return evaluate(scorer, history, targets, popularity=self.popularity, ks=(10,)).overall[METRIC]

    def _floors_before(self, row: Row) -> list[str]:
        """What this row is compared with: both floors, and a floor with the one before it."""
        floors = ["popularity", "no-sharing"]
        return floors[: floors.index(row.name)] if row.name in floors else floors

    def results(self, done: list[dict[str, Any]], plans: Mapping[str, Federated]) -> dict[str, Any]:
        data, parts = self.data, self.split
        return {
            "schema_version": SCHEMA_VERSION,
            "penchant": version(),
            "data": {
                "name": data.name,
                "users": data.interactions.n_users,
                "items": len(data.catalogue),
                "interactions": len(data.interactions),
                "digest": self.digest,
                "terms": data.terms,
                "cleaning": data.cleaning.lines(),
            },
            "split": {
                "name": parts.name,
                "scored_users": int((parts.targets.lengths > 0).sum()),
                "notes": list(parts.notes),
            },
            "seed": self.settings.seed,
            "engine": self.settings.engine,
            "command": f"penchant simulate --config {shlex.quote(str(self.folder.path / 'config.toml'))}",
            "budget_note": budget_note(self.settings, plans),
            "runs": [{k: v for k, v in row.items() if k not in ("rounds", "data_digest")} for row in done],
        }


def budget_note(settings: SimulationConfig, plans: Mapping[str, Federated]) -> str:
    """What the reader must know about how little was computed; "" where the person chose the budget."""
    trained = [f"{n} {f.plan.rounds} × {f.plan.cohort}" for n, f in plans.items() if f.learner == "fedavg"]
    if not trained or settings.rounds is not None or settings.cohort is not None:
        return ""
    return (
        f"Small fixed budgets for a first look (rounds × people: {', '.join(trained)}); the full comparison is "
        "docs/results.md, made by `make results`."
    )


def epsilon(run: Rounds, rounds: int) -> float | None:
    """ε after so many rounds, under the row's guarantee; None where nothing is promised."""
    promise = run.guarantee(rounds)
    return None if promise is None else promise.epsilon


def learner_of(manifest: Mapping[str, Any], catalogue: Catalogue) -> Learner:
    """The learner of a released model.

    Raises:
        InvalidConfig: the model belongs to another catalogue.
    """
    if manifest["catalogue"] != catalogue.version:
        raise InvalidConfig("the data's catalogue is not the one this model was made for")
    return registry.build(manifest["learner"], manifest["settings"], catalogue)
