"""One simulated person's profile to look at: their topics over time and now, and a list with how sure and why.

    share of topic t  ∝  (1 − w) Σⱼ long weight of event j · yⱼ · p(t | item j) + w · the same of the recent memory

Each sum is taken to 1 first, and an item's topics share it equally. Beside each listed item stands its intensity, the
expected strength in [0, 1] ± 1.96 stddev: what the model does not know, not how wrong it may be. With a release of
`strengths` it is that of the released item terms, calibrated; with any other nothing is known of an item's own strength
but its stddev over items, and the expectation is from the person's own history alone.

Source: `common/interests/profile.py`, whose memories weigh the events, and `intensity.py` there; the figure's style is
`frontier_page.py`'s.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from penchant.common.arrays import Float64
from penchant.common.catalogue import Catalogue
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.common.interests import InterestProfile
from penchant.common.interests.intensity import Intensities, ItemTerms
from penchant.common.learners.contract import Learner, State
from penchant.common.learners.strengths import Strengths, StrengthsConfig
from penchant.common.taste import Attribution
from penchant.simulations.frontier_page import PRINT, style
from penchant.simulations.runs import RunFolder
from penchant.simulations.simulate import learner_of, load_data
from penchant.simulations.tables import plain_table

REASONS = 3
_YEAR = re.compile(r"\s*\(\d{4}\)\s*$")
STRETCHES = 60
"""Of a history, at most: a figure shows the mean over each."""
UNNAMED = "no topic"
WIDTH, ROW, FONT = 760.0, 19.0, 8.5
"""Of the figure, in points."""


@dataclass(frozen=True)
class Listed:
    """One recommended item.

    Attributes:
        score: by which the list is ordered; in no unit.
        intensity, stddev: expected strength in [0, 1], and of that expectation.
        reasons: what gave most of the score, each with its share of all that raised it.
    """

    title: str
    topics: Sequence[str]
    score: float
    intensity: float
    stddev: float
    reasons: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Person:
    """What is shown of a person.

    Attributes:
        shares: by topic, largest now first: float64[n_events], after each event; they sum to 1 over topics.
        drifts: after how many events the profile noticed a change; empty for one that looks for none.
        mean: of the person's own strengths; None without an event.
        caution: what limits the intensities, in plain words; "" for nothing.
    """

    user: str
    data: str
    row: str
    note: str
    n_events: int
    shares: Mapping[str, Float64]
    drifts: Sequence[int]
    mean: float | None
    caution: str
    items: Sequence[Listed]


def person(folder: RunFolder, user: str, *, row: str | None = None, n: int = 10) -> Person:
    """The profile of a person of a run's data after their whole history, and how it came to be.

    Args:
        row: whose release; the run's last federated row that has item vectors if None.

    Raises:
        InvalidConfig: no such user or row, or a row without item vectors.
    """
    rows = [one["name"] for one in folder.read_results()["runs"] if one["kind"] == "federated"]
    if row is None and not rows:
        raise InvalidConfig(f"{folder.path} holds no federated row, so no model was released")
    data = load_data(folder.read_config())
    made, name = None, ""
    for name in [row] if row is not None else reversed(rows):
        state, manifest = folder.read_model(name)
        learner = learner_of(manifest, data.catalogue)
        if (side := learner.item_side(state)) is not None:
            made = learner, state, side, manifest["privacy_note"]
            break
    if made is None:
        hint = "take another --row" if row is not None and len(rows) > 1 else "simulate with --learner cooccurrence"
        raise InvalidConfig(f"{name} released no item vectors to make a profile of: {hint}")
    learner, state, side, note = made
    people = {known: place for place, known in enumerate(data.interactions.users)}
    if user not in people:
        raise InvalidConfig(f"no user {user!r} in {data.name}{did_you_mean(user, people)}")
    history = data.interactions.history(people[user]).known(len(data.catalogue))
    profile = InterestProfile(side, data.catalogue)
    path = _Path(profile)
    for item, strength, time in zip(
        history.items.tolist(), history.strengths.tolist(), history.times.tolist(), strict=True
    ):
        profile.update(item, strength=strength, time=time)
        path.note()
    drifts = [drift.event + 1 for drift in profile.drifts]
    mean = float(np.mean(profile.strengths)) if len(history) else None
    caution = "" if isinstance(learner, Strengths) else "nothing was released of items' strengths"
    if len(history) and np.ptp(profile.strengths) == 0:
        caution = "all own events are equally strong"
    items = list(_listed(profile, learner, state, n))
    return Person(user, data.name, name, note, len(history), path.shares(), drifts, mean, caution, items)


class _Path:
    """Follows a profile's memories by topic."""

    def __init__(self, profile: InterestProfile) -> None:
        self.profile, catalogue = profile, profile.catalogue
        self.names = sorted({topic for topics in catalogue.topics for topic in topics} - catalogue.sensitive)
        self.place = {name: k for k, name in enumerate([*self.names, UNNAMED])}
        self.mass = np.zeros((2, len(self.place)))
        self.before = [0.0, 0.0]
        self.rows: list[Float64] = []

    def note(self) -> None:
        """After an event."""
        profile = self.profile
        topics = profile.catalogue.topics[profile.items[-1]] or (UNNAMED,)
        own = [self.place[topic] for topic in topics if topic in self.place]  # none where all of them are sensitive
        for which, memory in enumerate((profile.long, profile.recent)):
            self.mass[which] *= np.exp(memory.faded - self.before[which])
            if own:
                self.mass[which, own] += profile.weights[-1] * profile.strengths[-1] / len(own)
            self.before[which] = memory.faded
        each = self.mass / np.maximum(self.mass.sum(axis=1, keepdims=True), 1e-300)
        self.rows.append((1 - profile.share) * each[0] + profile.share * each[1])

    def shares(self) -> dict[str, Float64]:
        """By topic, the largest now first; topics that never had any are left out."""
        if not self.rows:
            return {}
        table = np.array(self.rows)
        order = [k for k in np.argsort(-table[-1], kind="stable").tolist() if table[:, k].any()]
        names = list(self.place)
        return {names[k]: table[:, k] for k in order}


def _listed(profile: InterestProfile, learner: Learner, state: State, n: int) -> Iterator[Listed]:
    chosen = profile.recommend(n)
    means, stddevs = _intensities(profile, learner, state, [one.position for one in chosen])
    catalogue = profile.catalogue
    for one, mean, stddev in zip(chosen, means.tolist(), stddevs.tolist(), strict=True):
        reasons = _reasons(profile.attribution(one.position), profile.items, catalogue)
        i = one.position
        topics = tuple(topic for topic in catalogue.topics[i] if topic not in catalogue.sensitive)
        yield Listed(catalogue.titles[i], topics, one.score, mean, stddev, reasons)


def _intensities(profile: InterestProfile, learner: Learner, state: State, items: list[int]) -> tuple[Float64, Float64]:
    """Expected strengths and their stddevs, float64[n] each."""
    if isinstance(learner, Strengths):
        terms, model = learner.item_terms(state), learner.config.model
        found = Intensities.of(profile, terms, model, learner.correction(state)).at(items)
        return learner.calibration(state).strength(found.mean), found.stddev
    n, config = len(profile.catalogue), StrengthsConfig()
    mean = float(np.mean(profile.strengths)) if len(profile.strengths) else config.midpoint
    unknown = np.full(n, config.spread**2, np.float32)
    found = Intensities.of(profile, ItemTerms(mean, np.zeros(n, np.float32), unknown)).at(items)
    return found.mean, found.stddev


def _reasons(parts: Attribution, items: Sequence[int], catalogue: Catalogue) -> list[tuple[str, float]]:
    each: dict[str, float] = {}
    unnamed: dict[int, float] = {}  # of a sensitive topic: their part counts, and nobody reads what they are
    for item, part in zip(items, (parts.past + parts.transition).tolist(), strict=True):
        if catalogue.is_sensitive[item]:
            unnamed[item] = unnamed.get(item, 0.0) + part
        else:
            each[catalogue.titles[item]] = each.get(catalogue.titles[item], 0.0) + part
    each |= {"popularity": parts.popularity, "what you named": parts.prior}
    raised = sum(part for part in (*each.values(), *unnamed.values()) if part > 0)
    best = sorted(each.items(), key=lambda pair: -pair[1])[:REASONS]
    return [(what, part / raised) for what, part in best if part > 0.005 * raised]


# ------------------------------------------------------------------------------------------------------ in words


def told(found: Person) -> Iterator[Any]:
    """What a terminal shows, part by part."""
    yield Text(f"User {found.user} of {found.data}: {found.n_events} interactions, profile from {found.row}")
    if found.shares:
        half = (found.n_events - 1) // 2
        table = plain_table("Interests")
        table.add_column("topic")
        for title in ("half way %", "now %"):
            table.add_column(title, justify="right")
        table.add_column("")
        for topic, share in list(found.shares.items())[:10]:
            now = float(share[-1])
            table.add_row(Text(topic), f"{100 * share[half]:.0f}", f"{100 * now:.0f}", "█" * round(40 * now))
        if found.drifts:
            table.caption = Text("Change noticed after interactions: " + ", ".join(map(str, found.drifts)))
        yield table
    yield _list(found)
    yield Text(found.note, style="dim")


def _list(found: Person) -> Table:
    table = plain_table("Recommended")
    for title in ("#", "title", "score", "intensity", "because of"):
        table.add_column(title, justify="right" if title[0] in "#si" else "left")
    for place, one in enumerate(found.items, 1):
        strength = f"{one.intensity:.2f} ± {1.96 * one.stddev:.2f}"
        table.add_row(str(place), Text(one.title), f"{one.score:.2f}", strength, Text(_because(one)))
    table.caption = Text("Intensity: expected strength, 0 to 1" + (f"; {found.caution}" if found.caution else ""))
    return table


def _because(one: Listed, longest: int = 28) -> str:
    said = [f"{_short(_YEAR.sub('', what), longest)} {100 * share:.0f} %" for what, share in one.reasons]
    return ", ".join(said) or "nothing known"


def _short(words: str, longest: int) -> str:
    """
    >>> _short("Twelve Monkeys", 8)
    'Twelve…'
    """
    return words if len(words) <= longest else words[: longest - 1].rstrip() + "…"


# ---------------------------------------------------------------------------------------------------- as a figure


def figure(found: Person, kind: Literal["svg", "png"]) -> bytes:
    """The picture as a file; the same person gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", style(PRINT), {"font.size": FONT}]):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else {"Software": None}
        _draw(found).savefig(buffer, format=kind, dpi=200, metadata=nothing)
    return buffer.getvalue()


def _draw(found: Person) -> Figure:
    foot = textwrap.wrap(found.note, 195)
    below = ROW * max(len(found.items), 1) + 52 + 10 * len(foot)
    above, gap = 210.0, 46.0
    height = 44 + above + gap + below
    drawn = Figure(figsize=(WIDTH / 72, height / 72), facecolor=PRINT.paper)

    def at(left: float, top: float, width: float, tall: float) -> Axes:
        return drawn.add_axes((left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height))

    title = f"User {found.user} of {found.data}: {found.n_events} interactions, profile from {found.row}"
    drawn.text(10 / WIDTH, 1 - 18 / height, title, fontsize=FONT + 2, weight="bold", parse_math=False)
    drawn.text(10 / WIDTH, 8 / height, "\n".join(foot), fontsize=6.5, color=PRINT.muted, parse_math=False)
    named = list(found.shares)[: len(PRINT.series)]
    colours = dict(zip(named, PRINT.series, strict=False))
    _over_time(at(40, 50, 380, above - 24), found, colours)
    _now(at(560, 50, 180, above - 24), found, colours)
    _list_axes(at(210, 44 + above + gap, 200, ROW * max(len(found.items), 1)), found)
    return drawn


def _over_time(axes: Axes, found: Person, colours: Mapping[str, str]) -> None:
    axes.set_title("Interests over time, share in %")
    axes.set_ylim(0, 100)
    axes.set_xlabel("interactions, oldest first")
    if not found.shares:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=PRINT.muted)
        return
    shown = [100 * found.shares[name] for name in colours]
    shown.append(100 - np.sum(shown, axis=0))
    parts = np.array_split(np.arange(found.n_events), min(STRETCHES, found.n_events))
    edges = [0, *(int(part[-1]) + 1 for part in parts)]
    means = np.array([[row[part].mean() for part in parts] for row in shown])
    axes.stackplot(
        edges, means[:, [*range(len(parts)), -1]], step="post", colors=[*colours.values(), PRINT.grid], alpha=0.85
    )
    axes.set_xlim(0, found.n_events)
    axes.grid(False)
    if len(found.shares) > len(colours):
        look = {"facecolor": PRINT.grid, "edgecolor": "none", "pad": 1.5}  # over a line of a change
        axes.text(0.99, 0.97, "all other topics", transform=axes.transAxes, ha="right", va="top", bbox=look)
    for drift in found.drifts:
        axes.axvline(drift, color=PRINT.ink, linewidth=1.2, linestyle=(0, (3, 2)))
    if found.drifts:
        axes.annotate("change noticed", (found.drifts[0], 100), (2, 2), textcoords="offset points", fontsize=6.5)


def _now(axes: Axes, found: Person, colours: Mapping[str, str]) -> None:
    axes.set_title("Now, share in %")
    axes.grid(False)
    top = list(found.shares.items())[:10]
    other = 1.0 - sum(float(share[-1]) for _, share in top)
    bars = [(name, float(share[-1]), colours.get(name, PRINT.muted)) for name, share in top]
    if other > 0.005:
        n = len(found.shares) - len(top)
        bars.append((f"{n} other{'s' if n > 1 else ''}", other, PRINT.grid))
    for place, (name, share, colour) in enumerate(bars):
        axes.barh(place, 100 * share, color=colour, height=0.7, alpha=0.85)
        axes.text(100 * share, place, f" {100 * share:.0f}", va="center", fontsize=FONT - 1)
        axes.annotate(
            _short(name, 22), (0, place), (-5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="center", parse_math=False,
        )  # fmt: skip
    axes.set_ylim(max(len(bars), 1) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["bottom"]].set_visible(False)


def _list_axes(axes: Axes, found: Person) -> None:
    axes.set_xlabel("intensity: expected strength, ± 1.96 stddev" + (f"\n({found.caution})" if found.caution else ""))
    axes.set_xlim(0, 1)
    axes.grid(False)
    axes.grid(True, axis="x")
    if found.mean is not None:
        axes.axvline(found.mean, color=PRINT.ink, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.annotate("own mean", (found.mean, 1), (0, 3), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="center", fontsize=6.5)  # fmt: skip

    def beside(words: str, place: float, x: float, right: bool, **look: Any) -> None:
        axes.annotate(
            words,
            (float(right), place),
            (x, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            parse_math=False,
            annotation_clip=False,
            **look,
        )

    beside("Recommended, best score first", -1, -200, False)
    beside("because of", -1, 10, True)
    for place, one in enumerate(found.items):
        colour = PRINT.series[0]
        band = [max(0.0, one.intensity - 1.96 * one.stddev), min(1.0, one.intensity + 1.96 * one.stddev)]
        axes.plot(band, [place, place], color=colour, linewidth=3, alpha=0.4, solid_capstyle="butt")
        axes.plot(one.intensity, place, "o", color=colour, clip_on=False)
        beside(f"{place + 1}", place, -186, False, ha="right", color=PRINT.muted)
        beside(_short(one.title, 34), place, -180, False)
        beside(_because(one, 24), place, 10, True, fontsize=FONT - 1)
    axes.set_ylim(max(len(found.items), 1) - 0.5, -0.5)
    axes.set_yticks([])
