"""Results in words and terminal tables; the words and digits are the HTML report's too.

An ε alone says nothing, so none is printed without its unit, neighbours, δ, sampler, accountant and trust: one that
lacks any of these is refused. It is an upper bound, so it is rounded up. One row beats another where the 95 % interval
of the paired difference in NDCG@10 lies above 0, and differences are in percentage points.

Source: docs/metrics.md; NIST SP 800-226, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, Context
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from penchant.common.errors import MalformedData

FLOORS = ("popularity", "no-sharing")
NONE = "–"
MINUS = "−"
NEEDED = ("epsilon", "unit", "neighbours", "delta", "sampler", "accountant", "trust")
MARKS = {"above": " ▲", "below": " ▼", "unclear": ""}

Standing = Literal["above", "below", "unclear"]
Record = Mapping[str, Any]


def percent(fraction: float, digits: int = 2) -> str:
    """A fraction in %, without the sign.

    >>> percent(0.03604), percent(0.0712, 1)
    ('3.60', '7.1')
    """
    return f"{100 * fraction:.{digits}f}"


def points(fraction: float) -> str:
    """A difference of fractions in percentage points, always with its sign.

    >>> points(0.0182), points(-0.0049), points(-0.00001)
    ('+1.82', '−0.49', '0.00')
    """
    text = f"{100 * fraction:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", MINUS)


def number(value: float) -> str:
    """A number to three digits, in short.

    >>> number(1e-05), number(1.9), number(412.3)
    ('1e-5', '1.9', '412')
    """
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def epsilon(value: float) -> str:
    """ε to three digits, rounded up, because a bound rounded down is no bound.

    >>> epsilon(7.9999), epsilon(8.001), epsilon(0.5)
    ('8', '8.01', '0.5')
    """
    if not math.isfinite(value):
        return "∞"
    exact = Context(prec=12).create_decimal_from_float(value)  # 8 + 2e-15 is an 8
    return f"{float(exact.normalize(Context(prec=3, rounding=ROUND_CEILING))):g}"


def bound(privacy: Record) -> list[tuple[str, str]]:
    """What an ε needs beside it, as (name, words), the ε itself first.

    Raises:
        MalformedData: something is missing.
    """
    if missing := [name for name in NEEDED if privacy.get(name) in (None, "")]:
        raise MalformedData(f"results hold an ε that lacks {', '.join(missing)}")
    parts = [
        ("ε", epsilon(privacy["epsilon"])),
        ("δ", number(privacy["delta"])),
        ("unit", f"{privacy['unit']} ({privacy['neighbours']})"),
        ("sampler", privacy["sampler"]),
        ("accountant", privacy["accountant"]),
        ("trust", privacy["trust"]),
    ]
    for name, title in (("noise_multiplier", "noise over clip"), ("clip", "clip")):
        if values := privacy.get(name):
            parts.append((title, ", ".join(map(number, values))))
    return [*parts, ("not charged", "; ".join(privacy.get("uncharged") or ()) or "nothing")]


def guarantee(privacy: Record) -> str:
    """The whole guarantee in one line.

    Raises:
        MalformedData: something that an ε needs is missing.
    """
    (_, eps), (_, delta), *rest = bound(privacy)
    return f"ε = {eps} at δ = {delta}; " + "; ".join(f"{name}: {words}" for name, words in rest)


def promise(run: Record) -> str:
    """The whole guarantee of a row, with whom its noise imitates where it was scaled."""
    return guarantee(run["privacy"]) + (f"; {imitates(run)}" if imitates(run) else "")


def imitates(run: Record) -> str:
    """Whose noise a row has where it was scaled (`--as-if-users`), in words; "" where it was not."""
    return str((run.get("as_if") or {}).get("note", ""))


def standing(difference: Record) -> Standing:
    """Where an interval lies: above 0, below 0, or "unclear" because it contains 0."""
    if difference["low"] > 0:
        return "above"
    return "below" if difference["high"] < 0 else "unclear"


def findings(results: Record) -> list[tuple[str, str]]:
    """How the most accurate private row stands against both floors, as (sentence, its guarantee), the user unit first.

    The sentence holds no ε; the guarantee is empty where no row is private.

    Raises:
        MalformedData: something that an ε needs is missing.
    """
    runs: Sequence[Record] = results["runs"]
    private = [run for run in runs if run.get("privacy")]
    if not runs:
        return [("There are no rows.", "")]
    if not private:
        best = max(runs, key=_ndcg)
        return [("No row is private. " + _sentence(f"{best['name']}, the most accurate row,", best), "")]
    found = []
    for unit in sorted({run["privacy"]["unit"] for run in private}, key=lambda unit: (unit != "user", unit)):
        rows = [run for run in private if run["privacy"]["unit"] == unit]
        best = max(rows, key=_ndcg)
        rank = "the only row" if len(rows) == 1 else f"the most accurate of {len(rows)} rows"
        sentence = _sentence(f"{best['name']}, {rank} private at the {unit} level,", best)
        found.append((sentence, promise(best)))
    return found


def summary(results: Record) -> str:
    """The findings in words alone: a sentence for each unit."""
    return " ".join(sentence for sentence, _ in findings(results))


def results_table(results: Record) -> Table:
    """One row for each run, and under them each guarantee in full; reads well at 80 columns.

    Raises:
        MalformedData: an ε lacks what it needs beside it.
    """
    data, split = results["data"], results["split"]
    table = plain_table(f"{data['name']}, {split['name']}, {split['scored_users']:,} people scored")
    table.add_column("", overflow="fold")
    for title in ("NDCG@10\n%", "HR@10\n%", "vs popu-\nlarity", "vs no-\nsharing"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("ε, unit")
    table.add_column("s", justify="right", no_wrap=True)
    notes = _Notes()
    kind = None
    for run in results["runs"]:
        if kind not in (None, run.get("kind")):
            table.add_section()
        kind = run.get("kind")
        against = run.get("against_floors") or {}
        cells = [
            _label(run["name"]),
            _with_interval(run),
            percent(run["metrics"]["hr@10"], 1),
            *(less(against.get(floor)) for floor in FLOORS),
            notes.cell(run),
            duration(run.get("seconds")),
        ]
        table.add_row(*map(Text, cells))
    table.caption = _caption(
        "± is half a 95 % interval over people. ▲ better, ▼ worse: the paired 95 % interval of the difference, "
        "in points of NDCG@10, leaves out 0; without a mark it contains 0.",
        *notes.lines(),
    )
    return table


def compare_table(
    a: Record,
    b: Record,
    *,
    differences: Mapping[str, Record] | None = None,
    names: tuple[str, str] = ("first", "second"),
) -> Table:
    """Two results, their rows matched by name.

    Args:
        a: results.
        b: other results.
        differences: for a row's name, the paired difference in NDCG@10, b less a: "mean", "low", "high". Left out
            where data or split differ, since people are then not paired.
        names: what to call a and b.

    Raises:
        MalformedData: an ε lacks what it needs beside it.
    """
    reasons = differing(a, b)
    table = plain_table("\n".join([f"{names[0]} and {names[1]}", *(f"NOT COMPARABLE: {reason}" for reason in reasons)]))
    table.add_column("", overflow="fold", min_width=12)
    for name in names:
        table.add_column(f"NDCG@10 %\n{name}", justify="right")
    table.add_column("difference", justify="right", no_wrap=True)
    for name in names:
        table.add_column(f"ε, unit\n{name}")
    notes = _Notes()
    before = {run["name"]: run for run in a["runs"]}
    after = {run["name"]: run for run in b["runs"]}
    for row in dict.fromkeys([*before, *after]):
        pair = (before.get(row), after.get(row))
        known = None if reasons or differences is None else differences.get(row)
        cells = [
            _label(row, 12),
            *(_with_interval(run) if run else NONE for run in pair),
            less(known, interval=True),
            *(notes.cell(run) if run else NONE for run in pair),
        ]
        table.add_row(*map(Text, cells))
    lines = []
    if not reasons and differences:
        lines.append(
            f"Differences are {names[1]} less {names[0]}, in points of NDCG@10, ± half their paired 95 % interval. "
            "▲ better, ▼ worse: the interval leaves out 0; without a mark it contains 0."
        )
    if not reasons and a.get("seed") != b.get("seed"):
        lines.append(f"The seeds differ: {a.get('seed')} and {b.get('seed')}.")
    table.caption = _caption(*lines, *notes.lines())
    return table


def differing(a: Record, b: Record) -> list[str]:
    """Why the numbers of two results do not compare: what differs between their data and splits; [] if nothing."""
    found = []
    for part, fields in (("data", ("name", "users", "items", "interactions")), ("split", ("name", "scored_users"))):
        apart = [f for f in fields if a[part].get(f) != b[part].get(f)]
        if apart:
            what = ", ".join(f"{f.replace('_', ' ')} {a[part].get(f)} and {b[part].get(f)}" for f in apart)
            found.append(f"the {part} differ{'s' if part == 'split' else ''} ({what})")
    if not found and a["data"].get("digest") != b["data"].get("digest"):
        found.append("the data differ (other interactions under the same name)")
    return found


def duration(seconds: float | None) -> str:
    """Seconds, with a decimal while it matters."""
    if seconds is None:
        return NONE
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


class _Notes:
    """Numbers the distinct guarantees in the order they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def cell(self, run: Record) -> str:
        if not (privacy := run.get("privacy")):
            return NONE
        note = self._numbers.setdefault(promise(run), len(self._numbers) + 1)
        return f"{epsilon(privacy['epsilon'])} {privacy['unit']} ({note})"

    def lines(self) -> list[str]:
        return [f"({note}) {text}" for text, note in self._numbers.items()]


def plain_table(title: str) -> Table:
    """An empty table in this style: its title, and a rule under the headings only."""
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        title_style="",
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )


def _label(name: str, width: int = 16) -> str:
    """A name, in lines where it is longer than the width."""
    return name.replace("+", "\n+") if len(name) > width else name


def _caption(*lines: str) -> Text:
    return Text("\n".join(("", *lines)))


def _ndcg(run: Record) -> float:
    return float(run["metrics"]["ndcg@10"])


def _with_interval(run: Record) -> str:
    interval = (run.get("ci95") or {}).get("ndcg@10")
    half = f" ±{percent((interval[1] - interval[0]) / 2)}" if interval else ""
    return percent(_ndcg(run)) + half


def less(difference: Record | None, *, interval: bool = False) -> str:
    """A paired difference in points with its mark; "–" where there is none."""
    if difference is None:
        return NONE
    half = f" ±{percent((difference['high'] - difference['low']) / 2)}" if interval else ""
    return points(difference["mean"]) + half + MARKS[standing(difference)]


def _sentence(which: str, run: Record) -> str:
    interval = (run.get("ci95") or {}).get("ndcg@10")
    between = f" (95 % interval {percent(interval[0])} to {percent(interval[1])})" if interval else ""
    against = run.get("against_floors") or {}
    stands = [_stands(floor, against[floor]) for floor in FLOORS if floor in against]
    return f"{which} has an NDCG@10 of {percent(_ndcg(run))} %{between}{_listed(stands)}."


def _stands(floor: str, difference: Record) -> str:
    low, high = points(difference["low"]), points(difference["high"])
    by = percent(abs(difference["mean"]))
    match standing(difference):
        case "above":
            return f"beats {floor} by {by} points (95 % interval {low} to {high})"
        case "below":
            return f"falls short of {floor} by {by} points (95 % interval {low} to {high})"
        case _:
            mean = points(difference["mean"])
            return f"does not beat {floor} ({mean} points, 95 % interval {low} to {high}, which contains 0)"


def _listed(stands: Iterable[str]) -> str:
    text = " and ".join(stands)
    return f"; it {text}" if text else ""
