"""Test vectors of the wire: one small app, its keys, and everything about it as bytes.

Keys are hashes of their names, so that anybody can have them: they sign nothing but these. A version's files are
written once and read by tests for ever; what today's code makes of the same inputs must be the same bytes.

    python -m scripts.wire_vectors         writes those of tests/fixtures/wire/v1 that are not there
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import numpy as np

from penchant.common import config
from penchant.common.artifacts.bundle import App, catalogue_bytes
from penchant.common.artifacts.manifest import Blob, Manifest, Offer, Pointer
from penchant.common.artifacts.release import Release
from penchant.common.artifacts.signing import Certificate, Envelope, SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.learners.cooccurrence import CooccurrenceConfig, TransitionConfig
from penchant.common.privacy.plan import PrivacyPlan, SumSpec, rounded_up, task_digest
from penchant.common.taste import ItemSide, TasteConfig, Transitions

DAY_MS = 86_400_000
NOW_MS = 1_800_000_000_000


def seed(name: str) -> bytes:
    """bytes[32], the private key of this name."""
    return hashlib.sha256(f"penchant wire vectors: {name}".encode()).digest()


ROOT, RELEASE, NEXT = (SigningKey(seed(name)) for name in ("root", "release", "next release"))

CATALOGUE = Catalogue(
    ids=("film:1", "film:2", "film:3", "film:4", "film:5", "film:6"),
    titles=(
        "The Lighthouse Keeper (1994)",
        "Nordlys (2003)",
        "東の海 (1961)",
        "Two Trains (2003)",
        "Salt",
        "Old Reel (1932)",
    ),
    topics=(("drama",), ("drama", "nature"), ("drama",), ("comedy",), (), ("comedy",)),
    retired=frozenset({"film:6"}),
    name="films",
    categories={"language": ("en", "no", "ja", "en", "", "en")},
    numbers={"minutes": (101.0, 88.5, 117.0, 94.0, float("nan"), 61.0)},
    texts={"plot": ("A storm, a lamp.", "Six months of night.", "", "Both are late.", "", "")},
    vectors={"poster": np.array([[1, 0], [0.5, -0.25], [0, 1], [0, 0], [0.125, 2], [-1, 0]], np.float32)},
)
LEARNER = "cooccurrence"
SETTINGS = config.encode(CooccurrenceConfig(head=4, window=2, dims=2, transitions=TransitionConfig(window=2, fade=0.5)))
PLAN = PrivacyPlan(
    unit="user",
    n_users=1000,
    delta=1e-5,
    sampling="none",
    cohort=1000,
    sums=tuple(
        SumSpec(name=n, rounds=1, clip_norm=1.0, noise_multiplier=4.0) for n in ("counts", "matrix", "transitions")
    ),
    max_participations=3,
    task=task_digest(LEARNER, SETTINGS),
    population="readers",
)
MODEL = Release(
    {
        "popularity": np.array([1, 0.5, 0.75, 0.25, 0, 0.125], np.float32),
        "head": np.array([0, 1, 2, 3], np.int32),
        "floor": np.array(0.25, np.float32),
    },
    ItemSide(
        np.array([[1, 0, 0.5], [0.5, 0.5, 0], [0, 1, 0.5], [0.25, 0, 0], [0, 0, 0], [0, 0, 0.5]], np.float32),
        np.array([1, 0.5, 0.75, 0.25, 0, 0.125], np.float32),
        TasteConfig(popularity=0.25, transition=0.5),
        Transitions(np.eye(6, 2, dtype=np.float32), np.eye(6, 2, 1, dtype=np.float32)),
        content=1,
    ),
)
APP = App(
    app_id="films",
    population="readers",
    root=ROOT.public,
    distribution="releases.example:443",
    fleet="rounds.example:443",
    enrolment="releases.example:443",
    publisher="example/films",
)


def certificate(key: SigningKey = RELEASE, root: SigningKey = ROOT, **changes: Any) -> Envelope:
    """The root key's statement of a release key; `changes` are fields of `Certificate`."""
    fields = {
        "app_id": APP.app_id,
        "serial": 1,
        "not_before_ms": NOW_MS - DAY_MS,
        "not_after_ms": NOW_MS + 90 * DAY_MS,
    }
    return Certificate(public_key=key.public, **{**fields, **changes}).signed(root)


def manifest(**changes: Any) -> Manifest:
    guarantee = PLAN.guarantee()
    assert guarantee is not None
    epsilon = float(rounded_up(guarantee.epsilon))  # whose last digits differ from machine to machine
    fields: dict[str, Any] = {
        "app_id": APP.app_id,
        "population": APP.population,
        "version": 1,
        "created_ms": NOW_MS - 7_200_000,
        "model": Blob.of(MODEL.to_bytes()),
        "catalogue": Blob.of(catalogue_bytes(CATALOGUE)),
        "catalogue_version": CATALOGUE.version,
        "learner": LEARNER,
        "settings": SETTINGS,
        "plan": PLAN.to_json(),
        "guarantee": {**config.encode(guarantee), "epsilon": epsilon},
        "metrics": {"NDCG@10": 0.0625},
        "software": {"penchant": "0.1.0"},
    }
    return Manifest(**{**fields, **changes})


def pointer(to: Envelope, key: SigningKey = RELEASE, **changes: Any) -> Envelope:
    """The release key's statement that the channel has this manifest now."""
    fields: dict[str, Any] = {
        "app_id": APP.app_id,
        "population": APP.population,
        "channel": APP.channel,
        "sequence": 1,
        "manifest": to.sha256,
        "created_ms": NOW_MS - 3_600_000,
        "expires_ms": NOW_MS + 30 * DAY_MS,
    }
    return Pointer(**{**fields, **changes}).signed(key)


def offer(key: SigningKey = RELEASE, *, serial: int = 1, sequence: int = 1, **changes: Any) -> Offer:
    """A whole offer by one release key; `changes` are fields of its manifest."""
    signed = manifest(**changes).signed(key)
    return Offer(certificate(key, serial=serial), pointer(signed, key, sequence=sequence), signed)


def hpke_key(shared: bytes, enc: bytes, public: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Key and nonce of RFC 9180's base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305; first message.

    Written down again from the RFC, sections 4.1 and 5.1, so that what penchant seals is checked by other code.

    Args:
        shared: the X25519 secret between the sender's new key, whose public half is `enc`, and the receiver's `public`.
    """

    def extract(salt: bytes, suite: bytes, label: bytes, ikm: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, "sha256")

    def expand(key: bytes, suite: bytes, label: bytes, more: bytes, length: int) -> bytes:
        info = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + more
        return hmac.digest(key, info + b"\1", "sha256")[:length]  # HKDF-Expand of at most one block

    kem = b"KEM\0\x20"
    suite = b"HPKE\0\x20\0\x01\0\x03"
    secret = expand(extract(b"", kem, b"eae_prk", shared), kem, b"shared_secret", enc + public, 32)
    context = b"\0" + extract(b"", suite, b"psk_id_hash", b"") + extract(b"", suite, b"info_hash", info)
    root = extract(secret, suite, b"secret", b"")
    return expand(root, suite, b"key", context, 32), expand(root, suite, b"base_nonce", context, 12)
