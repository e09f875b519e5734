"""Accuracy against ε: every learner at every ε over several seeds, between the two floors.

    cell = learner × ε × seed,  a row of `simulate` with unit user; at ε = ∞ what it runs with unit none

Data is loaded and split once and the floors and references are fitted once, because none of them depends on ε. A cell
is kept as soon as it is finished, so that a run that was stopped, or asks for more, computes only what is missing.
Figures are paired over people and seeds and share one bootstrap; the seed drives training and noise, never the data.

    kept(ε) = NDCG@10 at ε ÷ NDCG@10 of the same learner at ε = ∞

Without noise a learner has the settings that suit it best there: FedAvg takes other rounds, cohorts, steps and trained
parts, co-occurrence a larger head. So ∞ is what privacy costs in all, and not what noise alone takes.

Source: docs/metrics.md.
"""

from __future__ import annotations

import math
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
import tomli_w

from penchant.common import config
from penchant.common.arrays import AnyFloat
from penchant.common.cli import version
from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.learners.neural.models import MODELS
from penchant.common.privacy.plan import rounded_up
from penchant.simulations.canary import canary_hr
from penchant.simulations.data.synthetic import Synthetic
from penchant.simulations.evaluation import Resamples
from penchant.simulations.plans import epsilon_and_delta
from penchant.simulations.runs import RunFolder, file_name, write_file, write_json
from penchant.simulations.settings import LearnerName, Row, SimulationConfig, rows
from penchant.simulations.simulate import METRIC, Prepared, one_row, plan_of, prepare

SCHEMA_VERSION = 1
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, math.inf)
FLOORS = ("popularity", "no-sharing")
REFERENCES = ("ease", "central", "item-knn", "truth")
"""What may stand beside the floors; "truth" is the law that made synthetic data, and nothing scores better than it."""
_OF_PRIVACY = ("epsilon", "delta", "noise_multiplier", "clip", "clip_quantile", "sampling")  # refused by unit none
_OF_DATA = ("data", "items", "rating_scale", "skip_bad_rows", "k_core", "split", "seed", "delta")  # one for all cells
_OF_CELLS = ("learner", "model", "unit", "epsilon", "noise_multiplier", "as_if_users", "settings", "tuned")


@dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """What decides a frontier. Everything in it can be published.

    Attributes:
        base: data, split, δ, engine and the first seed; what a cell decides is left out of it.
        learners: `NAME[:MODEL][:OPTION=VALUE]…`, as `fedavg:transformer:rounds=8`; any option of a simulation.
        epsilons: of unit user; ∞ stands for the learner as `simulate` runs it with unit none.
        seeds: how many, from the base's on.
        references: which of REFERENCES to fit, with the first seed.
        as_if_users: as in SimulationConfig, for every finite ε.
    """

    base: SimulationConfig
    learners: tuple[str, ...] = ("fedavg", "cooccurrence", "als")
    epsilons: tuple[float, ...] = EPSILONS
    seeds: int = 5
    references: tuple[str, ...] = ("ease", "central")
    as_if_users: int | None = None

    def __post_init__(self) -> None:
        for name in _OF_CELLS:
            if getattr(self.base, name) is not None:
                raise InvalidConfig(f"a frontier decides {name} for each cell: drop it")
        if not (isinstance(self.seeds, int) and self.seeds >= 1):
            raise InvalidConfig(f"seeds must be a whole number ≥ 1, not {self.seeds}")
        for name in ("learners", "epsilons"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InvalidConfig(f"{name} must be at least one, each once")
        for epsilon in self.epsilons:
            if not epsilon > 0:
                raise InvalidConfig(f"epsilons must be positive, or inf, not {epsilon}")
        for name in self.references:
            if name not in REFERENCES:
                raise InvalidConfig(f"unknown reference {name!r}{config.did_you_mean(name, REFERENCES)}")
        for name in self.learners:
            learner_options(name)


@dataclass(frozen=True)
class Cell:
    """One learner at one ε with one seed: a row of a simulation, in a folder of its own."""

    learner: str
    epsilon: float
    row: Row
    settings: SimulationConfig

    @property
    def place(self) -> str:
        return f"cells/{file_name(self.learner)}/epsilon-{self.epsilon:g}/seed-{self.settings.seed}"


def learner_options(name: str) -> dict[str, Any]:
    """The options of a simulation that such a name stands for.

    >>> learner_options("fedavg:gru:rounds=8:clip=0.2")
    {'learner': 'fedavg', 'model': 'gru', 'rounds': 8, 'clip': 0.2}

    Raises:
        InvalidConfig: an unknown learner, model or option, or a value that is none of its kind.
    """
    learner, *more = name.split(":")
    known = get_args(LearnerName)
    if learner not in known:
        raise InvalidConfig(f"unknown learner {learner!r}{config.did_you_mean(learner, known)}")
    options: dict[str, Any] = {"learner": learner}
    hints = typing.get_type_hints(SimulationConfig)
    for word in more:
        key, equals, text = word.partition("=")
        if not equals:
            if word not in MODELS:
                raise InvalidConfig(f"unknown model {word!r}{config.did_you_mean(word, MODELS)}")
            options["model"] = word
            continue
        key = key.replace("-", "_")
        kinds = [kind for kind in (bool, int, float, str) if kind in (hints.get(key), *get_args(hints.get(key)))]
        if not kinds or key in (*_OF_DATA, *_OF_CELLS):
            free = [f.name for f in fields(SimulationConfig) if f.name not in (*_OF_DATA, *_OF_CELLS)]
            raise InvalidConfig(f"{name}: {key} is no option of a learner{config.did_you_mean(key, free)}")
        try:
            value = {"true": True, "false": False}[text] if kinds[0] is bool else kinds[0](text)
            options[key] = tuple(text.split("+")) if key == "freeze" else value
        except (ValueError, KeyError):
            raise InvalidConfig(f"{name}: {key} cannot be {text!r}") from None
    return options


def cells(wanted: FrontierConfig, n_users: int) -> Iterator[Cell]:
    """Every cell, learner by learner, ε by ε, seed by seed.

    Args:
        n_users: who takes part; a large roster has a smaller δ where none is given.

    Raises:
        InvalidConfig: a learner cannot be run so.
    """
    base = replace(wanted.base, delta=None)
    _, delta = epsilon_and_delta(wanted.base, max(n_users, wanted.as_if_users or 0))
    for learner in wanted.learners:
        options = learner_options(learner)
        exact = {name: value for name, value in options.items() if name not in _OF_PRIVACY}
        for epsilon in wanted.epsilons:
            for seed in range(base.seed, base.seed + wanted.seeds):
                settings = replace(base, seed=seed, unit="none", **exact)
                if epsilon < math.inf:
                    budget: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "as_if_users": wanted.as_if_users}
                    settings = replace(base, seed=seed, unit="user", **budget, **options)
                found = [row for row in rows(settings) if row.kind == "federated"]
                if len(found) != 1:
                    raise InvalidConfig(f"learner {learner} is {len(found)} rows at ε = {epsilon:g}, not one")
                yield Cell(learner, epsilon, found[0], settings)


def run(wanted: FrontierConfig, path: Path, *, jobs: int = 1, tell: Callable[[str], None] = lambda words: None) -> None:
    """Computes every floor, reference and cell that is not there yet.

    Args:
        path: folder of the frontier.
        jobs: processes over cells; each has its own seed and folder, so their number changes no figure.
        tell: called with a line when a piece is done.

    Raises:
        InvalidConfig, MalformedData, MissingExtra, PrivacyRefused: as `simulate` does; nothing is written before every
            cell's plan is known to be sound.
    """
    if jobs < 1:
        raise InvalidConfig(f"jobs must be ≥ 1, not {jobs}")
    if (path / "frontier.toml").exists():
        before = read_config(path)
        if (before.base, before.as_if_users) != (wanted.base, wanted.as_if_users):
            raise InvalidConfig(f"{path} holds a frontier of other data or settings: take another folder")
    prepared = _prepared(wanted.base)
    todo = list(cells(wanted, prepared.population.histories.n_users))
    for cell in todo:
        plan_of(cell.row, cell.settings, prepared)
    if len({cell.place for cell in todo}) < len(todo):
        raise InvalidConfig("two learners or two ε would share a folder: write them so that they differ, or drop one")
    if "truth" in wanted.references and not isinstance(prepared.data, Synthetic):
        raise InvalidConfig(f"the truth of {prepared.data.name} is not known: drop the reference truth")
    record = {"schema_version": SCHEMA_VERSION, "frontier": config.encode(wanted)}
    write_file(path / "frontier.toml", tomli_w.dumps(record).encode())
    folder = _references(path)
    for name in (*FLOORS, *wanted.references):
        row = one_row(_reference(name), wanted.base, prepared, folder, folder)
        tell(f"{name}: {row['metrics'][METRIC]:.2%}")
    missing = [cell for cell in todo if not _finished(cell, path, prepared.digest)]
    if jobs == 1 or len(missing) < 2:
        for cell in missing:
            tell(_compute(cell, wanted.base, path))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(_compute, cell, wanted.base, path) for cell in missing]):
                tell(done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_config(path: Path) -> FrontierConfig:
    """The frontier that a folder holds.

    Raises:
        InvalidConfig: it holds none, or one that cannot be read here.
    """
    file = path / "frontier.toml"
    try:
        record = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InvalidConfig(f"cannot read {file}: give the folder of a frontier") from None
    if record.get("schema_version") != SCHEMA_VERSION:
        raise InvalidConfig(f"{file}: version {record.get('schema_version')!r} is unknown here; update penchant")
    return config.decode(FrontierConfig, record.get("frontier", {}))


def record(wanted: FrontierConfig, path: Path) -> dict[str, Any]:
    """What `run` found, as frontier.json holds it (docs/frontier.md).

    Raises:
        InvalidConfig: a cell is not finished.
        MalformedData: a file is damaged, or cells were run on other data.
    """
    prepared = _prepared(wanted.base)
    n_users = prepared.population.histories.n_users
    folder = _references(path)
    values: dict[str, AnyFloat] = {name: folder.per_user(name)[METRIC] for name in (*FLOORS, *wanted.references)}
    found: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    per_user: dict[tuple[str, float], list[AnyFloat]] = {}
    for cell in cells(wanted, n_users):
        at = RunFolder(path / cell.place)
        row = at.read_row(cell.row.name)
        if row is None:
            raise InvalidConfig(f"{path / cell.place} is not finished: go on with penchant frontier --resume {path}")
        if row["data_digest"] != prepared.digest:
            raise MalformedData(f"{path / cell.place} was run on other data: delete it and go on")
        key = (cell.learner, cell.epsilon)
        found.setdefault(key, []).append(row)
        per_user.setdefault(key, []).append(at.per_user(cell.row.name)[METRIC])
    values |= {_key(*key): np.stack(seeds) for key, seeds in per_user.items()}
    resamples = Resamples.of(values, seed=0)
    lines = [
        _line(name, kind, resamples, name, [_finished_row(folder, name)])
        for kind, names in (("floor", FLOORS), ("reference", wanted.references))
        for name in names
    ]
    for (learner, epsilon), seeds in found.items():
        line = _line(learner, "learner", resamples, _key(learner, epsilon), seeds)
        line["epsilon"] = None if epsilon == math.inf else epsilon
        if (learner, math.inf) in found and epsilon < math.inf:
            line["kept"] = asdict(resamples.ratio(_key(learner, epsilon), _key(learner, math.inf)))
        lines.append(line)
    data, parts = prepared.data, prepared.split
    return {
        "schema_version": SCHEMA_VERSION,
        "penchant": version(),
        "metric": METRIC,
        "data": {
            "name": data.name,
            "users": data.interactions.n_users,
            "items": len(data.catalogue),
            "interactions": len(data.interactions),
            "digest": prepared.digest,
            "terms": data.terms,
            "cleaning": data.cleaning.lines(),
        },
        "split": {
            "name": parts.name,
            "participants": n_users,
            "scored_users": int((parts.targets.lengths > 0).sum()),
            "notes": list(parts.notes),
        },
        "seed": wanted.base.seed,
        "seeds": wanted.seeds,
        "as_if_users": wanted.as_if_users,
        "canary": _canary(prepared),
        "rows": lines,
    }


def promises(lines: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """What beside ε all private rows promise alike, and for each row, in order, what is its own; "" for exact ones.

    Together with its ε the two are a row's whole guarantee: what one row alone has is never in the shared part.
    """
    parts = [_parts(line["privacy"]) if line["privacy"] else None for line in lines]
    private = [part for part in parts if part is not None]
    if not private:
        return "", ["" for _ in lines]
    alike = [len(set(column)) == 1 for column in zip(*private, strict=True)]
    shared = ", ".join(part for part, same in zip(private[0], alike, strict=True) if same)
    own = [
        ", ".join(word for word, same in zip(part, alike, strict=True) if not same) if part is not None else ""
        for part in parts
    ]
    return shared, own


def write(path: Path, found: Mapping[str, Any]) -> None:
    """frontier.json, frontier.html and the figure, beside the cells."""
    from penchant.simulations import frontier_page

    write_json(path / "frontier.json", found)
    write_file(path / "frontier.html", frontier_page.render(found).encode())
    for kind in ("svg", "png"):
        write_file(path / f"frontier.{kind}", frontier_page.figure(found, kind))


def _parts(privacy: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"δ = {privacy['delta']:g}",
        f"unit {privacy['unit']} ({privacy['neighbours']})",
        f"sampling {privacy['sampler']}",
        f"accountant {privacy['accountant']}",
        f"trust {privacy['trust']}",
        "not charged: " + ("; ".join(privacy["uncharged"]) or "nothing"),
    )


def _line(name: str, kind: str, resamples: Resamples, key: str, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the table. The ε is the largest of its seeds: a round that ran twice is charged twice."""
    worst = max(seeds, key=lambda row: row["privacy"]["epsilon"] if row["privacy"] else 0.0)
    return {
        "name": name,
        "kind": kind,
        "row": worst["name"],
        "epsilon": None,
        METRIC: asdict(resamples.mean(key)),
        "hr@10": float(np.mean([row["metrics"]["hr@10"] for row in seeds])),
        "against_floors": {f: asdict(resamples.difference(key, f)) for f in FLOORS if f != name},
        "kept": None,
        "privacy": worst["privacy"],
        "privacy_note": worst["privacy_note"],
        "as_if": worst.get("as_if"),
        "seeds": len(seeds),
        "seconds": float(np.mean([row["seconds"] for row in seeds])),
    }


def epsilon_words(line: Mapping[str, Any]) -> str:
    """ε of a row of the table, that of the people in the data; ∞ where nothing is promised."""
    return rounded_up(line["privacy"]["epsilon"]) if line["privacy"] else "∞"


def _canary(prepared: Prepared) -> dict[str, float] | None:
    """A rule that learns nothing, among 99 others, on this split; None where somebody has fewer unseen items."""
    try:
        hr, error = canary_hr(prepared.split.train, prepared.split.targets, pool="honest", rounds=1, seed=0)
    except InvalidConfig:
        return None
    return {"hr@10": hr, "standard_error": error}


def _compute(cell: Cell, base: SimulationConfig, path: Path) -> str:
    """One cell, in this process; what to say of it."""
    folder = RunFolder(path / cell.place)
    if folder.holds_other(cell.settings):
        raise InvalidConfig(f"{folder.path} holds a cell with other settings: delete it, or take another folder")
    folder.write_config(cell.settings)
    row = one_row(cell.row, cell.settings, _prepared(base), folder, _references(path))
    return f"{cell.learner}, unit {cell.row.unit}, {cell.place}: {row['metrics'][METRIC]:.2%}, {row['seconds']:.0f} s"


def _finished(cell: Cell, path: Path, digest: str) -> bool:
    folder = RunFolder(path / cell.place)
    row = folder.read_row(cell.row.name)
    if row is None:
        return False
    if folder.holds_other(cell.settings) or row["data_digest"] != digest:
        raise InvalidConfig(f"{folder.path} holds a cell of other settings or data: delete it, or take another folder")
    return True


@lru_cache(maxsize=1)
def _prepared(base: SimulationConfig) -> Prepared:
    """Once in each process, for all of its cells."""
    return prepare(base)


def _references(path: Path) -> RunFolder:
    return RunFolder(path / "references")


def _reference(name: str) -> Row:
    if name in FLOORS:
        return Row(name, "floor")
    return Row(name, "not private", model="mf" if name == "central" else "")


def _finished_row(folder: RunFolder, name: str) -> dict[str, Any]:
    row = folder.read_row(name)
    if row is None:
        raise InvalidConfig(f"{folder.path} lacks {name}: run the frontier again")
    return row


def _key(learner: str, epsilon: float) -> str:
    return f"{learner} @ {epsilon:g}"
