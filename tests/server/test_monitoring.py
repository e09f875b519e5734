"""What the operator is shown is what the server wrote, is read in milliseconds, and tells nobody from anybody."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from penchant.common.errors import BudgetExhausted
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import DeviceNoise, PrivacyPlan, SumSpec
from penchant.server.database import Database
from penchant.server.folder import Folder
from penchant.server.monitoring import CHANNELS, PHASES, REASONS, Cache, Metrics, Status, not_ready, read
from tests.server.history import History
from tests.server.operators import DAY, NOW, an_operator

ROOT = Path(__file__).resolve().parents[2]


def a_plan(**fields: Any) -> PrivacyPlan:
    """Twelve rounds of fifty users, of two kinds of sums."""
    said: dict[str, Any] = {
        "unit": "user",
        "n_users": 50,
        "delta": 1e-3,
        "sampling": "none",
        "cohort": 50,
        "sums": (
            SumSpec(name="counts", rounds=2, clip_norm=1.0, noise_multiplier=8.0),
            SumSpec(name="matrix", rounds=10, clip_norm=1.0, noise_multiplier=5.0),
        ),
        "max_participations": 12,
    }
    return PrivacyPlan(**said | fields)


def with_history(path: Path, *, budget: float | None = None) -> History:
    folder = an_operator(path, plan=a_plan(), toml="" if budget is None else f"budget = {budget}\n")
    folder.ledger.unlink()  # it was made without the budget
    history = History(folder)
    history.ledger().close()
    return history


def status(folder: Folder, now_ms: int = NOW) -> Status:
    return read(folder, now_ms=now_ms)


def scraped(found: Status) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of the metrics, by name and labels."""
    text = Metrics(lambda: (found, not_ready(found))).text().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# ------------------------------------------------------------------------------------------------------ what is told


def test_a_server_that_has_done_nothing_says_so(tmp_path: Path) -> None:
    found = status(an_operator(tmp_path / "prod"))
    assert (found.phase, found.recent, found.running, found.why) == ("", (), True, "")
    assert (found.done, found.rounds, found.rounds_left) == (0, 3, 3)
    assert found.privacy is not None
    assert found.privacy.guarantee.epsilon == 0
    assert found.problems == not_ready(found) == ()
    assert json.loads(json.dumps(found.to_record()))["channels"][0]["version"] == 1


def test_rounds_are_told_newest_first_with_what_became_of_who_was_asked(tmp_path: Path) -> None:
    history = with_history(tmp_path / "prod")
    history.want("running")
    history.round(drawn=50, answered=44, refused={"malformed": 2, "late": 3})
    history.round("abandoned", drawn=50, asked=48, answered=3, refused={"error": 4}, why="too few answers")
    history.round("training", drawn=50)
    found = status(history.folder, history.now_ms)
    assert [(one.round, one.attempt, one.phase, one.sum) for one in found.recent] == [
        (2, 1, "training", "counts"),
        (2, 0, "abandoned", "counts"),
        (1, 0, "released", "counts"),
    ]
    assert [(one.drawn, one.asked, one.answered, one.silent) for one in found.recent[1:]] == [
        (50, 48, 3, 41),
        (50, 50, 44, 1),
    ]
    assert (found.phase, found.since_ms, list(found.steps)) == (
        "training",
        history.now_ms - 1000,
        ["planned", "drawn", "training"],
    )
    assert (found.running, found.done, found.recent[1].why) == (True, 1, "too few answers")
    assert (found.totals.released, found.totals.abandoned) == (1, 1)
    assert found.totals.refused == {"malformed": 2, "late": 3, "error": 4}
    assert (found.totals.drawn, found.totals.answered, found.totals.silent) == (100, 47, 42)


def test_the_epsilon_is_the_ledgers_and_comes_with_all_that_gives_it_a_meaning(tmp_path: Path) -> None:
    history = with_history(tmp_path / "prod", budget=4.5)
    for _ in range(2):
        history.round(drawn=50)
    found = status(history.folder)
    assert found.privacy is not None
    with Ledger.open(history.folder.ledger) as ledger:
        assert found.privacy.guarantee.epsilon == ledger.spent().epsilon > 0
    whole = history.folder.plan.guarantee()
    assert whole is not None
    assert found.privacy.at_end == pytest.approx(whole.epsilon)
    assert (found.privacy.budget, found.rounds_left) == (4.5, 10)
    for words in ("δ = 0.001", "unit user", "sampling none", "accountant GDP", "trust server", "not charged: nothing"):
        assert words in found.privacy.words


def test_the_rounds_left_are_those_that_the_ledger_then_takes(tmp_path: Path) -> None:
    history = with_history(tmp_path / "prod", budget=1.45)
    history.want("running")
    told = [status(history.folder).rounds_left]
    while told[-1]:
        history.round(drawn=50)
        told.append(status(history.folder).rounds_left)
    with pytest.raises(BudgetExhausted):
        history.round(drawn=50)
    assert told == list(range(told[0], -1, -1))
    assert 0 < told[0] < history.folder.plan.rounds
    found = status(history.folder)
    assert (found.running, found.why) == (False, "the budget has no room for another round")


def test_a_pause_and_the_end_of_a_plan_are_told_apart(tmp_path: Path) -> None:
    history = with_history(tmp_path / "prod")
    history.want("running")
    assert status(history.folder).running
    history.want("paused")
    assert status(history.folder).why == "paused by the operator"
    history.want("paused", hold="the disk is full")
    assert (status(history.folder).running, status(history.folder).why) == (False, "paused: the disk is full")
    for _ in range(12):
        history.round(drawn=50)
    assert status(history.folder).why == "every round of the plan is released"


def test_places_are_counted_and_not_named(tmp_path: Path) -> None:
    history = with_history(tmp_path / "prod")
    for place in range(7):
        history.place(place, left=place == 3)
    roster = status(history.folder).roster
    assert roster is not None
    assert (roster.active, roster.left, roster.free) == (6, 1, 43)


@pytest.mark.parametrize(("unit", "left"), [("interaction", True), ("none", False)])
def test_a_plan_whose_noise_is_not_the_servers_is_told_as_it_is(tmp_path: Path, unit: str, left: bool) -> None:
    device = DeviceNoise(clip_norm=1.0, noise_multiplier=2.0, rate=0.1, steps=5, divisor=4.0) if left else None
    sums = (SumSpec(name="update", rounds=3, clip_norm=1.0),)
    plan = a_plan(unit=unit, sums=sums, device=device, max_participations=3)
    folder = an_operator(tmp_path / "prod")
    (folder.path / "plan.json").write_text(plan.to_json())
    found = status(Folder(folder.path))
    assert (found.unit, found.rounds_left, found.privacy is not None) == (unit, 3, left)
    assert found.privacy is None or found.privacy.guarantee.trust == "own device"


# ------------------------------------------------------------------------------------------------- what is not right


def test_a_part_that_cannot_be_read_is_named_and_the_others_are_still_told(tmp_path: Path) -> None:
    folder = an_operator(tmp_path / "prod")
    for path, part in (
        (folder.ledger, "ledger"),
        (folder.database, "database"),
        (folder.distribution / "channels/stable.json", "channels"),
        (folder.certificate, "certificates"),
    ):
        whole = path.read_bytes()
        path.write_bytes(b"damaged" * 100)
        found = status(folder)
        assert [problem.part for problem in found.problems] == [part]
        assert scraped(found)["penchant_part_readable", (("part", part),)] == 0
        assert (found.rounds, found.disk_free > 0) == (3, True)
        path.write_bytes(whole)
    (folder.path / "plan.json").unlink()
    assert [problem.part for problem in status(Folder(folder.path)).problems] == ["plan"]
    assert scraped(status(folder))["penchant_ready", ()] == 1


def test_what_expires_is_missed_only_once_it_has(tmp_path: Path) -> None:
    folder = an_operator(tmp_path / "prod")

    def missing(now_ms: int) -> list[str]:
        return [problem.part for problem in not_ready(status(folder, now_ms))]

    assert missing(NOW + 30 * DAY - 1) == []
    assert missing(NOW + 30 * DAY) == ["channels"]
    assert missing(NOW + 365 * DAY) == ["channels", "certificates"]
    (folder.distribution / "channels/stable.json").unlink()
    assert missing(NOW) == ["channels"]


def test_a_clock_that_was_set_back_is_told(tmp_path: Path) -> None:
    history = with_history(tmp_path / "prod")
    history.round()
    last_ms = history.now_ms - 1000
    assert status(history.folder, last_ms).clock_behind_ms == 0
    assert status(history.folder, last_ms - DAY).clock_behind_ms == DAY
    history.now_ms -= DAY
    history.round("training")
    found = status(history.folder, history.now_ms)
    assert [one.round for one in found.recent] == [2, 1]  # the newest is the one that was written last
    assert (found.phase, found.clock_behind_ms) == ("training", last_ms - history.now_ms)


# --------------------------------------------------------------------------------------------------------- how it is


def test_a_thousand_rounds_are_read_in_milliseconds_and_the_ledger_is_replayed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_plan(
        sums=(SumSpec(name="counts", rounds=1200, clip_norm=1.0, noise_multiplier=50.0),), max_participations=1200
    )
    folder = an_operator(tmp_path / "prod", plan=plan)
    event = plan.event(1)
    assert event is not None
    with Ledger(plan.population, delta=plan.delta, app_id="films", path=folder.ledger) as ledger:
        for number in range(1, 1001):
            ledger.charge(number, event, plan=plan.digest, cap=plan.charged_cap)
    with Database(folder.database) as database, database.transaction() as db:
        rows = [
            (plan.digest, n, 0, "released", NOW + n, "counts", 50, 50, 45, '{"late": 2, "malformed": 3}', 1.0, "")
            for n in range(1, 1001)
        ]
        db.executemany(f"INSERT INTO rounds VALUES ({', '.join('?' * 12)})", rows)
        db.executemany(
            "INSERT INTO phases (plan, round, attempt, phase, at_ms) VALUES (?, ?, 0, ?, ?)",
            [(plan.digest, n, phase, NOW + n) for n in range(1, 1001) for phase in PHASES[:6]],
        )
        db.execute("INSERT OR REPLACE INTO progress VALUES (?, 1000, '', '', x'')", (plan.digest,))
    replays: list[object] = []
    replayed = Ledger._replayed

    def counted(self: Ledger) -> object:
        replays.append(self)
        return replayed(self)

    monkeypatch.setattr(Ledger, "_replayed", counted)
    with Cache() as cache:
        first = read(folder, now_ms=NOW, cache=cache)
        taken = []
        for _ in range(20):
            started = time.process_time()
            again = read(folder, now_ms=NOW, cache=cache)
            taken.append(time.process_time() - started)
            assert replace(again, disk_free=first.disk_free) == first  # others write to this disk too
        assert min(taken) < 0.010
        assert len(replays) == 1
        with Ledger(plan.population, delta=plan.delta, app_id="films", path=folder.ledger) as ledger:
            ledger.charge(1001, event, plan=plan.digest, cap=plan.charged_cap)
        more = read(folder, now_ms=NOW, cache=cache)
        assert first.privacy is not None
        assert more.privacy is not None
        assert more.privacy.guarantee.epsilon > first.privacy.guarantee.epsilon
        assert len(replays) == 2  # by the writer that was opened; what it wrote was caught up with


def test_a_ledger_that_was_put_back_is_read_anew(tmp_path: Path) -> None:
    history = with_history(tmp_path / "prod")
    history.round()
    saved = history.folder.ledger.read_bytes()
    history.round()
    with Cache() as cache:
        before = read(history.folder, now_ms=NOW, cache=cache).privacy
        beside = tmp_path / "copy"
        beside.write_bytes(saved)
        beside.replace(history.folder.ledger)
        after = read(history.folder, now_ms=NOW, cache=cache).privacy
    assert before is not None
    assert after is not None
    assert 0 < after.guarantee.epsilon < before.guarantee.epsilon


# ---------------------------------------------------------------------------------------------------------- metrics


def test_metrics_are_what_the_status_says(tmp_path: Path) -> None:
    history = with_history(tmp_path / "prod", budget=4.5)
    history.want("running")
    history.round(drawn=50, answered=40, refused={"late": 3})
    history.round("training", drawn=50)
    history.place(0)
    found = status(history.folder)
    samples = scraped(found)
    for name, labels, value in (
        ("penchant_rounds_total", {"outcome": "released"}, 1),
        ("penchant_round_phase", {"phase": "training"}, 1),
        ("penchant_round_phase", {"phase": "released"}, 0),
        ("penchant_round_answers_total", {"outcome": "accepted"}, 40),
        ("penchant_round_answers_total", {"outcome": "silent"}, 7),
        ("penchant_round_refusals_total", {"reason": "late"}, 3),
        ("penchant_epsilon_budget", {}, 4.5),
        ("penchant_rounds_left", {}, 11),
        ("penchant_model_version", {"channel": "stable"}, 1),
        ("penchant_pointer_expiry_timestamp_seconds", {"channel": "stable"}, (NOW + 30 * DAY) / 1000),
        ("penchant_certificate_expiry_timestamp_seconds", {"certificate": "release key"}, (NOW + 365 * DAY) / 1000),
        ("penchant_places", {"state": "active"}, 1),
    ):
        assert samples[name, tuple(labels.items())] == value, (name, labels)
    assert found.privacy is not None
    assert samples["penchant_epsilon_spent", ()] == found.privacy.guarantee.epsilon


def test_no_device_can_add_a_label(tmp_path: Path) -> None:
    history = with_history(tmp_path / "prod")
    before = set(scraped(status(history.folder)))
    history.round(drawn=50, answered=40, refused={"film:7": 2, "node 81985529216486895": 1, "late": 1})
    (history.folder.distribution / "channels/mallory.json").write_bytes(
        (history.folder.distribution / "channels/stable.json").read_bytes()
    )
    found = status(history.folder)
    samples = scraped(found)
    assert set(samples) == before
    assert samples["penchant_round_refusals_total", (("reason", "other"),)] == 3
    assert dict(found.recent[0].refused) == {"other": 3, "late": 1}
    values = {value for _, labels in samples for _, value in labels}
    known = {*PHASES, *REASONS, *CHANNELS, "accepted", "refused", "silent", "active", "left", "free"}
    assert values - known - {found.software} == {
        *("plan", "database", "ledger", "channels", "certificates", "disk"),
        *("release key", "TLS", "TLS authority"),
    }


def alerts() -> list[dict[str, Any]]:
    groups = YAML(typ="safe").load((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bpenchant_\w+", expression))


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_are_there(tmp_path: Path) -> None:
    samples = scraped(status(with_history(tmp_path / "prod", budget=4.5).folder))
    there = {name for name, _ in samples}
    labels = {(name, label) for name, pairs in samples for label, _ in pairs}
    dashboard = json.loads((ROOT / "deploy/grafana/penchant.json").read_text(encoding="utf-8"))
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = [*panels, *(rule["expr"] for rule in alerts())]
    assert set().union(*map(names_in, asked)) - there == set()
    assert there - set().union(*map(names_in, panels)) == set()  # every metric has its place on the dashboard
    for expression in asked:
        for name, inside in re.findall(r"\b(penchant_\w+)\{([^}]*)\}", expression):
            used = set(re.findall(r"(\w+)\s*=", inside)) - {"instance"}
            assert all((name, label) in labels for label in used), expression
    assert names_in("penchant_nothing > 1") - there == {"penchant_nothing"}  # the measure can fail


def test_every_alert_says_who_it_is_for_and_what_to_do() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    for rule in alerts():
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = json.loads((ROOT / "deploy/grafana/penchant.json").read_text(encoding="utf-8"))["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)
