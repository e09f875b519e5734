"""The operator's page in a browser: what it shows of each state of a server, and what a token makes it do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette

from penchant.common.artifacts.manifest import Manifest, Offer, Pointer
from penchant.common.artifacts.signing import SigningKey
from penchant.common.errors import InvalidConfig
from penchant.server import web
from penchant.server.database import Database
from penchant.server.distribution import publish
from tests.server.history import History, serving
from tests.server.operators import DAY, NOW, an_operator
from tests.server.test_monitoring import a_plan
from tests.system.browser import Browser, chromium
from tests.system.test_films import CONTRAST, press

AN_EARLIER_ONE = "INSERT INTO moves (channel, sequence, version, manifest, at_ms) VALUES ('stable', 1, 1, '', 0)"


@dataclass
class Site:
    """A server's history, and the address of its page.

    Attributes:
        later_ms: how far the server's clock is ahead of the history's end.
        done: what the registry was asked for.
    """

    history: History
    address: str = ""
    later_ms: int = 20_000
    done: list[Any] = field(default_factory=list)

    def promote(self, version: int) -> None:
        if version == 4:
            raise InvalidConfig("version 4 is not here: promote another")
        self.done.append(version)

    def rollback(self) -> None:
        self.done.append("rollback")

    def offer(self, channel: str, *, version: int) -> None:
        """Puts a release into a channel, signed as the operator's are."""
        folder, (key, root) = self.history.folder, (SigningKey(b"k" * 32), SigningKey(b"r" * 32))
        before = Offer.from_bytes((folder.distribution / "channels/stable.json").read_bytes())
        manifest = replace(Manifest.read(before.manifest, key.public), version=version).signed(key)
        pointer = replace(
            Pointer.read(before.pointer, key.public), channel=channel, sequence=version, manifest=manifest.sha256
        )
        publish(
            folder.distribution,
            Offer(before.certificate, pointer.signed(key), manifest),
            (),
            root=root.public,
            now_ms=NOW,
        )

    @property
    def token(self) -> str:
        return (self.history.folder.keys / "admin.token").read_text()

    def made(self, closing: threading.Event) -> Starlette:
        folder = self.history.folder
        return web.application(
            folder,
            database_factory=lambda: Database(folder.database),
            models=lambda _: self,
            now_ms=lambda: self.history.now_ms + self.later_ms,
            every_s=0.05,
            closing=closing,
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(web, "BEAT_S", 0.2)
    folder = an_operator(tmp_path / "prod", plan=a_plan(), toml="budget = 1.45\n")
    folder.ledger.unlink()  # it was made without the budget
    one = Site(History(folder))
    one.history.ledger().close()
    with serving(one.made) as one.address:
        yield one


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str], None]) -> Iterator[Browser]:
    require("chromium")
    with chromium(tmp_path_factory.mktemp("chromium")) as one:
        yield one


@pytest.fixture
def page(site: Site, browser: Browser) -> Iterator[Browser]:
    """The page, live. At the end nothing may have failed in it or have been asked of another server."""
    browser.window(1200)
    browser.open("about:blank")
    browser.wait("document.readyState == 'complete'")
    browser.requests.clear()
    browser.faults.clear()
    browser.open(f"{site.address}/ui")
    browser.wait("document.querySelector('#link')?.textContent == 'Live'")
    yield browser
    assert browser.faults == []
    assert {urlsplit(asked).netloc for asked in browser.requests} - {""} == {urlsplit(site.address).netloc}
    browser.open("about:blank")


def shows(page: Browser, where: str, *words: str) -> None:
    """Waits until an element's text has all of these words."""
    for word in words:
        page.wait(f"document.querySelector({where!r})?.innerText.includes({word!r})")


def text(page: Browser, where: str) -> str:
    found: str = page.js(f"document.querySelector({where!r}).innerText")
    return found


def some_rounds(history: History) -> None:
    history.want("running")
    history.round(drawn=50, answered=44, refused={"malformed": 2, "late": 3})
    history.round("abandoned", drawn=50, answered=3, refused={"error": 4}, why="too few answers")
    history.round("training", drawn=50)


# ------------------------------------------------------------------------------------------------------ what it shows


def test_a_server_without_rounds_offers_to_start_them(page: Browser, site: Site) -> None:
    site.history.want("not started")
    shows(page, "#banner", "No new round begins: not started yet.")
    assert text(page, "#now") == "No round yet."
    assert page.js("[start.checkVisibility(), pause.checkVisibility()]") == [True, False]
    assert text(page, "#no-rounds") == "None yet."


def test_a_round_is_followed_phase_by_phase_without_a_reload(page: Browser, site: Site) -> None:
    site.history.want("running")
    current = "document.querySelector('[aria-current=step] span')?.innerText"
    for phase in ("planned", "drawn", "training", "aggregating", "charged", "released"):
        site.history.write(phase, 1, drawn=50, asked=50, answered=44, refused={"late": 6})
        page.wait(f"{current} == {phase!r}")
    shows(page, "#now", "Round 1 (counts) is released.")
    assert page.js("document.querySelectorAll('#steps .past').length") == 6
    assert page.js("document.querySelector('#now').role") == "status"


def test_who_was_asked_and_why_answers_were_refused_is_told_of_this_and_earlier_rounds(
    page: Browser, site: Site
) -> None:
    some_rounds(site.history)
    shows(page, "#now", "Round 2, try 2 (counts) is waiting for answers.")
    shows(page, "#since", "answers are awaited for")
    rounds = "[...document.querySelectorAll('#rounds details')].map(one => one.innerText)"
    page.wait(f"{rounds}.length == 2")
    abandoned, released = page.js(rounds)
    for word in ("Abandoned", "Round 2", "3 of 50 nodes answered", "4 refused", "too few answers"):
        assert word in abandoned
    assert "44 of 50 nodes answered · 5 refused" in released
    page.js("document.querySelector('#rounds summary').focus()")
    page.press("Enter")
    lines = "[...document.querySelectorAll('#rounds details[open] li')]"
    funnel = f"{lines}.map(one => one.innerText.replace(/\\s+/g, ' ').trim())"
    assert page.js(funnel) == [
        "Users drawn 50",
        "Nodes asked 50",
        "Answered 3",
        "Refused 4",
        "device failed 4",
        "Silent 43",
    ]
    site.history.want("paused")  # what is drawn anew stays open, and the keyboard where it was
    shows(page, "#banner", "paused by the operator")
    assert page.js(f"{funnel}.length") == 6
    assert page.js("document.activeElement.matches('#rounds li:first-child summary')")


def test_the_epsilon_comes_with_all_that_gives_it_a_meaning(page: Browser, site: Site) -> None:
    some_rounds(site.history)
    shows(page, "#epsilon", "ε = 0.259 at δ = 0.001, spent so far")
    shows(page, "#scale", "Plan’s end: ε = 1.88", "Budget: ε = 1.45, before the plan’s end")
    shows(page, "#left", "7 rounds left")
    shows(
        page,
        "#words",
        "user: add/remove one profile",
        "none (at most 12 of 12 sums per profile)",
        "GDP",
        "the server, which sees each contribution",
        "nothing",
    )
    meter = next(n for n in page("Accessibility.getFullAXTree")["nodes"] if n["role"]["value"] == "meter")
    assert meter["name"]["value"] == "Privacy spent"
    assert page.js("gauge.ariaValueText") == "ε 0.259 of 1.45"


def test_a_spent_budget_stops_rounds_and_cannot_be_started_again(page: Browser, site: Site) -> None:
    site.history.want("running")
    for _ in range(8):
        site.history.round(drawn=50)
    shows(page, "#banner", "No new round begins: the budget has no room for another round.")
    shows(page, "#left", "0 rounds left")
    assert page.js("[start.checkVisibility(), pause.checkVisibility()]") == [False, False]


def test_what_expires_is_said_in_words_and_what_is_missing_comes_first(page: Browser, site: Site) -> None:
    assert "Valid" in text(page, "#channels")
    site.later_ms = 21 * DAY
    shows(page, "#channels", "stable: version 1", "Renew soon", "for 9 d")
    assert not page.js("missing.checkVisibility()")
    site.later_ms = 364 * DAY
    shows(page, "#certificates", "Renew soon")
    shows(page, "#channels", "Expired")
    shows(page, "#problems", "Channels: the pointer of channel stable is expired")
    site.history.folder.ledger.write_bytes(b"damaged" * 100)
    shows(page, "#problems", "Ledger:")
    shows(page, "#no-privacy", "The ledger cannot be read.")


def test_a_lost_connection_is_said_and_found_again(tmp_path: Path, browser: Browser) -> None:
    site = Site(History(an_operator(tmp_path / "prod")))
    with serving(site.made) as site.address:
        browser.window(1200)
        browser.open(f"{site.address}/ui")
        browser.wait("document.querySelector('#link')?.textContent == 'Live'")
    browser.wait("document.querySelector('#link').textContent == 'Connection lost'")
    assert "Shown is what was so at" in text(browser, "#as-of")
    assert browser.js("document.querySelector('#app').checkVisibility()")
    site.history.want("running")
    with serving(site.made, port=urlsplit(site.address).port or 0):
        browser.wait("document.querySelector('#link').textContent == 'Live'", limit_s=20)
        shows(browser, "#now", "the first will be planned")
        browser.open("about:blank")


# ------------------------------------------------------------------------------------------------------- what it does


def give(page: Browser, token: str) -> None:
    page.wait("sure.open && document.activeElement.id == 'token'")
    page.js(f"token.value = {token!r}")
    page.press("Enter")


def test_the_token_is_asked_for_once_and_kept_nowhere(page: Browser, site: Site) -> None:
    press(page, "Start rounds")
    give(page, "not the token")
    shows(page, "#refused", "That is no admin token.")
    give(page, "x" * 43)
    shows(page, "#refused", "That is not the admin token.")
    give(page, site.token)
    shows(page, "#said", "Rounds start.")
    page.wait("pause.checkVisibility()")
    press(page, "Pause rounds")
    page.wait("sure.open")
    assert not page.js("token.checkVisibility()")
    press(page, "Pause", within="dialog[open]")
    shows(page, "#banner", "paused by the operator")
    kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href, token.value])"
    assert site.token not in page.js(kept)
    page.open(f"{site.address}/ui")
    page.wait("document.querySelector('#start')?.checkVisibility()")
    press(page, "Start rounds")
    page.wait("token.checkVisibility()")
    page.press("Escape")
    page.wait("!sure.open")
    # the first refusal is one that the browser reports as an error of its own
    page.faults[:] = [fault for fault in page.faults if "401" not in fault]


def test_a_candidate_is_promoted_and_the_model_before_comes_back(page: Browser, site: Site) -> None:
    assert page.js("[promote.checkVisibility(), rollback.checkVisibility()]") == [False, False]
    site.offer("candidate", version=3)
    press(page, "Promote version 3 to stable")
    give(page, site.token)
    shows(page, "#said", "Version 3 is stable.")
    with Database(site.history.folder.database) as database, database.transaction() as db:
        db.execute(AN_EARLIER_ONE)
    site.offer("stable", version=3)
    page.wait("!promote.checkVisibility()")
    press(page, "Go back to the model before")
    press(page, "Go back", within="dialog[open]")
    shows(page, "#said", "The model before is stable again.")
    assert site.done == [3, "rollback"]
    site.offer("candidate", version=4)
    press(page, "Promote version 4 to stable")
    press(page, "Promote", within="dialog[open]")
    shows(page, "#refused", "Version 4 is not here: promote another.")
    assert site.done == [3, "rollback"]
    page.faults[:] = [fault for fault in page.faults if "409" not in fault]


# ------------------------------------------------------------------------------------------------------- who can use it

CONTROLS = "[...document.querySelectorAll('a, button, summary')].filter(one => one.checkVisibility())"


def test_every_control_is_reached_in_order_seen_and_named(page: Browser, site: Site) -> None:
    some_rounds(site.history)
    page.wait("document.querySelectorAll('#rounds details').length == 2")
    page.js("document.querySelector('a').focus()")
    for place in range(page.js(f"{CONTROLS}.length")):
        focused, outline = page.js(
            f"[{CONTROLS}.indexOf(document.activeElement), getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert (focused, outline) == (place, "solid")
        page.press("Tab")
    nodes = page("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in nodes]
    assert {"banner", "navigation", "main", "region", "status", "meter", "contentinfo"} <= set(roles)
    asked = ("button", "link", "DisclosureTriangle", "region", "meter", "textbox")
    assert [n for n in nodes if n["role"]["value"] in asked and not n["name"]["value"]] == []
    page.js("pause.focus()")
    page.press("Enter")
    page.wait("document.activeElement.id == 'token'")
    page.press("Escape")
    page.wait("document.activeElement.id == 'pause'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_its_text_stands_out(page: Browser, site: Site, scheme: str) -> None:
    some_rounds(site.history)
    site.history.want("paused")
    site.later_ms = 21 * DAY
    shows(page, "#channels", "Renew soon")
    page.wait("document.querySelectorAll('#rounds details').length == 2")
    page.js("document.querySelectorAll('details').forEach(one => one.open = true)")
    for width in (320, 360, 800, 1200):
        page.window(width, scheme=scheme)
        assert page.js("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert page.js(f"{CONTRAST}(document)") == []
    page.js("document.querySelector('#now').style.color = 'var(--card)'")
    assert page.js(f"{CONTRAST}(document)") == ["now"]  # the measure can fail


def test_words_from_outside_are_shown_as_they_are_and_never_run(page: Browser, site: Site) -> None:
    site.history.want("running")
    hostile = "<img src=x onerror='document.title=1'>"
    site.history.round("abandoned", drawn=50, answered=0, refused={hostile: 7}, why=hostile)
    shows(page, "#now", hostile)
    shows(page, "#funnel", "other")
    assert page.js("[document.images.length, document.title]") == [0, "Round 1 abandoned – films"]
