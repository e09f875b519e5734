"""The terminal tables: what they say, that they fit 80 columns, and that no ε stands alone."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from penchant.common.errors import MalformedData
from penchant.simulations.tables import compare_table, differing, epsilon, findings, guarantee, results_table, summary

USER = {
    "unit": "user",
    "epsilon": 7.99998,
    "delta": 1e-5,
    "neighbours": "add/remove one profile",
    "sampler": "none (at most 2 of 2 sums per profile)",
    "accountant": "GDP",
    "noise_multiplier": [1.9, 0.63],
    "clip": [1.0, 1.0],
    "trust": "server",
    "uncharged": ["k-core survival"],
}
INTERACTION = USER | {
    "unit": "interaction",
    "epsilon": 6.2371,
    "delta": 1e-6,
    "neighbours": "add/remove one interaction",
    "sampler": "poisson over own interactions, rate 0.1",
    "accountant": "PLD",
    "trust": "own device",
    "uncharged": [],
}
PIECES = (
    "user (add/remove one profile)",
    "δ = 1e-5",
    "none (at most 2 of 2",
    "GDP",
    "trust: server",
    "k-core survival",
)


def run(name: str, kind: str, ndcg: float, floors: tuple[float, float] | None = None, **more: Any) -> dict[str, Any]:
    """A row; `floors` are the mean differences to popularity and no-sharing, each ± 0.01."""
    against = {
        name: {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}
        for name, mean in zip(("popularity", "no-sharing"), floors or (), strict=False)
    }
    return {
        "name": name,
        "kind": kind,
        "metrics": {"ndcg@10": ndcg, "hr@10": 2 * ndcg},
        "ci95": {"ndcg@10": [ndcg - 0.005, ndcg + 0.007]},
        "against_floors": against,
        "privacy": None,
        "seconds": 3.21,
    } | more


def results(*runs: dict[str, Any], users: int = 610, seed: int = 0) -> dict[str, Any]:
    return {
        "data": {"name": "ml-latest-small", "users": users, "items": 9742, "interactions": 100836},
        "split": {"name": "leave-last-out", "scored_users": 610},
        "seed": seed,
        "runs": list(runs),
    }


def sample() -> dict[str, Any]:
    return results(
        run("popularity", "floor", 0.0178),
        run("item-knn", "not private", 0.0301, (0.0123, 0.0247)),
        run("fedavg+opacus", "federated", 0.0171, (-0.0007, 0.0117), privacy=INTERACTION),
        run("fedavg+user-dp", "federated", 0.0021, (-0.0157, -0.0033), privacy=USER),
        run("cooccurrence+user-dp", "federated", 0.036, (0.0182, 0.0306), privacy=USER),
    )


def printed(table: Table, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def joined(text: str) -> str:
    """The text without the lines that it was broken into."""
    return " ".join(text.split())


def cells(text: str, name: str) -> list[str]:
    """The words in the line of the row of this name."""
    return next(line.split() for line in text.splitlines() if line.startswith(f"{name} "))


def test_the_table_fits_80_columns_and_shows_every_figure() -> None:
    text = printed(results_table(sample()))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert all(cell in text for cell in ("3.60 ±0.60", "7.2", "3.2", "8 user (2)", "6.24 interaction"))


def test_a_mark_stands_only_where_the_interval_leaves_out_zero() -> None:
    text = printed(results_table(sample()))
    assert cells(text, "item-knn")[4:8] == ["+1.23", "▲", "+2.47", "▲"]
    assert cells(text, "fedavg+opacus")[4:7] == ["−0.07", "+1.17", "▲"]
    assert cells(text, "fedavg+user-dp")[4:8] == ["−1.57", "▼", "−0.33", "8"]


def test_each_distinct_guarantee_stands_once_and_in_full() -> None:
    text = joined(printed(results_table(sample())))
    assert all(text.count(piece) == 1 for piece in PIECES)
    assert re.findall(r"\(\d\) ε = [\d.]+", text) == ["(1) ε = 6.24", "(2) ε = 8"]


@pytest.mark.parametrize("name", ["unit", "neighbours", "delta", "sampler", "accountant", "trust"])
def test_an_epsilon_that_lacks_a_piece_is_refused(name: str) -> None:
    lacking = {key: value for key, value in USER.items() if key != name}
    with pytest.raises(MalformedData, match=name):
        guarantee(lacking)
    with pytest.raises(MalformedData, match=name):
        results_table(results(run("fedavg", "federated", 0.02, privacy=lacking)))


def test_no_text_from_results_is_read_as_markup() -> None:
    text = printed(results_table(results(run("[bold]me[/bold]", "federated", 0.02))))
    assert "[bold]me[/bold]" in text


def test_colour_is_left_out_where_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def coloured() -> str:
        out = io.StringIO()
        Console(file=out, width=80, force_terminal=True, color_system="standard").print(results_table(sample()))
        return out.getvalue()

    colours = ("\x1b[3", "\x1b[4", "\x1b[9")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any(colour in coloured() for colour in colours)


@pytest.mark.parametrize(("value", "text"), [(7.999, "8"), (1.1801, "1.19"), (0.30001, "0.301"), (120.2, "121")])
def test_epsilon_is_rounded_up(value: float, text: str) -> None:
    assert epsilon(value) == text
    assert float(text) >= value


def test_the_summary_takes_the_best_private_row_of_each_unit_and_the_user_first() -> None:
    (first, held), (second, _) = findings(sample())
    assert first.startswith("cooccurrence+user-dp, the most accurate of 2 rows private at the user level")
    assert "beats popularity by 1.82 points (95 % interval +0.82 to +2.82)" in first
    assert second.startswith("fedavg+opacus, the only row private at the interaction level")
    assert all(piece in held for piece in PIECES)
    assert summary(sample()) == f"{first} {second}"


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (0.0182, "beats popularity by 1.82 points"),
        (0.004, "does not beat popularity (+0.40 points, 95 % interval −0.60 to +1.40, which contains 0)"),
        (-0.03, "falls short of popularity by 3.00 points (95 % interval −4.00 to −2.00)"),
    ],
)
def test_the_summary_says_plainly_how_a_floor_is_met(difference: float, words: str) -> None:
    assert words in summary(results(run("fedavg+user-dp", "federated", 0.02, (difference, 0.01), privacy=USER)))


def test_the_summary_speaks_of_no_private_row_where_there_is_none() -> None:
    text = summary(results(run("popularity", "floor", 0.0178), run("ease", "not private", 0.04, (0.022, 0.03))))
    assert text.startswith("No row is private. ease, the most accurate row,")
    assert summary(results()) == "There are no rows."


def test_compare_matches_rows_by_name_and_shows_a_known_difference() -> None:
    a = results(run("ease", "not private", 0.03), run("old", "not private", 0.01))
    b = results(run("new", "federated", 0.02, privacy=USER), run("ease", "not private", 0.041), seed=1)
    table = compare_table(a, b, differences={"ease": {"mean": 0.011, "low": 0.002, "high": 0.02}}, names=("one", "two"))
    text = printed(table)
    assert cells(text, "ease") == ["ease", "3.00", "±0.60", "4.10", "±0.60", "+1.10", "±0.90", "▲", "–", "–"]
    assert cells(text, "old") == ["old", "1.00", "±0.60", "–", "–", "–", "–"]
    assert cells(text, "new") == ["new", "–", "2.00", "±0.60", "–", "–", "8", "user", "(1)"]
    assert all(piece in joined(text) for piece in (*PIECES, "two less one", "The seeds differ: 0 and 1."))
    assert "NOT COMPARABLE" not in text


def test_compare_says_when_data_differ_and_then_holds_back_differences() -> None:
    a, b = sample(), sample() | {"data": sample()["data"] | {"users": 300}}
    differences = {"item-knn": {"mean": 0.05, "low": 0.04, "high": 0.06}}
    text = joined(printed(compare_table(a, b, differences=differences)))
    assert "NOT COMPARABLE: the data differ (users 610 and 300)" in text
    assert "+5.00" not in text
    assert "+5.00" in joined(printed(compare_table(a, a, differences=differences)))


def test_compare_says_when_splits_differ() -> None:
    other = sample() | {"split": {"name": "global-time", "scored_users": 52}}
    reasons = differing(sample(), other)
    assert reasons == ["the split differs (name leave-last-out and global-time, scored users 610 and 52)"]
    assert differing(sample(), sample()) == []


def test_compare_fits_80_columns_with_long_names() -> None:
    text = printed(compare_table(sample(), sample(), names=("calm-otter", "brisk-heron")))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
