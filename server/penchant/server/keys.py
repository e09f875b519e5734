"""The keys of an operator's folder: what makes them, and what goes on when one is renewed or was stolen.

    root (offline) ──► certificate.json: release key, serial, expiry ──► pointers, manifests, rounds' keys
    CA   (offline) ──► tls/server.crt: names, expiry                  ──► every connection of a device

A device refuses a release key whose serial is below the highest that it has seen, so a new certificate retires the key
before it. `certificate.json` decides which key that is: a new key lies beside the old one as keys/release.SERIAL.key
until the certificate that names it is there, whole, and only then takes its name. What channels offer is signed again
after that, one channel at a time, payloads of manifests unchanged, so that hashes that name them stay. Killed anywhere,
the folder offers each channel under one key or the other, both whole; the same call again finishes it.

The old key is deleted, not kept: nothing needs it, since what it signed is checked with its public half. That erases no
disk: encrypt one that others may come to read.

Source: the drills follow The Update Framework, section 6.1, key management and migration,
https://theupdateframework.github.io/specification/latest/.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes

from penchant.common.artifacts.bundle import Bundle, write_whole
from penchant.common.artifacts.manifest import Manifest, Offer, Pointer, Seen
from penchant.common.artifacts.signing import Certificate, Envelope, PublicKey, SigningKey
from penchant.common.errors import InvalidConfig, MalformedData, PenchantError
from penchant.server import tls
from penchant.server.database import Database
from penchant.server.distribution import publish
from penchant.server.folder import Folder, secret, sync, write_secret

DAY_MS = 86_400_000
DAYS = 365
"""Of a release key's certificate, unless said otherwise."""
FOUND = "found in the channel's file"
"""Why a move is in server.db that this server may not have made: its file was there, and no row (registry.py)."""


# ---------------------------------------------------------------------------------------------------- signing keys


def write_signing_key(path: Path, key: SigningKey) -> None:
    """As 64 hex digits and a line end, for its owner only."""
    write_secret(path, key.private_bytes().hex().encode() + b"\n")


def read_signing_key(data: bytes) -> SigningKey:
    """
    Raises:
        InvalidConfig: not 64 hex digits.
    """
    try:
        return SigningKey(bytes.fromhex(data.decode("ascii")))
    except (ValueError, InvalidConfig):
        raise InvalidConfig("not a signing key of 64 hex digits, as penchant serve init wrote it") from None


def certified(root: SigningKey, key: PublicKey, *, app_id: str, serial: int, now_ms: int, days: int = DAYS) -> Envelope:
    """The root key's word for a release key."""
    made = Certificate(
        app_id=app_id,
        public_key=key,
        serial=serial,
        not_before_ms=max(0, now_ms - 3_600_000),  # a device's clock may be behind
        not_after_ms=now_ms + days * DAY_MS,
    )
    return made.signed(root)


def release_key(folder: Folder) -> tuple[SigningKey, Envelope]:
    """The release key that the certificate names, and the certificate.

    Raises:
        InvalidConfig: no such key, or others may read it.
        MalformedData, MalformedArtifact, UntrustedArtifact: no certificate by the app's root key.
    """
    envelope = Envelope.from_bytes(_read(folder.certificate))
    certificate = Certificate.read(envelope, root_of(folder))
    for path in (_beside(folder, certificate.serial), folder.keys / "release.key"):
        if path.is_file() and (key := read_signing_key(secret(path))).public == certificate.public_key:
            return key, envelope
    raise InvalidConfig("keys/release.key is not the key that certificate.json names: restore both from one backup")


def root_of(folder: Folder) -> PublicKey:
    """What the app's devices check everything against."""
    return Bundle.app_of(folder.bundle).root


def write_secrets(keys: Path) -> None:
    """What only this machine's processes know: Flower's secret, the operator's token, the key of subjects' names."""
    write_secret(keys / "superexec.secret", secrets.token_bytes(32))
    write_secret(keys / "admin.token", secrets.token_urlsafe(32).encode())
    write_secret(keys / "subjects.secret", secrets.token_bytes(32))


# ---------------------------------------------------------------------------------------------------------- drills


@dataclass(frozen=True)
class Rotated:
    """What a rotation did.

    Attributes:
        serial: of the certificate that is there now.
        made: whether a new key was made, and not only an interrupted rotation finished.
        channels: whose offers were signed again.
    """

    serial: int
    made: bool
    channels: tuple[str, ...]


POINTS = ("key", "certificate", "named", "channel", "bundle")
"""Where a change of keys calls `at`, after each step; "channel" after each of them."""
At = Callable[[str], None]


def rotate(folder: Folder, root: SigningKey, *, now_ms: int, days: int = DAYS, at: At = lambda point: None) -> Rotated:
    """A new release key and all that the channels and the bundle offer signed with it; or the rest of such a change.

    Args:
        root: the offline key; nothing of it is written.
        at: called at each of POINTS; tests stop there.

    Raises:
        InvalidConfig: another root key.
        MalformedArtifact, UntrustedArtifact: what a channel offers is not the app's; nothing was changed.
    """
    before = _before(folder, root)
    if before.unfinished:
        return Rotated(before.certificate.serial, False, _sign_again(folder, root, now_ms, days, at))
    _switch(folder, root, before.certificate, now_ms, days, at)
    return Rotated(before.certificate.serial + 1, True, _sign_again(folder, root, now_ms, days, at))


def compromised(
    folder: Folder, root: SigningKey, *, now_ms: int, days: int = DAYS, at: At = lambda point: None
) -> Rotated:
    """As `rotate`, after somebody else may have had the release key: always a new key, and nothing new is vouched for.

    Channels are signed again only where server.db says that this server pointed them there: what a thief put into the
    folder stops the drill before it changes anything.

    Raises:
        InvalidConfig: another root key, or a channel that this server never pointed to what it offers.
        MalformedArtifact, UntrustedArtifact: as `rotate`.
    """
    before = _before(folder, root)
    with Database(folder.database) as database:
        rows = database.rows("SELECT channel, manifest FROM moves WHERE why != ?", FOUND)
    ours = {(row["channel"], row["manifest"]) for row in rows}
    if strange := sorted(name for name, offer in before.offers.items() if (name, offer.manifest.sha256) not in ours):
        where = folder.distribution / "channels" / f"{strange[0]}.json"
        raise InvalidConfig(
            f"channel {strange[0]} offers a model that this server never pointed it to: delete {where}, run this again"
        )
    if before.bundle.offer.manifest.sha256 not in {manifest for _, manifest in ours}:
        raise InvalidConfig(f"{folder.bundle} holds a model that is none of this server's: restore it from a backup")
    _switch(folder, root, before.certificate, now_ms, days, at)
    return Rotated(before.certificate.serial + 1, True, _sign_again(folder, root, now_ms, days, at))


def renew_server(
    folder: Folder,
    authority_key: bytes,
    *,
    now_ms: int,
    days: int = tls.DAYS,
    names: Sequence[str] = (),
    new_key: bool = False,
) -> tuple[str, ...]:
    """Writes a new tls/server.crt by the same authority; the names that it is for.

    With the key that is there one file changes, so that a process which reads the pair at any moment finds one that
    fits. With a new key, which a stolen one asks for, it may find two that do not, and has to be started again.

    Args:
        authority_key: in PEM, as `offline/ca.key` was.
        names: hosts and addresses; those of the certificate that is there if empty.

    Raises:
        InvalidConfig: another authority's key, or as `new_server`.
    """
    before = tls.read_certificate(_read(folder.tls / "server.crt")) if not names else None
    made = tls.new_server(
        tls.Pair(authority_key, _read(folder.tls / "ca.crt")),
        names if before is None else tls.names_of(before),
        now_ms=now_ms,
        days=days,
        key=None if new_key else secret(folder.keys / "server.key"),
    )
    if new_key:
        write_secret(folder.keys / "server.key", made.key)
    write_whole(folder.tls / "server.crt", made.certificate)
    sync(folder.tls)
    return tls.names_of(tls.read_certificate(made.certificate))


def signed_again(envelope: Envelope, key: SigningKey) -> Envelope:
    """The same statement by another key; the hash that names it stays."""
    return key.sign(envelope.payload_type, envelope.payload)


@dataclass(frozen=True)
class _Before:
    certificate: Certificate
    bundle: Bundle
    offers: Mapping[str, Offer]
    unfinished: bool


def _before(folder: Folder, root: SigningKey) -> _Before:
    """What there is, all of it checked before anything is changed."""
    if root.public != root_of(folder):
        raise InvalidConfig("this is not the root key that the app's bundle names: devices would refuse its word")
    certificate = Certificate.read(Envelope.from_bytes(_read(folder.certificate)), root.public)
    bundle, offers = Bundle.read(folder.bundle), dict[str, Offer]()
    serials = [bundle.seen.serial]
    for path in sorted((folder.distribution / "channels").glob("*.json")):
        try:
            offers[path.stem] = offer = Offer.from_bytes(path.read_bytes())
            _check(folder, path.stem, offer, root.public)
        except PenchantError as error:
            raise type(error)(f"{path}: {error}") from None
        serials.append(_serial(offer, root.public))
    behind = any(serial != certificate.serial for serial in serials)
    return _Before(certificate, bundle, offers, behind or _beside(folder, certificate.serial).exists())


def _switch(folder: Folder, root: SigningKey, before: Certificate, now_ms: int, days: int, at: At) -> None:
    """A new key and its certificate; until the certificate is there, the old one holds."""
    key, serial = SigningKey.generate(), before.serial + 1
    made = certified(root, key.public, app_id=before.app_id, serial=serial, now_ms=now_ms, days=days)
    write_signing_key(_beside(folder, serial), key)
    sync(folder.keys)
    at("key")
    write_whole(folder.certificate, made.to_bytes())
    sync(folder.path)
    at("certificate")


def _sign_again(folder: Folder, root: SigningKey, now_ms: int, days: int, at: At) -> tuple[str, ...]:
    """The rest of a change of keys, from wherever it stopped."""
    key, envelope = release_key(folder)
    serial = Certificate.read(envelope, root.public).serial
    if (beside := _beside(folder, serial)).exists():
        beside.replace(folder.keys / "release.key")
    for stale in folder.keys.glob("release.*.key"):  # of a change that never came to its certificate
        stale.unlink()
    sync(folder.keys)
    at("named")
    pointed_days = folder.settings.models.expires_days
    done = []
    for path in sorted((folder.distribution / "channels").glob("*.json")):
        with Database(folder.database) as database, database.transaction():  # no move meanwhile
            offer = Offer.from_bytes(path.read_bytes())
            if _serial(offer, root.public) != serial:
                fresh = _again(offer, root.public, key, envelope, now_ms, pointed_days)
                publish(folder.distribution, fresh, (), root=root.public, now_ms=now_ms)
                done.append(path.stem)
        at("channel")
    bundle = Bundle.read(folder.bundle)
    if bundle.seen.serial != serial:
        fresh = _again(bundle.offer, root.public, key, envelope, now_ms, float(days))
        Bundle.write(folder.bundle, bundle.app, root, fresh, catalogue=bundle.catalogue, model=bundle.model)
        sync(folder.path)
    at("bundle")
    return tuple(done)


def _again(offer: Offer, root: PublicKey, key: SigningKey, certificate: Envelope, now_ms: int, days: float) -> Offer:
    """The same manifest under the same sequence, by another key and from now on."""
    before = Pointer.read(offer.pointer, Certificate.read(offer.certificate, root).public_key)
    pointer = replace(before, created_ms=now_ms, expires_ms=now_ms + int(days * DAY_MS))
    return Offer(certificate, pointer.signed(key), signed_again(offer.manifest, key))


def _check(folder: Folder, channel: str, offer: Offer, root: PublicKey) -> Manifest:
    return offer.check(
        root,
        app_id=folder.settings.app_id,
        population=folder.plan.population,
        channel=channel,
        now_ms=offer.made_ms,
        seen=Seen(),
    )[0]


def _serial(offer: Offer, root: PublicKey) -> int:
    return Certificate.read(offer.certificate, root).serial


def _beside(folder: Folder, serial: int) -> Path:
    return folder.keys / f"release.{serial}.key"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MalformedData(f"{path}: {error.strerror}; restore it from a backup") from None


# ------------------------------------------------------------------------------------------------------------ show

SECRETS = ("release.key", "server.key", "superexec.secret", "admin.token", "subjects.secret")
OFFLINE = ("root.key", "ca.key")


def show(folder: Folder) -> list[dict[str, Any]]:
    """What there is, as JSON types: what it is, its id, and where it has any its serial, names and expiry.

    Nothing in it is secret: ids are of public keys, fingerprints of certificates.

    Raises:
        PenchantError: a certificate that cannot be read.
    """
    root = root_of(folder)
    named = Certificate.read(Envelope.from_bytes(_read(folder.certificate)), root)
    found: list[dict[str, Any]] = [
        {"what": "root key", "id": root.id},
        {
            "what": "release key",
            "id": named.public_key.id,
            "serial": named.serial,
            "until_ms": named.not_after_ms,
        },
    ]
    for what, path in (("authority", folder.tls / "ca.crt"), ("server certificate", folder.tls / "server.crt")):
        certificate = tls.read_certificate(_read(path))
        found.append(
            {
                "what": what,
                "id": certificate.fingerprint(hashes.SHA256()).hex(),
                "names": list(tls.names_of(certificate)),
                "until_ms": int(certificate.not_valid_after_utc.timestamp() * 1000),
            }
        )
    for path in sorted((folder.distribution / "channels").glob("*.json")):
        offer = Offer.from_bytes(path.read_bytes())
        signer = Certificate.read(offer.certificate, root)
        pointer = Pointer.read(offer.pointer, signer.public_key)
        found.append(
            {
                "what": f"channel {path.stem}",
                "id": pointer.manifest,
                "serial": signer.serial,
                "until_ms": pointer.expires_ms,
            }
        )
    here = _here(folder.keys, SECRETS) + _here(folder.path / "offline", OFFLINE)
    return [*found, *({"what": name, "here": there} for name, there in here)]


def _here(where: Path, names: Collection[str]) -> list[tuple[str, bool]]:
    return [(f"{where.name}/{name}", (where / name).is_file()) for name in names]
