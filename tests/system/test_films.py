"""The example app in a browser: started by its command, used by mouse, by keyboard and on a phone, and forgotten."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from penchant.client import Client
from tests.client.apps import CATALOGUE, Operator
from tests.system.browser import Browser, chromium

SCRIPT = Path(__file__).resolve().parents[2] / "examples/films/app.py"
spec = importlib.util.spec_from_file_location("films_app", SCRIPT)
assert spec is not None
assert spec.loader is not None
films_app = importlib.util.module_from_spec(spec)
spec.loader.exec_module(films_app)

HOSTILE = '<img src=x onerror="document.title=1"> & <b>Film</b> ' + "a" * 80
# The app as its command starts it, except that it ends at once if it ever connects to anything.
WATCHED = """
import os, runpy, sys
sys.addaudithook(lambda event, _: event == "socket.connect" and os._exit(9))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclasses.dataclass
class App:
    """A started app.

    Attributes:
        address: the printed one, with the token.
        person: folder of the person's state.
    """

    address: str
    person: Path

    def ask(
        self, method: str, path: str, body: Any = None, *, omit: str = "", **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """Status and answer of a request as the page makes it, except for what is given or left out."""
        url = urlsplit(self.address)
        sent = {"Host": url.netloc, "X-Films": url.fragment.removeprefix("token=")}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
        with contextlib.closing(connection):
            text = body if isinstance(body, str) or body is None else json.dumps(body)
            connection.request(method, path, text, {name: value for name, value in sent.items() if name != omit})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())


@contextlib.contextmanager
def started(state: Path, *options: str) -> Iterator[App]:
    command = [sys.executable, "-c", WATCHED, str(SCRIPT), "--state", str(state), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if line.startswith("Open http")), None)
            assert line, process.communicate()
            yield App(line.split()[1], state / "person")
        finally:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert out.split() == ["Stopped;", "what", "you", "did", "is", "kept."]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    catalogue = dataclasses.replace(CATALOGUE, titles=(HOSTILE, *CATALOGUE.titles[1:]))
    return Operator(catalogue=catalogue).bundle(tmp_path_factory.mktemp("app") / "films.bundle")


@pytest.fixture
def app(tmp_path: Path, bundle: Path) -> Iterator[App]:
    with contextlib.closing(films_app.Films(tmp_path / "person", bundle)) as films, films_app.serving(films) as address:
        yield App(address, tmp_path / "person")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str], None]) -> Iterator[Browser]:
    require("chromium")
    with chromium(tmp_path_factory.mktemp("chromium")) as one:
        yield one


@pytest.fixture
def page(app: App, browser: Browser) -> Iterator[Browser]:
    """The app's page, drawn. At the end nothing may have failed in it or have been asked of another server."""
    browser.requests.clear()
    browser.faults.clear()
    browser.window(1200)
    browser.open(app.address)
    browser.wait(
        "document.querySelectorAll('#list li').length == 10 && document.querySelectorAll('#found li').length == 12"
    )
    yield browser
    assert browser.faults == []
    assert {urlsplit(asked).netloc for asked in browser.requests} == {urlsplit(app.address).netloc}


def listed(page: Browser) -> list[str]:
    found: list[str] = page.js("[...document.querySelectorAll('#list h3')].map(h => h.textContent)")
    return found


def press(page: Browser, name: str, *, within: str = "main, dialog[open]") -> None:
    """Clicks the first button of that accessible name, as far as it is given."""
    page.wait(
        f"(b => b && (b.click(), true))([...document.querySelectorAll({within!r})].flatMap(part => "
        f"[...part.querySelectorAll('button')]).find(b => (b.ariaLabel ?? b.textContent).trim().startsWith({name!r})))"
    )


def said(page: Browser, words: str) -> None:
    """Waits until the page has told the person this."""
    page.wait(f"[...document.querySelectorAll('[role=status]')].some(p => p.textContent.includes({words!r}))")


# ------------------------------------------------------------------------------------------------------ what it does


def test_a_new_person_gets_a_list_with_reasons_and_is_told_that_nothing_left(page: Browser) -> None:
    reasons = page.js("[...document.querySelectorAll('#list li p:last-of-type')].map(p => p.textContent)")
    assert len(reasons) == 10
    assert all("many people choose it" in reason or "Little speaks for it" in reason for reason in reasons)
    assert page.js("document.querySelector('#left').textContent") == "Nothing, so far."
    assert "ε = " in page.js("document.querySelector('#promise').textContent")
    assert len(page.js("[...document.querySelectorAll('#interests li')].map(li => li.textContent)")) == 3
    page.js("language.value = 'zh'; language.onchange()")
    page.wait("document.querySelector('#list p[lang=zh]')?.textContent.includes('。')")


def test_a_film_that_was_watched_changes_the_list_and_is_in_none(page: Browser, app: App) -> None:
    before = listed(page)
    press(page, f"Watch: {before[0]}")
    said(page, f"You watched {before[0]}")
    after = listed(page)
    assert before[0] not in after
    assert after != before[1:]
    page.wait("document.querySelector('#rests-on').textContent.includes('1 thing that you did')")
    press(page, f"Like: {after[3]}")
    said(page, f"You like {after[3]}")
    kept = app.ask("GET", "/api/kept")[1]["events"]
    assert [event["kind"] for event in kept] == ["watch", "like"]


def test_what_was_refused_stays_away_until_it_is_allowed_again(page: Browser) -> None:
    unwanted = listed(page)[0]
    press(page, f"Not this film: {unwanted}")
    said(page, f"{unwanted} will not be listed")
    assert unwanted not in listed(page)
    press(page, "Not this topic: Drama")
    said(page, "No more Drama")
    topics = page.js("[...document.querySelectorAll('#list .quiet')].map(p => p.textContent)")
    assert len(topics) == 10
    assert "Drama" not in topics
    press(page, "Allow again: Drama")
    said(page, "Drama may be listed again")
    page.js("document.querySelector('#kept summary').click()")
    press(page, f"Allow again: {unwanted}")
    said(page, f"{unwanted} may be listed again")
    assert unwanted in listed(page)


def test_a_search_finds_films_by_words_of_their_title_and_topic(page: Browser) -> None:
    for words, topic, found in (("film 1950", "", 0), ("19 film", "Comedy", 17), ("1957", "Comedy", 1), ("", "", 60)):
        page.js(f"words.value = {words!r}; topics.value = {topic!r}; document.querySelector('#search').requestSubmit()")
        page.wait(f"document.querySelector('#n-found').textContent.startsWith('{found} film')")
        assert page.js("document.querySelectorAll('#found li').length") == min(found, 12)
    press(page, "Show more")
    page.wait("document.querySelectorAll('#found li').length == 24")


def test_agreeing_and_withdrawing_are_kept_with_the_text_and_a_sync_says_why_nothing_was_sent(
    page: Browser, app: App
) -> None:
    for switch, trust in (("true", "server"), ("false", "nobody")):
        press(page, "Take part")
        page.wait(f"document.querySelector('#consent').getAttribute('aria-checked') == {switch!r}")
        consent = app.ask("GET", "/api/kept")[1]["consent"]
        assert (consent["trust"], consent["text"]) == (trust, "films-1")
    press(page, "Look now")
    said(page, "version 1 is in use. This app has no rounds to take part in.")


@pytest.mark.parametrize("rounds_too", [False, True])
def test_forget_asks_first_gives_a_receipt_and_leaves_nothing(page: Browser, app: App, rounds_too: bool) -> None:
    press(page, "Watch")
    said(page, "You watched")
    press(page, "Forget me…")
    press(page, "Keep everything")
    assert len(app.ask("GET", "/api/kept")[1]["events"]) == 1
    press(page, "Forget me…")
    page.js(f"rounds.checked = {str(rounds_too).lower()}")
    press(page, "Forget me now")
    page.wait("document.activeElement.textContent == 'You are forgotten'")
    assert page.js("document.querySelector('#key').textContent").startswith("Destroyed")
    assert page.js("document.querySelector('#stays').textContent.startsWith('Nothing.')") is rounds_too
    left = {path.name for path in app.person.rglob("*") if path.is_file()}
    assert left == ({"store.lock"} if rounds_too else {"store.lock", "tombstone.json"})
    page.open(app.address.split("#")[0])  # as a reload does: the token is no longer in the address
    page.wait("document.querySelector('#h-gone')?.checkVisibility()")
    press(page, "Start again")
    page.wait("document.querySelector('#rests-on').textContent.includes('not done anything')")
    assert app.ask("GET", "/api/kept")[1]["events"] == []


def test_whatever_a_person_does_the_app_connects_to_nothing_and_a_restart_loses_nothing(
    tmp_path: Path, bundle: Path
) -> None:
    options = (tmp_path / "state", "--bundle", str(bundle))
    said = {
        "item": "film:7",
        "topic": "Drama",
        "refused": "Drama",
        "trust": "server",
        "rounds": "stay",
        "language": "en",
    }
    assert list(films_app.ACTIONS)[-1] == "forget"
    with started(*options) as app:
        for name in (*films_app.ACTIONS, "begin", *list(films_app.ACTIONS)[:-1]):
            assert app.ask("POST", f"/api/{name}", said)[0] == 200, name
    with started(*options) as app:
        kept = app.ask("GET", "/api/kept")[1]
    assert [(event["item"], event["kind"]) for event in kept["events"]] == [("film:7", "watch"), ("film:7", "like")]
    assert (kept["refused_items"], kept["consent"]["trust"]) == (["film:7"], "server")
    with Client.open(app.person) as me:
        assert me.interests().n_events == 2


# ------------------------------------------------------------------------------------------------------- who can use it

CONTROLS = "[...document.querySelectorAll('a, button, input, select, summary, [tabindex=\"0\"]')]"
FOCUSED = f"({CONTROLS}).filter(c => c.checkVisibility()).indexOf(document.activeElement)"


def test_every_control_is_reached_in_order_and_can_be_seen_and_used_by_keyboard(page: Browser, app: App) -> None:
    page.js("document.querySelector('#kept summary').focus()")
    page.press("Enter")
    page.wait("document.querySelector('#events li') != null")
    n = page.js(f"({CONTROLS}).filter(c => c.checkVisibility()).length")
    page.js("document.querySelector('a').focus()")
    for place in range(n):
        focused, outline = page.js(f"[{FOCUSED}, getComputedStyle(document.activeElement).outlineStyle]")
        assert (focused, outline) == (place, "solid"), page.js("document.activeElement.outerHTML")
        page.press("Tab")

    first = listed(page)[0]
    page.js("document.querySelector('#list button').focus()")
    page.press("Enter")
    said(page, f"You watched {first}")
    assert page.js("document.activeElement == document.querySelector('#list button')")  # and goes on from there

    page.js("words.focus()")
    for key in "1957":
        page.press(key)
    page.wait("document.querySelector('#n-found').textContent == '1 film'")
    page.js("consent.focus()")
    page.press("Space")
    page.wait("document.querySelector('#consent').ariaChecked == 'true'")

    page.js("forget.focus()")
    page.press("Enter")
    assert page.wait("document.activeElement.textContent") == "Keep everything"
    page.press("Escape")
    page.wait("document.activeElement.id == 'forget'")
    page.press("Enter")
    page.press("Tab")
    page.press("Enter")
    page.wait("document.activeElement.id == 'h-gone'")
    page.press("Tab")
    page.press("Enter")
    page.wait("document.activeElement.id == 'h-list'")
    assert app.ask("GET", "/api/kept")[1]["events"] == []


def test_the_page_is_never_wider_than_a_phone_and_every_control_has_a_name(page: Browser) -> None:
    page.js("words.value = 'img'; document.querySelector('#search').requestSubmit()")
    page.wait("document.querySelector('#found h3').textContent.startsWith('<img')")
    press(page, "Watch: <img")
    said(page, "<img")
    page.js("kept.open = true")
    page.wait("document.querySelector('#events').textContent.includes('<img')")
    for width in (320, 360, 800):
        page.window(width)
        assert page.js("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    page.js("document.querySelector('#list').insertAdjacentHTML('beforeend', `<pre>${'a '.repeat(200)}</pre>`)")
    assert page.js("document.documentElement.scrollWidth") > 800  # the measure can fail
    assert page.js("[document.images.length, document.querySelector('main b:not(.bar b)'), document.title]") == [
        0,
        None,
        "Films",
    ]
    nodes = page("Accessibility.getFullAXTree")["nodes"]
    asked = ("button", "switch", "searchbox", "combobox", "checkbox", "link", "DisclosureTriangle")
    nameless = [node for node in nodes if node["role"]["value"] in asked and not node["name"]["value"]]
    assert nameless == []


@pytest.mark.parametrize("asked", ["?lang=zh", ""], ids=["asked for", "as the browser says"])
def test_the_whole_page_is_chinese_for_who_asks_or_whose_browser_does(app: App, browser: Browser, asked: str) -> None:
    browser.faults.clear()
    agent = browser.js("navigator.userAgent")
    browser("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage="en" if asked else "zh-CN")
    try:
        browser.window(360)
        browser.open("about:blank")
        browser.open(app.address.replace("#", f"{asked}#"))
        browser.wait("document.querySelector('#found li') != null && document.querySelector('#list li') != null")
        assert browser.js("[document.documentElement.lang, document.title]") == ["zh", "电影"]
        assert browser.js("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert browser.js(f"{ENGLISH}(document)") == []
        browser.js("sync.click()")
        browser.wait("document.querySelector('#synced').textContent.includes('没有可以参加的轮次')")
        browser.js("language.value = 'en'; language.onchange()")
        browser.wait("document.querySelector('#list button').textContent == 'Watch'")
        assert browser.js("[document.querySelector('#h-list').textContent, document.title]") == ["For you", "Films"]
        assert "Watch" in browser.js(f"{ENGLISH}(document)")
    finally:
        browser("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage="en-US")
    assert browser.faults == []


ENGLISH = """(page => {
  const own = "#topics option:not(:first-child), #language, .films h3, .films p, .row span, #promise, #terms, "
    + "noscript, script";
  return [...page.body.querySelectorAll("*")].filter(at => !at.closest(own))
    .flatMap(at => [...at.childNodes].filter(node => node.nodeType === 3).map(node => node.textContent.trim()))
    .filter(text => /[a-z]{4}/.test(text) && !/Film |Drama|Comedy|Horror/.test(text));
})"""  # what is neither the catalogue's, nor the guarantee, whose words are fixed


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Browser, scheme: str) -> None:
    page.window(360, scheme=scheme)
    assert page.js(f"{CONTRAST}(document)") == []
    page.js("document.querySelector('#left').style.color = 'var(--card)'")
    assert page.js(f"{CONTRAST}(document)") == ["left"]


CONTRAST = """(page => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => parts(colour).slice(0, 3)
    .map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const ground = at => { while (parts(getComputedStyle(at).backgroundColor)[3] === 0) at = at.parentElement;
    return getComputedStyle(at).backgroundColor; };
  const ratio = at => { const [a, b] = [getComputedStyle(at).color, ground(at)].map(light).sort((a, b) => b - a);
    return (a + .05) / (b + .05); };
  const text = [...page.body.querySelectorAll("*")].filter(at => at.checkVisibility() && [...at.childNodes]
    .some(node => node.nodeType === 3 && node.textContent.trim()));
  return text.filter(at => ratio(at) < 4.5).map(at => at.id || at.outerHTML);
})"""  # WCAG 2.2, success criterion 1.4.3 and its relative luminance


# --------------------------------------------------------------------------------------------- who cannot, and what if


def test_another_page_or_name_or_person_of_this_machine_gets_nothing_and_changes_nothing(app: App) -> None:
    port = urlsplit(app.address).port
    watch = ("POST", "/api/watch", {"item": "film:7", "language": "en"})
    refused: list[dict[str, str]] = [
        {"Host": "films.example"},
        {"Host": f"films.example:{port}"},
        {"Origin": "https://films.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{(port or 0) + 1}"},
        {"X_Films": "guessed"},
        {"X_Films": "é"},
        {"omit": "X-Films"},
    ]
    for headers in refused:
        status, answer = app.ask(*watch, **headers)
        assert (status, list(answer)) == (403, ["error"]), headers
        assert app.ask("GET", "/api/me?language=en", **headers)[0] == 403
    assert app.ask("GET", "/", Host="films.example")[0] == 403
    assert app.ask("GET", "/api/kept")[1]["events"] == []
    assert app.ask(*watch, Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert app.ask(*watch, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200


def test_what_the_sdk_refuses_is_one_sentence_and_what_is_no_request_another(app: App) -> None:
    status, answer = app.ask("POST", "/api/not_this_item", {"item": "film:99", "language": "en"})
    assert status == 409
    assert "no item 'film:99'" in answer["error"]
    assert app.ask("GET", "/api/me?language=fr")[0] == 409
    assert app.ask("POST", "/api/begin", {"language": "en"})[0] == 409  # nobody was forgotten
    for wrong in ("", "{", "[]", '"watch"', '{"item": 7, "language": "en"}', "{}", "[" * 9000, "{}" + " " * 10_000):
        assert app.ask("POST", "/api/watch", wrong)[0] == 400, wrong[:9]
    for path in ("/api/nothing", "/api/", "/app.py", "/../app.py", "/api/films?words=a&topic=&after=x"):
        assert app.ask("GET", path)[0] == 400
        assert app.ask("POST", path, {})[0] == 400


def test_no_answer_is_kept_by_a_browser_and_the_page_runs_no_script_but_its_own(app: App) -> None:
    url = urlsplit(app.address)
    for path in ("/", "/page.js", "/api/kept"):
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            found = connection.getresponse().headers
        assert found["Cache-Control"] == "no-store"
        assert found["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
        assert found["Set-Cookie"] is None


def test_what_stops_a_start_is_one_line(tmp_path: Path, bundle: Path, app: App) -> None:
    port = str(urlsplit(app.address).port)
    for options, words in (
        (("--bundle", str(bundle), "--port", port), "in use"),
        (("--bundle", "none.bundle"), "none.bundle"),
    ):
        command = [sys.executable, str(SCRIPT), "--state", str(tmp_path / "other"), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
        assert words in done.stderr


@pytest.mark.slow
def test_one_command_makes_the_apps_bundle_the_first_time_and_keeps_it(tmp_path: Path) -> None:
    with started(tmp_path / "state") as app:
        assert len(app.ask("GET", "/api/me?language=en")[1]["films"]) == 10
        assert "unit user" in app.ask("GET", "/api/me?language=en")[1]["privacy"]["release"]
    made = (tmp_path / "state/films.bundle").stat()
    with started(tmp_path / "state") as app:
        assert app.ask("GET", "/api/kept")[1]["release"] == 1
    assert (tmp_path / "state/films.bundle").stat() == made
