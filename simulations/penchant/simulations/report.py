"""A run's results as one HTML file that opens offline, on a phone or a desktop, in light or dark.

The page loads nothing and runs no script, and a content security policy in it says so. Figures are SVG text, drawn in
placeholder colours that become CSS variables, so they follow the reader's colour scheme. The same results give the same
bytes. An ε in the page always has its guarantee in the same cell, paragraph or figure; figures of ε are drawn for
each unit apart, because a user's ε and an interaction's do not compare.

Source: the colours are tuned from Okabe and Ito's colour-blind safe set, https://jfly.uni-koeln.de/color/, to a
contrast of 4.5 on both papers.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import matplotlib.style
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D

from penchant.simulations import tables
from penchant.simulations.audit.bounds import rounded_down
from penchant.simulations.tables import NONE, Record

TEMPLATE = "report.html.jinja"
WIDTH = 280.0
"""Of a figure, in points: a phone shows it about 1.2 times as large."""
FONT = 8.5
LABEL = 20
"""Longest label in a figure, in characters."""

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#010201", "#010202", "#010203", "#010204", "#010205")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {c: f"--s{i}" for i, c in enumerate(SERIES, 1)}
MARKERS = ("o", "s", "^", "D", "v")
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1)), (0, (2, 1)))
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "penchant",
    "font.family": "DejaVu Sans",  # comes with matplotlib: text has the same measure everywhere
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.markersize": 4.0,
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure of the page.

    Attributes:
        key: names its elements; differs between the figures of a page.
        drawings: (heading, SVG) of each of its parts.
        caption: what to know when reading it.
        guarantees: (row, whole guarantee) of every ε in it.
    """

    key: str
    title: str
    drawings: tuple[tuple[str, Markup], ...]
    caption: str
    guarantees: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A row over the rounds: where it stands, in %, or what it has spent."""

    name: str
    look: int
    rounds: Sequence[int]
    values: Sequence[float]


def render(results: Mapping[str, Any], audit: Mapping[str, Any] | None = None) -> str:
    """The page. A piece that the results lack, such as rounds or privacy, is left out.

    Args:
        audit: audit.json, where the run was audited.

    Raises:
        MalformedData: an ε lacks what it needs beside it.
    """
    runs: Sequence[Record] = results["runs"]
    return page(
        TEMPLATE,
        version=results["penchant"],
        data=results["data"],
        split=results["split"],
        seed=results.get("seed"),
        engine=results.get("engine"),
        budget_note=results.get("budget_note"),
        command=results.get("command"),
        findings=tables.findings(results),
        rows=[_row(run) for run in runs],
        private=any(run.get("privacy") for run in runs),
        uncharged=_uncharged(runs),
        audit=audit and {**audit, "rows": [_audited(row) for row in audit["rows"]]},
        pictures=_pictures(runs),
    )


def page(template: str, **values: Any) -> str:
    """A template of this package, in the report's style."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = _prose
    here = resources.files("penchant.simulations")
    style = Markup(here.joinpath("report.css").read_text(encoding="utf-8"))
    return environment.from_string(here.joinpath(template).read_text(encoding="utf-8")).render(style=style, **values)


def _row(run: Record) -> dict[str, Any]:
    """The cells of a run, as text."""
    metrics = run["metrics"]
    intervals = run.get("ci95") or {}
    privacy = run.get("privacy")
    against = run.get("against_floors") or {}
    return {
        "name": run["name"],
        "kind": run.get("kind", ""),
        "ndcg": tables.percent(metrics["ndcg@10"]),
        "ndcg_interval": _interval(intervals.get("ndcg@10"), 2),
        "against": [_against(floor, against[floor]) for floor in tables.FLOORS if floor in against],
        "hr": tables.percent(metrics["hr@10"], 1),
        "hr_interval": _interval(intervals.get("hr@10"), 1),
        "coverage": tables.percent(metrics["coverage@10"], 1),
        "novelty": f"{metrics['novelty@10']:.1f}",
        "bound": tables.bound(privacy) if privacy else [],
        "note": tables.imitates(run) if privacy else run.get("privacy_note") or "exact, not private",
        "seconds": tables.duration(run.get("seconds")),
        "clients_per_second": _short(run.get("clients_per_second")),
        "up": _size(run.get("bytes_up")),
        "down": _size(run.get("bytes_down")),
        "memory": _size(None if run.get("peak_rss_mb") is None else 1e6 * run["peak_rss_mb"]),
    }


def _audited(row: Record) -> dict[str, Any]:
    """The cells of a row's audit, as text; what is shown is rounded down, as it is a lower bound."""
    seen, attack = row["canaries"], row["membership"]
    rate = attack["tpr"]
    return {
        "name": row["name"],
        "claim": tables.guarantee(row["privacy"]),
        "shown": rounded_down(seen["epsilon_lower"]),
        "ceiling": rounded_down(seen["epsilon_ceiling"]),
        "mu": "" if seen["mu_lower"] is None else f"μ {seen['mu_lower']:.2f} of {seen['claim_mu']:.2f}",
        "one_run": rounded_down(seen["one_run"]),
        "one_run_ceiling": rounded_down(seen["one_run_ceiling"]),
        "canaries": f"{seen['canaries']:,}",
        "holds": row["holds"],
        "auc": f"{attack['auc']:.2f}",
        "tpr": f"{tables.percent(rate['value'], 1)} % ({_interval((rate['low'], rate['high']), 1)} %)",
        "note": attack["note"],
    }


def _interval(interval: Sequence[float] | None, digits: int) -> str:
    return f"{tables.percent(interval[0], digits)} to {tables.percent(interval[1], digits)}" if interval else ""


def _against(floor: str, difference: Record) -> dict[str, str]:
    words = {"above": "better", "below": "worse", "unclear": "not told apart"}
    return {
        "floor": floor,
        "points": tables.points(difference["mean"]),
        "interval": f"{tables.points(difference['low'])} to {tables.points(difference['high'])}",
        "standing": tables.standing(difference),
        "words": words[tables.standing(difference)],
    }


def _prose(text: str) -> Markup:
    """Text in which `this` is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(Markup.escape(text))))


def _short(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _size(size_bytes: float | None) -> str:
    """Bytes in the unit that keeps them short.

    >>> _size(123456), _size(15), _size(None)
    ('123 kB', '15 B', '–')
    """
    if size_bytes is None:
        return NONE
    power = min(int(math.log10(max(size_bytes, 1)) // 3), 4)
    return f"{size_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _uncharged(runs: Sequence[Record]) -> list[tuple[str, str]]:
    """What no ε covers, as (statement, rows)."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for statement in (run.get("privacy") or {}).get("uncharged", ()):
            found.setdefault(statement, []).append(run["name"])
    return [(statement, ", ".join(names)) for statement, names in found.items()]


def _pictures(runs: Sequence[Record]) -> list[Picture]:
    """Every figure for which the runs hold something to draw."""
    with matplotlib.style.context(["default", STYLE]):
        found = [_by_round(runs)]
        units = {run["privacy"]["unit"] for run in runs if run.get("privacy")}
        found += [_by_unit(runs, unit) for unit in sorted(units, key=lambda unit: (unit != "user", unit))]
        found += [_by_bucket(runs, "popularity"), _by_bucket(runs, "history")]
    return [picture for picture in found if picture is not None]


def _by_round(runs: Sequence[Record]) -> Picture | None:
    lines = _lines(runs, runs, "ndcg@10", 100.0)
    if not lines:
        return None
    floors = {run["name"]: 100 * run["metrics"]["ndcg@10"] for run in runs if run.get("kind") == "floor"}
    alt = _told(lines, "{:.2f} %") + "".join(f" {name}, a floor: {y:.2f} %." for name, y in floors.items())
    return Picture(
        key="rounds",
        title="Accuracy by round",
        drawings=(("", _draw_lines("rounds", lines, floors, "NDCG@10, %", alt)),),
        caption="A line for each federated row; dashed level lines are the floors, which have no rounds.",
    )


def _by_unit(runs: Sequence[Record], unit: str) -> Picture:
    """Accuracy against ε and ε by round, for the rows with this unit."""
    private = [run for run in runs if run.get("privacy") and run["privacy"]["unit"] == unit]
    key = f"unit-{_slug(unit)}"
    drawings = [("What it costs in accuracy", _tradeoff(f"{key}-cost", runs, private))]
    caption = (
        "Further left is more private. Upright lines and grey bands are 95 % intervals over people; dashed level lines "
        "are the floors. "
    )
    if lines := _lines(runs, private, "epsilon", 1.0):
        drawing = _draw_lines(f"{key}-spent", lines, {}, "ε", _told(lines, "ε {:.2f}"))
        drawings.append(("What each round adds", drawing))
        caption += "What is spent by round ends at the row's whole guarantee. "
    return Picture(
        key=key,
        title=f"Privacy, unit {unit}",
        drawings=tuple(drawings),
        caption=caption + "The guarantees are:",
        guarantees=tuple((run["name"], tables.promise(run)) for run in private),
    )


def _tradeoff(key: str, runs: Sequence[Record], private: Sequence[Record]) -> Markup:
    """Accuracy against ε with intervals, over the floors' bands."""
    figure, axes = _canvas(170)
    looks = _looks(runs)
    labels: list[tuple[float, str, str]] = []
    told = []
    tops = [0.0]
    for run in runs:
        if run.get("kind") == "floor":
            y, (low, high) = 100 * run["metrics"]["ndcg@10"], _bounds(run)
            axes.axhspan(low, high, color=MUTED, alpha=0.15, linewidth=0)
            axes.axhline(y, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            labels.append((y, run["name"], MUTED))
            told.append(f"{run['name']}, a floor: {y:.2f} % ({low:.2f} to {high:.2f}).")
            tops.append(high)
    shown = [run for run in private if math.isfinite(run["privacy"]["epsilon"])]
    left, right = _span(axes, [run["privacy"]["epsilon"] for run in shown])
    places: list[float] = []
    for run in shown:
        x, y, (low, high) = run["privacy"]["epsilon"], 100 * run["metrics"]["ndcg@10"], _bounds(run)
        place = axes.transData.transform((x, 0))[0]
        aside = 5.0 * sum(abs(place - other) < 5 for other in places)  # points at one ε stand side by side
        places.append(place)
        look = looks[run["name"]]
        colour, marker = SERIES[look % len(SERIES)], MARKERS[look % len(MARKERS)]
        moved = axes.transData + Affine2D().translate(-aside, 0)
        axes.plot([x, x], [low, high], color=colour, linewidth=1.5, transform=moved)
        axes.plot(x, y, marker=marker, color=colour, markersize=6, linestyle="none", transform=moved, clip_on=False)
        labels.append((y, run["name"], colour))
        told.append(f"{run['name']}: {y:.2f} % ({low:.2f} to {high:.2f}) at ε {tables.epsilon(x)}.")
        tops.append(high)
    axes.set_xlim(left, right)
    axes.set_ylim(0, 1.08 * max(tops) or 1)
    axes.set_title("NDCG@10, %")
    axes.set_xlabel("ε")
    _label_right(axes, labels)
    return inline_svg(figure, key, " ".join(told))


def _span(axes: Axes, values: Sequence[float]) -> tuple[float, float]:
    """Sets the axis of ε, from 0 or logarithmic where the values are far apart, and returns its ends."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    ends = (0.0, 1.15 * high or 1.0)
    if high > 5 * low > 0:
        ends = (low / 1.4, high * 1.4)
        axes.set_xscale("log")
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        ticks = [t for p in powers for m in (1, 2, 5) if ends[0] <= (t := m * 10.0**p) <= ends[1]]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    axes.set_xlim(*ends)
    return ends


def _by_bucket(runs: Sequence[Record], kind: str) -> Picture | None:
    """A panel of bars for each bucket, three abreast, the rows' names on the left."""
    sizes: dict[str, int] = {}
    for run in runs:
        for bucket, figures in ((run.get("buckets") or {}).get(kind) or {}).items():
            sizes.setdefault(bucket, int(figures["n"]))
    if not sizes:
        return None
    buckets = sorted(sizes, key=lambda name: int((re.match(r"\d+", name) or ["0"])[0]))  # JSON may have sorted the text
    values = {
        bucket: [100 * float(run["buckets"][kind].get(bucket, {}).get("ndcg@10", math.nan)) for run in runs]
        for bucket in buckets
    }
    deep = math.ceil(len(buckets) / 3)
    names = [_cut(run["name"]) for run in runs]
    left, gap, top, bar = 5.4 * max(map(len, names)) + 6, 6.0, 34.0, 13.0
    wide = (WIDTH - left) / 3 - gap
    height = deep * (top + bar * len(runs))
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    longest = max([v for row in values.values() for v in row if v == v] + [0.0]) or 1.0
    for i, bucket in enumerate(buckets):
        x = left + (i % 3) * (wide + gap)
        y = height - (i // 3 + 1) * (top + bar * len(runs))
        axes = figure.add_axes((x / WIDTH, y / height, wide / WIDTH, bar * len(runs) / height))
        axes.set_axis_off()
        axes.set_xlim(0, 1.9 * longest)  # room for the figure beside the longest bar
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_title(f"{bucket}\nn = {sizes[bucket]:,}")
        for at, (run, value) in enumerate(zip(runs, values[bucket], strict=True)):
            if i % 3 == 0:
                weight = "bold" if run.get("privacy") else "normal"
                axes.annotate(names[at], (0, at), (-5, 0), **_OFFSET, ha="right", va="center", weight=weight)
            axes.barh(at, value, height=0.68, color=_group_colour(run))
            text = NONE if math.isnan(value) else f"{value:.1f}"
            axes.annotate(text, (0 if math.isnan(value) else value, at), (3, 0), **_OFFSET, va="center")
    alt = " ".join(
        f"{bucket}, n = {sizes[bucket]:,}: "
        + ", ".join(f"{run['name']} {v:.1f} %" for run, v in zip(runs, values[bucket], strict=True) if v == v)
        + "."
        for bucket in buckets
    )
    title, caption = {
        "popularity": (
            "Accuracy by the popularity of what was looked for",
            "NDCG@10 in %, each target by itself; head items hold the first 20 % of interactions, tail the last 20 %.",
        ),
        "history": (
            "Accuracy by length of history",
            "NDCG@10 in %, people by how many interactions they have.",
        ),
    }[kind]
    bold = " Orange bars and bold names are private." if any(run.get("privacy") for run in runs) else ""
    return Picture(
        key=f"by-{kind}",
        title=title,
        drawings=(("", inline_svg(figure, f"by-{kind}", alt)),),
        caption=f"{caption}{bold} Grey bars are floors.",
    )


_OFFSET: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}


def _lines(runs: Sequence[Record], chosen: Sequence[Record], field: str, scale: float) -> list[_Line]:
    looks = _looks(runs)
    lines = []
    for run in chosen:
        known = [point for point in run.get("curve") or () if point.get(field) is not None]
        if known:
            lines.append(
                _Line(
                    name=run["name"],
                    look=looks[run["name"]],
                    rounds=[int(point["round"]) for point in known],
                    values=[scale * float(point[field]) for point in known],
                )
            )
    return lines


def _looks(runs: Sequence[Record]) -> dict[str, int]:
    """A look of its own for each federated row, the same in every figure."""
    federated = [run["name"] for run in runs if run.get("privacy") or run.get("curve")]
    return {name: i for i, name in enumerate(federated)}


def _draw_lines(key: str, lines: Sequence[_Line], floors: Mapping[str, float], title: str, alt: str) -> Markup:
    figure, axes = _canvas(170)
    labels: list[tuple[float, str, str]] = []
    early: list[tuple[float, str, str, int]] = []
    for name, y in floors.items():
        axes.axhline(y, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        labels.append((y, name, MUTED))
    last = max(line.rounds[-1] for line in lines)
    for line in lines:
        colour = SERIES[line.look % len(SERIES)]
        axes.plot(
            line.rounds,
            line.values,
            color=colour,
            marker=MARKERS[line.look % len(MARKERS)],
            linestyle=DASHES[line.look % len(DASHES)],
            markevery=[len(line.rounds) - 1],
            clip_on=False,
        )
        x, y = line.rounds[-1], line.values[-1]
        if x > 0.75 * last:
            labels.append((y, line.name, colour))
        else:  # ended early: its name stays with it
            early.append((y, line.name, colour, x))
    axes.set_ylim(0, 1.08 * max([y for line in lines for y in line.values] + list(floors.values())) or 1)
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(title)
    axes.set_xlabel("round")
    _label_right(axes, labels)
    early.sort()
    for y, (_, name, colour, x) in zip(_clear(axes, [y for y, *_ in early]), early, strict=True):
        axes.annotate(_cut(name), (x, y), (6, 4), **_OFFSET, va="center", color=colour)
    return inline_svg(figure, key, alt)


def _canvas(height: float) -> tuple[Figure, Axes]:
    """A figure of so many points' height, with room on the right for names."""
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    left, bottom, right, top = 24.0, 32.0, 5.3 * LABEL, 18.0
    box = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - bottom - top) / height)
    return figure, figure.add_axes(box)


def _label_right(axes: Axes, labels: Iterable[tuple[float, str, str]]) -> None:
    """Writes names, each (height, name, colour), beside the right edge, moved apart where they would overlap."""
    ordered = sorted(labels)
    for y, (_, name, colour) in zip(_clear(axes, [y for y, _, _ in ordered]), ordered, strict=True):
        axes.annotate(
            _cut(name), (1, y), (6, 0), xycoords=("axes fraction", "data"), **_OFFSET, va="center", color=colour
        )


def _clear(axes: Axes, heights: Sequence[float]) -> list[float]:
    """Ascending heights in data units, moved so that lines of text at them do not overlap."""
    low, high = axes.get_ylim()
    gap = 1.2 * FONT * (high - low) / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    return apart(heights, gap, low, high)


def apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending heights, moved as little as keeps them a gap apart and, if they fit, between low and high.

    Less their share of gaps they must ascend, so this is isotonic regression: neighbours out of order are pooled.

    >>> apart([1.0, 1.0, 5.0], 1.0, 0.0, 6.0)
    [0.5, 1.5, 5.0]
    >>> apart([5.0, 5.0], 1.0, 0.0, 5.0)
    [4.0, 5.0]
    """
    pools: list[tuple[float, int]] = []  # mean, how many
    for i, height in enumerate(heights):
        mean, n = height - i * gap, 1
        while pools and pools[-1][0] > mean:
            other, m = pools.pop()
            mean, n = (mean * n + other * m) / (n + m), n + m
        pools.append((mean, n))
    flat = [mean for mean, n in pools for _ in range(n)]
    top = high - gap * (len(flat) - 1)
    return [max(low, min(mean, top)) + i * gap for i, mean in enumerate(flat)]


def inline_svg(figure: Figure, key: str, alt: str) -> Markup:
    """The figure as an SVG element for this page: no prolog, ids of its own, colours from the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (?:id|clip-path|xlink:href)="(?:url\()?#?', lambda found: f"{found[0]}{key}-", text)
    text = text.replace("xlink:href", "href")
    opening = f'<svg role="img" aria-label="{Markup.escape(alt)}" focusable="false"'
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    text = re.sub(r"<svg[^>]*>", lambda _: f"{opening} {box[0]}>", text, count=1)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r"#010[12]0\d|#0[23]0[23]0[23]", lambda found: f"var({VARIABLES[found[0]]})", text)
    return Markup(text)


def _told(lines: Sequence[_Line], style: str) -> str:
    return " ".join(
        f"{line.name}: {style.format(line.values[0])} after round {line.rounds[0]}"
        + (f", {style.format(line.values[-1])} after round {line.rounds[-1]}." if len(line.rounds) > 1 else ".")
        for line in lines
    )


def _bounds(run: Record) -> tuple[float, float]:
    """The 95 % interval of NDCG@10 in %; the figure itself where there is none."""
    value = run["metrics"]["ndcg@10"]
    low, high = (run.get("ci95") or {}).get("ndcg@10") or (value, value)
    return 100 * low, 100 * high


def _group_colour(run: Record) -> str:
    if run.get("kind") == "floor":
        return MUTED
    return SERIES[1] if run.get("privacy") else SERIES[0]


def _cut(name: str) -> str:
    return name if len(name) <= LABEL else name[: LABEL - 1] + "…"


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text)
