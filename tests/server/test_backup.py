"""A backup is the folder of one moment, with a ledger that holds all of it, and comes back whole or is refused.

Rounds run in this process on the folder's own files, with what three devices send at hand, so that a copy of any of it
would be found.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.client.node import Node
from penchant.common.arrays import Arrays
from penchant.common.artifacts.bundle import Bundle, catalogue_bytes
from penchant.common.artifacts.manifest import Blob, Manifest, Offer, Pointer, Seen
from penchant.common.artifacts.release import Release
from penchant.common.artifacts.signing import Certificate, Envelope, SigningKey
from penchant.common.errors import Busy, InvalidConfig, MalformedData, PrivacyRefused, StaleArtifact, UntrustedArtifact
from penchant.common.interactions import Interactions
from penchant.common.learners import registry
from penchant.common.learners.contract import Learner
from penchant.common.privacy.ledger import Ledger
from penchant.common.streams import Streams
from penchant.common.wire import Reply
from penchant.server import backup as backups
from penchant.server import backup_command, states
from penchant.server.backup import POINTS, Contents, backup, restore, verify
from penchant.server.database import Database
from penchant.server.distribution import publish
from penchant.server.folder import Folder
from penchant.server.registry import Registry, release_key
from penchant.server.rounds import Progress, Rounds
from tests.server.commands import run
from tests.server.operators import CATALOGUE, DAY, NOW, SETTINGS, an_operator, marker

USERS = 3
WORDS = "correct horse battery"
PEOPLE = Interactions.of([[1, 2, 3, 5, 8, 13, 21], [2, 3, 5, 7, 11, 13, 17], [4, 6, 8, 9, 10, 12, 14]], len(CATALOGUE))


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups, "_COST", 16)  # scrypt's cost is no matter of these tests, but for one


@pytest.fixture
def prod(tmp_path: Path) -> Folder:
    return an_operator(tmp_path / "prod", users=USERS)


def learners(name: str, settings: Mapping[str, Any]) -> Learner:
    return registry.build(name, settings, CATALOGUE)


def a_round(folder: Folder) -> list[Arrays]:
    """Runs the next round as a server does, up to the channel; what devices sent."""
    plan = folder.plan
    with (
        Database(folder.database, now_ms=lambda: NOW) as database,
        Ledger(plan.population, delta=plan.delta, app_id="films", path=folder.ledger, now_ms=lambda: NOW) as ledger,
    ):
        row = database.one("SELECT * FROM progress WHERE plan = ?", plan.digest)
        progress = None
        if row is not None and row["done"]:
            taken = np.frombuffer(row["participations"], "<i8").astype(np.int64)
            progress = Progress(states.load(folder, row["state"]), taken, row["done"])
        rounds = Rounds(
            learner=learners("cooccurrence", SETTINGS),
            settings=SETTINGS,
            plan=plan,
            roster=(1,) * USERS,
            ledger=ledger,
            streams=Streams.from_os(),
            progress=progress,
        )
        orders, state = rounds.open(), rounds.learner.released(rounds.state)
        sent = {}
        for place, order in orders.items():
            node = Node(PEOPLE.select([place]), learners, Streams.from_os(), plan=plan)
            sent[place] = node.answer(order, state)
        rounds.close(
            Reply(node=place, round=orders[place].round, attempt=orders[place].attempt, arrays=arrays)
            for place, arrays in sent.items()
        )
        name = states.save(folder, rounds.state)
        with database.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?)",
                (
                    *(plan.digest, rounds.progress.done, name, CATALOGUE.version),
                    rounds.progress.participations.astype("<i8").tobytes(),
                ),
            )
        guarantee = rounds.guarantee(rounds.progress.done)
        assert guarantee is not None
        offer_of(folder, rounds, {**asdict(guarantee), "epsilon": ledger.spent().epsilon})
    return list(sent.values())


def offer_of(folder: Folder, rounds: Rounds, guarantee: Mapping[str, Any]) -> None:
    """Puts the state that was released onto the stable channel."""
    app, done = Bundle.app_of(folder.bundle), rounds.progress.done
    key = SigningKey(bytes.fromhex((folder.keys / "release.key").read_text()))
    released = rounds.learner.released(rounds.state)
    model, listed = Release(released, rounds.learner.item_side(rounds.state)).to_bytes(), catalogue_bytes(CATALOGUE)
    manifest = Manifest(
        app_id=app.app_id,
        population=app.population,
        version=done + 1,
        created_ms=NOW,
        model=Blob.of(model),
        catalogue=Blob.of(listed),
        catalogue_version=CATALOGUE.version,
        learner="cooccurrence",
        settings=SETTINGS,
        plan=folder.plan.to_json(),
        guarantee=guarantee,
    ).signed(key)
    pointer = Pointer(
        app_id=app.app_id,
        population=app.population,
        channel="stable",
        sequence=done + 1,
        manifest=manifest.sha256,
        created_ms=NOW,
        expires_ms=NOW + 30 * DAY,
    )
    offer = Offer(Envelope.from_bytes(folder.certificate.read_bytes()), pointer.signed(key), manifest)
    publish(folder.distribution, offer, (model, listed), root=app.root, now_ms=NOW)


def tree(path: Path) -> dict[str, bytes]:
    """What must come back byte for byte."""
    left_out = ("offline", "flower", "run", "logs", "ledgers", "server.db")
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and not p.relative_to(path).as_posix().startswith(left_out)
    }


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return list(db.iterdump())


def records(folder: Folder) -> list[tuple[str, str]]:
    with Ledger.open(folder.ledger) as ledger:
        return ledger.records()


def plain(file: Path, passphrase: str | None) -> bytes:
    """All that is in a backup, opened."""
    with backups._opened(file, passphrase) as archive:
        return archive.read(1 << 30)


def made(folder: Folder, passphrase: str | None = WORDS, **options: Any) -> Path:
    out = folder.path.parent / f"{len(list(folder.path.parent.iterdir()))}.backup"
    backup(folder, out, passphrase, now_ms=lambda: NOW, **options)
    return out


# ------------------------------------------------------------------------------------------------- whole


def test_a_restored_folder_is_the_one_that_was_copied(prod: Folder, tmp_path: Path) -> None:
    for _ in range(2):
        a_round(prod)
    (prod.path / "flower-app/pyproject.toml").write_text("[project]\n")
    out = made(prod)
    assert out.stat().st_mode & 0o777 == 0o600
    lines = restore(out, tmp_path / "new", WORDS, now_ms=lambda: NOW)
    assert "checkpoint is after round 2" in "\n".join(lines)
    new = Folder(tmp_path / "new")
    current = prod.path / "states" / f"{Database(prod.database).rows('SELECT state FROM progress')[0][0]}.safetensors"
    expected = {
        name: data for name, data in tree(prod.path).items() if not name.startswith("states/") or current.name in name
    }
    assert tree(new.path) == expected
    assert records(new) == records(prod)
    for folder in (new, prod):
        with Database(folder.database) as database, database.transaction() as db:
            db.execute("DELETE FROM switches WHERE name IN ('rounds', 'hold', 'sequence')")
    assert dump(new.database) == dump(prod.database)
    for path in (new.path, new.keys, *(path for path in new.path.rglob("*") if path.is_file())):
        assert path.stat().st_mode & 0o077 == 0, path
    for path in (new.database, new.ledger):
        with closing(sqlite3.connect(path)) as opened:
            assert opened.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_rounds_go_on_from_a_restored_folder_with_its_ledger(prod: Folder, tmp_path: Path) -> None:
    a_round(prod)
    restore(made(prod), tmp_path / "new", WORDS)
    new = Folder(tmp_path / "new")
    before = records(new)
    a_round(new)
    a_round(new)
    assert records(new)[: len(before)] == before
    with Ledger.open(new.ledger) as ledger:
        assert [(e.kind, e.round, e.attempt) for e in ledger.entries] == [
            (kind, number, 0) for number in (1, 2, 3) for kind in ("charge", "release")
        ]
    row = Database(new.database).rows("SELECT done, participations FROM progress")[0]
    assert row["done"] == 3
    assert np.frombuffer(row["participations"], "<i8").tolist() == [3] * USERS


def test_what_devices_sent_is_in_no_backup(prod: Folder, tmp_path: Path) -> None:
    sent = [values for _ in range(3) for arrays in a_round(prod) for values in arrays.values()]
    secret = [m for values in sent for v in (values, values.astype(np.float32)) if (m := marker(v))]
    assert len(secret) >= 2 * 3 * USERS
    for passphrase in (WORDS, None):
        data = plain(made(prod, passphrase), passphrase)
        assert not [m for m in secret if m in data]
        state = states.load(prod, Database(prod.database).rows("SELECT state FROM progress")[0]["state"])
        shown = [m for values in state.values() if (m := marker(values)) and m in data]
        assert shown  # so the search finds what is there


def test_what_is_not_the_servers_own_stays_out(prod: Folder, tmp_path: Path) -> None:
    secrets = dict[str, bytes]()
    others = ("flower/state.db", "logs/rounds.jsonl", "run/nginx.conf", "notes.txt", "states/x.part")
    for name in ("offline/ca.key", *others):
        (prod.path / name).parent.mkdir(exist_ok=True)
        secrets[name] = os.urandom(16)
        (prod.path / name).write_bytes(secrets[name])
    secrets["offline/root.key"] = (prod.path / "offline/root.key").read_bytes().strip()
    secrets["an old state"] = (prod.states / f"{'0' * 64}.safetensors").name.encode()
    (prod.states / f"{'0' * 64}.safetensors").write_bytes(b"old")
    data = plain(made(prod), WORDS)
    assert {name for name, text in secrets.items() if text in data} == set()
    assert (prod.keys / "release.key").read_bytes() in data


def test_without_keys_there_are_none_and_the_restore_says_so(prod: Folder, tmp_path: Path) -> None:
    out = made(prod, None)
    data = out.read_bytes() + plain(out, None)
    for path in prod.keys.iterdir():
        assert path.read_bytes() not in data
    lines = restore(out, tmp_path / "new", None)
    assert not (tmp_path / "new/keys").exists()
    assert "keys/ is not in it" in "\n".join(lines)
    sealed = made(prod)
    for path in prod.keys.iterdir():
        assert path.read_bytes() in plain(sealed, WORDS)
        assert path.read_bytes() not in sealed.read_bytes()


# ------------------------------------------------------------------------------------------------- of one moment


@pytest.mark.parametrize("point", POINTS)
def test_a_round_that_ends_meanwhile_is_in_it_whole_or_not_at_all(prod: Folder, tmp_path: Path, point: str) -> None:
    a_round(prod)
    left = [point]

    def at(now: str) -> None:
        if now in left:
            left.remove(now)
            a_round(prod)

    out = made(prod, at=at)
    assert not left
    contents = read(out)
    with tarfile.open(fileobj=io.BytesIO(plain(out, WORDS))) as tar:
        held = tar.extractfile("distribution/channels/stable.json")
        assert held is not None
        offer = Offer.from_bytes(held.read())
    key = SigningKey(bytes.fromhex((prod.keys / "release.key").read_text())).public
    assert Manifest.read(offer.manifest, key).version == contents.done + 1
    assert contents.done == (2 if POINTS.index(point) < POINTS.index("statements") else 1)
    assert contents.entries == (4 if POINTS.index(point) <= POINTS.index("named") else 2)
    restore(out, tmp_path / "new", WORDS)
    a_round(Folder(tmp_path / "new"))


def read(out: Path, passphrase: str | None = WORDS) -> Contents:
    with backups._opened(out, passphrase) as archive:
        return backups._unpacked(archive, None)


def test_another_process_may_be_writing(prod: Folder) -> None:
    with Database(prod.database) as database, database.transaction() as db:
        db.execute("INSERT INTO switches VALUES ('seen', 'elsewhere', 0)")
        out = made(prod)
    data = plain(out, WORDS)
    assert b"elsewhere" not in data
    assert b"elsewhere" in plain(made(prod), WORDS)


def test_a_folder_that_never_rests_is_not_copied(prod: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    n = iter(range(1000))

    def at(now: str) -> None:
        if now == "read":
            (prod.path / "catalogue.json").write_text(f"{next(n)}")

    with pytest.raises(Busy, match="pause the rounds"):
        backup(prod, tmp_path / "x", WORDS, at=at)
    assert next(n) == backups._TRIES
    assert not list(tmp_path.glob(".x*"))
    assert not (tmp_path / "x").exists()


def test_bytes_that_are_collected_meanwhile_do_no_harm(prod: Folder) -> None:
    other = prod.distribution / "blobs" / ("ab" * 32)
    other.write_bytes(b"x")
    real, gone = backups._add, list[Path]()

    def add(tar: tarfile.TarFile, name: str, data: bytes | Path) -> tuple[int, str]:
        if not gone and name.startswith("distribution/blobs/"):
            gone.append(other)
            other.unlink()
        return real(tar, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backups, "_add", add)
        out = made(prod)
    assert gone
    assert other.name not in "".join(read(out).files)
    verify(out, WORDS)


# ------------------------------------------------------------------------------------------------- damage


def damaged(data: bytes) -> Iterator[bytes]:
    """Each byte of the beginning and the end flipped, and some hundred between; the file cut off; and with more."""
    places = {*range(60), *range(len(data) - 60, len(data)), *range(60, len(data) - 60, len(data) // 300)}
    for place in sorted(places):
        yield data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
    piece = backups._PIECE + backups._TAG
    head = len(backups._SEALED) + backups._SALT
    ends = {0, 1, head - 1, head, head + 1, head + piece, head + piece + 1, len(data) - piece, len(data) - 1}
    for end in sorted({*ends, *range(0, len(data), len(data) // 40)}):
        yield data[:end]
    yield data + b"\0"
    yield data + data[head:]
    yield data[:head] + data[head + piece : head + 2 * piece] + data[head : head + piece] + data[head + 2 * piece :]


@pytest.mark.parametrize("passphrase", [WORDS, None])
def test_each_byte_that_is_changed_missing_or_too_much_is_found(
    prod: Folder, tmp_path: Path, passphrase: str | None
) -> None:
    (prod.path / "flower-app/pyproject.toml").write_bytes(os.urandom(3 * backups._PIECE))
    data, broken = made(prod, passphrase).read_bytes(), tmp_path / "broken"
    found = 0
    for changed in damaged(data):
        assert changed != data
        broken.write_bytes(changed)
        with pytest.raises(MalformedData):
            read(broken, passphrase)
        found += 1
    assert found > 400
    with pytest.raises(MalformedData):
        restore(broken, tmp_path / "new", passphrase)
    assert not (tmp_path / "new").exists()
    broken.write_bytes(data)
    read(broken, passphrase)


def test_pieces_are_in_their_order_and_all_there(tmp_path: Path) -> None:
    n, size, key = 5, backups._PIECE + backups._TAG, bytes(32)
    sealed = io.BytesIO()
    sealer = backups._Sealer(sealed, key, b"about")
    sealer.write(bytes(n * backups._PIECE))  # all alike, so that nothing but their places tells them apart
    sealer.end()
    pieces = [sealed.getvalue()[at : at + size] for at in range(0, n * size, size)]

    def opened(pieces: list[bytes], about: bytes = b"about") -> bytes:
        return backups._Opener(io.BytesIO(b"".join(pieces)), key, about, "damaged").read(1 << 30)

    assert opened(pieces) == bytes(n * backups._PIECE)
    for wrong in (pieces[:-1], pieces[1:], [*pieces[:2], *pieces[3:]], [*pieces, pieces[-1]], pieces[::-1], []):
        with pytest.raises(MalformedData, match="damaged"):
            opened(wrong)
    with pytest.raises(MalformedData, match="damaged"):
        opened(pieces, b"another")


def test_what_comes_after_the_tar_is_checked_too(prod: Folder, tmp_path: Path) -> None:
    file, salt = tmp_path / "padded", bytes(backups._SALT)
    with file.open("wb") as out:
        out.write(backups._PLAIN + salt)
        sealer = backups._Sealer(out, backups._key(None, salt), backups._PLAIN + salt)
        sealer.write(plain(made(prod, None), None) + bytes(3 * backups._PIECE))
        sealer.end()
    read(file, None)
    data = file.read_bytes()
    for changed in (data[:-1] + b"?", data[: -backups._PIECE - 100], data + b"?"):
        file.write_bytes(changed)
        with pytest.raises(MalformedData):
            read(file, None)


def test_another_passphrase_opens_nothing(prod: Folder, tmp_path: Path) -> None:
    out = made(prod)
    for wrong in ("correct horse batterx", "", "Correct horse battery"):
        with pytest.raises(MalformedData, match="passphrase"):
            verify(out, wrong)
    with pytest.raises(InvalidConfig, match="sealed"):
        verify(out, None)


def test_a_guess_at_the_passphrase_costs_what_the_header_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert backups._COST == 2**17
    assert "N = 2¹⁷" in str(backups.__doc__)
    # RFC 7914, section 12: N = 16, r = 1, p = 1 is theirs; ours is held by another implementation
    import hashlib

    expected = hashlib.scrypt(b"words", salt=bytes(16), n=2**17, r=8, p=1, maxmem=1 << 28, dklen=32)
    assert backups._key("words", bytes(16)) == expected


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "keys/../../x", "x", "offline/root.key", ""])
def test_an_archive_that_somebody_else_made_writes_nowhere_else(prod: Folder, tmp_path: Path, name: str) -> None:
    hostile = tmp_path / "hostile"
    salt = bytes(backups._SALT)
    with hostile.open("wb") as file:
        file.write(backups._PLAIN + salt)
        sealer = backups._Sealer(file, backups._key(None, salt), backups._PLAIN + salt)
        with tarfile.open(fileobj=sealer, mode="w|") as tar:  # type: ignore[call-overload]  # it only writes
            backups._add(tar, name, b"mine")
        sealer.end()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(MalformedData):
        verify(hostile, None)
    with pytest.raises(MalformedData):
        restore(hostile, tmp_path / "new", None)
    assert set(tmp_path.rglob("*")) == before


def test_a_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    hostile, salt = tmp_path / "hostile", bytes(backups._SALT)
    with hostile.open("wb") as file:
        file.write(backups._PLAIN + salt)
        sealer = backups._Sealer(file, backups._key(None, salt), backups._PLAIN + salt)
        with tarfile.open(fileobj=sealer, mode="w|") as tar:  # type: ignore[call-overload]  # it only writes
            link = tarfile.TarInfo("tls")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            tar.addfile(link)
            backups._add(tar, "tls/x", b"mine")
        sealer.end()
    with pytest.raises(MalformedData):
        restore(hostile, tmp_path / "new", None)
    assert not (tmp_path / "x").exists()


def test_a_damaged_folder_is_not_copied_as_if_it_were_whole(prod: Folder, tmp_path: Path) -> None:
    a_round(prod)
    with Database(prod.database) as database:
        state = prod.states / f"{database.rows('SELECT state FROM progress')[0][0]}.safetensors"
    blob = next((prod.distribution / "blobs").iterdir())
    for path in (state, blob):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"?")
        with pytest.raises(MalformedData, match="damaged"):
            made(prod)
        path.write_bytes(whole)
    whole = prod.database.read_bytes()
    with prod.database.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(8192))
    with pytest.raises((MalformedData, InvalidConfig)):
        made(prod)
    prod.database.write_bytes(whole)
    (prod.path / "plan.json").rename(tmp_path / "plan.json")
    with pytest.raises(InvalidConfig, match=r"plan\.json"):
        made(prod)
    (tmp_path / "plan.json").rename(prod.path / "plan.json")
    made(prod)


def test_what_was_signed_by_somebody_else_or_not_charged_does_not_come_back(prod: Folder, tmp_path: Path) -> None:
    a_round(prod)
    first = tmp_path / "first.sqlite"
    with closing(sqlite3.connect(prod.ledger)) as there, closing(sqlite3.connect(first)) as copy:
        there.backup(copy)
    a_round(prod)
    channel = prod.distribution / "channels/stable.json"
    whole = channel.read_bytes()
    offer = Offer.from_bytes(whole)
    other, root = SigningKey(b"x" * 32), SigningKey(b"y" * 32)
    certificate = Certificate(
        app_id="films", public_key=other.public, serial=1, not_before_ms=NOW - DAY, not_after_ms=NOW + DAY
    )
    pointer = other.sign(offer.pointer.payload_type, offer.pointer.payload)
    channel.write_bytes(Offer(certificate.signed(root), pointer, offer.manifest).to_bytes())
    out = made(prod)
    with pytest.raises(UntrustedArtifact):
        verify(out, WORDS)
    with pytest.raises(UntrustedArtifact):
        restore(out, tmp_path / "new", WORDS)
    channel.write_bytes(whole)
    verify(made(prod), WORDS)

    for name in ("-wal", "-shm"):
        Path(f"{prod.ledger}{name}").unlink(missing_ok=True)
    shutil.copy(first, prod.ledger)  # a ledger that somebody put back
    out = made(prod)
    with pytest.raises(PrivacyRefused, match="lacks charges"):
        verify(out, WORDS)
    with pytest.raises(PrivacyRefused, match="lacks charges"):
        restore(out, tmp_path / "new", WORDS)
    with Database(prod.database) as database, database.transaction() as db:
        db.execute("UPDATE progress SET done = 1")  # and a checkpoint with it: the channel's model still cost more
    with pytest.raises(PrivacyRefused, match="cost more"):
        verify(made(prod), WORDS)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------- whole or not at all


KILLED = """
import os, signal, sys
from pathlib import Path
from penchant.server.backup import backup
from penchant.server.folder import Folder
from penchant.server.registry import Registry, release_key

def at(point):
    if point == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

backup(Folder(Path(sys.argv[1])), Path(sys.argv[2]), "correct horse battery", at=at)
"""


@pytest.mark.parametrize("point", ["begun", "named", "written", "whole"])
def test_killed_in_between_nothing_is_there_under_its_name(prod: Folder, tmp_path: Path, point: str) -> None:
    out = tmp_path / "prod.backup"
    done = subprocess.run([sys.executable, "-c", KILLED, str(prod.path), str(out), point], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    left = b"".join(path.read_bytes() for path in tmp_path.glob(".prod.backup.*.part"))
    for path in prod.keys.iterdir():
        assert path.read_bytes() not in left
    backup(prod, out, WORDS)
    verify(out, WORDS)


def test_a_full_disk_leaves_nothing_and_says_so(prod: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made(prod)
    before = sorted(tmp_path.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InvalidConfig, match="No space left on device"):
        backup(prod, tmp_path / "x", WORDS)
    with pytest.raises(InvalidConfig, match="No space left on device"):
        restore(out, tmp_path / "new", WORDS)
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_written_over(prod: Folder, tmp_path: Path) -> None:
    out = made(prod)
    with pytest.raises(InvalidConfig, match="there already"):
        backup(prod, out, WORDS)
    with pytest.raises(InvalidConfig, match="there already"):
        restore(out, prod.path, WORDS)
    (tmp_path / "empty").mkdir()
    restore(out, tmp_path / "empty", WORDS)
    with pytest.raises(InvalidConfig, match="there already"):
        restore(out, tmp_path / "empty", WORDS)


# ------------------------------------------------------------------------------------------------- what came after


def test_a_token_that_was_used_up_since_is_not_good_again(prod: Folder, tmp_path: Path) -> None:
    with Database(prod.database) as database, database.transaction() as db:
        db.execute("INSERT INTO tokens VALUES ('ab', 0, 1, 1, NULL)")
        db.execute("INSERT INTO places VALUES (0, x'01', 7, x'02', 0, NULL)")
    restore(made(prod), tmp_path / "new", WORDS)
    with Database(tmp_path / "new/server.db") as database:
        assert database.rows("SELECT * FROM tokens") == []
        assert len(database.rows("SELECT * FROM places")) == 1


def test_after_a_restore_rounds_wait_until_the_operator_says_so(prod: Folder, tmp_path: Path) -> None:
    with Database(prod.database) as database:
        database.set_switch("rounds", "running")
    a_round(prod)
    out = made(prod)
    a_round(prod)  # released, and in no ledger but the one that is lost
    lines = restore(out, tmp_path / "new", WORDS)
    assert "--after-restore" in lines[-1]
    assert "--ledger" in lines[-1]
    with Database(tmp_path / "new/server.db") as database:
        assert database.switch("rounds") == "paused"
        assert "not charged" in database.switch("hold")


def test_devices_that_saw_later_pointers_take_those_of_a_restored_folder(prod: Folder, tmp_path: Path) -> None:
    def has(folder: Folder) -> Offer:
        return Offer.from_bytes((folder.distribution / "channels/stable.json").read_bytes())

    app = Bundle.app_of(prod.bundle)

    def taken(offer: Offer, seen: Seen) -> Seen:
        who = {"app_id": app.app_id, "population": app.population, "channel": "stable"}
        return offer.check(app.root, **who, now_ms=NOW, seen=seen)[1]

    out = made(prod)
    seen = taken(has(prod), Seen(serial=1, sequence=0))
    later = replace(seen, sequence=seen.sequence + 500, manifest="")  # the device followed moves that the backup lacks
    restore(out, tmp_path / "new", WORDS, now_ms=lambda: NOW)
    with pytest.raises(StaleArtifact):
        taken(has(Folder(tmp_path / "new")), later)
    new = Folder(tmp_path / "new")
    with Database(new.database, now_ms=lambda: NOW) as database:  # as the services do when they start
        Registry(new, database, release_key(new), now_ms=lambda: NOW).renew()
    assert taken(has(new), later).sequence > later.sequence


def test_the_ledger_that_went_on_is_taken_and_another_is_not(prod: Folder, tmp_path: Path) -> None:
    with Database(prod.database) as database:
        database.set_switch("rounds", "running")
    a_round(prod)
    older = made(prod)
    a_round(prod)
    newer = made(prod)
    kept = tmp_path / "kept.sqlite"
    with closing(sqlite3.connect(prod.ledger)) as there, closing(sqlite3.connect(kept)) as copy:
        there.backup(copy)
    lines = restore(older, tmp_path / "new", WORDS, ledger=kept)
    assert "paused" not in "\n".join(lines)
    new = Folder(tmp_path / "new")
    assert records(new) == records(prod)
    with Database(new.database) as database:
        assert (database.switch("rounds"), database.switch("hold")) == ("running", "")
    a_round(new)  # the second round again, which is charged again
    with Ledger.open(new.ledger) as ledger:
        assert [(e.kind, e.round, e.attempt) for e in ledger.entries][-2:] == [("charge", 2, 1), ("release", 2, 1)]

    restore(older, tmp_path / "apart", WORDS)
    a_round(Folder(tmp_path / "apart"))  # another second round: the two ledgers part
    foreign = an_operator(tmp_path / "another", users=USERS, now_ms=NOW + 1)
    a_round(foreign)
    a_round(foreign)
    for other, why in ((tmp_path / "apart/ledgers/default.sqlite", "parted"), (foreign.ledger, "foreign")):
        with pytest.raises(PrivacyRefused, match="head noted earlier"):
            restore(newer, tmp_path / why, WORDS, ledger=other)
        assert not (tmp_path / why).exists()
    with pytest.raises(InvalidConfig, match="no ledger"):
        restore(newer, tmp_path / "none", WORDS, ledger=tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------- command


def test_the_commands(
    prod: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_round(prod)
    out, words = tmp_path / "a.backup", tmp_path / "words"
    words.write_text(WORDS + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.delenv(backup_command.VARIABLE, raising=False)
    assert run(backup_command.backup, str(prod.path), "--out", str(out)) == 2
    assert "PENCHANT_PASSPHRASE" in capsys.readouterr().err
    words.write_text("short\n")
    assert run(backup_command.backup, str(prod.path), "--out", str(out), "--passphrase-file", str(words)) == 2
    assert "12 characters" in capsys.readouterr().err
    words.write_text(WORDS + "\n")
    assert run(backup_command.backup, str(prod.path), "--out", str(out), "--passphrase-file", str(words)) == 0
    with Ledger.open(prod.ledger) as ledger:
        assert ledger.head in capsys.readouterr().out
    assert run(backup_command.restore, str(out), "--verify") == 2
    monkeypatch.setenv(backup_command.VARIABLE, WORDS)
    assert run(backup_command.restore, str(out), "--verify") == 0
    said = capsys.readouterr().out
    assert said.count("OK ") == len(said.splitlines()) == 4
    assert run(backup_command.restore, str(out), "--to", str(tmp_path / "new")) == 0
    assert "paused" in capsys.readouterr().err
    assert Folder(tmp_path / "new").plan == prod.plan
    assert run(backup_command.restore, str(out), "--to", str(tmp_path / "new")) == 2
    assert run(backup_command.restore, str(out)) == 2
    assert run(backup_command.restore, str(out), "--verify", "--ledger", str(prod.ledger)) == 2
    assert run(backup_command.restore, str(tmp_path / "nothing"), "--verify") == 2
    assert run(backup_command.restore, str(words), "--verify") == 3
    monkeypatch.setenv(backup_command.VARIABLE, "another passphrase")
    assert run(backup_command.restore, str(out), "--verify") == 3
    monkeypatch.delenv(backup_command.VARIABLE)
    bare = tmp_path / "b.backup"
    assert run(backup_command.backup, str(prod.path), "--out", str(bare), "--without-keys") == 0
    assert run(backup_command.restore, str(bare), "--verify") == 0
    assert run(backup_command.backup, str(tmp_path / "nothing"), "--out", str(bare)) == 2
