"""A frontier as one figure, and as one HTML file that opens offline.

ε is on a logarithmic axis with ∞ at its right end, past a gap that no line crosses unbroken. A learner has a colour, a
marker and a dash of its own and its name at the end of its line, so that it reads in greyscale and to colour-blind
eyes; both floors are level lines with their 95 % bands. The figure carries what its guarantees say beside ε, so that
it can travel alone. Where noise is scaled for other people, the ε of the people in the data stands at every tick.

Source: as `report.py`.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from penchant.simulations import report, tables
from penchant.simulations.evaluation import Interval
from penchant.simulations.frontier import epsilon_words, promises
from penchant.simulations.report import DASHES, SERIES
from penchant.simulations.tables import Record

TEMPLATE = "frontier.html.jinja"
METRIC = "ndcg@10"
WIDTH, HEIGHT, LEFT, RIGHT, TOP = 520.0, 300.0, 30.0, 128.0, 22.0
"""In points; RIGHT is the room for names, and a longer name, or what stands below the axis, is added to the size."""
FONT, SMALL = 9.0, 6.5
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Colours:
    """What a figure is drawn in."""

    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    paper: str


PRINT = Colours("#1b1f24", "#57606a", "#d3d9df", ("#0061a8", "#b34200", "#00705a", "#9a3a80", "#6b5700"), "#ffffff")
PAGE = Colours(report.INK, report.MUTED, report.GRID, SERIES, "none")


def figure(record: Record, kind: Literal["svg", "png"]) -> bytes:
    """The figure as a file; the same record gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", style(PRINT)]):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else {"Software": None}
        _draw(record, PRINT).savefig(buffer, format=kind, dpi=220, metadata=nothing)
    return buffer.getvalue().rstrip() + b"\n" if kind == "svg" else buffer.getvalue()


def render(record: Record) -> str:
    """The page."""
    with matplotlib.style.context(["default", style(PAGE)]):
        picture = report.inline_svg(_draw(record, PAGE, alone=False), "frontier", told(record))
    lines: Sequence[Record] = record["rows"]
    shared, own = promises(lines)
    return report.page(
        TEMPLATE,
        version=record["penchant"],
        data=record["data"],
        split=record["split"],
        seeds=record["seeds"],
        imitated=imitated(record),
        canary=canary(record),
        picture=picture,
        shared=shared,
        rows=[_cells(line, words) for line, words in zip(lines, own, strict=True)],
    )


def told(record: Record) -> str:
    """The figure in words."""
    said = []
    for line in record["rows"]:
        at = "" if line["kind"] != "learner" else f" at ε {_asked(line)}"
        found = line[METRIC]
        said.append(
            f"{line['name']}{at}: {tables.percent(found['mean'])} % "
            f"({tables.percent(found['low'])} to {tables.percent(found['high'])})."
        )
    return " ".join([*said, imitated(record)]).strip()


def imitated(record: Record) -> str:
    """That noise was scaled, and what that means; "" where it was not."""
    if not record["as_if_users"]:
        return ""
    return (
        f"Noise as for {record['as_if_users']:,} people: a research figure. Noise is scaled and data is not: the "
        f"{record['split']['participants']:,} people of this data have the ε that stands beside, not what it imitates."
    )


def canary(record: Record) -> str:
    """How the rule that learns nothing scores; "" where it could not be asked."""
    if not record["canary"]:
        return ""
    found, error = record["canary"]["hr@10"], record["canary"]["standard_error"]
    return (
        f"A rule that learns nothing hits {tables.percent(found, 1)} % ± {tables.percent(1.96 * error, 1)} of targets "
        "in the first ten of a hundred; chance is 10 %, so the split leaks no target through negatives."
    )


def interval(found: Mapping[str, float], words: Any = tables.percent) -> str:
    """A figure with its 95 % interval."""
    return f"{words(found['mean'])} [{words(found['low'])}, {words(found['high'])}]"


def kept(line: Record) -> str:
    """The share of the learner's own figure without privacy, in %; "–" where there is none to compare with."""
    return interval(line["kept"], lambda value: f"{100 * value:.0f}") if line["kept"] else tables.NONE


def _cells(line: Record, own: str) -> dict[str, Any]:
    private = line["privacy"] is not None
    return {
        "name": line["name"],
        "kind": line["kind"],
        "epsilon": epsilon_words(line) if line["kind"] == "learner" else "",
        "own": own if private else line["privacy_note"],
        "imitates": tables.imitates(line),
        "ndcg": tables.percent(line[METRIC]["mean"]),
        "interval": f"{tables.percent(line[METRIC]['low'])} to {tables.percent(line[METRIC]['high'])}",
        "hr": tables.percent(line["hr@10"], 1),
        "against": [
            {
                "floor": floor,
                "points": tables.points(found["mean"]),
                "interval": f"{tables.points(found['low'])} to {tables.points(found['high'])}",
                "standing": tables.standing(found),
            }
            for floor, found in line["against_floors"].items()
        ],
        "kept": kept(line),
    }


def _asked(line: Record) -> str:
    return "∞" if line["epsilon"] is None else f"{line['epsilon']:g}"


def style(colours: Colours) -> dict[str, Any]:
    swapped = {report.INK: colours.ink, report.MUTED: colours.muted, report.GRID: colours.grid}
    style = {
        name: swapped.get(value, value) if isinstance(value, str) else value for name, value in report.STYLE.items()
    }
    return {**style, "font.size": FONT, "axes.titlesize": FONT, "axes.labelsize": FONT, "lines.markersize": 5.0}


def _draw(record: Record, colours: Colours, *, alone: bool = True) -> Figure:
    """The figure; `alone` with a title and the guarantees below, which a page has beside it."""
    lines: Sequence[Record] = record["rows"]
    learners = list(dict.fromkeys(line["name"] for line in lines if line["kind"] == "learner"))
    foot = _foot(record) if alone else []
    below = 34.0 + (FONT + 2) * bool(record["as_if_users"]) + (SMALL * 1.35 * len(foot) + 6 if foot else 0)
    top = TOP + (18.0 if alone else 0.0)
    height = HEIGHT + below + top
    width = WIDTH + max(0.0, 0.6 * FONT * max(map(len, learners), default=0) + 16 - RIGHT)
    drawn = Figure(figsize=(width / 72, height / 72), facecolor=colours.paper)
    box = (LEFT / width, below / height, (WIDTH - LEFT - RIGHT) / width, HEIGHT / height)
    axes = drawn.add_axes(box, facecolor=colours.paper)
    places, step = _places(axes, lines)
    labels: list[tuple[float, str, str, float]] = []
    highest = 0.0
    for line in lines:
        if line["kind"] == "learner":
            continue
        found = _percent(line)
        floor = line["kind"] == "floor"
        if floor:
            axes.axhspan(found.low, found.high, color=colours.muted, alpha=0.16, linewidth=0)
        axes.axhline(
            found.mean, color=colours.muted, linewidth=1.3 if floor else 0.8, linestyle=(0, (5, 2)) if floor else ":"
        )
        words = f"{line['name']} ({'floor' if floor else 'not private'})"
        labels.append((found.mean, words, colours.ink if floor else colours.muted, 1.0))
        highest = max(highest, found.high)
    band = 0.15 if len(learners) < 4 else 0.08
    for i, name in enumerate(learners):
        colour, marker, dash = (
            colours.series[i % len(colours.series)],
            MARKERS[i % len(MARKERS)],
            DASHES[(i + i // len(colours.series)) % len(DASHES)],
        )
        own = sorted((line for line in lines if line["kind"] == "learner" and line["name"] == name), key=_order)
        aside = 0.5 * step * ((i + 0.5) / len(learners) - 0.5)  # at ∞ all would stand on one another
        at = [places[_asked(line)] + (aside if line["epsilon"] is None else 0.0) for line in own]
        each = [_percent(line) for line in own]
        finite = sum(line["epsilon"] is not None for line in own)
        for part in (slice(0, finite), slice(finite, None)):  # ∞ is a place, not a number: no band leads there
            shown = each[part]
            if len(shown) == 1:
                axes.plot([at[part][0]] * 2, [shown[0].low, shown[0].high], color=colour, linewidth=5, alpha=0.2)
            else:
                axes.fill_between(
                    at[part], [x.low for x in shown], [x.high for x in shown], color=colour, alpha=band, linewidth=0
                )
            axes.plot(
                at[part],
                [x.mean for x in shown],
                color=colour,
                marker=marker,
                linestyle=dash,
                linewidth=1.6,
                markeredgecolor=colours.paper if alone else colour,
                markeredgewidth=0.6,
                zorder=3,
                clip_on=False,
            )
        if 0 < finite < len(own):
            ends = slice(finite - 1, finite + 1)
            axes.plot(at[ends], [x.mean for x in each[ends]], color=colour, linewidth=0.8, linestyle=(0, (1, 2.5)))
        if own:
            reach = (at[-1] - axes.get_xlim()[0]) / (axes.get_xlim()[1] - axes.get_xlim()[0])
            labels.append((each[-1].mean, name, colour, reach))
            highest = max(highest, *(x.high for x in each))
    axes.set_ylim(0, 1.06 * highest or 1)
    _name(axes, labels)
    axes.set_title("NDCG@10, %")
    scaled = record["as_if_users"]
    if alone:
        title = f"{record['data']['name']}: accuracy against ε"
        title += f", noise as for {scaled:,} people (a research figure)" if scaled else ""
        drawn.text(4 / width, 1 - 14 / height, title, fontsize=FONT + 1.5, weight="bold")
    people = f" of {scaled:,} people whose noise this is (in brackets: of the people in the data)" if scaled else ""
    axes.set_xlabel(f"ε{people}" if scaled else "ε, privacy budget (∞: without privacy)")
    if foot:
        drawn.text(4 / width, 4 / height, "\n".join(foot), fontsize=SMALL, color=colours.muted, linespacing=1.25)
    return drawn


def _places(axes: Axes, lines: Sequence[Record]) -> tuple[dict[str, float], float]:
    """Sets the axis of ε: where each value stands, its logarithm and ∞ past a gap, and the step that gap is made of."""
    own = {_asked(line): line for line in lines if line["kind"] == "learner"}
    finite = sorted(float(line["epsilon"]) for line in own.values() if line["epsilon"] is not None)
    places = {f"{e:g}": math.log2(e) for e in finite}
    step = max(1.0, (places[f"{finite[-1]:g}"] - places[f"{finite[0]:g}"]) / 5) if finite else 1.0
    if "∞" in own:
        places["∞"] = (max(places.values()) + 1.3 * step) if places else 0.0
        axes.axvline(places["∞"] - 0.65 * step, color=axes.xaxis.label.get_color(), linewidth=0.5, alpha=0.35)
    words = [f"{asked}\n({epsilon_words(own[asked])})" if own[asked].get("as_if") else asked for asked in places]
    axes.set_xticks(list(places.values()), words)
    axes.set_xlim(min(places.values()) - 0.25 * step, max(places.values()) + 0.35 * step)
    return places, step


def _name(axes: Axes, labels: Sequence[tuple[float, str, str, float]]) -> None:
    """Names beside the right edge, each (height, name, colour, where its line ends from 0 to 1), led to where moved."""
    ordered = sorted(labels)
    low, high = axes.get_ylim()
    gap = 1.25 * FONT * (high - low) / HEIGHT
    heights = report.apart([y for y, *_ in ordered], gap, low, high)
    for at, (y, name, colour, reach) in zip(heights, ordered, strict=True):
        axes.annotate(
            name,
            (reach, y),
            xytext=(1.035, at),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            va="center",
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4},
        )


def _foot(record: Record) -> list[str]:
    """What the figure says below itself: its people, its bands, and all that stands beside an ε."""
    lines: Sequence[Record] = record["rows"]
    shared, own = promises(lines)
    data, split = record["data"], record["split"]
    said = [
        f"{split['participants']:,} people, {data['items']:,} items; {split['name']}, {split['scored_users']:,} people "
        f"scored over the whole catalogue; {record['seeds']} seed{'s' if record['seeds'] > 1 else ''}. Bands: 95 %, "
        "over people and seeds."
    ]
    if imitated(record):
        said.append(imitated(record))
    if shared:
        said.append(f"Every finite ε: {shared}.")
    each: dict[str, list[str]] = {}
    for line, words in zip(lines, own, strict=True):
        if words and line["name"] not in each.setdefault(words, []):
            each[words].append(line["name"])
    said += [f"{', '.join(names)}: {words}." for words, names in each.items()]
    return [part for sentence in said for part in textwrap.wrap(sentence, 152)]


def _percent(line: Record) -> Interval:
    return Interval(**{name: 100 * value for name, value in line[METRIC].items()})


def _order(line: Record) -> float:
    return math.inf if line["epsilon"] is None else float(line["epsilon"])
