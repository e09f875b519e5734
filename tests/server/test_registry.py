"""The registry gives devices one whole, signed model whatever happens to it, and throws nothing away too early."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from penchant.client import Client, _distribution
from penchant.common.artifacts.distribution_pb2 import Chunk, GetBlobRequest
from penchant.common.artifacts.signing import SigningKey
from penchant.common.errors import InvalidConfig, MalformedArtifact, PenchantError, StaleArtifact
from penchant.server import keys
from penchant.server.distribution import SERVICE, Distribution, publish
from penchant.server.folder import write_json
from penchant.server.model_command import model as command
from penchant.server.registry import GRACE_MS, POINTS, Registry
from tests.server.commands import run
from tests.server.models import Server
from tests.server.operators import CATALOGUE, DAY


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server.make(tmp_path / "prod")


def has(registry: Registry) -> dict[str, tuple[int, int]]:
    """Version and sequence of each channel."""
    return {one.name: (one.version, one.sequence) for one in registry.channels()}


def moves(server: Server) -> list[tuple[str, int, int, str]]:
    with server.database() as database:
        rows = database.rows("SELECT * FROM moves ORDER BY number")
    return [(row["channel"], row["sequence"], row["version"], row["why"]) for row in rows]


def tree(server: Server) -> dict[str, bytes]:
    root = server.folder.distribution
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# --------------------------------------------------------------------------------------------------- new models


def test_a_new_model_is_the_next_version_and_only_candidate_has_it(server: Server) -> None:
    registry = server.registry()
    made = server.add(1, registry, metrics={"recall": 0.25})
    assert (made.version, made.round, made.channels, made.collected) == (2, 1, ("candidate",), False)
    assert made.manifest.metrics == {"recall": 0.25, "round": 1}
    assert made.manifest.parents == (registry.model(1).name,)
    assert made.manifest.guarantee == json.loads(json.dumps(server.guarantee(1)))
    assert {"penchant", "numpy"} <= made.manifest.software.keys()
    assert has(registry) == {"candidate": (2, 1), "stable": (1, 1)}
    assert registry.verify() == []
    catalogue, release = registry.bytes_of(made)
    assert catalogue == CATALOGUE
    assert release.state.keys() == server.state(1).keys()


def test_what_stays_on_the_server_is_not_in_the_model(server: Server) -> None:
    state = {**server.state(1), "server/momentum": np.full(500, 7.25, np.float32)}
    made = server.registry().add(
        state, CATALOGUE, round=1, plan=server.folder.plan, guarantee=server.guarantee(1), parents=()
    )
    assert not any(name.startswith("server/") for name in server.registry().bytes_of(made)[1].state)
    assert all(state["server/momentum"].tobytes()[:40] not in data for data in tree(server).values())


def test_the_same_round_again_is_the_same_version_and_moves_nothing(server: Server) -> None:
    registry = server.registry()
    first, before = server.add(1, registry), tree(server)
    assert server.add(1, registry) == first
    assert server.add(1) == first
    assert tree(server) == before
    server.add(2, registry)
    again = server.add(1, registry)
    assert (again.version, again.channels) == (2, ())
    assert has(registry)["candidate"] == (3, 2)


def test_a_candidate_that_the_operator_took_back_does_not_come_again_by_itself(server: Server) -> None:
    registry = server.registry()
    for number in (1, 2):
        server.add(number, registry)
    registry.rollback("candidate")
    server.add(2)
    assert has(registry)["candidate"] == (2, 3)


def test_a_round_is_not_released_twice_with_different_numbers(server: Server) -> None:
    registry = server.registry()
    server.add(1, registry)
    other = {name: values + 1 if values.dtype == np.float32 else values for name, values in server.state(1).items()}
    with pytest.raises(InvalidConfig, match="round 1 was released as version 2"):
        registry.add(other, CATALOGUE, round=1, plan=server.folder.plan, guarantee=server.guarantee(1))
    assert [model.version for model in registry.models()] == [1, 2]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"metrics": {"recall": float("nan")}}, "finite"),
        ({"metrics": {"recall": "high"}}, "finite"),
        ({"guarantee": None}, "guarantee"),
        ({"guarantee": {"epsilon": 1.0}}, "guarantee"),
    ],
)
def test_a_model_without_its_promise_or_with_figures_that_are_none_is_not_made(
    server: Server, change: dict[str, Any], word: str
) -> None:
    with pytest.raises(InvalidConfig, match=word):
        server.add(1, **change)
    assert [model.version for model in server.registry().models()] == [1]


def test_a_state_that_devices_would_refuse_is_not_made_a_model(server: Server) -> None:
    state = {**server.state(1), "floor": np.array(np.nan, np.float32)}
    with pytest.raises(MalformedArtifact, match="finite"):
        server.registry().add(state, CATALOGUE, round=1, plan=server.folder.plan, guarantee=server.guarantee(1))
    assert has(server.registry()) == {"stable": (1, 1)}


def test_a_catalogue_that_changes_while_a_model_is_made_is_the_one_that_it_is_over(server: Server) -> None:
    after = replace(CATALOGUE, retired=frozenset({"film:3"}))

    def changed(point: str) -> None:
        if point == "add:blobs":
            write_json(server.folder.path / "catalogue.json", after.to_record())

    server.at = changed
    made = server.add(1)
    assert made.manifest.catalogue_version == after.version
    assert [model.version for model in server.registry().models()] == [1, 2]


def test_where_promotion_is_automatic_a_new_model_is_stable_at_once(tmp_path: Path) -> None:
    server = Server.make(tmp_path / "prod", '[models]\npromote = "automatic"\n')
    assert server.add(1).channels == ("candidate", "stable")
    assert has(server.registry()) == {"candidate": (2, 1), "stable": (2, 2)}


def test_several_at_once_make_versions_without_gaps_or_repeats(server: Server) -> None:
    def one(round: int) -> int:
        with server.database() as database:
            return server.add(round, server.registry(database=database)).version

    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(one, [1, 2, 3, 1, 2, 3]))
    assert sorted(made) == [2, 2, 3, 3, 4, 4]
    assert made[:3] == made[3:]
    registry = server.registry()
    assert registry.verify() == []
    assert has(registry)["candidate"][0] == 4


# ----------------------------------------------------------------------------------------------------- channels


def test_promote_and_rollback_are_new_pointers_that_devices_take(server: Server, tmp_path: Path) -> None:
    registry = server.registry()
    server.add(1, registry)
    with Client.open(
        tmp_path / "d", bundle=server.device_bundle(tmp_path / "d.bundle"), now_ms=lambda: server.now_ms
    ) as me:
        assert (me.sync().release, me.sync().version) == ("up_to_date", 1)
        registry.promote(2)
        assert (me.sync().release, me.sync().version) == ("updated", 2)
        registry.rollback()
        assert (me.sync().release, me.sync().version) == ("updated", 1)
    assert has(registry)["stable"] == (1, 3)
    registry.promote(2)
    registry.promote(2)  # it has it
    assert has(registry)["stable"] == (2, 4)
    assert moves(server) == [
        ("stable", 1, 1, "the first release"),
        ("candidate", 1, 2, "made"),
        ("stable", 2, 2, "promoted"),
        ("stable", 3, 1, "rolled back"),
        ("stable", 4, 2, "promoted"),
    ]


def test_a_move_that_makes_no_sense_is_refused_and_changes_nothing(server: Server) -> None:
    registry = server.registry()
    server.add(1, registry)
    registry.promote(2)
    before = tree(server)
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: registry.promote(1), "roll back"),
        (lambda: registry.promote(9), "newest is 2"),
        (lambda: registry.rollback(to=2), "not before"),
        (lambda: registry.rollback(to=9), "newest is 2"),
        (lambda: registry.rollback("candidate"), "nothing before"),
        (lambda: registry.rollback("beta"), "no channel beta"),
        (lambda: registry.promote(2, "../stable"), "name"),
        (lambda: Registry(server.folder, server.database()).promote(2, "beta"), "release key"),
        (lambda: server.registry(SigningKey(b"x" * 32)).promote(2, "beta"), "another release key"),
    ]
    for move, word in refused:
        with pytest.raises(InvalidConfig, match=word):
            move()
    assert tree(server) == before


def test_two_moves_at_once_are_never_both_made_unseen(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = server.registry()
    for number in (1, 2):
        server.add(number, registry)
    check = Registry._check

    def meanwhile(self: Registry, *args: Any) -> None:
        check(self, *args)
        monkeypatch.undo()
        server.registry().promote(3)

    monkeypatch.setattr(Registry, "_check", meanwhile)
    with pytest.raises(InvalidConfig, match="meanwhile"):
        registry.promote(2)
    assert has(registry)["stable"] == (3, 2)


@pytest.mark.parametrize("harm", ["older", "gone"])
def test_a_channel_s_file_that_was_lost_or_restored_goes_on_above_all_that_devices_saw(
    server: Server, harm: str
) -> None:
    registry = server.registry()
    server.add(1, registry)
    path = server.folder.distribution / "channels" / "stable.json"
    old = path.read_bytes()
    registry.promote(2)
    if harm == "older":
        path.write_bytes(old)
    else:
        path.unlink()
    registry = server.registry()
    registry.promote(2)
    assert has(registry)["stable"] == (2, 3)
    assert registry.verify() == []


def test_a_model_whose_bytes_are_damaged_is_not_promoted(server: Server) -> None:
    registry = server.registry()
    made = server.add(1, registry)
    path = server.folder.distribution / "blobs" / made.manifest.model.sha256
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(MalformedArtifact):
        registry.promote(2)
    assert has(registry)["stable"] == (1, 1)


def test_a_model_that_would_bring_retired_items_back_needs_a_word(server: Server) -> None:
    registry = server.registry()
    server.add(1, registry)
    write_json(server.folder.path / "catalogue.json", replace(CATALOGUE, retired=frozenset({"film:3"})).to_record())
    with pytest.raises(InvalidConfig, match="1 items that retired"):
        registry.promote(2)
    assert registry.promote(2, older_catalogue=True).channels == ("candidate", "stable")


def test_pointers_are_renewed_before_they_expire_and_not_all_the_time(server: Server, tmp_path: Path) -> None:
    registry = server.registry()
    server.add(1, registry)
    assert registry.renew() == []
    server.ahead_ms = 16 * DAY
    assert registry.renew() == ["candidate", "stable"]
    assert registry.renew() == []
    assert has(registry) == {"candidate": (2, 2), "stable": (1, 2)}
    server.ahead_ms = 40 * DAY  # the first would have expired after 30
    with Client.open(
        tmp_path / "d", bundle=server.device_bundle(tmp_path / "d.bundle"), now_ms=lambda: server.now_ms
    ) as me:
        assert me.sync().release == "up_to_date"
        server.ahead_ms = 50 * DAY
        assert "expired" in me.sync().why
        assert any("expired" in problem for problem in registry.verify())
        registry.renew()
        assert me.sync().release == "up_to_date"
    assert registry.verify() == []


def test_one_channel_that_cannot_be_renewed_keeps_no_other_from_it(server: Server) -> None:
    registry = server.registry()
    server.add(1, registry)
    server.ahead_ms = 16 * DAY
    (server.folder.distribution / "channels" / "candidate.json").write_bytes(b"{}")
    with pytest.raises(PenchantError):
        registry.renew()
    with server.database() as database:
        assert database.one("SELECT 1 FROM moves WHERE channel = 'stable' AND why = 'renewed'") is not None


def test_an_older_pointer_is_not_published_again(server: Server) -> None:
    registry = server.registry()
    server.add(1, registry)
    old = registry.channels()[1].offer
    registry.promote(2)
    with pytest.raises(StaleArtifact):
        publish(server.folder.distribution, old, (), root=server.root.public, now_ms=server.now_ms)


# ------------------------------------------------------------------------------------------- a new release key


def test_after_a_new_release_key_every_version_is_still_verified_and_can_be_had_again(
    server: Server, tmp_path: Path
) -> None:
    old = server.registry()
    server.add(1, old)
    old.promote(2)
    with Client.open(
        tmp_path / "d", bundle=server.device_bundle(tmp_path / "d.bundle"), now_ms=lambda: server.now_ms
    ) as me:
        assert me.sync().version == 2
        server.rotate()
        with pytest.raises(InvalidConfig, match="restart"):  # a process that has the old key still
            old.rollback()
        registry = server.registry()
        assert registry.renew() == ["candidate", "stable"]
        assert registry.verify() == []
        assert me.sync().release == "up_to_date"  # the same content has the same name, whoever signed it
        names = {model.version: model.name for model in registry.models()}
        registry.rollback()
        assert (me.sync().release, me.sync().version) == ("updated", 1)
        assert registry.verify() == []
        assert {model.version: model.name for model in registry.models()} == names
    third = server.add(2, registry)
    assert (third.version, registry.verify()) == (3, [])


def test_the_drill_for_a_new_key_leaves_a_registry_that_goes_on(server: Server, tmp_path: Path) -> None:
    server.add(1)
    server.registry().promote(2)
    assert keys.rotate(server.folder, server.root, now_ms=server.now_ms).serial == 2
    registry = server.registry()
    assert (registry.verify(), registry.renew()) == ([], [])
    assert registry.rollback().version == 1
    assert server.add(2, registry).version == 3
    assert registry.verify() == []


def test_a_manifest_of_a_key_whose_certificate_is_gone_is_named(server: Server) -> None:
    server.add(1)
    server.rotate()
    server.registry().renew()
    (server.folder.distribution / "certificates" / "1.json").unlink()
    assert len([problem for problem in server.registry().verify() if "certificate" in problem]) == 2


# ---------------------------------------------------------------------------------------------------------- kills

CHILD = """
import sys
from pathlib import Path
from penchant.server.folder import Folder
from tests.server.models import Server, stop_at
server = Server(Folder(Path(sys.argv[1])), ahead_ms=int(sys.argv[3]), at=stop_at(sys.argv[2]))
server.registry().collect() if sys.argv[2].startswith("collect") else server.add(1)
"""


def killed(server: Server, point: str) -> bool:
    command = [sys.executable, "-c", CHILD, str(server.folder.path), point, str(server.ahead_ms)]
    return subprocess.run(command, timeout=120, check=False).returncode == -9


@pytest.mark.parametrize("point", [point for point in POINTS if not point.startswith("collect")])
def test_after_a_kill_the_registry_is_whole_and_the_same_again_ends_it(server: Server, point: str) -> None:
    assert killed(server, point)
    registry = server.registry()
    assert registry.verify() == []
    assert has(registry)["stable"] == (1, 1)
    made = server.add(1, registry)
    assert (made.version, made.channels) == (2, ("candidate",))
    assert (registry.verify(), has(registry)["candidate"]) == ([], (2, 1))
    assert [row[:3] for row in moves(server)].count(("candidate", 1, 2)) == 1
    assert len(registry.models()) == 2


@pytest.mark.parametrize("point", ["collect:set-aside", "collect:done"])
def test_after_a_kill_garbage_collection_ends_the_next_time(tmp_path: Path, point: str) -> None:
    server = Server.make(tmp_path / "prod", "[models]\nkeep = 1\n")
    registry = server.registry()
    server.add(1, registry)
    registry.promote(2)
    server.add(2, registry)
    registry.promote(3)
    server.ahead_ms = 2 * GRACE_MS
    assert killed(server, point)
    registry = server.registry()
    assert registry.verify() == []
    assert [model.collected for model in registry.models()] == [True, True, False]
    registry.collect()
    blobs = {path.name for path in (server.folder.distribution / "blobs").iterdir()}
    kept = [model.manifest for model in registry.models() if not model.collected]
    assert blobs == {blob.sha256 for one in kept for blob in (one.model, one.catalogue)}


def test_a_full_disk_leaves_what_devices_get(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    registry, before = server.registry(), tree(server)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(InvalidConfig, match="No space"):
            server.add(1, registry)
        assert tree(server) == before
    assert server.add(1, registry).version == 2


# --------------------------------------------------------------------------------------------------------- verify


def test_every_kind_of_damage_is_named(server: Server) -> None:
    registry = server.registry()
    made = server.add(1, registry)
    root = server.folder.distribution
    model, manifest = root / "blobs" / made.manifest.model.sha256, root / "manifests" / f"{made.name}.json"
    foreign = SigningKey(b"x" * 32).sign("application/vnd.penchant.manifest+json", b"{}")
    harms: list[tuple[Path, bytes | None, str]] = [
        (model, model.read_bytes()[:-1] + b"\xff", "other bytes"),
        (model, model.read_bytes()[:-1], "another size"),
        (model, None, "gone"),
        (manifest, None, "not among the manifests"),
        (manifest, manifest.read_bytes()[:-9], "statement|JSON|signed"),
        (manifest, foreign.to_bytes(), "no certificate"),
        (root / "blobs" / ("0" * 64), b"more", "other bytes"),
        (root / "manifests" / f"{'0' * 64}.json", manifest.read_bytes(), "another manifest"),
        (root / "channels" / "stable.json", b"{}", "channel stable"),
        (root / "channels" / "stable.json", (root / "channels" / "candidate.json").read_bytes(), "another app"),
    ]
    for path, data, word in harms:
        before = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        found = server.registry().verify()
        assert any(re.search(word, problem) for problem in found), (path, word, found)
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
        assert server.registry().verify() == []


def test_a_version_that_is_missing_or_there_twice_is_named(server: Server) -> None:
    registry = server.registry()
    for number in (1, 2):
        server.add(number, registry)
    path = server.folder.distribution / "manifests" / f"{registry.model(2).name}.json"
    path.unlink()
    found = server.registry().verify()
    assert "no manifest of version 2" in found
    assert "version 3: the manifest that it came from is not here" in found


def test_a_move_that_the_database_does_not_know_is_named_and_made_up_for(server: Server) -> None:
    registry = server.registry()
    with server.database() as database, database.transaction() as db:
        db.execute("DELETE FROM moves")
    assert registry.verify() == ["channel stable: server.db has another last move"]
    assert server.registry().verify() == []
    assert moves(server) == [("stable", 1, 1, "found in the channel's file")]


# ---------------------------------------------------------------------------------------------- garbage collection


def grown(path: Path, *, keep: int) -> tuple[Server, Registry]:
    """Versions 1 to 4; stable has 4, and left 2 a day and a half ago and 3 half a day ago."""
    server = Server.make(path / "prod", f"[models]\nkeep = {keep}\n")
    registry = server.registry()
    for number in (1, 2, 3):
        server.add(number, registry)
    registry.promote(2)
    server.ahead_ms = 2 * DAY
    registry.promote(3)
    server.ahead_ms = 3 * DAY
    registry.promote(4)
    server.ahead_ms = 3 * DAY + DAY // 2
    return server, registry


def test_only_what_nobody_can_want_any_more_is_thrown_away(tmp_path: Path) -> None:
    server, registry = grown(tmp_path, keep=1)
    before = tree(server)
    told = registry.collect(dry_run=True)
    assert tree(server) == before
    assert registry.collect() == told
    assert told.versions == (1, 2)  # 3 was stable until half a day ago
    assert told.n_bytes == sum(len(data) for name, data in before.items() if name not in tree(server)) - sum(
        len(data) for name, data in before.items() if name.startswith("manifests/") and name not in tree(server)
    )
    assert [model.collected for model in registry.models()] == [True, True, False, False]
    assert registry.verify() == []
    assert registry.collect().versions == ()
    with pytest.raises(InvalidConfig, match="collected"):
        registry.rollback(to=2)
    assert registry.rollback().version == 3
    assert server.add(1, registry).version == 2  # what it was is still known
    server.ahead_ms += 2 * DAY
    assert registry.collect().versions == (), "stable has 3 now, and 4 is the newest"


def test_bytes_go_only_after_the_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, registry = grown(tmp_path, keep=1)
    before = tree(server)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        with pytest.raises(InvalidConfig, match="No space"):
            registry.collect()
    assert tree(server) == before
    assert registry.verify() == []
    assert registry.collect().versions == (1, 2)


def test_the_newest_are_kept_and_so_is_what_is_being_made(tmp_path: Path) -> None:
    server, registry = grown(tmp_path, keep=3)
    young = server.folder.distribution / "blobs" / ("a" * 64)
    server.ahead_ms = 0
    young.write_bytes(b"of a model that is being made")
    assert (registry.collect().versions, young.exists()) == ((), True)
    server.ahead_ms = 9 * DAY
    assert registry.collect().versions == (1,)
    assert not young.exists()


def test_the_catalogue_of_the_checkpoint_outlives_its_models(tmp_path: Path) -> None:
    server = Server.make(tmp_path / "prod", "[models]\nkeep = 1\n")
    server.checkpoint(1)
    registry = server.registry()
    server.add(1, registry)
    write_json(server.folder.path / "catalogue.json", replace(CATALOGUE, retired=frozenset({"film:3"})).to_record())
    registry.promote(server.add(1, registry).version)
    server.ahead_ms = 9 * DAY
    assert registry.collect().versions == (1, 2)
    assert registry.catalogue(CATALOGUE.version) == CATALOGUE


@pytest.mark.parametrize(("asleep_ms", "version"), [(0, 2), (3 * DAY, 1)])
def test_a_device_between_offer_and_bytes_ends_its_download_or_gets_a_newer_offer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asleep_ms: int, version: int
) -> None:
    server = Server.make(tmp_path / "prod", "[models]\nkeep = 1\n")
    registry = server.registry()
    for number in (1, 2):
        server.add(number, registry)
    registry.promote(2)
    fetch = _distribution.fetch_blob
    once: list[object] = []

    def moved_meanwhile(*args: Any, **more: Any) -> bytes:
        if not once:
            once.append(registry.promote(3))
            server.ahead_ms += asleep_ms
            once.append(registry.collect())
        return fetch(*args, **more)

    monkeypatch.setattr(_distribution, "fetch_blob", moved_meanwhile)
    with Client.open(
        tmp_path / "d", bundle=server.device_bundle(tmp_path / "d.bundle"), now_ms=lambda: server.now_ms
    ) as me:
        found = me.sync()
        assert (found.version, found.release) == (version, "updated" if version == 2 else "failed")
        assert me.recommend(3)
        assert (me.sync().release, me.sync().version) == ("updated", 3)
    assert registry.verify() == []


def test_a_stream_under_way_is_not_cut_by_garbage_collection(tmp_path: Path) -> None:
    server = Server.make(tmp_path / "prod", "[models]\nkeep = 1\n")
    registry = server.registry()
    large = {**server.state(1), "more": np.random.default_rng(0).random(500_000)}
    made = registry.add(large, CATALOGUE, round=1, plan=server.folder.plan, guarantee=server.guarantee(1))
    server.add(2, registry)
    with Distribution(
        {("films", "default"): server.folder.distribution},
        address="127.0.0.1:0",
        private_key=(server.folder.keys / "server.key").read_bytes(),
        chain=(server.folder.tls / "server.crt").read_bytes(),
    ) as served:
        trusted = grpc.ssl_channel_credentials((server.folder.tls / "ca.crt").read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{served.port}", trusted) as channel:
            call = channel.unary_stream(f"/{SERVICE}/GetModel", GetBlobRequest.SerializeToString, Chunk.FromString)
            asked = GetBlobRequest(app_id="films", population="default", sha256=made.manifest.model.sha256)
            chunks = iter(call(asked, timeout=60))
            data = next(chunks).data
            server.ahead_ms = 9 * DAY
            assert 2 in registry.collect().versions
            for chunk in chunks:
                data += chunk.data
    assert made.manifest.model.check(data) == data


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_operator_does_channels_are_whole_and_only_go_forward(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    server = Server.make(tmp_path / "prod", "[models]\nkeep = 2\n")
    highest: dict[str, int] = {}
    for _ in range(25):
        registry, channel = server.registry(), choose.choice(["stable", "candidate"])
        newest = registry.models()[-1]
        version = choose.randint(1, newest.version)
        doing: list[Callable[[], object]] = [
            partial(server.add, min(newest.round + 1, 3), registry),
            partial(registry.promote, version, channel),
            partial(registry.rollback, channel),
            partial(registry.rollback, channel, version),
            registry.renew,
            registry.collect,
            server.rotate,
        ]
        with suppress(InvalidConfig):
            choose.choice(doing)()
        server.ahead_ms += choose.choice([0, DAY // 3, 5 * DAY])
        registry = server.registry()
        registry.renew()
        assert registry.verify() == []
        for name, (_, sequence) in has(registry).items():
            assert sequence >= highest.get(name, 0)
            highest[name] = sequence


# ------------------------------------------------------------------------------------------------------- command


def test_the_command_shows_moves_and_checks(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(server.folder.path)
    server.add(1)
    assert run(command, "ls", where) == 0
    said = capsys.readouterr().out
    assert "UTC" in said
    for line in said.splitlines()[1:3]:
        assert "at δ 0.001 per user" in line
    assert run(command, "promote", where, "2") == 0
    assert run(command, "rollback", where) == 0
    assert capsys.readouterr().out.splitlines() == ["stable has version 2", "stable has version 1"]
    assert run(command, "ls", where, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["version"], one["channels"]) for one in told["models"]] == [(1, ["stable"]), (2, ["candidate"])]
    assert [(one["channel"], one["sequence"]) for one in told["channels"]] == [("candidate", 1), ("stable", 3)]
    assert run(command, "show", where, "2") == 0
    assert "accountant GDP" in capsys.readouterr().out
    assert run(command, "collect", where, "--dry-run") == 0
    assert run(command, "verify", where) == 0
    capsys.readouterr()
    assert run(command, "promote", where, "9") == 2
    assert capsys.readouterr().err == "penchant: no version 9; the newest is 2\n"
    next((server.folder.distribution / "blobs").iterdir()).write_bytes(b"")
    assert run(command, "verify", where, "--json") == 3
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_a_difference_names_what_changed_and_how_far_numbers_moved(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = server.registry()
    for number in (1, 2):
        server.add(number, registry)
    found = registry.diff(2, 3)
    assert found["metrics"] == {"round": [1, 2]}
    assert found["guarantee"]["epsilon"][1] > found["guarantee"]["epsilon"][0]
    assert "learner" not in found
    assert "catalogue" not in found
    assert found["arrays"]["state/vectors"]["norm"][0] is None
    assert found["arrays"]["side/popularity"]["moved"] == 0
    assert run(command, "diff", str(server.folder.path), "1", "2") == 0
    assert "side/popularity: norm 0 [40] → norm" in capsys.readouterr().out


def test_the_commands_are_light_to_import() -> None:
    code = (
        "import sys; import penchant.server.model_command, penchant.server.catalogue_command; "
        "print(*sorted({'numpy', 'grpc', 'cryptography', 'flwr'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
