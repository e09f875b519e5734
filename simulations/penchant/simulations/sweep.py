"""Chooses a learner's public settings on what is held out for tuning, never on targets.

    best = argmax over the learner's space of  metric(train with the settings, validation)

The first value is that of the row's own settings; then Optuna's TPE proposes one trial after another. A proposal
depends on the seed, its number and the finished trials before it, so that a sweep that was stopped and goes on finds
what it would have found. Every trial trains at the same ε with the same noise seed.

Each trial reads the validation items of the people whom ε is to protect, and no ε covers that. What comes out says so:
best.toml carries it in `tuned`, and from there it is beside every ε of `penchant simulate --config best.toml`.

Source: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization" (TPE); Akiba et al. 2019,
https://arxiv.org/abs/1907.10902 (Optuna).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tomli_w

from penchant.common import config
from penchant.common.cli import version
from penchant.common.errors import InvalidConfig, MalformedScores, MissingExtra
from penchant.common.privacy.plan import Unit
from penchant.simulations.runs import SCHEMA_VERSION as RUN_VERSION
from penchant.simulations.runs import write_file, write_json
from penchant.simulations.settings import Row, SimulationConfig, laid_over, rows
from penchant.simulations.simulate import METRIC, Prepared, on_validation, plan_of, prepare

if TYPE_CHECKING:
    import optuna

SCHEMA_VERSION = 1
PUBLIC = ("embedded", "ml-100k", "synthetic")
"""Research data that anybody may read; everything else is taken to be somebody's."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """One public setting that `penchant sweep` may choose.

    Attributes:
        name: a field of SimulationConfig, or `settings.` and the path of a learner's own setting.
        low, high: its ends; both whole numbers, or neither.
        log: whether it is drawn evenly on a logarithmic scale.
        units: with which of them it means anything.
    """

    name: str
    low: float
    high: float
    log: bool = False
    units: tuple[Unit, ...] = ("user", "none")

    def applied(self, settings: SimulationConfig, value: float) -> SimulationConfig:
        """The simulation with this value of the setting."""
        first, *path = self.name.split(".")
        table: Any = value
        if not path:
            return replace(settings, **{first: table})
        for key in reversed(path):
            table = {key: table}
        return replace(settings, settings=laid_over(settings.settings or {}, table))


_TASTE = (
    Range(name="settings.taste.decay", low=0.3, high=1.0),
    Range(name="settings.taste.popularity", low=0.01, high=10.0, log=True),
)
SPACES: Mapping[str, tuple[Range, ...]] = {
    "cooccurrence": (
        Range(name="settings.head", low=50, high=2000, log=True),
        Range(name="settings.dims", low=2, high=64, log=True),
        Range(name="settings.window", low=1, high=50, log=True),
        Range(name="settings.whiten", low=0.0, high=0.6),
        Range(name="settings.even", low=0.0, high=1.0),
        Range(name="settings.content", low=0.0, high=2.0),
        Range(name="counts_share", low=0.02, high=0.5, log=True, units=("user",)),
        *_TASTE,
    ),
    "fedavg": (
        Range(name="rounds", low=1, high=40, log=True),
        Range(name="local_epochs", low=1, high=4),
        Range(name="lr", low=1e-3, high=2.0, log=True),
        Range(name="clip", low=0.01, high=2.0, log=True, units=("user",)),
        Range(name="settings.server.lr", low=1.0, high=2000.0, log=True, units=("user",)),
        Range(name="settings.server.lr", low=3e-3, high=0.3, log=True, units=("none",)),
        *_TASTE,
    ),
}
"""What may be chosen of each learner; all of it is public, and none of it decides ε."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What decides a sweep.

    Attributes:
        base: the simulation whose learner is tuned: data, learner, model, unit, ε and δ, seed.
        trials: how many, beside the row's own settings.
        metric: of full ranking at 10 or 20, such as "ndcg@10".
    """

    base: SimulationConfig
    trials: int = 50
    metric: str = METRIC

    def __post_init__(self) -> None:
        if not (isinstance(self.trials, int) and self.trials >= 1):
            raise InvalidConfig(f"trials must be a whole number ≥ 1, not {self.trials}")
        if self.base.learner not in SPACES:
            given = "no learner" if self.base.learner is None else f"learner {self.base.learner}"
            raise InvalidConfig(f"{given}: sweep has a space for {' and '.join(SPACES)}; give --learner")
        if self.base.tuned is not None or self.base.settings is not None:
            raise InvalidConfig("a sweep chooses the settings: start from a config without settings and tuned")


def sweep(
    wanted: SweepConfig, path: Path, *, storage: Path | None = None, tell: Callable[[str], None] = lambda words: None
) -> dict[str, Any]:
    """Runs the trials that are missing; writes sweep.json and best.toml, and returns what the first holds.

    Args:
        path: folder of the sweep.
        storage: journal of its trials; None keeps it in the folder.
        tell: called with a line for each trial.

    Raises:
        MissingExtra: Optuna is not installed.
        InvalidConfig: the learner cannot be run so, the metric is unknown, or the journal is of another sweep.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtra("sweep", "optuna") from None
    base, row = wanted.base, _row(wanted.base)
    prepared = prepare(base)
    space = {one.name: one for one in SPACES[row.learner] if row.unit in one.units and _free(one, base)}
    what = {
        "simulation": config.encode(base),
        "metric": wanted.metric,
        "data": prepared.digest,
        "space": [config.encode(one) for one in space.values()],
    }
    journal = storage or path / "trials.journal"
    own = None if journal.exists() else on_validation(row, base, prepared, wanted.metric)  # refused before any file is
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = _study(journal, json.dumps(what, sort_keys=True))
    if "own" not in study.user_attrs:
        study.set_user_attr("own", on_validation(row, base, prepared, wanted.metric) if own is None else own)
    tell(f"the row's own settings: {study.user_attrs['own']:.2%}")
    while (done := len(_finished(study))) < wanted.trials:
        study.sampler = optuna.samplers.TPESampler(seed=_seed(base.seed, done), constant_liar=False)
        trial = study.ask({name: _distribution(one) for name, one in space.items()})
        try:
            value = on_validation(row, _applied(base, space, trial.params), prepared, wanted.metric)
        except (InvalidConfig, MalformedScores) as refused:
            trial.set_user_attr("refused", str(refused))
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            tell(f"trial {done + 1}: refused, {refused}")
            continue
        study.tell(trial, value)
        tell(f"trial {done + 1}: {value:.2%}")
    found = _record(wanted, study, space, row, prepared)
    write_json(path / "sweep.json", found)
    best = {"schema_version": RUN_VERSION, "simulation": found["best"]["simulation"]}
    write_file(path / "best.toml", tomli_w.dumps(best).encode())
    return found


def public(data: str) -> bool:
    """Whether this is research data that anybody may read.

    >>> public("synthetic:users=300"), public("./ml-100k"), public("ratings.csv")
    (True, False, False)
    """
    return data.partition(":")[0] in PUBLIC


def _row(base: SimulationConfig) -> Row:
    """The one row that is tuned."""
    found = [row for row in rows(base) if row.kind == "federated"]
    if len(found) != 1 or found[0].unit == "interaction":
        raise InvalidConfig("a sweep tunes one row: give --unit user or none")
    return found[0]


def _free(one: Range, base: SimulationConfig) -> bool:
    """Whether the setting is left to the sweep: one that was given stays as it is."""
    return one.name.startswith("settings.") or getattr(base, one.name) is None


def _applied(base: SimulationConfig, space: Mapping[str, Range], values: Mapping[str, Any]) -> SimulationConfig:
    for name, value in values.items():
        base = space[name].applied(base, value)
    return base


def _distribution(one: Range) -> optuna.distributions.BaseDistribution:
    import optuna

    if isinstance(one.low, int) and isinstance(one.high, int):
        return optuna.distributions.IntDistribution(one.low, one.high, log=one.log)
    return optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)


def _study(journal: Path, what: str) -> optuna.Study:
    """The study in this journal, new or as it was left; a trial that was at work then is given up.

    Raises:
        InvalidConfig: it is of another sweep, or cannot be read or written.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(study_name="penchant", storage=storage, direction="maximize", load_if_exists=True)
    except (OSError, ValueError, KeyError):
        raise InvalidConfig(f"cannot use {journal} as a journal of trials: take another --storage") from None
    if study.user_attrs.setdefault("what", what) != what:
        raise InvalidConfig(f"{journal} is of another sweep: take another --out or --storage")
    study.set_user_attr("what", what)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that came to a value or were refused, in order; not those that were stopped."""
    return [t for t in study.get_trials(deepcopy=False) if t.value is not None or "refused" in t.user_attrs]


def _seed(seed: int, trial: int) -> int:
    """Of the proposal of one trial."""
    return int(np.random.SeedSequence((seed, trial)).generate_state(1)[0])


def _record(
    wanted: SweepConfig, study: optuna.Study, space: Mapping[str, Range], row: Row, prepared: Prepared
) -> dict[str, Any]:
    own, trials = float(study.user_attrs["own"]), _finished(study)[: wanted.trials]
    best = max((t for t in trials if t.value is not None), key=lambda t: (t.value, -t.number), default=None)
    chosen = best.params if best is not None and best.value is not None and best.value > own else {}
    anybodys = public(wanted.base.data)
    note = (
        f"settings were tuned on the validation set of {prepared.data.name}"
        f"{' (public research data)' if anybodys else ''}: {len(trials)} trials, not charged"
    )
    settings = replace(_applied(wanted.base, space, chosen), unit=row.unit, tuned=note)
    promise = plan_of(row, settings, prepared).plan.guarantee()
    return {
        "schema_version": SCHEMA_VERSION,
        "penchant": version(),
        "data": {"name": prepared.data.name, "digest": prepared.digest, "public": anybodys},
        "split": prepared.split.name,
        "row": row.name,
        "metric": wanted.metric,
        "seed": wanted.base.seed,
        "uncharged": note,
        "own": own,
        "best": {
            "value": best.value if chosen and best is not None else own,
            "settings": dict(chosen),
            "simulation": config.encode(settings),
            "privacy": None if promise is None else asdict(promise),
            "privacy_note": "exact: not private" if promise is None else str(promise),
        },
        "trials": [
            {"settings": dict(t.params), "value": t.value, "refused": t.user_attrs.get("refused")} for t in trials
        ],
    }
