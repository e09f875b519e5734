"""The SDK's face: useful at once and offline, the same after a restart, with nothing of a person where it is read."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import penchant.client
from penchant.client import AsyncClient, Client, KeyFile, Retention, Strengths, SyncResult
from penchant.client._conditions import Refusal
from penchant.common.errors import Busy, InvalidConfig, MalformedArtifact, StoreDamaged, StoreLocked, UntrustedArtifact
from penchant.common.interests.explanations import LANGUAGES, messages
from tests.client.apps import CATALOGUE, DAY, NOW, Operator


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Operator().bundle(tmp_path_factory.mktemp("app") / "films.bundle")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def opened(state: Path, bundle: Path | None = None, **options: Any) -> Client:
    return Client.open(state, bundle=bundle, now_ms=lambda: NOW, **options)


@pytest.fixture
def me(state: Path, bundle: Path) -> Iterator[Client]:
    with opened(state, bundle) as client:
        yield client


def test_public_names_are_these() -> None:
    assert penchant.client.__all__ == [
        "AsyncClient",
        "Client",
        "Conditions",
        "Feedback",
        "Forgotten",
        "Interests",
        "KeyFile",
        "KeyringKey",
        "Left",
        "PassphraseKey",
        "Privacy",
        "Recommendation",
        "Retention",
        "RoundPolicy",
        "Salvaged",
        "Strengths",
        "SyncResult",
        "TopicShare",
        "Training",
        "Trust",
    ]
    assert all(hasattr(penchant.client, name) for name in penchant.client.__all__)
    assert dir(penchant.client) == penchant.client.__all__
    with pytest.raises(AttributeError, match="Klient"):
        penchant.client.Klient  # noqa: B018  # that reading it raises


def test_importing_the_sdk_loads_no_numpy_and_no_server(state: Path) -> None:
    code = "import sys, penchant.client; from penchant.client import Client; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "flwr", "scipy", "grpc", "cryptography"} & set(found)


def test_both_faces_have_the_same_calls() -> None:
    def calls(face: type) -> set[str]:
        return {name for name, value in inspect.getmembers(face, callable) if not name.startswith("_")}

    assert calls(Client) == calls(AsyncClient)
    for name in calls(Client) - {"open"}:
        ours, theirs = (set(inspect.signature(getattr(face, name)).parameters) for face in (Client, AsyncClient))
        assert ours - theirs <= {"random"}, name  # a generator is not for two threads


# ------------------------------------------------------------------------------------------------- useful in a minute


def test_a_new_install_recommends_before_it_ever_met_a_server_or_its_person(me: Client) -> None:
    found = me.recommend(5)
    assert len(found) == 5
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert found[0].title == CATALOGUE.titles[CATALOGUE.index[found[0].item]]
    assert me.interests().n_events == 0
    assert {topic.topic for topic in me.interests().topics} == {"Drama", "Comedy", "Horror"}


def test_the_next_list_knows_what_was_observed(me: Client) -> None:
    before = me.recommend(60)
    me.observe(before[0].item, "watch")
    after = me.recommend(60)
    assert before[0].item not in [one.item for one in after]
    assert [one.item for one in after] != [one.item for one in before[1:]]
    assert me.interests().n_events == 1


@pytest.mark.parametrize(
    ("said", "strength"),
    [
        ({"kind": "like"}, 0.75),
        ({"kind": "rate", "rating": 4.0}, 0.75),
        ({"kind": "watch", "dwell_s": 3000.0}, 0.5),  # film:1 lasts 6,000 s
        ({"kind": "watch", "strength": 0.2, "rating": 5.0}, 0.2),
    ],
)
def test_strength_is_what_the_app_said_else_the_rating_the_dwell_or_the_kind(
    me: Client, said: dict[str, Any], strength: float
) -> None:
    me.observe("film:1", **said)
    assert me._person.profile.strengths == [strength]


def test_a_dwell_counts_by_kind_where_the_length_is_unknown(me: Client) -> None:
    me.observe("film:2", "watch", dwell_s=3000)
    assert me._person.profile.strengths == [0.5]  # of "watch"


def test_what_cannot_be_kept_is_refused_and_nothing_of_it_kept(me: Client) -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"kind": "wach"}, "did you mean 'watch'"),
        ({"kind": "rate", "rating": 9.0}, "rating must be"),
        ({"kind": "view", "dwell_s": -1.0}, "dwell_s"),
        ({"kind": "view", "strength": 2.0}, "strength"),
        ({"kind": "view", "at_ms": -5}, "at_ms"),
    )
    for wrong, words in refused:
        with pytest.raises(InvalidConfig, match=words):
            me.observe("film:1", **wrong)
    assert me.export()["events"] == []
    assert me.interests().n_events == 0


def test_an_app_names_its_own_events(state: Path, bundle: Path) -> None:
    with opened(state, bundle, strengths=Strengths(events={"binge": 1.0})) as me:
        me.observe("film:1", "binge")
        assert me._person.profile.strengths == [1.0]
    with opened(state) as me, pytest.raises(InvalidConfig, match="binge"):
        me.observe("film:1", "binge")


def test_an_explanation_sums_to_the_score_and_says_it_in_words(me: Client) -> None:
    me.observe("film:4", "like")
    top = me.recommend(1)[0]
    found = me.explain(top.item)
    assert found.total == pytest.approx(top.score, abs=1e-5)
    assert found.sentence("en")
    assert found.sentence("zh")
    with pytest.raises(InvalidConfig, match="did you mean 'film:4'"):
        me.explain("film4")


def test_not_this_topic_holds_until_it_is_taken_back(state: Path, bundle: Path) -> None:
    with opened(state, bundle) as me:
        assert me.feedback("film:2", "not_this_topic") == "Horror"
        assert me.feedback("film:3", "not_this_item") == "film:3"
    with opened(state) as me:
        shown = [one.item for one in me.recommend(60)]
        assert len(shown) == 39
        assert "film:3" not in shown
        assert me.interests().refused == ("Horror",)
        assert "Horror" not in {topic.topic for topic in me.interests().topics}
        me.allow("Horror")
        me.allow("film:3")
        assert len(me.recommend(60)) == 60


def test_feedback_of_no_known_kind_or_topic_is_refused(me: Client) -> None:
    with pytest.raises(InvalidConfig, match="did you mean 'dislike'"):
        me.feedback("film:1", "dislke")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InvalidConfig, match="did you mean 'Horror'"):
        me.feedback("film:1", "not_this_topic", topic="Horor")
    with pytest.raises(InvalidConfig, match="no item"):
        me.feedback("nothing", "not_this_item")


# ------------------------------------------------------------------------------------------------------ what is kept


def test_a_restart_changes_no_list(state: Path, bundle: Path) -> None:
    with opened(state, bundle) as me:
        for i in range(30):
            me.observe(f"film:{i}", "watch", context={"device": "phone"})
        before, shares = me.recommend(10, context={"device": "phone"}), me.interests()
    with opened(state) as me:
        assert me.recommend(10, context={"device": "phone"}) == before
        assert me.interests() == shares
        me.observe("film:40", "like")
        before = me.recommend(10)
        me._store.close()  # as a killed process: nothing was kept of the profile since the restart
        me._closed = True
    with opened(state) as me:
        assert [one.item for one in me.recommend(10)] == [one.item for one in before]


def test_events_that_retention_drops_while_it_is_open_are_in_no_kept_profile(state: Path, bundle: Path) -> None:
    with opened(state, bundle, retention=Retention(max_events=3)) as me:
        for i in range(10):
            me.observe(f"film:{i}", "like")
    with opened(state, retention=Retention(max_events=3)) as me:
        assert me._person.profile.items == [7, 8, 9]
        assert me.interests().n_events == 3


def test_a_damaged_profile_is_made_again_and_an_event_without_a_strength_counts_as_none(
    state: Path, bundle: Path
) -> None:
    with opened(state, bundle, strengths=Strengths(events={"binge": 1.0})) as me:
        me.observe("film:1", "binge")
        me.observe("film:2", "like")
        me._store.put("profile", b"something else")
        me._store.close()
        me._closed = True
    with opened(state) as me:  # an app that no longer knows "binge"
        assert me._person.profile.items == [2]
        assert len(me.export()["events"]) == 2


def test_a_torn_bundle_in_the_folder_is_replaced_by_a_whole_one(state: Path, bundle: Path) -> None:
    opened(state, bundle).close()
    (state / "app.bundle").write_bytes(b"half of it")
    with pytest.raises(MalformedArtifact):
        opened(state)
    with opened(state, bundle) as me:
        assert me.recommend(1)


def test_folders_and_numbers_that_cannot_be_are_typed_errors(state: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="folder"):
        opened(tmp_path / "file", bundle)
    with pytest.raises(MalformedArtifact):
        opened(state, tmp_path)
    with opened(state, bundle) as me, pytest.raises(InvalidConfig, match="numbers"):
        me.observe("film:1", strength="1")  # type: ignore[arg-type]  # wrong on purpose


def test_events_that_retention_drops_are_in_no_profile(state: Path, bundle: Path) -> None:
    with opened(state, bundle) as me:
        for i in range(10):
            me.observe(f"film:{i}", "watch")
    with opened(state, retention=Retention(max_events=4)) as me:
        assert me.interests().n_events == 4
        assert me._person.profile.items == [6, 7, 8, 9]


def test_an_item_that_the_catalogue_does_not_have_yet_waits_for_one_that_has(me: Client) -> None:
    me.observe("film:99", "watch")
    assert me._person.profile.items == []
    assert me.export()["events"][0]["item"] == "film:99"


def test_export_is_all_that_is_kept_in_plain_json(me: Client) -> None:
    me.observe("film:1", "rate", rating=4.0, context={"place": "home"})
    me.feedback("film:2", "not_this_topic")
    found = json.loads(json.dumps(me.export()))
    (event,) = found["events"]
    assert event == {"item": "film:1", "kind": "rate", "at_ms": NOW, "rating": 4.0, "context": {"place": "home"}}
    assert found["refused_topics"] == ["Horror"]
    assert found["app_id"] == "films"


def test_no_file_holds_a_word_of_what_the_person_did(state: Path, bundle: Path) -> None:
    with opened(state, bundle, trust="server", consent="text-7") as me:
        me.observe("film:31-secret", "watch", context={"place": "kitchen-secret"})
        me.feedback("film:1", "not_this_topic", topic="Horror")
        for _ in range(2):  # open, and closed
            files = [p for p in state.rglob("*") if p.is_file() and p.parent == state and p.name != "app.bundle"]
            assert files
            for path in files:
                data = path.read_bytes()
                assert not any(word in data for word in (b"secret", b"Horror", b"watch", b"text-7")), path.name
            me.close()


def test_forget_destroys_the_key_and_what_is_left_says_nothing(state: Path, bundle: Path) -> None:
    me = opened(state, bundle)
    me.observe("film:1", "watch")
    receipt = me.forget()
    assert receipt.key_destroyed
    assert receipt.kept == {"app_id": "films", "population": "default", "participations": 0}
    with pytest.raises(InvalidConfig, match="closed"):
        me.recommend()
    left = {path.name for path in state.rglob("*") if path.is_file()}
    assert left <= {"store.lock", "tombstone.json"}
    assert b"film" not in (state / "tombstone.json").read_bytes().replace(b'"films"', b"")
    with pytest.raises(InvalidConfig, match="bundle="):
        opened(state)
    with opened(state, bundle) as again:
        assert again.interests().n_events == 0


def test_forget_everything_leaves_nothing(state: Path, bundle: Path) -> None:
    me = opened(state, bundle)
    receipt = me.forget(everything=True)
    assert receipt.kept == {}
    assert {path.name for path in state.rglob("*") if path.is_file()} <= {"store.lock"}


# -------------------------------------------------------------------------------------------------------- consent


def test_nothing_was_agreed_until_it_was(state: Path, bundle: Path) -> None:
    with opened(state, bundle) as me:
        assert me.trust == "nobody"
        assert me.privacy().consented_ms is None
        assert me.privacy().seen_by.startswith("nobody")
    with opened(state, trust="server", consent="v1") as me:
        assert (me.trust, me.privacy().consented_ms) == ("server", NOW)  # as said when the app was installed
    with Client.open(state, now_ms=lambda: NOW + DAY) as me:
        assert (me.trust, me.privacy().consented_ms) == ("server", NOW)
        kept = {"trust": "server", "units": ["user", "interaction"], "text": "v1", "at_ms": NOW}
        assert me.export()["consent"] == kept
        me.agree("nobody")
        assert (me.privacy().consented_ms, me.privacy().consent) == (NOW + DAY, "")
    with pytest.raises(InvalidConfig, match="did you mean 'server'"), opened(state) as me:
        me.agree("serve")  # type: ignore[arg-type]  # wrong on purpose


def test_privacy_says_the_releases_epsilon_with_all_that_gives_it_a_meaning(me: Client) -> None:
    found = me.privacy()
    for words in ("ε = ", "δ = 1e-05", "unit user", "add/remove one profile", "accountant GDP", "trust server"):
        assert words in str(found.release)
    assert "not charged" in str(found.release)
    assert found.release is not None
    assert found.release.unit == "user"
    assert not found.can_leave
    assert found.left == ()
    assert found.trusted  # this device cannot check the server's noise


# ------------------------------------------------------------------------------------------- the folder and the bundle


def test_the_first_time_needs_a_bundle(state: Path) -> None:
    with pytest.raises(InvalidConfig, match="bundle="):
        opened(state)


def test_a_bundle_that_is_not_what_was_signed_is_refused_and_the_old_one_stays(
    state: Path, bundle: Path, tmp_path: Path
) -> None:
    opened(state, bundle).close()
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.bundle").write_bytes(data)
    with pytest.raises((MalformedArtifact, UntrustedArtifact)):
        opened(state, tmp_path / "bad.bundle")
    with pytest.raises(MalformedArtifact, match=r"none\.bundle"):
        opened(state, tmp_path / "none.bundle")
    with opened(state) as me:
        assert me.recommend(1)


def test_a_bundle_of_another_app_is_refused(state: Path, bundle: Path, tmp_path: Path) -> None:
    opened(state, bundle).close()
    with pytest.raises(InvalidConfig, match="'films', the bundle of 'books'"):
        opened(state, Operator(app_id="books").bundle(tmp_path / "books.bundle"))


def test_an_update_of_the_app_brings_its_newer_release_and_an_older_one_does_not(
    state: Path, bundle: Path, tmp_path: Path
) -> None:
    newer = Operator().bundle(tmp_path / "newer.bundle", version=2, seed=1)
    with opened(state, newer) as me:
        me.observe("film:1", "like")
        two = me.recommend(5)
        assert me.export()["release"] == 2
    with opened(state, bundle) as me:  # of the app's last version
        assert me.export()["release"] == 2
        assert [one.item for one in me.recommend(5)] == [one.item for one in two]


def test_a_second_process_is_refused_at_once(state: Path, bundle: Path, me: Client) -> None:
    with pytest.raises(StoreLocked):
        opened(state)


def test_a_key_of_ones_own_choice(state: Path, bundle: Path, tmp_path: Path) -> None:
    with opened(state, bundle, key=KeyFile(tmp_path / "elsewhere.key")) as me:
        me.observe("film:1")
    with opened(state, key=KeyFile(tmp_path / "elsewhere.key")) as me:
        assert me.interests().n_events == 1


# -------------------------------------------------------------------------------------------------------- threads


def test_calls_from_many_threads_lose_nothing(me: Client) -> None:
    def work(start: int) -> None:
        for i in range(start, 60, 6):
            me.observe(f"film:{i}", "view")
            me.recommend(3)
            me.interests()

    threads = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(event["item"] for event in me.export()["events"]) == sorted(CATALOGUE.ids)
    assert me.interests().n_events == 60


def test_a_call_waits_no_longer_than_it_says(state: Path, bundle: Path) -> None:
    with opened(state, bundle, timeout_s=0.05) as me:
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with me._held():
                held.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        with pytest.raises(Busy, match="try again"):
            me.recommend()
        done.set()
        thread.join()
        assert me.recommend(1)


def test_a_damaged_store_is_salvaged_and_a_lost_consent_is_a_no(state: Path, bundle: Path) -> None:
    with opened(state, bundle, trust="server") as me:
        for i in range(200):
            me.observe(f"film:{i % 40}", "watch")
        me.agree("nobody", consent="films-2")  # and this is what must not turn into a yes
    assert Client.salvage(state).lost == ()
    with opened(state) as me:
        assert (me.trust, me.privacy().consent) == ("nobody", "films-2")
        place = me._store._sealer.number("consent")
        (sealed,) = me._store._db.execute("SELECT sealed FROM records WHERE id = ?", (place,)).fetchone()
    database = state / "store.db"
    whole = database.read_bytes()
    assert sealed in whole
    database.write_bytes(whole.replace(sealed, bytes(len(sealed)))[: len(whole) // 8192 * 4096])
    with pytest.raises(StoreDamaged, match=r"Client\.salvage"):
        opened(state)
    saved = Client.salvage(state)
    assert 0 < saved.n_events < 200
    assert saved.lost
    with opened(state, trust="server") as me:
        assert (me.trust, me.privacy().consent) == ("nobody", "")
        assert len(me.export()["events"]) == saved.n_events
        assert me.recommend(3)
        with pytest.raises(StoreLocked):
            Client.salvage(state)
        assert me.forget().key_destroyed
    assert {path.name for path in state.iterdir()} <= {"store.lock", "tombstone.json"}


LOST = "UPDATE records SET sealed = zeroblob(length(sealed)) WHERE id = 0"
ATTACKS = {
    "consent put back, state lost": ("UPDATE records SET sealed = :consent WHERE id = :place", LOST),
    "consent put back, state gone": (
        "UPDATE records SET sealed = :consent WHERE id = :place",
        "DELETE FROM records WHERE id = 0",
    ),
    "both put back": (
        "UPDATE records SET sealed = :consent WHERE id = :place",
        "UPDATE records SET sealed = :state WHERE id = 0",
    ),
    "consent gone, state lost": ("DELETE FROM records WHERE id = :place", LOST),
    "consent put back": ("UPDATE records SET sealed = :consent WHERE id = :place",),
    "consent gone": ("DELETE FROM records WHERE id = :place",),
}


@pytest.mark.parametrize("salvaged", [False, True], ids=["opened", "salvaged"])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_nobody_without_the_key_undoes_a_withdrawal(
    attack: tuple[str, ...], salvaged: bool, state: Path, bundle: Path
) -> None:
    with opened(state, bundle, trust="server") as me:
        me.observe("film:1", "watch")
        place = me._store._sealer.number("consent")
        rows = dict(me._store._db.execute("SELECT id, sealed FROM records WHERE id IN (0, ?)", (place,)))
        me.agree("nobody")
        me.observe("film:2", "watch")
    with contextlib.closing(sqlite3.connect(state / "store.db", isolation_level=None)) as db:
        for statement in attack:
            db.execute(statement, {"consent": rows[place], "state": rows[0], "place": place})
    if salvaged:
        assert Client.salvage(state).lost
    with opened(state, trust="server") as me:
        assert me.trust == "nobody"
        assert len(me.export()["events"]) == 2
        me.agree("own device")
    with opened(state, trust="server") as me:
        assert me.trust == "own device"  # what the person said anew holds
        assert me._store.check() == ()


def test_a_store_that_is_killed_as_it_finds_its_state_lost_is_no_yes_either(
    state: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(state, bundle, trust="server"):
        pass
    with contextlib.closing(sqlite3.connect(state / "store.db", isolation_level=None)) as db:
        db.execute(LOST)
    monkeypatch.setattr(Client, "__init__", None)  # the store was opened, and nothing comes after it
    with pytest.raises(TypeError):
        opened(state)
    monkeypatch.undo()
    with opened(state, trust="server") as me:
        assert me.trust == "nobody"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_reason_not_to_take_part_has_words_in_every_language(language: str) -> None:
    reasons = {*map(str, Refusal), "no_fleet", "nothing_to_do", "missing_extra", ""}
    assert messages(language, "penchant.client").keys() == reasons
    said = [SyncResult(release="up_to_date", version=1, round=7, reason=one).sentence(language) for one in reasons]
    assert len(set(said)) == len(reasons)
    assert all(one.endswith("." if language == "en" else "。") and "{" not in one for one in said)
    assert "7" in SyncResult(release="up_to_date", version=1, round=7).sentence(language)
    with pytest.raises(InvalidConfig, match="language"):
        SyncResult(release="up_to_date", version=1).sentence("fr")


def test_the_async_face_gives_what_the_other_gives(state: Path, bundle: Path) -> None:
    async def day() -> tuple[list[Any], dict[str, Any]]:
        async with await AsyncClient.open(state, bundle=bundle, now_ms=lambda: NOW) as me:
            await asyncio.gather(*(me.observe(f"film:{i}", "like") for i in range(5)))
            await me.feedback("film:20", "not_this_item")
            await me.allow("film:20")
            await me.agree("nobody")
            assert (await me.sync(1.0)).release == "no_server"
            assert (await me.privacy()).left == ()
            assert (await me.explain("film:9")).item == "film:9"
            assert (await me.interests()).n_events == 5
            return await me.recommend(5), await me.export()

    found, exported = asyncio.run(day())
    assert len(exported["events"]) == 5
    with opened(state) as me:
        assert me.recommend(5) == found
        receipt = me.forget()
    assert dataclasses.asdict(receipt)["key_destroyed"]
