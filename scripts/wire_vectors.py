"""Test vectors of the wire: one small app, its keys, and everything about it as bytes.

Keys are hashes of their names, so that anybody can have them: they sign nothing but these. A version's files are
written once and read by tests for ever; what today's code makes of the same inputs must be the same bytes.

    python -m scripts.wire_vectors         writes those of tests/fixtures/wire/v1 that are not there
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from safetensors.numpy import save

from penchant.common import config
from penchant.common.arrays import Arrays
from penchant.common.artifacts import distribution_pb2 as pb
from penchant.common.artifacts.bundle import App, Bundle, catalogue_bytes
from penchant.common.artifacts.enrolment import enrol_message, revoke_message
from penchant.common.artifacts.manifest import Blob, Manifest, Offer, Pointer
from penchant.common.artifacts.release import Release
from penchant.common.artifacts.sealing import RoundKey
from penchant.common.artifacts.signing import Certificate, Envelope, SigningKey, pae
from penchant.common.catalogue import Catalogue
from penchant.common.interactions import History, Interactions
from penchant.common.learners.registry import build
from penchant.common.privacy.plan import PrivacyPlan, SumSpec, rounded_up, task_digest
from penchant.common.privacy.sums import Clip
from penchant.common.streams import Streams
from penchant.common.taste import ItemSide, TasteConfig, Transitions
from penchant.common.wire import Order

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "wire" / "v1"
DAY_MS = 86_400_000
NOW_MS = 1_800_000_000_000


def seed(name: str) -> bytes:
    """bytes[32], the private key of this name."""
    return hashlib.sha256(f"penchant wire vectors: {name}".encode()).digest()


TOKEN = "one-time token of a test"
HISTORY = (0, 2, 2, 1, 5, 0, 3, 2)
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
SETTINGS: dict[str, Any] = {"head": 4, "window": 1, "dims": 2, "transitions": {"window": 2, "fade": 0.5}}
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
        TasteConfig(decay=0.75, unseen=0.125, ridge=0.25, popularity=0.25, transition=0.5, transition_decay=0.5),
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


def hpke_seal(plain: bytes, receiver: bytes, sender: bytes, info: bytes) -> bytes:
    """What a device sends, from a fixed key where a device makes a new one: enc, then the ciphertext and its tag.

    Args:
        receiver, sender: private keys of X25519, bytes[32].
    """
    own = X25519PrivateKey.from_private_bytes(sender)
    public = X25519PrivateKey.from_private_bytes(receiver).public_key()
    enc = own.public_key().public_bytes_raw()
    key, nonce = hpke_key(own.exchange(public), enc, public.public_bytes_raw(), info)
    return enc + ChaCha20Poly1305(key).encrypt(nonce, plain, b"")


# ------------------------------------------------------------------------------------------------------- files


def statement(name: str, envelope: Envelope) -> dict[str, Any]:
    ((key_id, signature),) = envelope.signatures
    return {
        "name": name,
        "payload_type": envelope.payload_type,
        "payload": envelope.payload.decode(),
        "payload_sha256": envelope.sha256,
        "signed_bytes": pae(envelope.payload_type, envelope.payload).decode(),
        "key_id": key_id,
        "signature": signature.hex(),
        "envelope": envelope.to_bytes().decode(),
    }


def arrays(values: Arrays) -> dict[str, Any]:
    """Named arrays as JSON; a float is written with as many digits as tell it from its neighbours in float64."""
    return {
        name: {"dtype": v.dtype.str, "shape": list(v.shape), "values": v.ravel().tolist()} for name, v in values.items()
    }


def round_key() -> RoundKey:
    public = X25519PrivateKey.from_private_bytes(seed("round")).public_key().public_bytes_raw()
    return RoundKey(
        app_id=APP.app_id, population=APP.population, plan=PLAN.digest, round=1, attempt=0, public_key=public
    )


def cooccurrence() -> dict[str, Any]:
    """What one history contributes in each of the three rounds."""
    learner, history = build(LEARNER, SETTINGS, CATALOGUE), History.of(HISTORY)
    first = {"popularity": np.zeros(len(CATALOGUE), np.float32)}
    vectors = {**MODEL.state, "vectors": np.zeros((len(CATALOGUE), 2), np.float32)}
    rounds = []
    for number, state in enumerate((first, MODEL.state, vectors), 1):
        spec = PLAN.spec(number)
        reply = learner.partial_sum(state, Interactions.one(history, len(CATALOGUE)), Clip(spec.clip_norm), Streams)
        rounds.append(
            {
                "round": number,
                "clip_norm": spec.clip_norm,
                "state": arrays(state),
                "contribution": arrays(learner.contribution(state, history, Streams(0))),
                "reply": arrays(reply),
            }
        )
    return {"learner": LEARNER, "settings": SETTINGS, "n_items": len(CATALOGUE), "items": HISTORY, "rounds": rounds}


def scores() -> dict[str, Any]:
    """What the bundle's model gives each item after this history, to four decimals: a solver's last digits differ."""
    assert MODEL.side is not None
    found = MODEL.side.scores(Interactions.one(History.of(HISTORY), len(CATALOGUE)))[0]
    return {"items": HISTORY, "scores": [round(float(score), 4) for score in found]}


def sealed() -> dict[str, Any]:
    signed = round_key().signed(RELEASE)
    info = pae("penchant/contribution", signed.payload)
    values = {"counts": np.array([0.5, 0.5, 0.5, 0.5, 0, 0], np.float64)}
    plain = save(values)
    return {
        "round_key": statement("round key", signed),
        "private_key": seed("round").hex(),
        "sender_private_key": seed("sender").hex(),
        "info": info.decode(),
        "plain": plain.hex(),
        "arrays": arrays(values),
        "sealed": hpke_seal(plain, seed("round"), seed("sender"), info).hex(),
    }


def enrolment() -> dict[str, Any]:
    key = ec.derive_private_key(int.from_bytes(seed("node"), "big"), ec.SECP384R1())
    enrol, revoke = enrol_message(APP.app_id, APP.population, TOKEN), revoke_message(APP.app_id, APP.population)
    signed = [key.sign(m, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)) for m in (enrol, revoke)]
    return {
        "app_id": APP.app_id,
        "population": APP.population,
        "token": TOKEN,
        "curve": "P-384",
        "private_key": seed("node").hex(),
        "node_key": key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo).hex(),
        "enrol_message": enrol.hex(),
        "enrol_proof": signed[0].hex(),
        "revoke_message": revoke.hex(),
        "revoke_proof": signed[1].hex(),
    }


def messages() -> list[dict[str, Any]]:
    """Protobuf messages with their fields, by number as in distribution.proto."""
    app = {"app_id": APP.app_id, "population": APP.population}
    found = manifest()
    made: list[tuple[Any, dict[str, Any]]] = [
        (pb.GetManifestRequest, {**app, "channel": APP.channel, "wire_version": 1, "have": "ab" * 32}),
        (pb.GetBlobRequest, {**app, "sha256": found.model.sha256, "offset": 300, "accept": ["deflate"]}),
        (pb.Chunk, {"data": b"films".hex(), "size": found.model.size, "encoding": ""}),
        (pb.EnrolResponse, {"place": 17, "plan": PLAN.to_json()}),
    ]
    out = []
    for kind, fields in made:
        message = kind(**{**fields, **({"data": bytes.fromhex(fields["data"])} if "data" in fields else {})})
        name = message.DESCRIPTOR.full_name
        out.append({"message": name, "fields": fields, "bytes": message.SerializeToString(deterministic=True).hex()})
    return out


def files() -> dict[str, bytes]:
    """Every file of the vectors, by name."""
    order = Order(round=1, attempt=0, plan=PLAN, learner=LEARNER, settings=SETTINGS, users=(0,))
    found, whole = manifest(), offer()
    keys = {name: {"seed": seed(name).hex(), "public": key.public.raw.hex(), "id": key.public.id} for name, key in KEYS}
    records: dict[str, Any] = {
        "keys.json": keys,
        "statements.json": [
            statement("app", APP.signed(ROOT)),
            statement("certificate", whole.certificate),
            statement("pointer", whole.pointer),
            statement("manifest", whole.manifest),
        ],
        "catalogue.json": {
            "record": catalogue_bytes(CATALOGUE).decode(),
            "sha256": found.catalogue.sha256,
            "version": CATALOGUE.version,
        },
        "plan.json": {"text": PLAN.to_json(), "digest": PLAN.digest, "task": PLAN.task, "guarantee": found.guarantee},
        "order.json": order.to_flat(),
        "cooccurrence.json": cooccurrence(),
        "scores.json": scores(),
        "sealed.json": sealed(),
        "enrolment.json": enrolment(),
        "messages.json": messages(),
    }
    texts = {
        name: json.dumps(record, ensure_ascii=False, indent=1).encode() + b"\n" for name, record in records.items()
    }
    return {**texts, "offer.json": whole.to_bytes() + b"\n", "films.bundle": bundle()}


def bundle() -> bytes:
    """The app's bundle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in BUNDLED.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    Bundle.from_bytes(out.getvalue())
    return out.getvalue()


KEYS = (("root", ROOT), ("release", RELEASE), ("next release", NEXT))
BUNDLED: Mapping[str, bytes] = {
    "app.json": APP.signed(ROOT).to_bytes(),
    "offer.json": offer().to_bytes(),
    "catalogue.json": catalogue_bytes(CATALOGUE),
    "model.safetensors": MODEL.to_bytes(),
}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, data in files().items():
        if not (place := FOLDER / name).exists():
            place.write_bytes(data)
            print(place.relative_to(FOLDER.parents[3]))
