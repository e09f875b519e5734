"""The HTML report: whole, self-contained, well-formed, the same each time, and no ε in it alone."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from penchant.common.errors import MalformedData
from penchant.simulations.report import render

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
    "uncharged": ["K and w were chosen on validation"],
}
INTERACTION = USER | {
    "unit": "interaction",
    "epsilon": 6.2371,
    "delta": 1e-6,
    "neighbours": "add/remove one interaction",
    "sampler": "poisson over own interactions, rate 0.1",
    "accountant": "PLD",
    "trust": "own device",
}
BESIDE = {
    "8": ("1e-5", "user", "add/remove one profile", "none (at most 2 of 2 sums per profile)", "GDP", "server"),
    "6.24": ("1e-6", "interaction", "add/remove one interaction", "poisson over own", "PLD", "own device"),
}
VOID = {"meta", "link", "br", "hr", "img", "input"}


def run(name: str, kind: str, ndcg: float, **more: Any) -> dict[str, Any]:
    """A row whose intervals and buckets follow from its NDCG@10."""
    floors = {"popularity": 0.0178, "no-sharing": 0.0054}
    figures = {"n": 200, "ndcg@10": ndcg, "hr@10": 2 * ndcg}
    return {
        "name": name,
        "kind": kind,
        "metrics": {"ndcg@10": ndcg, "hr@10": 2 * ndcg, "coverage@10": 0.107, "novelty@10": 9.51},
        "ci95": {"ndcg@10": [0.8 * ndcg, 1.2 * ndcg], "hr@10": [1.6 * ndcg, 2.4 * ndcg]},
        "against_floors": {
            floor: {"mean": ndcg - value, "low": ndcg - value - 0.005, "high": ndcg - value + 0.005}
            for floor, value in floors.items()
            if floor != name
        },
        "privacy": None,
        "privacy_note": "",
        "buckets": {
            "popularity": {"head": figures, "middle": figures, "tail": figures},
            "history": {"1-9": figures, "10-49": figures, "200+": figures, "50-199": figures},
        },
        "curve": [],
        "seconds": 3.2,
        "clients_per_second": None,
        "bytes_up": None,
        "bytes_down": None,
        "peak_rss_mb": 900.0,
    } | more


def curve(ndcg: float, epsilon: float | None, rounds: int = 50) -> list[dict[str, Any]]:
    return [
        {
            "round": r,
            "ndcg@10": ndcg * (1 - math.exp(-r / 14)),
            "epsilon": None if epsilon is None else epsilon * math.sqrt(r / rounds),
        }
        for r in range(5, rounds + 1, 5)
    ]


def sample() -> dict[str, Any]:
    federated = {"clients_per_second": 412.0, "bytes_up": 123456, "bytes_down": 2_500_000}
    return {
        "schema_version": 1,
        "penchant": "0.1.0",
        "command": "penchant simulate --config runs/calm-otter/config.toml",
        "data": {
            "name": "ml-latest-small",
            "users": 610,
            "items": 9742,
            "interactions": 100836,
            "terms": "Research use only: https://example.org/terms",
            "cleaning": ["3 rows were left out."],
        },
        "split": {"name": "leave-last-out", "scored_users": 610, "notes": ["Ties are broken by item."]},
        "seed": 0,
        "engine": "local",
        "budget_note": "The full comparison is `make results`.",
        "runs": [
            run("popularity", "floor", 0.0178, privacy_note="exact counts: not private"),
            run("no-sharing", "floor", 0.0054, privacy_note="nothing leaves the device"),
            run("item-knn", "not private", 0.0301),
            run("ease", "not private", 0.0415),
            run("fedavg", "federated", 0.0231, curve=curve(0.0231, None), **federated),
            run("fedavg+opacus", "federated", 0.0171, privacy=INTERACTION, curve=curve(0.0171, 6.2371), **federated),
            run("fedavg+user-dp", "federated", 0.0187, privacy=USER, curve=curve(0.0187, 7.99998), **federated),
            run(
                "cooccurrence+user-dp",
                "federated",
                0.036,
                privacy=USER,
                curve=[{"round": 2, "ndcg@10": 0.036, "epsilon": 8.0}],
                **federated,
            ),
        ],
    }


@pytest.fixture(scope="module")
def page() -> str:
    return render(sample())


class Walk(HTMLParser):
    """Checks that tags balance and ids differ; collects tags, attributes and texts with the elements around them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, int]] = []
        self.faults: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, tuple[tuple[str, int], ...]]] = []
        self.feed(text)
        self.close()
        self.faults += [f"never closed: {tag}" for tag, _ in self.open]
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        self.faults += [f"repeated id: {name}" for name in set(ids) if ids.count(name) > 1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, len(self.tags)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop()[0] != tag:
            self.faults.append(f"out of place: /{tag}")

    def handle_data(self, data: str) -> None:
        self.texts.append((data, tuple(self.open)))

    def within(self, *names: str) -> Iterator[tuple[str, str]]:
        """The (name, whole text) of each outermost element of these names."""
        found: dict[tuple[str, int], list[str]] = {}
        for text, around in self.texts:
            place = next((element for element in around if element[0] in names), None)
            if place is not None:
                found.setdefault(place, []).append(text)
        return ((name, " ".join("".join(parts).split())) for (name, _), parts in found.items())

    def visible(self) -> str:
        hidden = {"style", "title", "svg"}
        return " ".join("".join(t for t, around in self.texts if not hidden & {tag for tag, _ in around}).split())


def lonely(text: str) -> list[str]:
    """Each printed ε whose cell, paragraph or figure lacks what belongs beside it."""
    found = []
    for name, block in Walk(text).within("td", "p", "figure", "li"):
        found += [
            f"{name}: {block}"
            for value in re.findall(r"ε = ([\d.]+)", block)
            if not all(piece in block for piece in BESIDE[value.rstrip(".")])
        ]
    return found


def test_the_page_is_well_formed_and_a_fault_would_be_seen(page: str) -> None:
    assert Walk(page).faults == []
    assert Walk(page.replace("</figure>", "", 1)).faults
    assert Walk(page.replace("</main>", '<p id="results"></p></main>', 1)).faults == ["repeated id: results"]


def test_every_reference_inside_the_page_has_its_target(page: str) -> None:
    tags = Walk(page).tags
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    wanted = [str(a["href"])[1:] for _, a in tags if str(a.get("href", "")).startswith("#")]
    wanted += [name for _, a in tags for name in str(a.get("aria-labelledby", "")).split()]
    wanted += re.findall(r"url\(#([^)]*)\)", page)
    assert len(wanted) > 10
    assert set(wanted) <= ids


def test_the_same_results_give_the_same_bytes(page: str) -> None:
    assert render(sample()) == page


def test_another_process_gives_the_same_bytes_and_pyplot_and_settings_stay_as_they_were(page: str) -> None:
    program = """
import json, sys
import matplotlib
before = matplotlib.rcParams.copy()
from penchant.simulations.report import render
sys.stdout.buffer.write(render(json.load(sys.stdin)).encode())
assert matplotlib.rcParams.copy() == before and "matplotlib.pyplot" not in sys.modules
"""
    given = json.dumps(sample()).encode()
    done = subprocess.run([sys.executable, "-c", program], input=given, capture_output=True, check=True)
    assert done.stdout.decode() == page


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert not re.search(r"""(?:src|href|action|url)\s*[=(]\s*["']?\s*(?:https?:|//)""", page)
    for tag, attributes in Walk(page).tags:
        assert tag not in ("script", "iframe", "object", "embed")
        assert all(not re.match(r"\s*(https?:)?//", value or "") for value in attributes.values())
    assert page.count("http://") + page.count("https://") == 1  # the terms, as plain text
    assert "default-src 'none'" in page


def test_no_epsilon_stands_without_its_guarantee(page: str) -> None:
    assert len(re.findall(r"ε = (?:8|6\.24)\b", Walk(page).visible())) == 8  # 2 findings, 3 cells, 3 in figures
    assert lonely(page) == []
    for piece in ("GDP", "add/remove one profile", "1e-6", "own device"):
        assert lonely(page.replace(piece, ""))


def test_every_figure_of_epsilon_carries_the_guarantees_of_its_rows(page: str) -> None:
    figures = [text for name, text in Walk(page).within("figure") if "ε" in text]
    assert len(figures) == 2  # one for each unit
    user = next(text for text in figures if "Privacy, unit user" in text)
    assert all(piece in user for piece in BESIDE["8"])
    assert "fedavg+opacus" not in user


def test_an_epsilon_that_lacks_a_piece_is_refused() -> None:
    for name in ("unit", "neighbours", "delta", "sampler", "accountant", "trust"):
        broken = sample()
        broken["runs"][6]["privacy"] = {key: value for key, value in USER.items() if key != name}
        broken["runs"][6]["curve"] = []
        with pytest.raises((MalformedData, KeyError), match=name):
            render(broken)


def test_the_page_tells_what_was_found_done_and_left_out(page: str) -> None:
    text = Walk(page).visible()
    for piece in (
        "cooccurrence+user-dp, the most accurate of 2 rows private at the user level",
        "does not beat popularity",
        "which contains 0",
        "3 rows were left out.",
        "Ties are broken by item.",
        "Research use only: https://example.org/terms",
        "K and w were chosen on validation (fedavg+opacus, fedavg+user-dp, cooccurrence+user-dp)",
        "exact, not private",
        "exact counts: not private",
        "3.60 2.88 to 4.32",
        "+1.82 better",
        "123 kB",
        "2.5 MB",
        "412",
        "penchant simulate --config runs/calm-otter/config.toml",
        "Releasing more than one adds their costs up",
    ):
        assert piece in text, piece


def test_every_drawing_is_described_in_words(page: str) -> None:
    drawings = [attributes for tag, attributes in Walk(page).tags if tag == "svg"]
    assert len(drawings) == 7  # rounds, two for each of two units, two of buckets
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in drawings)
    labels = " ".join(str(a["aria-label"]) for a in drawings)
    assert "popularity, a floor: 1.78 %" in labels
    assert "cooccurrence+user-dp: 3.60 % (2.88 to 4.32) at ε 8" in labels


def test_drawings_take_every_colour_from_the_page(page: str) -> None:
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert not re.findall(r"#[0-9a-f]{6}\b", drawing)
        assert set(re.findall(r"var\((--\w+)\)", drawing)) <= set(re.findall(r"(--\w+):", page))


def test_history_buckets_go_by_length_however_the_file_sorted_them(page: str) -> None:
    label = next(str(a["aria-label"]) for t, a in Walk(page).tags if t == "svg" and "50-199" in str(a["aria-label"]))
    assert re.findall(r"(\S+), n =", label) == ["1-9", "10-49", "50-199", "200+"]


def test_text_contrast_is_enough_on_both_papers(page: str) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    blocks = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in blocks]
    assert len(schemes) == 2
    for scheme in schemes:
        for name in ("ink", "muted", "s1", "s2", "s3", "s4", "s5", "better", "worse"):
            assert contrast(scheme[name], scheme["paper"]) >= 4.5, name
        assert contrast(scheme["muted"], scheme["card"]) >= 4.5


def test_pieces_that_are_not_there_are_left_out() -> None:
    bare = sample()
    bare["runs"] = bare["runs"][:3]
    bare["command"] = None
    for one in bare["runs"]:
        one["buckets"] = {}
    text = render(bare)
    assert Walk(text).faults == []
    assert all(piece not in text for piece in ("<svg", "<figure", 'id="figures"', 'id="reproduce"'))
    assert "No row is private." in text


def test_results_without_rows_or_with_only_what_must_be_there_still_make_a_page() -> None:
    empty = sample() | {"runs": []}
    assert "There are no rows." in render(empty)
    least = sample()
    least["runs"] = [{key: one[key] for key in ("name", "metrics")} for one in least["runs"]]
    assert Walk(render(least)).faults == []


def test_a_private_row_alone_and_epsilons_far_apart_are_drawn() -> None:
    far = sample()
    far["runs"] = far["runs"][5:]
    far["runs"][1]["privacy"] = USER | {"epsilon": 0.31}
    far["runs"][1]["curve"] = []
    text = render(far)
    assert Walk(text).faults == []
    assert text.count("<svg") == 7


def test_names_and_notes_from_results_are_text_not_markup() -> None:
    hostile = sample()
    name = "<img src=x onerror=alert(1)>\"'`<b>`"
    hostile["runs"][6]["name"] = hostile["data"]["name"] = hostile["budget_note"] = hostile["command"] = name
    text = render(hostile)
    assert Walk(text).faults == []
    assert all(tag not in ("img", "b") for tag, _ in Walk(text).tags)
    assert html.escape("<img src=x", quote=False) in text


def test_the_page_is_never_wider_than_its_window(page: str, tmp_path: Path, require: Callable[[str], None]) -> None:
    require("chromium")
    long = sample()
    long["runs"][6]["name"] = "a-row+with-a-name-that-nobody-would-want-to-have-to-read"
    long["command"] = "penchant simulate " + "--option=value" * 20
    long["data"]["terms"] = "https://example.org/" + "a" * 200
    windows = [360, 500, 800, 1280]
    for text in (page, render(long)):
        assert widths(text, windows, tmp_path) == windows
    too_wide = page.replace("<main>", '<main><div style="width: 2000px">x</div>')
    assert all(width > 1900 for width in widths(too_wide, windows, tmp_path))


def widths(page: str, windows: list[int], folder: Path) -> list[int]:
    """How wide the page gets in frames of these widths, in CSS pixels. Chromium's own windows start at 500."""
    frames = "".join(
        f'<iframe style="width: {window}px; height: 20000px; border: 0" srcdoc="{html.escape(page)}"></iframe>'
        for window in windows
    )
    script = (
        "onload = () => { document.title = [...document.querySelectorAll('iframe')]"
        ".map(f => f.contentDocument.documentElement.scrollWidth).join(' ') }"
    )
    document = folder / "frames.html"
    document.write_text(f"<!doctype html><meta charset=utf-8><script>{script}</script>{frames}", "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(["chromium", *flags, document.as_uri()], capture_output=True, timeout=60, check=True)
    title = re.search(r"<title>([\d ]+)</title>", done.stdout.decode())
    assert title is not None
    return [int(found) for found in title[1].split()]
