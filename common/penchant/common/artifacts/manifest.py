"""What a release is, and which release a channel points to.

    certificate (root key) ──► pointer (release key): channel, sequence, expiry ──► manifest (release key) ──► blobs

A manifest never changes and says everything about one model. A pointer says which manifest a channel has now; its
sequence only goes up, so that going back to an earlier model is a new pointer, and an old pointer replayed by somebody
in between is refused. Whoever withholds new pointers gains until the expiry of the last. A new release key, which has
signed none of the old pointers, starts its sequence anywhere: one that a thief drove to the end binds nobody.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from penchant.common.artifacts.signing import (
    SCHEMA_VERSION,
    Certificate,
    Envelope,
    PublicKey,
    SigningKey,
    checked,
    from_json,
    hex32,
    text,
    to_json,
    whole,
    within,
)
from penchant.common.errors import (
    InvalidConfig,
    MalformedArtifact,
    PrivacyRefused,
    StaleArtifact,
    UntrustedArtifact,
)
from penchant.common.privacy.plan import PrivacyPlan, task_digest

MANIFEST = "application/vnd.penchant.manifest+json"
POINTER = "application/vnd.penchant.pointer+json"
MAX_BLOB = 1 << 30
"""Bytes of the largest model or catalogue that a device reads."""


@dataclass(frozen=True)
class Blob:
    """Bytes, named by their hash.

    Attributes:
        sha256: 64 hex digits.
        size: in bytes, at most `MAX_BLOB`.
    """

    sha256: str
    size: int

    def __post_init__(self) -> None:
        hex32(self.__dict__, "sha256")  # it becomes a file's name
        if whole(self.__dict__, "size") > MAX_BLOB:
            raise MalformedArtifact(f"a blob of {self.size} bytes; at most {MAX_BLOB} are read")

    @classmethod
    def of(cls, data: bytes) -> Blob:
        return cls(hashlib.sha256(data).hexdigest(), len(data))

    def check(self, data: bytes) -> bytes:
        """These bytes, if they are the ones.

        Raises:
            MalformedArtifact: they are not.
        """
        if len(data) != self.size or hashlib.sha256(data).hexdigest() != self.sha256:
            raise MalformedArtifact(f"{len(data)} bytes that are not those of {self.sha256[:16]}; fetch them again")
        return data

    def to_record(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "size": self.size}

    @classmethod
    def from_record(cls, record: object) -> Blob:
        if not isinstance(record, dict):
            raise MalformedArtifact("a signed statement without a blob's hash and size")
        return cls(text(record, "sha256"), whole(record, "size"))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All about one release; every field is public.

    Attributes:
        app_id, population: whose.
        version: of the model within its population, from 1; only goes up.
        created_ms: UTC milliseconds.
        model: the bytes that `release.py` reads.
        catalogue: the bytes of the catalogue's record, as JSON.
        catalogue_version: of that catalogue.
        learner, settings: what builds the learner.
        plan: under which it was made, as `PrivacyPlan.to_json` gives it.
        guarantee: what holds for everybody in the population with this release and all before it, as the ledger says:
            epsilon with all that gives it a meaning; None where nothing is promised.
        metrics: public figures, such as on a panel or a public set; never of people's data unless a private sum.
        parents: hashes of the manifests that it came from.
        software: versions that made it.
    """

    app_id: str
    population: str
    version: int
    created_ms: int
    model: Blob
    catalogue: Blob
    catalogue_version: str
    learner: str
    settings: Mapping[str, Any]
    plan: str
    guarantee: Mapping[str, Any] | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    software: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.app_id and self.population and self.version >= 1):
            raise InvalidConfig("a manifest needs an app_id, a population and a version ≥ 1")
        plan = PrivacyPlan.from_json(self.plan)
        if plan.to_json() != self.plan:  # its digest is that of this text
            raise InvalidConfig("the plan is not in its canonical form: give PrivacyPlan.to_json()")
        if plan.population != self.population:
            raise InvalidConfig("the plan charges another population's ledger than the manifest's")
        if plan.task not in ("", task_digest(self.learner, self.settings)):
            raise InvalidConfig("learner and settings are not the task that the plan names")
        if (self.guarantee is None) != (plan.unit == "none"):
            raise InvalidConfig(
                f"a manifest of a plan with unit {plan.unit!r} needs its guarantee, and no other plan has one"
            )
        if self.guarantee is not None:
            _check_guarantee(self.guarantee, plan.unit)

    def signed(self, key: SigningKey) -> Envelope:
        record = {
            "schema_version": SCHEMA_VERSION,
            "app_id": self.app_id,
            "population": self.population,
            "version": self.version,
            "created_ms": self.created_ms,
            "model": self.model.to_record(),
            "catalogue": {**self.catalogue.to_record(), "version": self.catalogue_version},
            "learner": self.learner,
            "settings": dict(self.settings),
            "plan": self.plan,
            "guarantee": None if self.guarantee is None else dict(self.guarantee),
            "metrics": dict(self.metrics),
            "parents": list(self.parents),
            "software": dict(self.software),
        }
        return key.sign(MANIFEST, to_json(record))

    @classmethod
    def read(cls, envelope: Envelope, key: PublicKey) -> Manifest:
        """
        Raises:
            UntrustedArtifact: not signed by this key.
            MalformedArtifact: signed, but not a manifest that this version can read.
        """
        record = checked(envelope.opened(key, MANIFEST), SCHEMA_VERSION)
        catalogue = record.get("catalogue")
        try:
            return cls(
                app_id=text(record, "app_id"),
                population=text(record, "population"),
                version=whole(record, "version"),
                created_ms=whole(record, "created_ms"),
                model=Blob.from_record(record.get("model")),
                catalogue=Blob.from_record(catalogue),
                catalogue_version=text(catalogue if isinstance(catalogue, dict) else {}, "version"),
                learner=text(record, "learner"),
                settings=_mapping(record, "settings"),
                plan=text(record, "plan"),
                guarantee=None if record.get("guarantee") is None else _mapping(record, "guarantee"),
                metrics=_mapping(record, "metrics"),
                parents=_hashes(record, "parents"),
                software=_mapping(record, "software"),
            )
        except (InvalidConfig, PrivacyRefused) as error:
            raise MalformedArtifact(f"not a manifest that this version can read: {error!s:.200}") from None
        except (OverflowError, RecursionError):
            raise MalformedArtifact("a manifest whose plan has numbers out of any range; ask the operator") from None


_BESIDE_EPSILON = {"epsilon", "delta", "unit", "neighbours", "sampler", "accountant", "trust", "uncharged"}


def _check_guarantee(guarantee: Mapping[str, Any], unit: str) -> None:
    if missing := _BESIDE_EPSILON - guarantee.keys():
        raise InvalidConfig(f"a guarantee without {min(missing)} means nothing")
    if guarantee["unit"] != unit:
        raise InvalidConfig("the guarantee is for another unit than the plan's")
    epsilon, delta = guarantee["epsilon"], guarantee["delta"]
    if {type(epsilon), type(delta)} - {int, float} or not (0 <= epsilon < math.inf and 0 <= delta < 1):
        raise InvalidConfig("a guarantee needs an epsilon ≥ 0 and a delta in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """What a channel has now.

    Attributes:
        app_id, population, channel: which; a channel is "stable" or "candidate".
        sequence: from 1; only goes up.
        manifest: hash of the manifest's payload.
        created_ms, expires_ms: UTC milliseconds.
    """

    app_id: str
    population: str
    channel: str
    sequence: int
    manifest: str
    created_ms: int
    expires_ms: int

    def __post_init__(self) -> None:
        if not (self.app_id and self.population and self.channel and self.sequence >= 1):
            raise InvalidConfig("a pointer needs an app_id, a population, a channel and a sequence ≥ 1")
        if not 0 <= self.created_ms < self.expires_ms:
            raise InvalidConfig("a pointer needs an expiry after its start")

    def signed(self, key: SigningKey) -> Envelope:
        record = {"schema_version": SCHEMA_VERSION, **self.__dict__}
        return key.sign(POINTER, to_json(record))

    @classmethod
    def read(cls, envelope: Envelope, key: PublicKey) -> Pointer:
        """
        Raises:
            UntrustedArtifact: not signed by this key.
            MalformedArtifact: signed, but not a pointer that this version can read.
        """
        record = checked(envelope.opened(key, POINTER), SCHEMA_VERSION)
        try:
            return cls(
                app_id=text(record, "app_id"),
                population=text(record, "population"),
                channel=text(record, "channel"),
                sequence=whole(record, "sequence"),
                manifest=hex32(record, "manifest").hex(),
                created_ms=whole(record, "created_ms"),
                expires_ms=whole(record, "expires_ms"),
            )
        except InvalidConfig as error:
            raise MalformedArtifact(str(error)) from None


@dataclass(frozen=True)
class Seen:
    """What a device remembers of one channel, so that nobody can send it back in time.

    Attributes:
        serial: highest of a release key's certificate.
        sequence: highest of a pointer by that key.
        at_ms: latest start of a pointer, below which no clock can be right.
        key: id of the release key with that serial; "" where it is not known.
        manifest: hash of what the pointer with that sequence named; "" where it is not known.
    """

    serial: int = 0
    sequence: int = 0
    at_ms: int = 0
    key: str = ""
    manifest: str = ""


@dataclass(frozen=True)
class Offer:
    """What a channel has now, with all that proves it."""

    certificate: Envelope
    pointer: Envelope
    manifest: Envelope

    def to_bytes(self) -> bytes:
        return to_json({name: getattr(self, name).to_record() for name in _OFFERED})

    @classmethod
    def from_bytes(cls, data: bytes) -> Offer:
        """
        Raises:
            MalformedArtifact: not an offer, or one above 3 MiB.
        """
        if len(data) > MAX_OFFER:
            raise MalformedArtifact(f"an offer of {len(data)} bytes; at most {MAX_OFFER} are read")
        record = from_json(data)
        return cls(*(Envelope.from_record(record.get(name)) for name in _OFFERED))

    @property
    def made_ms(self) -> int:
        """When its pointer was made, as it says itself: for what is here already, and cannot be newer than the app.

        Raises:
            MalformedArtifact: it does not say.
        """
        return whole(from_json(self.pointer.payload), "created_ms")

    def check(
        self, root: PublicKey, *, app_id: str, population: str, channel: str, now_ms: int, seen: Seen
    ) -> tuple[Manifest, Seen]:
        """The manifest that the channel has now, and what to remember from here on.

        Raises:
            UntrustedArtifact: a signature, app, population or channel that is not the one asked for; or two statements
                under one serial or sequence.
            ExpiredArtifact: the certificate's or the pointer's time is over.
            StaleArtifact: a certificate or a pointer older than one that was seen.
            MalformedArtifact: signed, but nothing that this version can read.
        """
        now_ms = max(now_ms, seen.at_ms)
        certificate = Certificate.read(self.certificate, root)
        certificate.check(app_id, now_ms=now_ms, serial=seen.serial)
        key = certificate.public_key.id
        if seen.key not in ("", key):
            if certificate.serial == seen.serial:
                raise UntrustedArtifact(f"two release keys with serial {seen.serial}; ask the operator")
            seen = Seen(at_ms=seen.at_ms)
        pointer = Pointer.read(self.pointer, certificate.public_key)
        if (pointer.app_id, pointer.population, pointer.channel) != (app_id, population, channel):
            raise UntrustedArtifact("the pointer is for another app, population or channel")
        if pointer.sequence < seen.sequence:
            raise StaleArtifact(f"pointer {pointer.sequence} of channel {channel} is older than {seen.sequence}")
        if pointer.sequence == seen.sequence and seen.manifest not in ("", pointer.manifest):
            raise UntrustedArtifact(
                f"two pointers of channel {channel} with sequence {seen.sequence}; ask the operator"
            )
        within("the pointer", pointer.created_ms, pointer.expires_ms, now_ms)
        manifest = Manifest.read(self.manifest, certificate.public_key)
        if self.manifest.sha256 != pointer.manifest or (manifest.app_id, manifest.population) != (app_id, population):
            raise UntrustedArtifact("the manifest is not the one that the pointer names")
        at_ms = max(seen.at_ms, pointer.created_ms)
        return manifest, Seen(certificate.serial, pointer.sequence, at_ms, key, pointer.manifest)


_OFFERED = ("certificate", "pointer", "manifest")
MAX_OFFER = 3 << 20
"""Bytes of the largest offer that is read."""


def _hashes(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = record.get(name)
    if not isinstance(values, list):
        raise MalformedArtifact(f"a signed statement without a list in {name}")
    return tuple(hex32({name: value}, name).hex() for value in values)


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(value := record.get(name), dict):
        raise MalformedArtifact(f"a signed statement without an object in {name}")
    return value
