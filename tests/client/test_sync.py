"""A newer model reaches a device and changes its list; anything older, foreign or damaged changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penchant.client import Client, _distribution
from penchant.client._client import _BUNDLE
from penchant.common.artifacts.bundle import Bundle, catalogue_bytes
from penchant.common.artifacts.manifest import Blob
from penchant.common.artifacts.signing import SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.errors import StoreFull
from penchant.server.distribution import Distribution, publish
from tests.certificates import Tls, tls
from tests.client.apps import CATALOGUE, DAY, NOW, Operator


class World:
    """An operator with a folder of releases, and one device."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder, self.state = tmp_path / "published", tmp_path / "state"
        self.operator = Operator(distribution=self.folder.as_uri())
        self.bundle = self.operator.bundle(tmp_path / "films.bundle")
        self.now = NOW

    def publish(self, version: int, **changes: Any) -> None:
        self.operator.publish(self.folder, version, seed=version, **changes)

    def device(self) -> Client:
        return Client.open(self.state, bundle=self.bundle, now_ms=lambda: self.now)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def me(world: World) -> Iterator[Client]:
    with world.device() as client:
        client.observe("film:1", "like")
        yield client


def shown(me: Client) -> list[str]:
    return [one.item for one in me.recommend(10)]


def test_a_newer_release_changes_the_list_and_is_there_after_a_restart(world: World, me: Client) -> None:
    before = shown(me)
    world.publish(2)
    found = me.sync()
    assert (found.release, found.version, found.reason) == ("updated", 2, "no_fleet")
    after = shown(me)
    assert after != before
    assert me.interests().n_events == 1  # over the new vectors, of the same events
    assert me.sync().release == "up_to_date"
    me.close()
    with world.device() as again:
        assert shown(again) == after
        assert again.sync().version == 2


def test_a_release_comes_over_grpc_with_tls(tmp_path: Path) -> None:
    authority: Tls = tls()
    world = World(tmp_path)
    world.publish(2)
    served = {("films", "default"): world.folder}
    with Distribution(
        served, address="127.0.0.1:0", private_key=authority.private_key, chain=authority.chain
    ) as server:
        operator = world.operator
        app = replace(operator.app, distribution=f"127.0.0.1:{server.port}", ca=authority.ca.decode())
        model = operator.model(0)
        offer = operator.offer(1, model)
        Bundle.write(tmp_path / "g.bundle", app, operator.root, offer, catalogue=CATALOGUE, model=model)
        with Client.open(tmp_path / "g", bundle=tmp_path / "g.bundle", now_ms=lambda: NOW) as me:
            assert me.sync().release == "updated"
            server.stop(0)
            gone = me.sync(deadline_s=2.0)
            assert (gone.release, gone.version) == ("failed", 2)
            assert gone.why
            assert me.recommend(3)  # what is here stays in use


def test_a_pointer_older_than_one_seen_is_refused_also_after_a_restart(world: World, me: Client) -> None:
    world.publish(3)
    me.sync()
    world.publish(2)
    found = me.sync()
    assert (found.release, found.version) == ("failed", 3)
    assert "older" in found.why
    me.close()
    with world.device() as again:
        assert again.sync().release == "failed"
    world.publish(2, sequence=4)  # the operator goes back, and says so
    with world.device() as again:
        assert again.sync().version == 2


def test_what_another_key_signed_is_refused(world: World, me: Client) -> None:
    world.operator = replace(world.operator, release=SigningKey(b"x" * 32), root=SigningKey(b"y" * 32))
    world.publish(2)
    found = me.sync()
    assert (found.release, found.version) == ("failed", 1)
    assert "signature" in found.why


def test_a_release_key_that_a_newer_one_retired_is_refused(world: World, me: Client) -> None:
    old = world.operator
    world.operator = replace(old, release=SigningKey(b"n" * 32), serial=2)
    world.publish(2)
    assert me.sync().release == "updated"
    world.operator = old
    world.publish(9)
    found = me.sync()
    assert (found.release, found.version) == ("failed", 2)
    assert "retired" in found.why


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_model_damaged_on_its_way_is_not_taken_and_a_whole_one_is_later(world: World, me: Client, harm: str) -> None:
    world.publish(2)
    path = world.folder / "blobs" / Blob.of(world.operator.model(2)).sha256
    whole = path.read_bytes()
    before = shown(me)
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-9] if harm == "cut" else whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    assert me.sync(5.0).release == "failed"
    assert shown(me) == before
    path.write_bytes(whole)
    assert me.sync().release == "updated"


def test_a_clock_far_ahead_is_said_and_costs_nothing_but_the_sync(world: World, me: Client) -> None:
    world.publish(2)
    world.now = NOW + 400 * DAY
    found = me.sync()
    assert (found.release, found.version) == ("failed", 1)
    assert "clock" in found.why
    world.now = NOW - 10 * DAY  # set back: what the app shipped with says that it is later
    assert me.sync().release == "updated"


def test_a_grown_catalogue_comes_with_its_release_and_old_events_find_their_items(world: World, me: Client) -> None:
    me.observe("film:60", "like")  # not in the catalogue yet
    grown = Catalogue(
        ids=(*CATALOGUE.ids, "film:60"),
        titles=(*CATALOGUE.titles, "Film 60"),
        topics=(*CATALOGUE.topics, ("Drama",)),
        retired=frozenset({"film:5"}),
        name="films",
    )
    world.operator = replace(world.operator, catalogue=grown)
    world.publish(2)
    assert me.sync().release == "updated"
    assert me._person.profile.items == [1, 60]
    assert "film:5" not in [one.item for one in me.recommend(100)]


def test_an_interrupted_download_goes_on_and_leaves_nothing_behind(world: World, me: Client) -> None:
    world.publish(2)
    model = world.operator.model(2)
    part = world.state / "releases" / f"{Blob.of(model).sha256}.part"
    part.write_bytes(model[:100])
    assert me.sync().release == "updated"
    assert not list((world.state / "releases").glob("*.part"))


def test_what_publish_puts_into_a_folder_is_what_devices_take(world: World, me: Client) -> None:
    model = world.operator.model(5)
    offer = world.operator.offer(5, model)
    publish(world.folder, offer, [model, catalogue_bytes(CATALOGUE)], root=world.operator.root.public, now_ms=NOW)
    assert me.sync().version == 5


def test_what_was_seen_is_kept_with_the_person_and_not_in_clear(world: World, me: Client) -> None:
    world.publish(2)
    me.sync()
    kept = me._store.get("seen")
    assert kept is not None
    assert json.loads(kept)["sequence"] == 2
    assert (world.state / _BUNDLE).exists()


def test_a_slow_sync_does_not_take_back_what_a_faster_one_brought(
    world: World, me: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish(2)
    original = _distribution.fetch_blob

    def slow(*args: Any, **named: Any) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(_distribution, "fetch_blob", original)
            world.publish(3)
            assert me.sync().version == 3  # another thread's, meanwhile
        return original(*args, **named)

    monkeypatch.setattr(_distribution, "fetch_blob", slow)
    found = me.sync()
    assert (found.release, found.version) == ("failed", 3)
    assert "older" in found.why


def test_stopped_between_what_was_seen_and_the_release_nothing_older_is_taken(
    world: World, me: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish(3)
    with monkeypatch.context() as patch:
        patch.setattr(me._shelf, "put", lambda *_: (_ for _ in ()).throw(StoreFull("no room")))
        assert me.sync().release == "failed"
    assert me.catalogue is me._person.catalogue
    world.publish(2)
    assert me.sync().release == "failed"
    world.publish(3)
    assert me.sync().version == 3


@pytest.mark.parametrize(
    ("said", "rounds"),
    [(7, 7), (7.0, 7), ("seven", None), ("7", None), (-1, None), (2.5, None), (True, None), ([7], None), (None, None)],
)
def test_how_many_rounds_a_release_has_is_unknown_where_its_manifest_says_no_number(
    said: Any, rounds: int | None, world: World, me: Client
) -> None:
    world.publish(2, metrics={"round": said})
    assert me.sync().version == 2
    assert me._released(me._installed.manifest.plan) == rounds
    assert me._released("another") is None
