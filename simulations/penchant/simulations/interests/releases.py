"""What every evaluation of interests starts from: a split, and one release made from its training part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.learners import registry
from penchant.common.learners.contract import Learner, State
from penchant.common.privacy.plan import Guarantee
from penchant.common.taste import ItemSide
from penchant.simulations import engine, plans
from penchant.simulations.data.dataset import Dataset
from penchant.simulations.data.loaders import load
from penchant.simulations.engine import Population
from penchant.simulations.evaluation import Interval
from penchant.simulations.settings import Row, SimulationConfig
from penchant.simulations.splits import Split, split

CHOSEN = ("settings of the profiles were chosen on validation parts or other people of the same data",)


@dataclass(frozen=True)
class Release:
    """Data, how it is split, and what devices got.

    Attributes:
        guarantee: of the release, with all that its ε means nothing without; None for exact sums.
        side: what devices score with.
    """

    data: Dataset
    split: Split
    guarantee: Guarantee | None
    learner: Learner
    state: State
    side: ItemSide

    @property
    def catalogue(self) -> Catalogue:
        return self.data.catalogue

    @property
    def conditions(self) -> str:
        """What is promised, as a sentence below a table."""
        return f"Each release: {self.guarantee}." if self.guarantee else "Exact sums: nothing is promised, no ε."


@dataclass(frozen=True)
class Table:
    """One measured table of docs/interests.md.

    Attributes:
        title: the question.
        columns: headings; the first column names what is compared.
        rows: as many cells each; intervals are written as `interval` does.
        notes: plain sentences below it: data, people, seeds, ε with its conditions, and what does not beat its floor.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        lines = [f"| {' | '.join(self.columns)} |", f"|{'---|' * len(self.columns)}"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([f"**{self.title}**", "", *lines, "", *self.notes])


def release(name: str, *, by: str = "leave-last-out", epsilon: float | None = None, seed: int = 0) -> Release:
    """Co-occurrence's release from the training part of a data set, by the rounds that `penchant simulate` runs.

    Args:
        name: as `penchant simulate --data` takes it.
        by: name of the split.
        epsilon: with unit user, δ = 1e-5, add/remove one profile; None for exact sums.

    Raises:
        InvalidConfig: no such data or split.
    """
    data = load(name)
    parts = split(by, data.interactions, seed)
    row = Row("co-occurrence", "federated", "cooccurrence", "", "none" if epsilon is None else "user")
    settings = SimulationConfig(epsilon=epsilon, delta=None if epsilon is None else 1e-5)
    made = plans.federated(row, settings, int(parts.participants.sum()), (*CHOSEN, *parts.uncharged))
    people = parts.train.select(parts.participants.nonzero()[0])
    rounds = engine.run(
        made,
        Population(histories=people, catalogue=data.catalogue),
        name=row.name,
        seed=seed,
        nodes=engine.cores(),
        engine="local",
        where="cpu",
        after_round=lambda *_: None,
    )
    learner = registry.build(made.learner, made.settings, data.catalogue)
    state = learner.released(rounds.progress.state)
    side = learner.item_side(state)
    if side is None:
        raise InvalidConfig(f"learner {made.learner} releases no item vectors to make a profile of")
    return Release(data, parts, made.plan.guarantee(), learner, state, side)


def interval(found: Interval, digits: int = 3) -> str:
    """A mean with its 95 % interval.

    >>> interval(Interval(mean=0.25, low=0.2, high=0.3), 2)
    '0.25 [0.20, 0.30]'
    """
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"
