"""A new key retires the one before it on every device, wherever it is killed; a wrong certificate is refused."""

from __future__ import annotations

import ssl
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penchant.common.artifacts.bundle import Bundle
from penchant.common.artifacts.manifest import Manifest, Offer, Pointer, Seen
from penchant.common.artifacts.signing import Certificate, Envelope, SigningKey
from penchant.common.errors import InvalidConfig, MalformedData, PenchantError, StaleArtifact, UntrustedArtifact
from penchant.server import keys, tls
from penchant.server.database import Database
from penchant.server.distribution import publish
from penchant.server.folder import Folder
from penchant.server.keys import Rotated, compromised, read_signing_key, release_key, renew_server, rotate
from penchant.server.keys_command import keys as command
from tests.server.commands import run
from tests.server.operators import DAY, NOW, an_operator

HOUR = 3_600_000
TODAY = time.time_ns() // 1_000_000


class Killed(BaseException):
    """Not an error: nothing may catch it."""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """With a second channel, so that one can be signed again and the other not yet."""
    made = an_operator(tmp_path / "prod")
    release, certificate = release_key(made)
    before = channel(made)
    told = Pointer.read(before.pointer, release.public)
    pointer = replace(told, channel="candidate")
    offer = Offer(certificate, pointer.signed(release), before.manifest)
    publish(made.distribution, offer, (), root=root(made).public, now_ms=NOW)
    with Database(made.database) as database, database.transaction() as db:
        db.execute(
            "INSERT INTO moves (channel, sequence, version, manifest, at_ms) VALUES ('candidate', 1, 1, ?, ?)",
            (pointer.manifest, NOW),
        )
    return made


def root(folder: Folder) -> SigningKey:
    return read_signing_key((folder.path / "offline" / "root.key").read_bytes())


def channel(folder: Folder, name: str = "stable") -> Offer:
    return Offer.from_bytes((folder.distribution / "channels" / f"{name}.json").read_bytes())


def taken(folder: Folder, offer: Offer, seen: Seen = Seen(), *, name: str = "stable", now_ms: int) -> Seen:  # noqa: B008  # frozen
    """What a device remembers once it took an offer in."""
    who = {"app_id": "films", "population": "default", "channel": name}
    return offer.check(keys.root_of(folder), **who, now_ms=now_ms, seen=seen)[1]


# ------------------------------------------------------------------------------------------------------- rotation


def test_a_rotation_moves_devices_to_the_new_key_and_no_device_goes_back(folder: Folder) -> None:
    old_key, _ = release_key(folder)
    before = {name: channel(folder, name) for name in ("stable", "candidate")}
    seen = taken(folder, before["stable"], now_ms=NOW)
    done = rotate(folder, root(folder), now_ms=NOW + DAY)
    assert (done.serial, done.made, done.channels) == (2, True, ("candidate", "stable"))
    new_key, certificate = release_key(folder)
    assert new_key.public != old_key.public
    assert Certificate.read(certificate, keys.root_of(folder)).serial == 2
    for name, old in before.items():
        now = channel(folder, name)
        assert now.manifest.sha256 == old.manifest.sha256
        assert Manifest.read(now.manifest, new_key.public) == Manifest.read(old.manifest, old_key.public)
        after = taken(folder, now, seen if name == "stable" else Seen(), name=name, now_ms=NOW + DAY + HOUR)
        assert after.serial == 2
        with pytest.raises(StaleArtifact, match="retired by 2"):
            taken(folder, old, after, name=name, now_ms=NOW + DAY + HOUR)
    assert Bundle.read(folder.bundle).seen.serial == 2
    assert sorted(path.name for path in folder.keys.glob("release*")) == ["release.key"]
    assert old_key.private_bytes().hex() not in "".join(p.read_text("latin-1") for p in folder.keys.iterdir())
    assert rotate(folder, root(folder), now_ms=NOW + 2 * DAY).serial == 3


@pytest.mark.parametrize("change", [rotate, compromised])
@pytest.mark.parametrize("stop", [*keys.POINTS, "second channel"])
def test_killed_anywhere_every_channel_is_whole_and_the_same_call_finishes(
    folder: Folder, stop: str, change: Callable[..., Rotated]
) -> None:
    seen = taken(folder, channel(folder), now_ms=NOW)
    passed = list[str]()

    def at(point: str) -> None:
        passed.append(point)
        if point == stop or (stop == "second channel" and passed.count("channel") == 2):
            raise Killed

    with pytest.raises(Killed):
        change(folder, root(folder), now_ms=NOW + DAY, at=at)
    key, certificate = release_key(folder)
    assert Certificate.read(certificate, keys.root_of(folder)).public_key == key.public
    for name in ("stable", "candidate"):
        taken(folder, channel(folder, name), seen if name == "stable" else Seen(), name=name, now_ms=NOW + DAY + HOUR)
    Bundle.read(folder.bundle)
    assert Certificate.read(certificate, keys.root_of(folder)).serial == (1 if stop == "key" else 2)

    done = change(folder, root(folder), now_ms=NOW + DAY)
    again = stop in ("key", "bundle") or change is compromised
    assert done.made is again
    assert done.serial == (2 if stop == "key" or not again else 3)
    for name in ("stable", "candidate"):
        assert taken(folder, channel(folder, name), name=name, now_ms=NOW + DAY + HOUR).serial == done.serial
    assert Bundle.read(folder.bundle).seen.serial == done.serial
    assert sorted(path.name for path in folder.keys.glob("release*")) == ["release.key"]
    assert read_signing_key((folder.keys / "release.key").read_bytes()).public == release_key(folder)[0].public


def test_another_root_key_changes_nothing(folder: Folder) -> None:
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(InvalidConfig, match="not the root key"):
        rotate(folder, SigningKey.generate(), now_ms=NOW)
    assert before == {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_a_channel_that_nobody_signed_stops_a_rotation_before_it_changes_anything(folder: Folder) -> None:
    release, certificate = release_key(folder)
    forged = channel(folder)
    path = folder.distribution / "channels" / "stable.json"
    thief = SigningKey.generate()
    path.write_bytes(Offer(certificate, forged.pointer, keys.signed_again(forged.manifest, thief)).to_bytes())
    with pytest.raises(UntrustedArtifact, match=r"stable\.json"):
        rotate(folder, root(folder), now_ms=NOW + DAY)
    path.write_bytes(b"{}")
    with pytest.raises(PenchantError, match=r"stable\.json"):
        rotate(folder, root(folder), now_ms=NOW + DAY)
    assert release_key(folder)[0].public == release.public


def test_after_a_theft_nothing_that_the_thief_signed_is_vouched_for(folder: Folder) -> None:
    stolen, certificate = release_key(folder)
    before = channel(folder)
    manifest = replace(Manifest.read(before.manifest, stolen.public), version=2).signed(stolen)
    pointer = replace(Pointer.read(before.pointer, stolen.public), sequence=1 << 40, manifest=manifest.sha256)
    theirs = Offer(certificate, pointer.signed(stolen), manifest)
    deceived = taken(folder, theirs, now_ms=NOW + HOUR)  # a device believes it while the key is good
    path = folder.distribution / "channels" / "stable.json"
    path.write_bytes(theirs.to_bytes())
    with pytest.raises(InvalidConfig, match=r"never pointed it to: delete .*stable\.json"):
        compromised(folder, root(folder), now_ms=NOW + DAY)
    assert release_key(folder)[0].public == stolen.public

    path.write_bytes(before.to_bytes())
    compromised(folder, root(folder), now_ms=NOW + DAY)
    back = taken(folder, channel(folder), deceived, now_ms=NOW + DAY + HOUR)
    assert (back.serial, back.sequence) == (2, 1)  # also out of a sequence that was driven to the end
    with pytest.raises(StaleArtifact, match="retired by 2"):
        taken(folder, theirs, back, now_ms=NOW + DAY + HOUR)


def test_a_bundle_that_this_server_did_not_make_is_not_signed_after_a_theft(folder: Folder) -> None:
    with Database(folder.database) as database, database.transaction() as db:
        db.execute("DELETE FROM moves WHERE channel = 'stable'")
        db.execute("UPDATE moves SET manifest = ?", ("0" * 64,))
    for path in (folder.distribution / "channels").iterdir():
        path.unlink()
    with pytest.raises(InvalidConfig, match=r"app\.bundle holds a model"):
        compromised(folder, root(folder), now_ms=NOW + DAY)


def test_a_release_key_that_was_lost_is_replaced(folder: Folder) -> None:
    (folder.keys / "release.key").unlink()
    with pytest.raises(InvalidConfig, match="certificate"):
        release_key(folder)
    assert rotate(folder, root(folder), now_ms=NOW + DAY).serial == 2
    release_key(folder)
    (folder.keys / "release.key").write_text("no key")
    assert rotate(folder, root(folder), now_ms=NOW + DAY).serial == 3
    release_key(folder)


# ------------------------------------------------------------------------------------------------------------ TLS


def handshake(pair: tls.Pair, trusted: bytes, host: str, where: Path) -> None:
    """A TLS client and server in memory, as Python's ssl does it; raises what the client does."""
    where.mkdir(exist_ok=True)
    (where / "key.pem").write_bytes(pair.key)
    (where / "chain.pem").write_bytes(pair.certificate)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(where / "chain.pem", where / "key.pem")
    asking = ssl.create_default_context(cadata=trusted.decode())
    asking.verify_flags |= ssl.VERIFY_X509_STRICT  # as from Python 3.13 on
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(down, up, server_hostname=host)
    server = serving.wrap_bio(up, down, server_side=True)
    open_ends: list[ssl.SSLObject] = [client, server]
    for _ in range(20):
        for end in list(open_ends):
            try:
                end.do_handshake()
                open_ends.remove(end)
            except ssl.SSLWantReadError:
                pass
        if not open_ends:
            return
    raise AssertionError("the handshake does not end")


def test_a_handshake_takes_the_names_given_and_this_machines_own(tmp_path: Path) -> None:
    authority = tls.new_authority("films", now_ms=TODAY)
    server = tls.new_server(authority, ["films.example", "10.0.0.7", "fd00::1"], now_ms=TODAY)
    for host in ("films.example", "10.0.0.7", "fd00::1", "localhost", "127.0.0.1"):
        handshake(server, authority.certificate, host, tmp_path)


def test_a_handshake_refuses_another_name_another_authority_and_another_time(tmp_path: Path) -> None:
    authority, other = tls.new_authority("films", now_ms=TODAY), tls.new_authority("films", now_ms=TODAY)
    server = tls.new_server(authority, ["films.example"], now_ms=TODAY)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(server, authority.certificate, "evil.example", tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        handshake(server, authority.certificate, "10.0.0.7", tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, other.certificate, "films.example", tmp_path)
    long_ago = tls.new_authority("films", now_ms=TODAY - 40 * DAY)
    expired = tls.new_server(long_ago, ["films.example"], now_ms=TODAY - 40 * DAY, days=39)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(expired, long_ago.certificate, "films.example", tmp_path)
    soon = tls.new_server(authority, ["films.example"], now_ms=TODAY + DAY)
    with pytest.raises(ssl.SSLCertVerificationError, match="not yet valid"):
        handshake(soon, authority.certificate, "films.example", tmp_path)
    leaf_as_authority = tls.Pair(server.key, server.certificate)
    below = tls.new_server(leaf_as_authority, ["films.example"], now_ms=TODAY, days=1)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(below, authority.certificate + server.certificate, "films.example", tmp_path)


def test_openssl_finds_no_fault_in_a_certificate(tmp_path: Path) -> None:
    authority = tls.new_authority("films", now_ms=TODAY)
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    (tmp_path / "server.crt").write_bytes(tls.new_server(authority, ["films.example"], now_ms=TODAY).certificate)
    told = subprocess.run(
        (
            *("openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "films.example"),
            *("-CAfile", str(tmp_path / "ca.crt"), str(tmp_path / "server.crt")),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr


def test_a_renewed_certificate_goes_on_under_the_same_authority(folder: Folder, tmp_path: Path) -> None:
    authority = (folder.path / "offline" / "ca.key").read_bytes()
    trusted, key = (folder.tls / "ca.crt").read_bytes(), (folder.keys / "server.key").read_bytes()
    assert renew_server(folder, authority, now_ms=TODAY, days=9, names=["films.example"]) == (
        *("films.example", "localhost"),
        "127.0.0.1",
    )
    assert (folder.keys / "server.key").read_bytes() == key
    pair = tls.Pair(key, (folder.tls / "server.crt").read_bytes())
    handshake(pair, trusted, "films.example", tmp_path)
    assert renew_server(folder, authority, now_ms=TODAY, new_key=True)[0] == "films.example"  # the names that it had
    fresh = tls.Pair((folder.keys / "server.key").read_bytes(), (folder.tls / "server.crt").read_bytes())
    assert fresh.key != key
    handshake(fresh, trusted, "films.example", tmp_path)
    assert Bundle.app_of(folder.bundle).ca == trusted.decode()


def test_a_certificate_that_devices_would_refuse_is_not_made(folder: Folder) -> None:
    authority = (folder.path / "offline" / "ca.key").read_bytes()
    before = (folder.tls / "server.crt").read_bytes()
    other = tls.new_authority("films", now_ms=TODAY).key
    cases: tuple[tuple[bytes, dict[str, Any], str], ...] = (
        (other, {}, r"not that of tls/ca\.crt"),
        (b"no key", {}, "no private key"),
        (authority, {"days": 9000}, "before the authority"),
        (authority, {"days": 0}, "before the authority"),
        (authority, {"names": ["films example"]}, "no host's name"),
        (authority, {"names": ["*"]}, "no host's name"),
        (authority, {"names": ["a..b"]}, "no host's name"),
    )
    for key, more, word in cases:
        with pytest.raises(InvalidConfig, match=word):
            renew_server(folder, key, now_ms=TODAY, **more)
    assert (folder.tls / "server.crt").read_bytes() == before
    (folder.tls / "ca.crt").write_bytes(b"nothing")
    with pytest.raises(MalformedData, match="backup"):
        renew_server(folder, authority, now_ms=TODAY)


# ------------------------------------------------------------------------------------------------------- commands


def test_show_says_what_there_is_and_no_secret(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "show", str(folder.path)) == 0
    assert run(command, "show", str(folder.path), "--json") == 0
    said = capsys.readouterr().out
    for word in ("serial 1", "root key", "channel candidate", "localhost, 127.0.0.1", "offline/root.key"):
        assert word in said
    assert release_key(folder)[0].public.id in said
    for path in (*folder.keys.iterdir(), *(folder.path / "offline").iterdir()):
        secret = path.read_bytes()
        for form in (secret.strip(), secret.hex().encode(), secret[60:100]):
            assert form == b"" or form not in said.encode()


def test_the_commands_run_the_drills_and_say_what_to_do_next(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stick = tmp_path / "stick"
    (folder.path / "offline").rename(stick)
    (stick / "root.key").chmod(0o755)  # as on a stick that knows no modes
    where, key = str(folder.path), str(stick / "root.key")
    assert run(command, "rotate", where, "--root", key) == 0
    assert "serial 2" in (said := capsys.readouterr().out)
    assert "serve down" in said
    assert "app.bundle" in said
    assert "move it away" not in said
    assert run(command, "compromised", where, "--root", key, "--days", "30") == 0
    assert "refuses the old key" in capsys.readouterr().out
    certificate = Certificate.read(Envelope.from_bytes(folder.certificate.read_bytes()), keys.root_of(folder))
    assert certificate.serial == 3
    assert certificate.not_after_ms < TODAY + 31 * DAY
    authority = str(stick / "ca.key")
    assert run(command, "renew-server", where, "--ca", authority, "--names", "a.example", "--days", "5") == 0
    assert "a.example" in capsys.readouterr().out
    assert run(command, "rotate", where, "--root", str(stick / "none.key")) == 2
    assert run(command, "rotate", where, "--root", authority) == 2
    assert run(command, "rotate", where, "--root", key, "--days", "0") == 2
    assert run(command, "rotate", where) == 2
    assert run(command, "show", str(tmp_path)) == 2
